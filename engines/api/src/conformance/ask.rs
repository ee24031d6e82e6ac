//! Asking an engine, and reading its answers more strictly than the host does.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::{Capabilities, Fixture, Verdict, checks::Checked};
use crate::{Chunk, ChunkStream, Endpoint, Engine, GenerateRequest, Reply, WholeReply, sse::DONE_FRAME};

/// Output tokens that most checks ask for.
pub(super) const OUTPUT_TOKENS: u32 = 12;

/// How often a level is looked at while it is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// An engine under test, with what is asked again and again.
pub(super) struct Asking<'a, F> {
    pub(super) fixture: &'a F,
    pub(super) engine: Arc<dyn Engine>,
    pub(super) can: Capabilities,
}

impl<'a, F: Fixture> Asking<'a, F> {
    pub(super) fn new(fixture: &'a F) -> Self {
        Self { fixture, engine: fixture.engine(), can: fixture.capabilities() }
    }

    /// A chat of one message.
    pub(super) fn chat(&self, says: &str) -> Value {
        self.body(json!({ "messages": [{ "role": "user", "content": says }] }))
    }

    /// A completion of a text or of token ids.
    pub(super) fn completion(&self, prompt: impl Into<Value>) -> Value {
        self.body(json!({ "prompt": prompt.into() }))
    }

    /// A body that names the model.
    pub(super) fn body_for_model(&self, mut body: Value) -> Value {
        body["model"] = self.fixture.model().into();
        body
    }

    fn body(&self, body: Value) -> Value {
        let mut body = self.body_for_model(body);
        body["max_tokens"] = OUTPUT_TOKENS.into();
        body["temperature"] = 0.into();
        if self.can.unknown_fields {
            body["ignore_eos"] = true.into();
        }
        body
    }

    pub(super) async fn generate(&self, endpoint: Endpoint, body: impl Into<Bytes>, stream: bool) -> Result<Reply, Verdict> {
        self.engine.generate(request(endpoint, body, stream)).await.map_err(|error| Verdict::Failed(error.to_string()))
    }

    /// Asks for a whole answer, and gets one that is no error.
    pub(super) async fn whole(&self, endpoint: Endpoint, body: &Value) -> Result<Value, Verdict> {
        self.whole_with(request(endpoint, body.to_string(), false)).await
    }

    /// The same for a request made otherwise.
    pub(super) async fn whole_with(&self, request: GenerateRequest) -> Result<Value, Verdict> {
        let reply = self.engine.generate(request).await.map_err(|error| Verdict::Failed(error.to_string()))?;
        let reply = whole(reply)?;
        ensure(reply.status == 200, || format!("{}: {}", reply.status, String::from_utf8_lossy(&reply.body)))?;
        let content_type = reply.headers.get(http::header::CONTENT_TYPE).map(http::HeaderValue::as_bytes);
        let is_json = content_type.is_some_and(|kind| kind.starts_with(b"application/json"));
        ensure(is_json, || "the content-type of a whole answer is not application/json".into())?;
        serde_json::from_slice(&reply.body).map_err(|error| Verdict::Failed(format!("not JSON: {error}")))
    }

    /// Asks for a stream, and gets its head.
    pub(super) async fn open(&self, endpoint: Endpoint, mut body: Value) -> Result<ChunkStream, Verdict> {
        body["stream"] = true.into();
        match self.generate(endpoint, body.to_string(), true).await? {
            Reply::Stream(chunks) => Ok(chunks),
            Reply::Whole(reply) => {
                Err(Verdict::Failed(format!("no stream but {}: {}", reply.status, String::from_utf8_lossy(&reply.body))))
            }
        }
    }

    /// Asks for a stream and reads all of it.
    pub(super) async fn stream(&self, endpoint: Endpoint, body: Value) -> Result<Streamed, Verdict> {
        read(self.open(endpoint, body).await?).await
    }

    /// Waits until the engine's count of running requests is as wanted.
    pub(super) async fn wait_until_running(&self, within: Duration, wanted: fn(u32) -> bool) -> Checked {
        let mut seen = 0;
        let level = async {
            loop {
                match self.fixture.running().await {
                    None => return Err(Verdict::NotApplicable("the engine does not tell what it works on")),
                    Some(running) if wanted(running) => return Ok(()),
                    Some(running) => seen = running,
                }
                sleep(LOOK_EVERY).await;
            }
        };
        let reached = timeout(within, level).await;
        reached.unwrap_or_else(|_| fail(format!("after {} ms the engine works on {seen} requests", within.as_millis())))
    }
}

/// A request as the host makes it.
pub(super) fn request(endpoint: Endpoint, body: impl Into<Bytes>, stream: bool) -> GenerateRequest {
    GenerateRequest::new(endpoint, body.into(), stream, "conformance".into())
}

/// A stream that was read to its end.
#[derive(Debug)]
pub(super) struct Streamed {
    pub(super) chunks: Vec<Chunk>,
    /// The data of its events but `[DONE]`.
    pub(super) events: Vec<Value>,
}

impl Streamed {
    /// What the first choice says, `text` or `delta.content`, in order.
    pub(super) fn text(&self) -> String {
        self.choices().filter_map(|choice| choice["text"].as_str().or(choice["delta"]["content"].as_str())).collect()
    }

    /// The first choice of each event that has one.
    pub(super) fn choices(&self) -> impl Iterator<Item = &Value> {
        self.events.iter().filter_map(|event| event["choices"].get(0))
    }
}

/// Reads a stream and checks what is true of any good one.
pub(super) async fn read(mut chunks: ChunkStream) -> Result<Streamed, Verdict> {
    let mut streamed = Streamed { chunks: Vec::new(), events: Vec::new() };
    while let Some(item) = chunks.next().await {
        let chunk = item.map_err(|error| Verdict::Failed(error.to_string()))?;
        ensure(!is_done(&streamed), || "a chunk after the one that ends the stream".into())?;
        streamed.chunks.push(chunk);
    }
    ensure(is_done(&streamed), || "the stream ended without its [DONE]".into())?;
    ensure(chunks.next().await.is_none(), || "the stream went on after its end".into())?;
    let bytes: Vec<u8> = streamed.chunks.iter().flat_map(|chunk| chunk.bytes.iter().copied()).collect();
    let events = bytes.strip_suffix(DONE_FRAME).ok_or_else(|| Verdict::Failed("the last bytes are not [DONE]'s".into()))?;
    streamed.events = parse_events(events)?;
    let finishes = streamed.choices().filter(|choice| choice["finish_reason"].is_string()).count();
    ensure(finishes == 1, || format!("{finishes} finish reasons"))?;
    let after = streamed.choices().skip_while(|choice| !choice["finish_reason"].is_string()).skip(1).count();
    ensure(after == 0, || format!("{after} deltas after the finish reason"))?;
    Ok(streamed)
}

fn is_done(streamed: &Streamed) -> bool {
    streamed.chunks.last().is_some_and(|chunk| chunk.summary.done)
}

/// Reads whole events and takes nothing for granted: fields are known, data is JSON, the last one has its blank line.
pub(super) fn parse_events(bytes: &[u8]) -> Result<Vec<Value>, Verdict> {
    let text = str::from_utf8(bytes).map_err(|error| Verdict::Failed(format!("not UTF-8: {error}")))?;
    let mut events = Vec::new();
    let mut data = String::new();
    for line in text.lines() {
        match line.split_once(':') {
            Some(("data", value)) => data.push_str(value.strip_prefix(' ').unwrap_or(value)),
            Some(("" | "event" | "id" | "retry", _)) => {}
            None if line.is_empty() && data.is_empty() => {}
            None if line.is_empty() => {
                let event = serde_json::from_str(&data);
                events.push(event.map_err(|error| Verdict::Failed(format!("an event's data is not JSON ({error}): {data}")))?);
                data.clear();
            }
            _ => return Err(Verdict::Failed(format!("not a line of server-sent events: {line}"))),
        }
    }
    ensure(data.is_empty(), || format!("an event without its end: {data}"))?;
    Ok(events)
}

/// The whole reply, not a stream.
pub(super) fn whole(reply: Reply) -> Result<WholeReply, Verdict> {
    match reply {
        Reply::Whole(reply) => Ok(reply),
        Reply::Stream(_) => Err(Verdict::Failed("a stream instead of a whole answer".into())),
    }
}

/// Fails unless `holds`.
pub(super) fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { fail(otherwise()) }
}

fn fail<T>(seen: String) -> Result<T, Verdict> {
    Err(Verdict::Failed(seen))
}
