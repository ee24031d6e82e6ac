//! What a request's body says of its prompt, and how an engine makes a text of it.
//!
//! Contract: as vLLM 0.32 does it, of which the rules were read: a completion's text gets the tokenizer's special tokens, a
//! chat's rendered template does not. What an engine could do in another way, or what only some configuration of it does, is
//! done as vLLM's defaults do it and said to be inexact.

mod chat;
mod convert;

use std::{borrow::Cow, collections::BTreeMap};

use dynamo_host_core::Endpoint;
use minijinja::Value;
use serde_json::value::RawValue;

pub(crate) use self::chat::Chat;
use crate::{PromptTokens, approximate::approximate, error::PromptError};

/// A body's fields, unread.
#[derive(Debug, Default)]
pub(crate) struct Fields<'a>(BTreeMap<Cow<'a, str>, &'a RawValue>);

impl<'a> Fields<'a> {
    fn parse(body: &'a [u8]) -> Option<Self> {
        serde_json::from_slice(body).ok().map(Self)
    }

    /// A field's JSON; null is absent.
    pub(crate) fn get(&self, name: &str) -> Option<&'a str> {
        self.0.get(name).map(|raw| raw.get()).filter(|json| *json != "null")
    }

    fn read(&self, name: &str) -> Result<Option<Value>, PromptError> {
        let value = self.get(name).map(serde_json::from_str).transpose();
        value.map_err(|error| PromptError::Unreadable(format!("{name}: {error}")))
    }

    fn flag(&self, name: &str) -> Option<bool> {
        self.get(name).and_then(|json| json.parse().ok())
    }

    fn any(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.get(name).is_some())
    }
}

/// A request, asked for its prompt.
#[derive(Debug)]
pub struct Asked<'a> {
    endpoint: Endpoint,
    fields: Fields<'a>,
}

/// What tokens are made of.
pub(crate) enum Source {
    /// Tokens already.
    Ids(PromptTokens),
    /// A text; `special`: with what the tokenizer puts around texts.
    Text { text: String, special: bool, is_exact: bool },
    /// A chat, for the template.
    Chat(Chat),
}

impl<'a> Asked<'a> {
    /// Reads a body's outline. A body that is no JSON object has no prompt.
    #[must_use]
    pub fn of(endpoint: Endpoint, body: &'a [u8]) -> Self {
        Self { endpoint, fields: Fields::parse(body).unwrap_or_default() }
    }

    /// The client's `cache_salt`, which keeps its blocks apart from others' equal ones.
    #[must_use]
    pub fn cache_salt(&self) -> Option<String> {
        self.fields.get("cache_salt").and_then(|json| serde_json::from_str(json).ok())
    }

    /// The prompt itself, if the client gave tokens: no tokenizer is needed.
    #[must_use]
    pub fn given_ids(&self) -> Option<PromptTokens> {
        let json = self.fields.get(text_field(self.endpoint)?).filter(|json| json.starts_with('['))?;
        match serde_json::from_str::<Vec<u32>>(json) {
            Ok(ids) => Some(PromptTokens { ids: ids.into(), is_exact: !self.is_altered() }),
            // Of a batch, the first: one worker gets them all.
            Err(_) => {
                let batch: Vec<&RawValue> = serde_json::from_str(json).ok()?;
                let ids: Vec<u32> = serde_json::from_str(batch.first()?.get()).ok()?;
                Some(PromptTokens { ids: ids.into(), is_exact: false })
            }
        }
    }

    /// Stand-ins for its tokens, where nobody can tell them.
    #[must_use]
    pub fn approximate(&self) -> PromptTokens {
        approximate(self.endpoint, &self.fields)
    }

    /// What its tokens are made of.
    pub(crate) fn source(&self) -> Result<Source, PromptError> {
        if let Some(ids) = self.given_ids() {
            return Ok(Source::Ids(ids));
        }
        let Some(field) = text_field(self.endpoint) else { return convert::chat(self.endpoint, &self.fields).map(Source::Chat) };
        if self.endpoint == Endpoint::Embeddings && self.fields.get("messages").is_some() {
            return Err(PromptError::Unreadable("embeddings of chats have templates of their own".to_owned()));
        }
        let (text, is_alone) = match self.fields.read(field)? {
            Some(prompt) if prompt.as_str().is_some() => (prompt, true),
            // Of a batch, the first: one worker gets them all.
            Some(batch) => (batch.get_item_by_index(0).unwrap_or_default(), batch.len() == Some(1)),
            None => return Err(PromptError::Unreadable(format!("{field} is missing"))),
        };
        let text = text.as_str().ok_or_else(|| PromptError::Unreadable(format!("{field} is no text")))?.to_owned();
        // Models that embed may lower the case first.
        let is_exact = is_alone && !self.is_altered() && self.endpoint == Endpoint::Completions;
        Ok(Source::Text { text, special: self.fields.flag("add_special_tokens").unwrap_or(true), is_exact })
    }

    /// Whether the engine is asked to make something else of the prompt.
    fn is_altered(&self) -> bool {
        self.fields.any(&["truncate_prompt_tokens", "prompt_embeds"])
    }
}

/// The field that has a prompt as it is, where there is one.
fn text_field(endpoint: Endpoint) -> Option<&'static str> {
    match endpoint {
        Endpoint::Completions => Some("prompt"),
        Endpoint::Embeddings => Some("input"),
        _ => None,
    }
}
