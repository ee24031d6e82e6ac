//! Relays an engine's answer to the client.
//!
//! Contract: chunks go out as they came in, none is held back for another; a client that leaves drops the stream, and
//! with it the engine's work. A stream that fails after it began says so in an error event in OpenAI's shape and ends
//! without `[DONE]`: what is cut short must not look complete.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::{body::Body, response::Response};
use bytes::Bytes;
use dynamo_engine_api::{Chunk, ChunkStream, EngineError, Usage, WholeReply};
use futures_core::Stream;
use futures_util::StreamExt;
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde::Deserialize;
use tokio::time::Sleep;

use crate::{
    account::{Account, End},
    admit::Permit,
    config::Limits,
    error::{Audience, RequestError},
};

/// The header under which clients find their request in the log.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The header that names who placed the request.
pub(crate) const POLICY: HeaderName = HeaderName::from_static("x-dynamo-policy");
/// The header that names the worker, where workers are exposed.
pub(crate) const WORKER: HeaderName = HeaderName::from_static("x-dynamo-worker");

/// What the host says about an answer.
pub(crate) struct Head {
    pub(crate) policy: String,
    pub(crate) worker: Option<String>,
    pub(crate) request_id: Arc<str>,
}

impl Head {
    fn apply(self, response: &mut Response) {
        let headers = response.headers_mut();
        let mut set = |name, value: &str| {
            // What cannot be a header value came from the operator's own names: leave it out.
            if let Ok(value) = HeaderValue::from_str(value) {
                headers.insert(name, value);
            }
        };
        set(REQUEST_ID, &self.request_id);
        set(POLICY, &self.policy);
        if let Some(worker) = &self.worker {
            set(WORKER, worker);
        }
    }
}

/// How long an answer may go on.
pub(crate) struct Patience {
    /// How long it may be silent.
    pub(crate) idle: Duration,
    /// When it must have ended.
    pub(crate) deadline: Instant,
    /// The time from the request to its deadline, for people.
    pub(crate) timeout: Duration,
}

impl Patience {
    /// For a request that was accepted at this moment, and that its client may give less time than it could have.
    pub(crate) fn since(accepted: Instant, limits: &Limits, clients: Option<Duration>) -> Self {
        let timeout = clients.unwrap_or(Duration::MAX).min(limits.request_timeout());
        Self { idle: limits.stream_idle(), deadline: accepted + timeout, timeout }
    }

    pub(crate) fn exceeded(&self) -> RequestError {
        RequestError::Deadline { seconds: self.timeout.as_secs_f64() }
    }
}

/// A whole answer, as the engine gave it.
pub(crate) fn whole(mut account: Account, mut permit: Option<Permit>, head: Head, reply: WholeReply) -> Response {
    #[derive(Deserialize)]
    struct WithUsage {
        usage: Usage,
    }
    let end = match reply.status {
        status if status.is_success() => End::Done,
        status if status.is_client_error() => End::Rejected,
        _ => End::Failed,
    };
    account.answer(reply.status, Some(end));
    if end == End::Done
        && let Ok(WithUsage { usage }) = serde_json::from_slice(&reply.body)
    {
        if let Some(permit) = &mut permit {
            permit.output(usage.completion_tokens);
        }
        account.usage(usage);
    }
    let mut response = Response::new(Body::from(reply.body));
    *response.status_mut() = reply.status;
    *response.headers_mut() = reply.headers;
    head.apply(&mut response);
    response
}

/// A streamed answer that has begun.
pub(crate) fn stream(
    mut account: Account,
    permit: Option<Permit>,
    head: Head,
    first: Chunk,
    chunks: ChunkStream,
    patience: Patience,
    audience: Audience,
) -> Response {
    account.answer(StatusCode::OK, None);
    let last = Instant::now();
    let alarm = tokio::time::sleep_until((last + patience.idle).min(patience.deadline).into());
    let relay =
        Relay { first: Some(first), chunks: Some(chunks), account, permit, patience, audience, last, alarm: Box::pin(alarm) };
    let mut response = Response::new(Body::from_stream(relay));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    head.apply(&mut response);
    response
}

/// The body of a streamed answer.
struct Relay {
    first: Option<Chunk>,
    /// `None` when the stream has ended.
    chunks: Option<ChunkStream>,
    account: Account,
    permit: Option<Permit>,
    patience: Patience,
    audience: Audience,
    last: Instant,
    /// Looks whether the stream is idle or late; set again only when it fires, not at every chunk.
    alarm: Pin<Box<Sleep>>,
}

impl Relay {
    fn pass(&mut self, chunk: Chunk) -> Bytes {
        let begun = Instant::now();
        if begun >= self.patience.deadline {
            return self.fail(&self.patience.exceeded());
        }
        self.last = begun;
        self.account.chunk(&chunk, begun);
        if let Some(permit) = &mut self.permit {
            permit.output(chunk.summary.tokens);
        }
        self.account.relayed += begun.elapsed();
        chunk.bytes
    }

    fn fail(&mut self, error: &RequestError) -> Bytes {
        self.chunks = None;
        if let RequestError::Engine(error) = error {
            self.account.blame(error);
        }
        self.account.fail();
        self.account.span.in_scope(|| error.record());
        error.event(self.account.endpoint(), self.audience)
    }

    /// Ready when the stream has been silent for too long, or its time is over.
    fn poll_late(&mut self, context: &mut Context<'_>) -> Poll<RequestError> {
        while self.alarm.as_mut().poll(context).is_ready() {
            let now = Instant::now();
            let idle_until = self.last + self.patience.idle;
            if now >= self.patience.deadline {
                return Poll::Ready(self.patience.exceeded());
            }
            if now >= idle_until {
                let engine = format!("worker {}", self.account.worker());
                return Poll::Ready(EngineError::Timeout { engine, after: self.patience.idle }.into());
            }
            self.alarm.as_mut().reset(idle_until.min(self.patience.deadline).into());
        }
        Poll::Pending
    }
}

impl Stream for Relay {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let relay = &mut *self;
        if let Some(chunk) = relay.first.take() {
            return Poll::Ready(Some(Ok(relay.pass(chunk))));
        }
        let Some(chunks) = &mut relay.chunks else { return Poll::Ready(None) };
        match chunks.poll_next_unpin(context) {
            Poll::Ready(Some(Ok(chunk))) => Poll::Ready(Some(Ok(relay.pass(chunk)))),
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Ok(relay.fail(&error.into())))),
            Poll::Ready(None) => {
                relay.chunks = None;
                Poll::Ready(None)
            }
            Poll::Pending => relay.poll_late(context).map(|error| Some(Ok(relay.fail(&error)))),
        }
    }
}
