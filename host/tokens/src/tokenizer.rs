//! A model's tokenizer: from a request to the tokens of its prompt, with what is known of them already.

use std::{collections::BTreeMap, fmt, path::Path, sync::Arc};

use tokenizers::Tokenizer as HuggingFace;

use crate::{
    PromptTokens,
    cut::Cuts,
    error::{PromptError, TokenizerError},
    files::ModelFiles,
    prompt::{Asked, Source},
    runs::{RunCache, RunKey},
    template::Templates,
};

/// A model's tokenizer and chat templates.
pub struct Tokenizer {
    tokenizer: HuggingFace,
    cuts: Cuts,
    templates: Templates,
    /// Special tokens by the names that templates know them by.
    special: BTreeMap<String, String>,
    /// What comes before and after a text that is given special tokens.
    around: (Vec<u32>, Vec<u32>),
    is_templated: bool,
    hash: u64,
    runs: Arc<RunCache>,
}

/// A prompt of which some tokens are known.
pub struct Begun {
    parts: Vec<Part>,
    is_exact: bool,
    uncached_bytes: usize,
    text_bytes: usize,
}

enum Part {
    Known(Arc<[u32]>),
    Text(RunKey, Box<str>),
}

impl Begun {
    /// Bytes of its text.
    #[must_use]
    pub fn text_bytes(&self) -> usize {
        self.text_bytes
    }

    /// Bytes of text whose tokens have to be computed: some 100 ns each.
    #[must_use]
    pub fn uncached_bytes(&self) -> usize {
        self.uncached_bytes
    }
}

impl Tokenizer {
    /// Reads a model directory as Hugging Face lays it out: `tokenizer.json`, and where there are some `tokenizer_config.json`,
    /// `chat_template.jinja`, `special_tokens_map.json`, `config.json`. Takes up to seconds for a large vocabulary.
    ///
    /// # Errors
    /// Says which file is wrong, where, and how to mend it.
    pub fn load(directory: &Path, runs: Arc<RunCache>) -> Result<Self, TokenizerError> {
        let ModelFiles { tokenizer, hash, config, templates, is_templated } = ModelFiles::read(directory)?;
        let around = around(&tokenizer, &config.special, config.add_bos_token, config.add_eos_token);
        let cuts = Cuts::new(&tokenizer);
        Ok(Self { tokenizer, cuts, templates, special: config.special, around, is_templated, hash, runs })
    }

    /// Makes a text of a request's prompt, and looks up what is known of it.
    ///
    /// # Errors
    /// If there is no prompt, or the template refuses it.
    pub fn begin(&self, asked: &Asked<'_>) -> Result<Begun, PromptError> {
        let (text, special, is_exact) = match asked.source()? {
            Source::Ids(PromptTokens { ids, is_exact }) => {
                return Ok(Begun { parts: vec![Part::Known(ids)], is_exact, uncached_bytes: 0, text_bytes: 0 });
            }
            Source::Text { text, special, is_exact } => (text, special, is_exact),
            Source::Chat(chat) => {
                let special = chat.special;
                let named = self.special.iter().map(|(name, token)| (name.as_str(), token.as_str()));
                let rendered = chat.render(&self.templates, named)?;
                (rendered.text, special, rendered.is_exact && self.is_templated)
            }
        };
        let mut begun = Begun { parts: Vec::new(), is_exact, uncached_bytes: 0, text_bytes: text.len() };
        let around = |ids: &Vec<u32>| (special && !ids.is_empty()).then(|| Part::Known(ids.as_slice().into()));
        begun.parts.extend(around(&self.around.0));
        for piece in self.cuts.pieces(&text) {
            let key = self.runs.key(self.hash, piece);
            begun.parts.push(match self.runs.get(key) {
                Some(run) => Part::Known(run),
                None => {
                    begun.uncached_bytes += piece.len();
                    Part::Text(key, piece.into())
                }
            });
        }
        begun.parts.extend(around(&self.around.1));
        Ok(begun)
    }

    /// Computes the tokens that are not known.
    ///
    /// # Errors
    /// If the tokenizer has no token for a text.
    pub fn finish(&self, begun: Begun) -> Result<PromptTokens, PromptError> {
        let Begun { mut parts, is_exact, .. } = begun;
        for part in &mut parts {
            let Part::Text(key, text) = part else { continue };
            // Another request may have had the same text in the meantime.
            let run = match self.runs.get(*key) {
                Some(run) => run,
                None => {
                    let run: Arc<[u32]> = self.encode(text)?.into();
                    self.runs.insert(*key, Arc::clone(&run));
                    run
                }
            };
            *part = Part::Known(run);
        }
        let known = |part: &Part| match part {
            Part::Known(run) => Arc::clone(run),
            Part::Text(..) => unreachable!("all are known by now"),
        };
        let ids = match parts.as_slice() {
            [only] => known(only),
            parts => {
                let runs: Vec<Arc<[u32]>> = parts.iter().map(known).collect();
                runs.concat().into()
            }
        };
        Ok(PromptTokens { ids, is_exact })
    }

    /// Tokens of a text on its own, without any cache.
    fn encode(&self, text: &str) -> Result<Vec<u32>, PromptError> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|error| PromptError::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("templates", &self.templates).field("around", &self.around).finish_non_exhaustive()
    }
}

/// The special tokens around a text: where the configuration says so, the begin and end tokens; else what the tokenizer's own
/// post-processor adds to a letter.
fn around(
    tokenizer: &HuggingFace,
    special: &BTreeMap<String, String>,
    add_bos: Option<bool>,
    add_eos: Option<bool>,
) -> (Vec<u32>, Vec<u32>) {
    if add_bos.is_some() || add_eos.is_some() {
        let id = |name: &str| special.get(name).and_then(|token| tokenizer.token_to_id(token));
        let of = |is_added: Option<bool>, name: &str| {
            is_added.filter(|is_added| *is_added).and_then(|_| id(name)).into_iter().collect()
        };
        return (of(add_bos, "bos_token"), of(add_eos, "eos_token"));
    }
    let encode =
        |special: bool| tokenizer.encode_fast("a", special).map(|encoding| encoding.get_ids().to_vec()).unwrap_or_default();
    let (bare, whole) = (encode(false), encode(true));
    let at = whole.windows(bare.len().max(1)).position(|part| part == bare).unwrap_or(0);
    let end = (at + bare.len()).min(whole.len());
    (whole[..at].to_vec(), whole[end..].to_vec())
}

#[cfg(test)]
mod tests;
