//! Server-sent events as engines send them: cut into whole frames, looked into, never collected.
//!
//! Contract: the bytes of all chunks, joined, are the bytes of the stream (plus a blank line if its last frame
//! lacks one), however the network cut them. A chunk holds whole frames only, so that it can be relayed as it
//! is; where a read ends on a frame's border nothing is copied. What the host needs to know of the frames is in
//! the chunk's [`Summary`]; everything else in them stays unread. Lines end in LF or CRLF: no engine sends lone CR.
//!
//! Three APIs' streams are understood: OpenAI's completions (chunks with `choices`), its responses and Anthropic's messages
//! (events with a `type`, see [`typed`]). Each frame says itself which it is.
//!
//! Spec: <https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream>

mod typed;

use std::{fmt, ops::Range};

use bytes::{Bytes, BytesMut};
use dynamo_host_core::Endpoint;
use memchr::memmem;
use serde::{
    Deserialize, Deserializer,
    de::{SeqAccess, Visitor},
};
use serde_json::value::RawValue;

/// Bytes that a single frame may have.
pub const MAX_FRAME_BYTES: usize = 8 << 20;

/// The end of every complete stream of OpenAI's completions.
pub const DONE_FRAME: &[u8] = b"data: [DONE]\n\n";
/// The end of every complete stream of Anthropic's messages.
pub const MESSAGE_STOP_FRAME: &[u8] = b"event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n";

/// Whole frames of a stream, ready to relay.
#[derive(Clone, Debug, PartialEq)]
pub struct Chunk {
    /// The frames, verbatim.
    pub bytes: Bytes,
    /// What they say.
    pub summary: Summary,
}

/// The frame that ends a stream: `[DONE]`, `message_stop`, `response.completed`, or an error.
#[derive(Clone, Debug, PartialEq)]
pub struct Ending {
    /// Where it lies within the chunk.
    pub at: Range<usize>,
    /// What it says.
    pub summary: Summary,
}

impl Chunk {
    /// Reads whole frames.
    #[must_use]
    pub fn new(bytes: Bytes) -> Self {
        Self { summary: summarize(&bytes), bytes }
    }

    /// The end of a stream in a chunk of its own, for an engine that does not send it.
    #[must_use]
    pub fn done(endpoint: Endpoint) -> Self {
        let frame = if endpoint == Endpoint::Messages { MESSAGE_STOP_FRAME } else { DONE_FRAME };
        Self { bytes: Bytes::from_static(frame), summary: Summary { done: true, ..Summary::default() } }
    }

    /// The first frame that ends the stream, if there is one; frames are looked at one by one only then.
    #[must_use]
    pub fn ending(&self) -> Option<Ending> {
        if !self.summary.done && self.summary.error.is_none() {
            return None;
        }
        let mut start = 0;
        while start < self.bytes.len() {
            let end = first_border(&self.bytes[start..]).map_or(self.bytes.len(), |length| start + length);
            let summary = summarize(&self.bytes[start..end]);
            if summary.done || summary.error.is_some() {
                return Some(Ending { at: start..end, summary });
            }
            start = end;
        }
        None
    }

    /// Its frames up to `end`, which must be a frame's border (such as those in [`Ending::at`]); none if that is no byte.
    #[must_use]
    pub fn until(self, end: usize) -> Option<Self> {
        match end {
            0 => None,
            end if end == self.bytes.len() => Some(self),
            end => Some(Self::new(self.bytes.slice(..end))),
        }
    }
}

/// What the frames of a chunk say, as far as the host needs it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Output tokens: `token_ids` where the engine gives them, else 1 per delta with content.
    pub tokens: u32,
    /// Choices that reported their finish reason.
    pub finishes: u32,
    /// Whether the event came that ends a stream in its API.
    pub done: bool,
    /// The engine's own count, if it came.
    pub usage: Option<Usage>,
    /// An error object's message, if one came.
    pub error: Option<String>,
    /// Whether that error is the request's fault, by its code (400 to 499).
    pub refused: bool,
}

impl Summary {
    /// Adds what the frames after these say.
    pub fn add(&mut self, later: Self) {
        self.tokens = self.tokens.saturating_add(later.tokens);
        self.finishes += later.finishes;
        self.done |= later.done;
        self.usage = later.usage.or(self.usage);
        self.error = later.error.or(self.error.take());
        self.refused |= later.refused;
    }
}

/// Token counts as the engine reports them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    #[serde(default, alias = "input_tokens")]
    pub prompt_tokens: u32,
    /// Tokens of output, over all choices.
    #[serde(default, alias = "output_tokens")]
    pub completion_tokens: u32,
    /// Where the prompt's tokens came from.
    #[serde(default, alias = "input_tokens_details")]
    pub prompt_tokens_details: Option<PromptTokensDetails>,
}

/// Part of [`Usage`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct PromptTokensDetails {
    /// Prompt tokens that the engine had cached.
    #[serde(default)]
    pub cached_tokens: Option<u32>,
}

/// A frame that grew past [`MAX_FRAME_BYTES`] without ending.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("an event of over {MAX_FRAME_BYTES} bytes without an end")]
pub struct FrameTooLarge;

/// Cuts a byte stream into chunks of whole frames.
#[derive(Debug, Default)]
pub struct Framer {
    pending: BytesMut,
}

impl Framer {
    /// Takes what was read; returns the frames that are now whole, if any.
    ///
    /// # Errors
    /// If a frame grows past its bound.
    pub fn push(&mut self, read: Bytes) -> Result<Option<Chunk>, FrameTooLarge> {
        let frames = if self.pending.is_empty() {
            match last_border(&read) {
                Some(end) => {
                    self.pending.extend_from_slice(&read[end..]);
                    read.slice(..end)
                }
                None => {
                    self.pending.extend_from_slice(&read);
                    return self.whole_later();
                }
            }
        } else {
            // A border may straddle the old end by at most three bytes.
            let from = self.pending.len().saturating_sub(3);
            self.pending.extend_from_slice(&read);
            match last_border(&self.pending[from..]) {
                Some(end) => self.pending.split_to(from + end).freeze(),
                None => return self.whole_later(),
            }
        };
        Ok(Some(Chunk::new(frames)))
    }

    /// The stream ended: a last frame without its blank line is whole now.
    pub fn finish(&mut self) -> Option<Chunk> {
        if self.pending.iter().all(u8::is_ascii_whitespace) {
            return None;
        }
        self.pending.extend_from_slice(b"\n\n");
        Some(Chunk::new(self.pending.split().freeze()))
    }

    fn whole_later(&self) -> Result<Option<Chunk>, FrameTooLarge> {
        if self.pending.len() > MAX_FRAME_BYTES { Err(FrameTooLarge) } else { Ok(None) }
    }
}

/// Where the last whole frame ends.
fn last_border(bytes: &[u8]) -> Option<usize> {
    // Engines write event by event, so that most reads end here.
    if bytes.ends_with(b"\n\n") {
        return Some(bytes.len());
    }
    let lf = memmem::rfind(bytes, b"\n\n").map(|at| at + 2);
    let crlf = memmem::rfind(bytes, b"\n\r\n").map(|at| at + 3);
    lf.max(crlf)
}

/// Where the first whole frame ends.
fn first_border(bytes: &[u8]) -> Option<usize> {
    let lf = memmem::find(bytes, b"\n\n").map(|at| at + 2);
    let crlf = memmem::find(bytes, b"\n\r\n").map(|at| at + 3);
    match (lf, crlf) {
        (Some(lf), Some(crlf)) => Some(lf.min(crlf)),
        (lf, crlf) => lf.or(crlf),
    }
}

/// Reads whole frames, as many as there are.
#[must_use]
pub fn summarize(frames: &[u8]) -> Summary {
    let mut summary = Summary::default();
    // Engines send one `data` line per event, so each line is an event; a line that isn't JSON is none of ours.
    for line in frames.split(|&byte| byte == b'\n') {
        let Some(data) = line.strip_prefix(b"data:") else { continue };
        let data = data.trim_ascii();
        if data == b"[DONE]" {
            summary.done = true;
        } else if let Ok(event) = serde_json::from_slice::<Event>(data) {
            event.add_to(&mut summary);
            if event.kind.is_some() {
                typed::add_to(data, &mut summary);
            }
        }
    }
    summary
}

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow, default, rename = "type")]
    kind: Option<&'a RawValue>,
    #[serde(default)]
    choices: Option<Choices>,
    #[serde(default)]
    usage: Option<Usage>,
    #[serde(borrow, default)]
    error: Option<&'a RawValue>,
}

/// What all choices of a frame say: added up as they are read, not collected.
#[derive(Default)]
struct Choices {
    tokens: u32,
    finishes: u32,
}

impl<'de> Deserialize<'de> for Choices {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ChoicesVisitor;

        impl<'de> Visitor<'de> for ChoicesVisitor {
            type Value = Choices;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of choices")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut all: A) -> Result<Choices, A::Error> {
                let mut choices = Choices::default();
                while let Some(choice) = all.next_element::<Choice<'de>>()? {
                    choices.tokens = choices.tokens.saturating_add(choice.tokens());
                    choices.finishes += u32::from(is_something(choice.finish_reason));
                }
                Ok(choices)
            }
        }

        deserializer.deserialize_seq(ChoicesVisitor)
    }
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow, default)]
    finish_reason: Option<&'a RawValue>,
    #[serde(borrow, default)]
    text: Option<&'a RawValue>,
    #[serde(borrow, default)]
    delta: Option<Delta<'a>>,
    #[serde(default)]
    token_ids: Option<Vec<u32>>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
    #[serde(borrow, default)]
    reasoning: Option<&'a RawValue>,
    #[serde(borrow, default)]
    reasoning_content: Option<&'a RawValue>,
    #[serde(borrow, default)]
    tool_calls: Option<&'a RawValue>,
}

impl Event<'_> {
    fn add_to(&self, summary: &mut Summary) {
        if let Some(Choices { tokens, finishes }) = self.choices {
            summary.tokens = summary.tokens.saturating_add(tokens);
            summary.finishes += finishes;
        }
        summary.usage = self.usage.or(summary.usage);
        if is_something(self.error) {
            summary.error = self.error.map(|error| error_message(error.get()));
            summary.refused |= self.error.is_some_and(|error| is_refusal(error.get()));
        }
    }
}

impl Choice<'_> {
    fn tokens(&self) -> u32 {
        if let Some(ids) = self.token_ids.as_ref().filter(|ids| !ids.is_empty()) {
            return ids.len() as u32;
        }
        let delta = self.delta.as_ref();
        let parts = [
            self.text,
            delta.and_then(|delta| delta.content),
            delta.and_then(|delta| delta.reasoning),
            delta.and_then(|delta| delta.reasoning_content),
            delta.and_then(|delta| delta.tool_calls),
        ];
        u32::from(parts.into_iter().any(is_something))
    }
}

fn is_something(value: Option<&RawValue>) -> bool {
    value.is_some_and(|value| !matches!(value.get(), "null" | "\"\"" | "[]"))
}

/// Whether an error object says that the request is at fault.
fn is_refusal(json: &str) -> bool {
    #[derive(Deserialize)]
    struct WithCode {
        code: u16,
    }
    serde_json::from_str::<WithCode>(json).is_ok_and(|error| (400..500).contains(&error.code))
}

/// The message within an OpenAI error object, or the whole of what came instead.
#[must_use]
pub fn error_message(json: &str) -> String {
    #[derive(Deserialize)]
    struct WithMessage {
        message: String,
    }
    serde_json::from_str::<WithMessage>(json).map_or_else(|_| json.to_owned(), |error| error.message)
}

#[cfg(test)]
mod tests;
