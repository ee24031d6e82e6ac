//! Record: what a client has of a stream, choice by choice, so that another worker can go on with it.
//!
//! Contract: [`Record::keep`] is all that a chunk costs on its way: its bytes are copied. They are read when a stream is to go
//! on elsewhere, and before that only when many have come together, so that memory holds text and ids instead of frames.
//! Chunks hold whole frames; what was cut off within one never came here.

use std::{borrow::Cow, collections::BTreeMap, fmt};

use dynamo_engine_api::{Endpoint, Usage};
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::{Map, Value, value::RawValue};

use super::nested::Nested;

/// Bytes of frames that are kept before they are read.
const FOLD_AT: usize = 128 << 10;

/// What a client has of a stream.
#[derive(Debug, Default)]
pub(crate) struct Record {
    frames: Vec<u8>,
    /// Bytes that may be kept, and that text and ids took when they were last read.
    most: usize,
    read_bytes: usize,
    /// Whether more came than may be kept: nobody can go on with it any more.
    pub(crate) is_over: bool,
    pub(crate) said: Said,
}

/// What the frames said.
#[derive(Debug, Default)]
pub(crate) struct Said {
    /// `id`, `created`, `model` and `object` of its frames, as the first one had them.
    pub(crate) head: BTreeMap<&'static str, Value>,
    pub(crate) choices: BTreeMap<u32, Choice>,
    /// The last usage that came, and whether it came with choices.
    pub(crate) usage: Option<Usage>,
    pub(crate) has_continuous_usage: bool,
    /// Whether the usage's own frame came.
    pub(crate) has_last_usage: bool,
    /// Whether a frame came that could not be read: what it said is not known.
    pub(crate) has_unread: bool,
    /// The prompt's ids, where frames have them at their top.
    prompt_ids: Option<Vec<u32>>,
    /// Of a stream whose events have no choices: its one answer is choice 0.
    pub(super) nested: Option<Nested>,
}

/// What a client has of one choice.
#[derive(Clone, Debug)]
pub(crate) struct Choice {
    pub(crate) text: String,
    /// The ids of the prompt that `ids` follow.
    pub(crate) prompt_ids: Option<Vec<u32>>,
    pub(crate) ids: Vec<u32>,
    /// How many of the last ids have no text yet: it was held back.
    loose: usize,
    /// Whether some text came without ids.
    has_gap: bool,
    /// Output tokens: ids where they are known, else deltas.
    pub(crate) tokens: u32,
    pub(crate) is_finished: bool,
    pub(crate) has_role: bool,
    pub(crate) stage: Stage,
    /// Whether the tokens that come next are made again: their log probabilities may have been told.
    pub(crate) is_remade: bool,
    /// Whether the client has reasoning of it.
    pub(crate) has_reasoned: bool,
}

/// What a choice is in the middle of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Nothing has come.
    #[default]
    Nothing,
    Reasoning,
    Text,
    ToolCall,
    /// Something that the host does not know.
    Unknown,
}

const HEAD: [&str; 4] = ["id", "object", "created", "model"];

#[derive(Deserialize)]
struct Frame<'a> {
    #[serde(borrow, default)]
    choices: Option<Vec<FrameChoice<'a>>>,
    #[serde(default)]
    usage: Option<Usage>,
    #[serde(default)]
    prompt_token_ids: Option<Vec<u32>>,
}

/// One choice of a frame.
#[derive(Default, Deserialize)]
pub(super) struct FrameChoice<'a> {
    #[serde(default)]
    index: u32,
    #[serde(borrow, default)]
    finish_reason: Option<&'a RawValue>,
    #[serde(default)]
    text: Option<String>,
    #[serde(borrow, default)]
    delta: Option<Delta<'a>>,
    #[serde(default)]
    token_ids: Option<Vec<u32>>,
    #[serde(default)]
    prompt_token_ids: Option<Vec<u32>>,
}

/// What a chat's frame says of a choice.
#[derive(Default)]
struct Delta<'a> {
    content: Option<&'a RawValue>,
    has_role: bool,
    other: Option<Stage>,
}

impl<'de: 'a, 'a> Deserialize<'de> for Delta<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DeltaVisitor;

        #[derive(Deserialize)]
        struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

        impl<'de> Visitor<'de> for DeltaVisitor {
            type Value = Delta<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut delta = Delta::default();
                while let Some(Key(name)) = map.next_key()? {
                    let value: &RawValue = map.next_value()?;
                    match &*name {
                        _ if !is_something(value) => {}
                        "role" => delta.has_role = true,
                        "content" => delta.content = Some(value),
                        name => delta.other = Some(Stage::of(name)),
                    }
                }
                Ok(delta)
            }
        }

        deserializer.deserialize_map(DeltaVisitor)
    }
}

impl Stage {
    /// Of what a delta has beside its role and content.
    pub(super) fn of(name: &str) -> Self {
        match name {
            "reasoning" | "reasoning_content" => Self::Reasoning,
            "tool_calls" | "function_call" => Self::ToolCall,
            _ => Self::Unknown,
        }
    }
}

impl Record {
    /// Of an endpoint's stream, of at most so many bytes.
    pub(crate) fn new(endpoint: Endpoint, most: usize) -> Self {
        Self { most, said: Said { nested: Nested::of(endpoint), ..Said::default() }, ..Self::default() }
    }

    /// Keeps whole frames that the client gets.
    pub(crate) fn keep(&mut self, frames: &[u8]) {
        if self.is_over {
            return;
        }
        if self.frames.len() + frames.len() > FOLD_AT {
            self.fold();
        }
        self.frames.extend_from_slice(frames);
        if self.frames.len() + self.read_bytes > self.most {
            *self = Self { is_over: true, ..Self::default() };
            metrics::counter!("dynamo_host_migration_untracked_total").increment(1);
        }
    }

    /// Whether a choice has begun that has not told its finish.
    pub(crate) fn has_unfinished(&mut self) -> bool {
        self.fold();
        self.said.choices.values().any(|choice| !choice.is_finished)
    }

    /// Reads what was kept.
    pub(crate) fn fold(&mut self) {
        for line in self.frames.split(|&byte| byte == b'\n') {
            if let Some(data) = line.strip_prefix(b"data:") {
                self.said.read(data.trim_ascii());
            }
        }
        self.frames.clear();
        self.read_bytes = self.said.bytes();
    }
}

impl Said {
    fn bytes(&self) -> usize {
        let ids = |ids: &Option<Vec<u32>>| 4 * ids.as_ref().map_or(0, Vec::len);
        let of = |choice: &Choice| size_of::<Choice>() + choice.text.len() + 4 * choice.ids.len() + ids(&choice.prompt_ids);
        let nested = self.nested.as_ref().map_or(0, Nested::bytes);
        nested + ids(&self.prompt_ids) + self.choices.values().map(of).sum::<usize>()
    }

    fn read(&mut self, data: &[u8]) {
        if let Some(nested) = &mut self.nested {
            match serde_json::from_slice::<Map<String, Value>>(data) {
                Ok(event) => {
                    nested.read(&event, self.choices.entry(0).or_insert_with(Choice::new));
                    self.usage = nested.usage();
                }
                Err(_) => self.has_unread |= data.starts_with(b"{"),
            }
            return;
        }
        let Ok(frame) = serde_json::from_slice::<Frame<'_>>(data) else {
            // What is no JSON object holds nothing for anybody.
            self.has_unread |= data.starts_with(b"{") && serde_json::from_slice::<IgnoredAny>(data).is_ok();
            return;
        };
        let choices = frame.choices.unwrap_or_default();
        if self.head.is_empty()
            && let Ok(mut fields) = serde_json::from_slice::<BTreeMap<String, Value>>(data)
        {
            self.head = HEAD.into_iter().filter_map(|name| Some((name, fields.remove(name)?))).collect();
        }
        self.has_continuous_usage |= frame.usage.is_some() && !choices.is_empty();
        self.has_last_usage |= frame.usage.is_some() && choices.is_empty();
        self.usage = frame.usage.or(self.usage);
        self.prompt_ids = frame.prompt_token_ids.or(self.prompt_ids.take());
        for said in choices {
            let choice = self.choices.entry(said.index).or_insert_with(Choice::new);
            choice.read(said);
            if choice.prompt_ids.is_none() {
                choice.prompt_ids.clone_from(&self.prompt_ids);
            }
        }
    }
}

impl Choice {
    pub(crate) fn new() -> Self {
        Self {
            text: String::new(),
            prompt_ids: None,
            ids: Vec::new(),
            loose: 0,
            has_gap: false,
            tokens: 0,
            is_finished: false,
            has_role: false,
            stage: Stage::Nothing,
            is_remade: false,
            has_reasoned: false,
        }
    }

    /// Takes down what a frame says of it.
    fn read(&mut self, said: FrameChoice<'_>) {
        let FrameChoice { finish_reason, text, delta, token_ids, prompt_token_ids, .. } = said;
        self.prompt_ids = prompt_token_ids.or(self.prompt_ids.take());
        let Delta { content, has_role, other } = delta.unwrap_or_default();
        self.has_role |= has_role;
        let read: Option<String> = content.and_then(|content| serde_json::from_str(content.get()).ok());
        // Content that is no text, such as a list of parts.
        let other = if content.is_some() && read.is_none() { Some(Stage::Unknown) } else { other };
        let text = read.or(text).unwrap_or_default();
        self.is_finished |= finish_reason.is_some_and(is_something);
        self.take(&text, &token_ids.unwrap_or_default(), other);
    }

    /// Takes down text that the client gets, the ids that came with it, and what came beside it.
    pub(crate) fn take(&mut self, text: &str, ids: &[u32], other: Option<Stage>) {
        let is_heard = !text.is_empty() || other.is_some();
        self.has_gap |= is_heard && ids.is_empty();
        self.ids.extend_from_slice(ids);
        self.loose = if is_heard { 0 } else { self.loose + ids.len() };
        self.tokens = self.tokens.saturating_add(if ids.is_empty() { u32::from(is_heard) } else { ids.len() as u32 });
        self.text.push_str(text);
        self.has_reasoned |= other == Some(Stage::Reasoning);
        // What is unknown, or a call of a tool, stays so: text after it does not bring back what it was.
        let is_final = matches!(self.stage, Stage::ToolCall | Stage::Unknown);
        if !is_final && is_heard {
            self.stage = other.unwrap_or(Stage::Text);
        }
    }

    /// Forgets ids whose text the client does not have: whoever goes on makes those tokens again. A character of several
    /// tokens is then made by one engine, and comes whole.
    pub(crate) fn settle(&mut self) {
        let loose = std::mem::take(&mut self.loose).min(self.ids.len());
        self.is_remade = loose > 0;
        self.ids.truncate(self.ids.len() - loose);
        self.tokens -= (loose as u32).min(self.tokens);
    }

    /// Prompt and output as ids, if all are known.
    pub(crate) fn all_ids(&self) -> Option<Vec<u32>> {
        let prompt = self.prompt_ids.as_ref().filter(|ids| !ids.is_empty() && !self.has_gap && self.loose == 0)?;
        Some(prompt.iter().chain(&self.ids).copied().collect())
    }

    /// What follows is told from another prompt, whose ids are not known yet.
    pub(crate) fn rebase(&mut self) {
        self.prompt_ids = None;
        self.ids.clear();
        self.loose = 0;
        self.has_gap = false;
    }
}

fn is_something(value: &RawValue) -> bool {
    !matches!(value.get(), "null" | "\"\"" | "[]")
}
