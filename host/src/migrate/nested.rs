//! Nested: streams of the APIs whose events nest, Anthropic's messages and OpenAI's responses, which go on as chats.
//!
//! Contract: [`Nested::read`] takes down what the client has of such a stream, [`as_chat`] says its request as a chat, which
//! engines know how to go on with, and [`Nested::retell`] makes the chat's chunks events of the client's API.
//!
//! Invariants: what the lost worker opened is gone on with and closed, once; places and numbers of events go on where they
//! were; an event that the host does not know makes a stream unfit to go on, it is never passed over.

mod chat;
mod messages;
mod responses;

use std::fmt;

use bytes::Bytes;
use dynamo_engine_api::{Endpoint, Usage};
use futures_util::StreamExt;
use serde_json::{Map, Value};

pub(super) use self::chat::as_chat;
use self::{messages::Messages, responses::Responses};
use super::{Rest, RestStream, record::Choice};

/// What a client has of such a stream, and how it is told the rest.
#[derive(Debug)]
pub(crate) struct Nested {
    api: Box<dyn Api>,
    /// Text that came while a call of a tool was open: it is told behind that.
    held: String,
    /// Calls of tools that were begun, by their number in the chat.
    calls: Vec<u64>,
    finish: Finish,
}

/// What a piece of an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Thought,
    Text,
    Call,
}

/// Which tool is called.
#[derive(Clone, Copy, Debug, Default)]
struct Call<'a> {
    id: &'a str,
    name: &'a str,
}

/// How an answer ended, in a chat's words.
#[derive(Clone, Debug, Default)]
struct Finish {
    reason: String,
    /// The stop string that ended it.
    stop: Option<String>,
}

/// Tokens of a whole stream.
#[derive(Clone, Copy, Debug)]
struct Tokens {
    prompt: u32,
    output: u32,
}

/// An API whose events nest.
trait Api: fmt::Debug + Send {
    /// Takes down an event that the client has.
    fn read(&mut self, event: &Map<String, Value>, choice: &mut Choice);

    /// Whether the event came that begins a stream.
    fn has_begun(&self) -> bool;

    /// What the engine that began counted.
    fn usage(&self) -> Option<Usage>;

    /// The piece that may be gone on with.
    fn open(&self) -> Option<Kind>;

    /// Opens a piece.
    fn begin(&mut self, kind: Kind, call: Call<'_>, out: &mut Vec<u8>);

    /// Adds to the piece that is open.
    fn add(&mut self, text: &str, out: &mut Vec<u8>);

    /// Closes the piece that is open, if one is.
    fn close(&mut self, out: &mut Vec<u8>);

    /// Ends the stream.
    fn end(&mut self, finish: &Finish, tokens: Tokens, out: &mut Vec<u8>);

    /// Bytes that it keeps.
    fn bytes(&self) -> usize;
}

impl Nested {
    /// For a stream of this endpoint; none if its events do not nest.
    pub(super) fn of(endpoint: Endpoint) -> Option<Self> {
        let api: Box<dyn Api> = match endpoint {
            Endpoint::Messages => Box::new(Messages::default()),
            Endpoint::Responses => Box::new(Responses::default()),
            _ => return None,
        };
        Some(Self { api, held: String::new(), calls: Vec::new(), finish: Finish::default() })
    }

    /// Takes down an event that the client has.
    pub(super) fn read(&mut self, event: &Map<String, Value>, choice: &mut Choice) {
        self.api.read(event, choice);
    }

    /// Whether the event came that begins it, and which nobody else can tell.
    pub(super) fn has_begun(&self) -> bool {
        self.api.has_begun()
    }

    pub(super) fn usage(&self) -> Option<Usage> {
        self.api.usage()
    }

    pub(super) fn bytes(&self) -> usize {
        self.api.bytes()
    }

    /// A chat's rest as events of this API.
    pub(super) fn retell(mut self, rest: RestStream) -> RestStream {
        let retold = move |piece: Result<Rest, _>| {
            Ok(match piece? {
                Rest::Frames(frames, tokens) => Rest::Frames(self.tell(&frames), tokens),
                Rest::End(_, prompt, output) => Rest::End(self.end(Tokens { prompt, output }), prompt, output),
            })
        };
        rest.map(retold).boxed()
    }

    /// Events of a chat's frames.
    fn tell(&mut self, frames: &[u8]) -> Bytes {
        let mut out = Vec::new();
        for line in frames.split(|&byte| byte == b'\n') {
            let frame = line.strip_prefix(b"data:").and_then(|data| serde_json::from_slice::<Value>(data).ok());
            let Some(choice) = frame.as_ref().and_then(|frame| frame["choices"].get(0)) else { continue };
            let delta = &choice["delta"];
            for name in ["reasoning", "reasoning_content"] {
                self.say(Kind::Thought, text_of(&delta[name]), &mut out);
            }
            self.say(Kind::Text, text_of(&delta["content"]), &mut out);
            for call in delta["tool_calls"].as_array().into_iter().flatten() {
                self.call(call, &mut out);
            }
            if let Some(reason) = choice["finish_reason"].as_str() {
                self.finish = Finish { reason: reason.to_owned(), stop: choice["stop_reason"].as_str().map(str::to_owned) };
            }
        }
        out.into()
    }

    fn say(&mut self, kind: Kind, text: &str, out: &mut Vec<u8>) {
        if text.is_empty() {
            return;
        }
        // Whatever is left of the call's arguments must find it open.
        if kind == Kind::Text && self.api.open() == Some(Kind::Call) {
            self.held.push_str(text);
            return;
        }
        if self.api.open() != Some(kind) {
            self.close(out);
            self.api.begin(kind, Call::default(), out);
        }
        self.api.add(text, out);
    }

    fn call(&mut self, call: &Value, out: &mut Vec<u8>) {
        let number = call["index"].as_u64().unwrap_or_default();
        let function = &call["function"];
        if !self.calls.contains(&number) {
            self.close(out);
            self.calls.push(number);
            self.api.begin(Kind::Call, Call { id: text_of(&call["id"]), name: text_of(&function["name"]) }, out);
        }
        let arguments = text_of(&function["arguments"]);
        if !arguments.is_empty() && self.api.open() == Some(Kind::Call) {
            self.api.add(arguments, out);
        }
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        self.api.close(out);
        if !self.held.is_empty() {
            self.api.begin(Kind::Text, Call::default(), out);
            self.api.add(&std::mem::take(&mut self.held), out);
            self.api.close(out);
        }
    }

    fn end(&mut self, tokens: Tokens) -> Bytes {
        let mut out = Vec::new();
        self.close(&mut out);
        if !self.calls.is_empty() && self.finish.reason == "stop" && self.finish.stop.is_none() {
            "tool_calls".clone_into(&mut self.finish.reason);
        }
        self.api.end(&self.finish, tokens, &mut out);
        out.into()
    }
}

fn text_of(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Writes an event under the name that is its type.
fn push_event(out: &mut Vec<u8>, event: &Value) {
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(text_of(&event["type"]).as_bytes());
    out.extend_from_slice(b"\ndata: ");
    out.extend_from_slice(event.to_string().as_bytes());
    out.extend_from_slice(b"\n\n");
}

#[cfg(test)]
mod tests;
