//! Relays an engine's answer to the client, and keeps its account: tokens, latencies, load, outcome.
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
use dynamo_host_core::{
    RequestFacts, Worker, WorkerId, WorkerSpec,
    load::{InFlight, Recent},
};
use dynamo_host_policy::{OutcomeRow, PolicyVersion};
use futures_core::Stream;
use futures_util::StreamExt;
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde::Deserialize;
use tokio::time::Sleep;

use crate::{error::RequestError, meters::RequestMeters, observe::Observer, request::Lane};

/// The header under which clients find their request in the log.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The header that names who placed the request.
pub(crate) const POLICY: HeaderName = HeaderName::from_static("x-dynamo-policy");
const WORKER: HeaderName = HeaderName::from_static("x-dynamo-worker");

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

/// A whole answer, as the engine gave it.
pub(crate) fn whole(mut account: Account, head: Head, reply: WholeReply) -> Response {
    #[derive(Deserialize)]
    struct WithUsage {
        usage: Usage,
    }
    account.status = reply.status;
    if reply.status.is_success()
        && let Ok(WithUsage { usage }) = serde_json::from_slice(&reply.body)
    {
        account.tokens(usage.completion_tokens);
        account.usage = Some(usage);
    }
    account.end = if reply.status.is_success() { End::Done } else { End::Failed };
    let mut response = Response::new(Body::from(reply.body));
    *response.status_mut() = reply.status;
    *response.headers_mut() = reply.headers;
    head.apply(&mut response);
    response
}

/// A streamed answer. Waits for the first chunk: until then another worker can be asked.
///
/// # Errors
/// What the stream failed with before its first chunk; the account comes back with it.
pub(crate) async fn stream(
    mut account: Account,
    head: Head,
    mut chunks: ChunkStream,
    idle: Duration,
) -> Result<Response, (Account, EngineError)> {
    let first = match tokio::time::timeout(idle, chunks.next()).await {
        Ok(Some(Ok(chunk))) => chunk,
        Ok(Some(Err(error))) => return Err((account, error)),
        Ok(None) => {
            let engine = account.worker_name();
            return Err((account, EngineError::Incomplete { engine }));
        }
        Err(_) => {
            let error = EngineError::Timeout { engine: account.worker_name(), after: idle };
            return Err((account, error));
        }
    };
    account.status = StatusCode::OK;
    let relay = Relay {
        first: Some(first),
        chunks: Some(chunks),
        account,
        idle,
        last: Instant::now(),
        alarm: Box::pin(tokio::time::sleep(idle)),
    };
    let mut response = Response::new(Body::from_stream(relay));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    head.apply(&mut response);
    Ok(response)
}

/// The body of a streamed answer.
struct Relay {
    first: Option<Chunk>,
    /// `None` when the stream has ended.
    chunks: Option<ChunkStream>,
    account: Account,
    idle: Duration,
    last: Instant,
    /// Looks whether the stream is idle; set again only when it fires, not at every chunk.
    alarm: Pin<Box<Sleep>>,
}

impl Relay {
    fn pass(&mut self, chunk: Chunk) -> Bytes {
        let begun = Instant::now();
        self.last = begun;
        self.account.chunk(&chunk, begun);
        self.account.meters.relay.record(begun.elapsed());
        chunk.bytes
    }

    fn fail(&mut self, error: EngineError) -> Bytes {
        self.chunks = None;
        self.account.end = End::Failed;
        let error = RequestError::from(error);
        self.account.span.in_scope(|| error.record());
        Bytes::from(format!("data: {}\n\n", error.body()))
    }

    fn poll_idle(&mut self, context: &mut Context<'_>) -> Poll<()> {
        while self.alarm.as_mut().poll(context).is_ready() {
            if self.last.elapsed() >= self.idle {
                return Poll::Ready(());
            }
            let next = self.last + self.idle;
            self.alarm.as_mut().reset(next.into());
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
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Ok(relay.fail(error)))),
            Poll::Ready(None) => {
                relay.chunks = None;
                Poll::Ready(None)
            }
            Poll::Pending => match relay.poll_idle(context) {
                Poll::Ready(()) => {
                    let error = EngineError::Timeout { engine: relay.account.worker_name(), after: relay.idle };
                    Poll::Ready(Some(Ok(relay.fail(error))))
                }
                Poll::Pending => Poll::Pending,
            },
        }
    }
}

/// How a request ended: `outcomes.end` of the contract.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Done = 0,
    Cancelled = 1,
    Failed = 2,
}

/// One request on one worker, from dispatch to its end. Closing it is dropping it: there is no way out without.
pub(crate) struct Account {
    meters: RequestMeters,
    observer: Observer,
    version: Option<Arc<PolicyVersion>>,
    in_flight: InFlight,
    worker: WorkerId,
    spec: Arc<WorkerSpec>,
    decision_id: u64,
    endpoint: &'static str,
    prompt_tokens: u32,
    start: Instant,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    output_tokens: u32,
    usage: Option<Usage>,
    status: StatusCode,
    /// Cancelled, until something else is known: a client that leaves just drops the account.
    end: End,
    is_abandoned: bool,
    /// What is logged after the handler has returned belongs to the request all the same.
    span: tracing::Span,
}

/// nginx's status for a client that left before its answer; it is only ever a metric label.
const CLIENT_LEFT: u16 = 499;

impl Account {
    pub(crate) fn open(
        lane: &Lane,
        facts: &RequestFacts,
        worker: &Worker,
        version: Option<Arc<PolicyVersion>>,
        start: Instant,
    ) -> Self {
        lane.meters.in_flight.increment(1.0);
        Self {
            meters: lane.meters.clone(),
            observer: lane.observer.clone(),
            version,
            in_flight: InFlight::dispatch(Arc::clone(&worker.load), facts.prompt.tokens),
            worker: worker.id,
            spec: Arc::clone(&worker.spec),
            decision_id: facts.decision_id,
            endpoint: facts.endpoint.label(),
            prompt_tokens: facts.prompt.tokens,
            start,
            first_token: None,
            last_token: None,
            output_tokens: 0,
            usage: None,
            status: StatusCode::from_u16(CLIENT_LEFT).expect("499 is a status"),
            end: End::Cancelled,
            is_abandoned: false,
            span: tracing::Span::current(),
        }
    }

    /// The request goes on elsewhere: only the worker's load and error rate are settled.
    pub(crate) fn abandon(mut self) {
        self.is_abandoned = true;
    }

    fn worker_name(&self) -> String {
        format!("worker {}", self.spec.name)
    }

    fn chunk(&mut self, chunk: &Chunk, now: Instant) {
        let summary = &chunk.summary;
        if summary.tokens > 0 {
            match self.last_token {
                None => {
                    self.first_token = Some(now);
                    self.meters.ttft.record(now - self.start);
                }
                Some(last) => self.meters.itl.record((now - last) / summary.tokens),
            }
            self.last_token = Some(now);
            self.tokens(summary.tokens);
        }
        self.usage = summary.usage.or(self.usage);
        if summary.done {
            self.end = End::Done;
        }
    }

    fn tokens(&mut self, count: u32) {
        self.output_tokens = self.output_tokens.saturating_add(count);
        self.in_flight.tokens(count);
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.meters.in_flight.decrement(1.0);
        let load = self.in_flight.slot();
        if self.end != End::Cancelled || self.is_abandoned {
            let failed = self.is_abandoned || self.end == End::Failed && !self.status.is_client_error();
            load.observe(Recent::ErrorRate, if failed { 1.0 } else { 0.0 });
        }
        if self.is_abandoned {
            return;
        }
        let ms = |duration: Duration| duration.as_secs_f32() * 1000.0;
        let ttft_ms = self.first_token.map_or(f32::NAN, |first| ms(first - self.start));
        let itl_ms = match (self.first_token, self.last_token) {
            (Some(first), Some(last)) if self.output_tokens > 1 => ms(last - first) / (self.output_tokens - 1) as f32,
            _ => f32::NAN,
        };
        for (recent, value) in [(Recent::TtftMs, ttft_ms), (Recent::ItlMs, itl_ms)] {
            if !value.is_nan() {
                load.observe(recent, value);
            }
        }
        let usage = self.usage.unwrap_or(Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.output_tokens,
            prompt_tokens_details: None,
        });
        self.meters.prompt_tokens.increment(u64::from(usage.prompt_tokens));
        self.meters.output_tokens.increment(u64::from(usage.completion_tokens));
        self.meters.seconds.record(self.start.elapsed());
        count_request(self.endpoint, &self.spec.model, self.status);
        if let Some(version) = self.version.take() {
            let row = OutcomeRow {
                decision_id: self.decision_id,
                worker_id: self.worker.0,
                ttft_ms,
                itl_ms,
                output_tokens: usage.completion_tokens,
                end: self.end as u32,
            };
            self.observer.tell(version, row);
        }
        tracing::debug!(parent: &self.span, status = self.status.as_u16(), tokens = usage.completion_tokens, ttft_ms, itl_ms, "request ended");
    }
}

/// Counts a request that has been answered, or left. `model` must be one that is served: clients may not make labels.
pub(crate) fn count_request(endpoint: &'static str, model: &str, status: StatusCode) {
    metrics::counter!(
        "dynamo_host_requests_total",
        "endpoint" => endpoint, "model" => model.to_owned(), "code" => status.as_u16().to_string()
    )
    .increment(1);
}
