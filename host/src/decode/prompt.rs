//! The prompt: how long it is, how it begins, and what in it is not text. Its words stay where they are.

use std::borrow::Cow;

use dynamo_host_core::{TokenCount, id};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{fields::Fields, invalid};
use crate::error::RequestError;

/// Bytes of the prompt that the prefix key covers.
const PREFIX_BYTES: usize = 1024;

/// How the names of parts that are not text tell it, in all dialects: `image_url`, `input_audio`, `document`, …
const MULTIMODAL: [&str; 5] = ["image", "audio", "video", "file", "document"];

/// What policies may know of a prompt.
pub(super) struct Prompt {
    pub(super) tokens: TokenCount,
    pub(super) prefix_key: u64,
    pub(super) multimodal_items: u32,
    /// How many prompts there are: more than one in a batch.
    pub(super) count: u32,
}

impl Prompt {
    /// Of a chat.
    pub(super) fn of_chat(fields: &Fields<'_>) -> Result<Self, RequestError> {
        Self::of_messages(fields, None)
    }

    /// Of a message of Anthropic's API: what the system says comes first.
    pub(super) fn of_message(fields: &Fields<'_>) -> Result<Self, RequestError> {
        Self::of_messages(fields, fields.get("system"))
    }

    /// Of a response: instructions, then a text or a list of items.
    pub(super) fn of_response(fields: &Fields<'_>) -> Result<Self, RequestError> {
        const EXPECTED: &str = "a string, or an array of at least one item {\"role\": …, \"content\": …}";
        let raw = fields.get("input").ok_or(RequestError::MissingField { field: "input", expected: EXPECTED })?;
        let instructions = fields.get("instructions");
        if raw.get().starts_with('"') {
            return Ok(Self::of_text(instructions, raw, text_len(raw)));
        }
        let items: Vec<Item<'_>> = serde_json::from_str(raw.get()).map_err(|_| invalid("input", raw, EXPECTED))?;
        if items.is_empty() {
            return Err(invalid("input", raw, EXPECTED));
        }
        if items.iter().any(|item| item.kind.as_deref() == Some("item_reference")) {
            return Err(RequestError::Stateful { field: "input", instead: "send the items themselves, no item_reference" });
        }
        let mut measure = Measure::default();
        for item in &items {
            [item.content, item.arguments, item.output].into_iter().flatten().for_each(|content| measure.add(content, 1));
        }
        Ok(Self { multimodal_items: measure.items, ..Self::of_text(instructions, raw, measure.bytes) })
    }

    fn of_messages(fields: &Fields<'_>, system: Option<&RawValue>) -> Result<Self, RequestError> {
        const EXPECTED: &str = "an array of at least one message {\"role\": …, \"content\": …}";
        let raw = fields.get("messages").ok_or(RequestError::MissingField { field: "messages", expected: EXPECTED })?;
        let messages: Vec<Message<'_>> = serde_json::from_str(raw.get()).map_err(|_| invalid("messages", raw, EXPECTED))?;
        if messages.is_empty() {
            return Err(invalid("messages", raw, EXPECTED));
        }
        let mut measure = Measure::default();
        messages.iter().filter_map(|message| message.content).for_each(|content| measure.add(content, 1));
        Ok(Self { multimodal_items: measure.items, ..Self::of_text(system, raw, measure.bytes) })
    }

    /// Of a completion or an embedding: a text, token ids, or a batch of either.
    pub(super) fn of_batch(fields: &Fields<'_>, field: &'static str) -> Result<Self, RequestError> {
        const EXPECTED: &str = "a string, an array of token ids, or an array of either";
        let raw = fields.get(field).ok_or(RequestError::MissingField { field, expected: EXPECTED })?;
        let counted = match raw.get().as_bytes()[0] {
            b'"' => Some((TokenCount::estimate(text_len(raw)), 1)),
            b'[' => match serde_json::from_str::<Vec<u32>>(raw.get()) {
                Ok(ids) => Some((TokenCount { tokens: ids.len() as u32, exact: true }, 1)),
                Err(_) => batch(raw),
            },
            _ => None,
        };
        let (tokens, count) = counted.ok_or_else(|| invalid(field, raw, EXPECTED))?;
        Ok(Self { tokens, count, prefix_key: prefix_key(None, raw), multimodal_items: 0 })
    }

    fn of_text(before: Option<&RawValue>, raw: &RawValue, bytes: usize) -> Self {
        let mut first = Measure::default();
        before.into_iter().for_each(|before| first.add(before, 0));
        let tokens = TokenCount::estimate(first.bytes + bytes);
        Self { tokens, prefix_key: prefix_key(before, raw), multimodal_items: 0, count: 1 }
    }
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
}

/// An item of a response's input.
#[derive(Deserialize)]
struct Item<'a> {
    #[serde(borrow, default, rename = "type")]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
    /// Of a call of a function.
    #[serde(borrow, default)]
    arguments: Option<&'a RawValue>,
    /// What the function answered.
    #[serde(borrow, default)]
    output: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Part<'a> {
    #[serde(borrow, default, rename = "type")]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
    /// Of a tool's result.
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
    /// Of a tool's use.
    #[serde(borrow, default)]
    input: Option<&'a RawValue>,
}

/// How much there is of text, and of what is none.
#[derive(Default)]
struct Measure {
    bytes: usize,
    items: u32,
}

impl Measure {
    /// Adds a string, or a list of parts; `deeper`: how many levels of parts within parts are looked at.
    fn add(&mut self, content: &RawValue, deeper: u32) {
        match content.get().as_bytes()[0] {
            b'"' => self.bytes += text_len(content),
            b'[' => {
                // What is no list of parts is the engine's to refuse.
                let parts: Vec<Part<'_>> = serde_json::from_str(content.get()).unwrap_or_default();
                for part in parts {
                    if part.kind.as_deref().is_some_and(|kind| MULTIMODAL.iter().any(|name| kind.contains(name))) {
                        self.items += 1;
                        continue;
                    }
                    self.bytes += part.text.map_or(0, text_len) + part.input.map_or(0, |input| input.get().len());
                    if let Some(content) = part.content.filter(|_| deeper > 0) {
                        self.add(content, deeper - 1);
                    }
                }
            }
            _ => {}
        }
    }
}

/// Tokens of a batch and its prompts: strings all, or lists of token ids all. Elements are looked at, not read: there
/// may be millions.
fn batch(raw: &RawValue) -> Option<(TokenCount, u32)> {
    let elements: Vec<&RawValue> = serde_json::from_str(raw.get()).ok()?;
    let first = elements.first()?.get().as_bytes()[0];
    if elements.iter().any(|element| element.get().as_bytes()[0] != first) {
        return None;
    }
    let count = elements.len() as u32;
    match first {
        b'"' => Some((TokenCount::estimate(elements.iter().map(|element| text_len(element)).sum()), count)),
        b'[' => {
            let mut tokens = 0u32;
            for element in elements {
                let ids = &element.get()[1..];
                if ids.contains(['[', '{', '"']) {
                    return None;
                }
                tokens = tokens.saturating_add(1 + ids.bytes().filter(|&byte| byte == b',').count() as u32);
            }
            Some((TokenCount { tokens, exact: false }, count))
        }
        _ => None,
    }
}

/// Bytes of a JSON string as it is written, without its quotes; 0 for anything else.
fn text_len(raw: &RawValue) -> usize {
    if raw.get().starts_with('"') { raw.get().len() - 2 } else { 0 }
}

/// Key of how the prompt begins: what comes before it, then itself.
fn prefix_key(before: Option<&RawValue>, raw: &RawValue) -> u64 {
    let cut = |raw: &'_ RawValue, most: usize| raw.get().len().min(most);
    let raw_bytes = raw.get().as_bytes();
    let Some(before) = before else { return id::key(&raw_bytes[..cut(raw, PREFIX_BYTES)]) };
    let mut begins = before.get().as_bytes()[..cut(before, PREFIX_BYTES)].to_vec();
    begins.extend_from_slice(&raw_bytes[..cut(raw, PREFIX_BYTES - begins.len())]);
    id::key(&begins)
}
