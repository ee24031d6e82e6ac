//! A model directory as Hugging Face lays it out: what is read of it for tokens.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::{AddedToken, Tokenizer};
use xxhash_rust::xxh3::xxh3_64;

use crate::{error::TokenizerError, template::Templates};

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS: &str = "special_tokens_map.json";
const TEMPLATE: &str = "chat_template.jinja";
const MORE_TEMPLATES: &str = "additional_chat_templates";
const PROCESSOR_TEMPLATE: &str = "chat_template.json";
const MODEL: &str = "config.json";

/// Largest of these files; the largest vocabularies are some 40 MB.
const MAX_BYTES: u64 = 256 << 20;

/// Models for which engines have a way of their own from chats to tokens, by how `model_type` begins (vLLM 0.32).
const OWN_RENDERERS: [&str; 6] = ["gpt_oss", "deepseek_v32", "deepseek_v4", "kimi_k3", "inkling", "cohere2_moe"];

/// What is read of a model directory.
pub(crate) struct ModelFiles {
    pub(crate) tokenizer: Tokenizer,
    /// Of all that the ids of a text depend on.
    pub(crate) hash: u64,
    pub(crate) config: TokenizerConfig,
    pub(crate) templates: Templates,
    /// Whether chats become tokens by the chat template alone.
    pub(crate) is_templated: bool,
}

/// `tokenizer_config.json`, as far as it matters.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct TokenizerConfig {
    pub(crate) add_bos_token: Option<bool>,
    pub(crate) add_eos_token: Option<bool>,
    split_special_tokens: bool,
    added_tokens_decoder: BTreeMap<String, Added>,
    chat_template: Option<WrittenTemplates>,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
    /// Names that templates know special tokens by, and the tokens.
    #[serde(skip)]
    pub(crate) special: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum WrittenTemplates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

#[derive(Debug, Deserialize)]
#[serde(default)]
struct Added {
    content: String,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

impl Default for Added {
    fn default() -> Self {
        let (single_word, lstrip, rstrip, normalized, special) = (false, false, false, true, false);
        Self { content: String::new(), single_word, lstrip, rstrip, normalized, special }
    }
}

impl From<Added> for AddedToken {
    fn from(added: Added) -> Self {
        let Added { content, single_word, lstrip, rstrip, normalized, special } = added;
        Self { content, single_word, lstrip, rstrip, normalized, special }
    }
}

impl ModelFiles {
    /// Reads a model directory.
    pub(crate) fn read(directory: &Path) -> Result<Self, TokenizerError> {
        let path = directory.join(TOKENIZER);
        let Some(bytes) = read(&path)? else {
            return Err(TokenizerError::Unreadable { path, reason: "there is no such file".to_owned() });
        };
        let malformed = |reason: String| TokenizerError::Malformed {
            path: path.clone(),
            reason,
            fix: "take the tokenizer.json of the model as Hugging Face's tokenizers wrote it",
        };
        // The library's own words for what is no JSON at all name neither line nor column.
        serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).map_err(|error| malformed(error.to_string()))?;
        let mut tokenizer = Tokenizer::from_bytes(&bytes).map_err(|error| malformed(error.to_string()))?;

        let mut config = TokenizerConfig::read(directory)?;
        let mut hash = xxh3_64(&bytes);
        let config_path = directory.join(CONFIG);
        let config_malformed = |reason: String| TokenizerError::Malformed {
            path: config_path.clone(),
            reason,
            fix: "take both files from the same model",
        };
        let mut added: Vec<(u32, AddedToken)> = Vec::new();
        for (id, token) in std::mem::take(&mut config.added_tokens_decoder) {
            let id = id.parse().map_err(|_| config_malformed(format!("added_tokens_decoder has {id:?}, which is no id")))?;
            added.push((id, token.into()));
        }
        added.sort_unstable_by_key(|(id, _)| *id);
        tokenizer.add_tokens(added.iter().map(|(_, token)| token.clone())).map_err(|error| malformed(error.to_string()))?;
        for (id, AddedToken { content, .. }) in added {
            hash = hash.rotate_left(5) ^ xxh3_64(content.as_bytes());
            match tokenizer.token_to_id(&content) {
                Some(given) if given == id => {}
                Some(given) => {
                    let reason = format!("added_tokens_decoder has {content:?} as {id}, in tokenizer.json it is {given}");
                    return Err(config_malformed(reason));
                }
                None => return Err(config_malformed(format!("added_tokens_decoder has {content:?}, which cannot be a token"))),
            }
        }
        let prepared = tokenizer.with_truncation(None).map(|tokenizer| {
            tokenizer.with_padding(None);
            tokenizer.set_encode_special_tokens(config.split_special_tokens);
        });
        prepared.map_err(|error| malformed(error.to_string()))?;
        let templates = templates(directory, config.chat_template.take())?;
        let is_templated = is_templated(directory)?;
        Ok(Self { tokenizer, hash: hash ^ u64::from(config.split_special_tokens), config, templates, is_templated })
    }
}

impl TokenizerConfig {
    fn read(directory: &Path) -> Result<Self, TokenizerError> {
        let mut config: Self = read_json(&directory.join(CONFIG))?.unwrap_or_default();
        let mut tokens: BTreeMap<String, Value> = read_json(&directory.join(SPECIAL_TOKENS))?.unwrap_or_default();
        tokens.append(&mut config.rest);
        if let Some(Value::Object(more)) = tokens.remove("extra_special_tokens") {
            tokens.extend(more);
        }
        let named = tokens.into_iter().filter(|(name, _)| name.ends_with("_token"));
        config.special = named.filter_map(|(name, token)| Some((name, content(&token)?))).collect();
        Ok(config)
    }
}

/// A token that is written as itself, or as an object.
fn content(token: &Value) -> Option<String> {
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
}

/// The chat templates: a file of their own, else what the configuration says.
fn templates(directory: &Path, written: Option<WrittenTemplates>) -> Result<Templates, TokenizerError> {
    #[derive(Deserialize)]
    struct Processor {
        chat_template: String,
    }
    let mut sources: Vec<(String, String, PathBuf)> = Vec::new();
    let config = directory.join(CONFIG);
    match written {
        Some(WrittenTemplates::One(template)) => sources.push(("default".to_owned(), template, config)),
        Some(WrittenTemplates::Named(all)) => {
            sources.extend(all.into_iter().map(|NamedTemplate { name, template }| (name, template, config.clone())));
        }
        None => {
            let path = directory.join(PROCESSOR_TEMPLATE);
            let processor: Option<Processor> = read_json(&path)?;
            sources.extend(processor.map(|Processor { chat_template }| ("default".to_owned(), chat_template, path)));
        }
    }
    let mut files = vec![("default".to_owned(), directory.join(TEMPLATE))];
    for entry in fs::read_dir(directory.join(MORE_TEMPLATES)).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = path.file_stem().and_then(|name| name.to_str()).map(str::to_owned);
        files.extend(name.filter(|_| path.extension().is_some_and(|kind| kind == "jinja")).map(|name| (name, path.clone())));
    }
    for (name, path) in files {
        let Some(bytes) = read(&path)? else { continue };
        let malformed = |reason| TokenizerError::Malformed { path: path.clone(), reason, fix: "write it in UTF-8" };
        let template = String::from_utf8(bytes).map_err(|error| malformed(error.to_string()))?;
        sources.retain(|(known, ..)| *known != name);
        sources.push((name, template, path));
    }
    Templates::new(sources)
}

/// Whether engines have no other way from a chat of this model to tokens than its template.
fn is_templated(directory: &Path) -> Result<bool, TokenizerError> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Model {
        model_type: String,
    }
    let model: Model = read_json(&directory.join(MODEL))?.unwrap_or_default();
    let is_mistrals = directory.join("tekken.json").exists();
    Ok(!is_mistrals && !OWN_RENDERERS.iter().any(|name| model.model_type.starts_with(name)))
}

fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<Option<T>, TokenizerError> {
    let Some(bytes) = read(path)? else { return Ok(None) };
    let read = serde_json::from_slice(&bytes).map_err(|error| TokenizerError::Malformed {
        path: path.to_owned(),
        reason: error.to_string(),
        fix: "take the file as the model's authors published it",
    });
    read.map(Some)
}

/// A file's bytes; `None` if there is none.
fn read(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    let unreadable = |reason: String| TokenizerError::Unreadable { path: path.to_owned(), reason };
    match fs::metadata(path) {
        Ok(found) if found.len() > MAX_BYTES => {
            Err(unreadable(format!("it has {} bytes, more than any such file ({MAX_BYTES})", found.len())))
        }
        Ok(_) => fs::read(path).map(Some).map_err(|error| unreadable(error.to_string())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unreadable(error.to_string())),
    }
}
