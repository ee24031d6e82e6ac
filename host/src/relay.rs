//! Relays an engine's answer to the client.
//!
//! Contract: chunks go out as they came in, none is held back for another; a client that leaves drops the stream, and
//! with it the engine's work. A stream whose worker is lost goes on with another ([`migrate`]). Where that cannot be, it says so
//! in an error event in the shape of the client's API and ends without `[DONE]`: what is cut short must not look complete.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use axum::{body::Body, response::Response};
use bytes::Bytes;
use dynamo_engine_api::{Chunk, ChunkStream, Endpoint, Engine, EngineError, Usage, WholeReply};
use futures_core::Stream;
use futures_util::StreamExt;
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde::Deserialize;
use tokio::time::Sleep;

use crate::{
    account::{Account, Books, End},
    admit::Permit,
    config::Limits,
    error::{Audience, RequestError},
    handoff::Beside,
    migrate::{self, Course, LOOK_EVERY, Loss, Lost, Record, Rest, RestStream, Vigil, has_choices, without_ids},
    retry_after,
    text::plain,
};

/// The header under which clients find their request in the log.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The header that names who placed the request.
pub(crate) const POLICY: HeaderName = HeaderName::from_static("x-dynamo-policy");
/// The header that names the worker, where workers are exposed.
pub(crate) const WORKER: HeaderName = HeaderName::from_static("x-dynamo-worker");

/// The header that names the worker that computed the prompt, if that is another.
pub(crate) const PREFILL_WORKER: HeaderName = HeaderName::from_static("x-dynamo-prefill-worker");

/// What the host says about an answer.
pub(crate) struct Head {
    pub(crate) policy: String,
    pub(crate) worker: Option<String>,
    pub(crate) prefill_worker: Option<String>,
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
        for (name, worker) in [(WORKER, &self.worker), (PREFILL_WORKER, &self.prefill_worker)] {
            if let Some(worker) = worker {
                set(name, worker);
            }
        }
    }
}

/// How long an answer may go on.
#[derive(Clone, Copy)]
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
pub(crate) fn whole(mut account: Account, permit: Option<Permit>, head: Head, reply: WholeReply) -> Response {
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
        if let Some(permit) = &permit {
            permit.output(usage.completion_tokens);
        }
        account.usage(usage);
    }
    // Its place on the worker first: whoever is given its permit must find that free.
    drop(account);
    drop(permit);
    let mut response = Response::new(Body::from(reply.body));
    *response.status_mut() = reply.status;
    *response.headers_mut() = reply.headers;
    retry_after::bound(response.headers_mut());
    head.apply(&mut response);
    response
}

/// The beginning of a streamed answer.
pub(crate) struct Begun {
    pub(crate) account: Account,
    pub(crate) permit: Option<Permit>,
    pub(crate) first: Chunk,
    pub(crate) chunks: ChunkStream,
    pub(crate) vigil: Vigil,
    pub(crate) patience: Patience,
    /// Ends with the worker's part of the stream, or when the client leaves.
    pub(crate) beside: Option<Beside>,
}

/// A streamed answer that has begun. `course`: how it goes on if its worker is lost.
pub(crate) fn stream(
    begun: Begun,
    head: Head,
    course: Option<Box<Course>>,
    engine: Arc<dyn Engine>,
    audience: Audience,
) -> Response {
    let Begun { mut account, permit, first, chunks, vigil, patience, beside } = begun;
    account.answer(StatusCode::OK, None);
    let last = Instant::now();
    let alarm = tokio::time::sleep_until((last + LOOK_EVERY).min(patience.deadline).into());
    let endpoint = account.endpoint();
    let movable = course.map(|course| Movable {
        record: Record::new(endpoint, course.migration.max_kept_bytes),
        // Engines are asked for ids of what can go on with them.
        strips_ids: has_choices(endpoint) && !course.returns_ids,
        unfinished: course.facts.choices,
        course,
        engine,
    });
    let relay = Relay {
        source: Source::Worker { first: Some(first), chunks, account, _beside: beside },
        movable,
        endpoint,
        permit,
        patience,
        audience,
        vigil,
        last,
        alarm: Box::pin(alarm),
    };
    event_stream(Body::from_stream(relay), head)
}

/// A stream of events that is there as a whole: what an engine gave as a whole answer, to a client that wants a stream.
pub(crate) fn finished(
    mut account: Account,
    permit: Option<Permit>,
    head: Head,
    events: Bytes,
    usage: Option<Usage>,
) -> Response {
    account.answer(StatusCode::OK, Some(End::Done));
    account.first_token();
    if let Some(usage) = usage {
        if let Some(permit) = &permit {
            permit.output(usage.completion_tokens);
        }
        account.usage(usage);
    }
    drop(account);
    drop(permit);
    event_stream(Body::from(events), head)
}

fn event_stream(body: Body, head: Head) -> Response {
    let mut response = Response::new(body);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    head.apply(&mut response);
    response
}

/// The body of a streamed answer.
struct Relay {
    source: Source,
    /// What it takes to go on elsewhere, until that is done.
    movable: Option<Movable>,
    endpoint: Endpoint,
    permit: Option<Permit>,
    patience: Patience,
    audience: Audience,
    vigil: Vigil,
    last: Instant,
    /// Looks whether the worker is lost or the request late; set again only when it fires, not at every chunk.
    alarm: Pin<Box<Sleep>>,
}

/// Where the frames come from.
#[expect(clippy::large_enum_variant, reason = "there is one for each stream, and nearly all are the large one")]
enum Source {
    /// The worker that began, whose frames pass as they are.
    Worker {
        first: Option<Chunk>,
        chunks: ChunkStream,
        account: Account,
        /// What works beside it.
        _beside: Option<Beside>,
    },
    /// Others, since that was lost.
    Others {
        rest: RestStream,
        books: Books,
    },
    Ended,
}

/// What it takes to go on elsewhere.
struct Movable {
    course: Box<Course>,
    engine: Arc<dyn Engine>,
    record: Record,
    strips_ids: bool,
    /// Choices that have not told their finish.
    unfinished: u32,
}

impl Movable {
    /// Whether a choice has begun that the last chunk, and all before it, do not finish.
    fn lacks(&mut self, last: &Chunk) -> bool {
        self.record.keep(&last.bytes);
        self.record.has_unfinished()
    }

    /// Keeps what the client gets, and takes out of it what it did not ask for.
    fn pass(&mut self, bytes: Bytes) -> Bytes {
        self.record.keep(&bytes);
        self.strip(bytes)
    }

    fn strip(&self, bytes: Bytes) -> Bytes {
        if self.strips_ids { without_ids(bytes) } else { bytes }
    }
}

impl Relay {
    /// What the client gets of a chunk; `None`: it said that the worker is lost.
    fn pass(&mut self, chunk: Chunk) -> Option<Bytes> {
        let Source::Worker { account, .. } = &mut self.source else { return None };
        let begun = Instant::now();
        if begun >= self.patience.deadline {
            return Some(self.fail(&self.patience.exceeded()));
        }
        let mut chunk = chunk;
        let mut lacks_choices = false;
        if let Some(movable) = &mut self.movable {
            movable.unfinished = movable.unfinished.saturating_sub(chunk.summary.finishes);
            // One that was never heard of was not understood: some engines know no `n`.
            if chunk.summary.done && movable.unfinished > 0 && movable.lacks(&chunk) {
                // It says that it is done with what it is not: that does not pass.
                lacks_choices = true;
                let before = chunk.ending().map_or(0, |ending| ending.at.start);
                chunk = chunk.until(before).unwrap_or_else(|| Chunk::new(Bytes::new()));
            }
        }
        self.last = begun;
        account.chunk(&chunk, begun);
        if let Some(permit) = &self.permit {
            permit.output(chunk.summary.tokens);
        }
        let bytes = match &mut self.movable {
            // The last one is kept already, or needs not be.
            Some(movable) if chunk.summary.done || lacks_choices => movable.strip(chunk.bytes),
            Some(movable) => movable.pass(chunk.bytes),
            None => chunk.bytes,
        };
        account.relayed += begun.elapsed();
        if lacks_choices {
            let error = EngineError::Incomplete { engine: format!("worker {}", account.worker()) };
            let failed = self.lost(error.label(), error);
            return match (bytes.is_empty(), failed) {
                (false, None) => Some(bytes),
                (true, failed) => failed,
                (false, Some(failed)) => Some([bytes, failed].concat().into()),
            };
        }
        Some(bytes)
    }

    /// The worker is lost: others go on, or the client is told why not.
    fn lost(&mut self, cause: &'static str, failure: EngineError) -> Option<Bytes> {
        let Source::Worker { account, .. } = &mut self.source else { return None };
        let is_refusal = matches!(failure, EngineError::InStream { refused: true, .. });
        let Some(Movable { course, engine, record, .. }) = self.movable.take().filter(|_| !is_refusal) else {
            return Some(self.fail(&failure.into()));
        };
        let span = account.span.clone();
        span.in_scope(|| tracing::warn!(worker = account.worker(), "stream lost: {}", plain(&failure.to_string())));
        course.lane.roster.report_failed(account.worker_id(), &engine, &failure);
        account.blame(&failure);
        let loss = Loss { failure, cause, silent_since: self.last };
        match migrate::carry_on(*course, record, loss, span) {
            Ok(rest) => {
                let books = Books::take_over(account);
                // The lost worker's account and connection are closed with this, and what works beside it ends.
                self.source = Source::Others { rest, books };
                None
            }
            Err(error) => Some(self.fail(&error)),
        }
    }

    fn fail(&mut self, error: &RequestError) -> Bytes {
        match std::mem::replace(&mut self.source, Source::Ended) {
            Source::Worker { mut account, .. } => {
                if let RequestError::Engine(error) = error {
                    account.blame(error);
                }
                account.fail();
                account.span.in_scope(|| error.record());
            }
            Source::Others { books, .. } => books.span.in_scope(|| error.record()),
            Source::Ended => {}
        }
        error.event(self.endpoint, self.audience)
    }

    /// Ready when the worker is lost, or the stream's time is over.
    fn poll_late(&mut self, context: &mut Context<'_>) -> Poll<Result<Lost, RequestError>> {
        while self.alarm.as_mut().poll(context).is_ready() {
            let now = Instant::now();
            if now >= self.patience.deadline {
                return Poll::Ready(Err(self.patience.exceeded()));
            }
            let has_tokens = !matches!(&self.source, Source::Worker { account, .. } if !account.has_tokens());
            if let Some(lost) = self.vigil.within(self.last, now, has_tokens)
                && self.is_worth_it(lost)
            {
                return Poll::Ready(Ok(lost));
            }
            self.alarm.as_mut().reset((now + LOOK_EVERY).min(self.patience.deadline).into());
        }
        Poll::Pending
    }

    /// Whether a lost worker is left: one that is silent only if there is another.
    fn is_worth_it(&self, lost: Lost) -> bool {
        match (lost, &self.movable, &self.source) {
            (Lost::Stalled { .. }, Some(movable), Source::Worker { account, .. }) => {
                movable.course.has_other(account.worker_id())
            }
            _ => true,
        }
    }

    /// The next frames of the worker that began. `Ready(None)`: it is that worker's no more.
    fn poll_worker(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let Source::Worker { first, chunks, account, .. } = &mut self.source else { return Poll::Ready(None) };
        if let Some(chunk) = first.take() {
            return Poll::Ready(self.pass(chunk));
        }
        let failure = match chunks.poll_next_unpin(context) {
            Poll::Ready(Some(Ok(chunk))) => return Poll::Ready(self.pass(chunk)),
            Poll::Ready(Some(Err(failure))) => failure,
            Poll::Ready(None) if account.has_ended() => {
                self.source = Source::Ended;
                return Poll::Ready(None);
            }
            Poll::Ready(None) => EngineError::Incomplete { engine: format!("worker {}", account.worker()) },
            Poll::Pending => {
                let worker = account.worker().to_owned();
                return match ready!(self.poll_late(context)) {
                    Ok(lost) => Poll::Ready(self.lost(lost.label(), lost.error(&worker, self.patience.idle))),
                    Err(error) => Poll::Ready(Some(self.fail(&error))),
                };
            }
        };
        Poll::Ready(self.lost(failure.label(), failure))
    }

    /// The next frames of those who went on.
    fn poll_others(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let Source::Others { rest, books } = &mut self.source else { return Poll::Ready(None) };
        match ready!(rest.poll_next_unpin(context)) {
            Some(Ok(Rest::Frames(frames, tokens))) => {
                books.tokens(tokens);
                if let Some(permit) = &self.permit {
                    permit.output(tokens);
                }
                Poll::Ready(Some(frames))
            }
            Some(Ok(Rest::End(frames, prompt, output))) => {
                books.usage(prompt, output);
                self.source = Source::Ended;
                Poll::Ready(Some(frames))
            }
            Some(Err(error)) => Poll::Ready(Some(self.fail(&error))),
            None => {
                self.source = Source::Ended;
                Poll::Ready(None)
            }
        }
    }
}

impl Stream for Relay {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let relay = &mut *self;
        loop {
            let frames = match &relay.source {
                Source::Worker { .. } => ready!(relay.poll_worker(context)),
                Source::Others { .. } => ready!(relay.poll_others(context)),
                Source::Ended => return Poll::Ready(None),
            };
            if let Some(frames) = frames.filter(|frames| !frames.is_empty()) {
                return Poll::Ready(Some(Ok(frames)));
            }
        }
    }
}
