//! The prompt: how long it is, how it begins, and what in it is not text. Its words stay where they are.

use std::borrow::Cow;

use dynamo_host_core::{TokenCount, id};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{fields::Fields, invalid};
use crate::error::RequestError;

/// Bytes of the prompt that the prefix key covers.
const PREFIX_BYTES: usize = 1024;

/// What policies may know of a prompt.
pub(super) struct Prompt {
    pub(super) tokens: TokenCount,
    pub(super) prefix_key: u64,
    pub(super) multimodal_items: u32,
}

impl Prompt {
    /// Of a chat.
    pub(super) fn of_messages(fields: &Fields<'_>) -> Result<Self, RequestError> {
        const EXPECTED: &str = "an array of at least one message {\"role\": …, \"content\": …}";
        let raw = fields.get("messages").ok_or(RequestError::MissingField { field: "messages", expected: EXPECTED })?;
        let messages: Vec<Message<'_>> = serde_json::from_str(raw.get()).map_err(|_| invalid("messages", raw, EXPECTED))?;
        if messages.is_empty() {
            return Err(invalid("messages", raw, EXPECTED));
        }
        let (mut text_bytes, mut multimodal_items) = (0, 0);
        for content in messages.iter().filter_map(|message| message.content) {
            match content.get().as_bytes()[0] {
                b'"' => text_bytes += text_len(content),
                b'[' => {
                    // What is no list of parts is the engine's to refuse.
                    let parts: Vec<Part<'_>> = serde_json::from_str(content.get()).unwrap_or_default();
                    text_bytes += parts.iter().filter_map(Part::text).map(text_len).sum::<usize>();
                    multimodal_items += parts.iter().filter(|part| !part.is_text()).count() as u32;
                }
                _ => {}
            }
        }
        Ok(Self { tokens: TokenCount::estimate(text_bytes), prefix_key: prefix_key(raw), multimodal_items })
    }

    /// Of a completion.
    pub(super) fn of_prompt(fields: &Fields<'_>) -> Result<Self, RequestError> {
        const EXPECTED: &str = "a string, an array of token ids, or an array of either";
        let raw = fields.get("prompt").ok_or(RequestError::MissingField { field: "prompt", expected: EXPECTED })?;
        let tokens = match raw.get().as_bytes()[0] {
            b'"' => Some(TokenCount::estimate(text_len(raw))),
            b'[' => match serde_json::from_str::<Vec<u32>>(raw.get()) {
                Ok(ids) => Some(TokenCount { tokens: ids.len() as u32, exact: true }),
                Err(_) => batch(raw),
            },
            _ => None,
        };
        let tokens = tokens.ok_or_else(|| invalid("prompt", raw, EXPECTED))?;
        Ok(Self { tokens, prefix_key: prefix_key(raw), multimodal_items: 0 })
    }
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Part<'a> {
    #[serde(borrow, default, rename = "type")]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
}

impl Part<'_> {
    /// `text`, `input_text`, …
    fn is_text(&self) -> bool {
        self.kind.as_deref().is_none_or(|kind| kind.ends_with("text"))
    }

    fn text(&self) -> Option<&RawValue> {
        self.text.filter(|_| self.is_text())
    }
}

/// Tokens of a batch: strings all, or lists of token ids all. Elements are looked at, not read: there may be millions.
fn batch(raw: &RawValue) -> Option<TokenCount> {
    let elements: Vec<&RawValue> = serde_json::from_str(raw.get()).ok()?;
    let first = elements.first()?.get().as_bytes()[0];
    if elements.iter().any(|element| element.get().as_bytes()[0] != first) {
        return None;
    }
    match first {
        b'"' => Some(TokenCount::estimate(elements.iter().map(|element| text_len(element)).sum())),
        b'[' => {
            let mut tokens = 0u32;
            for element in elements {
                let ids = &element.get()[1..];
                if ids.contains(['[', '{', '"']) {
                    return None;
                }
                tokens = tokens.saturating_add(1 + ids.bytes().filter(|&byte| byte == b',').count() as u32);
            }
            Some(TokenCount { tokens, exact: false })
        }
        _ => None,
    }
}

/// Bytes of a JSON string as it is written, without its quotes; 0 for anything else.
fn text_len(raw: &RawValue) -> usize {
    if raw.get().starts_with('"') { raw.get().len() - 2 } else { 0 }
}

fn prefix_key(raw: &RawValue) -> u64 {
    id::key(&raw.get().as_bytes()[..raw.get().len().min(PREFIX_BYTES)])
}
