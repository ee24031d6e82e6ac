//! Parts: a request of several choices or prompts where nobody serves that as it is, served as one request for each choice.
//!
//! Engines that only prefill or decode for each other hand over one prompt with one answer: SGLang has one room for all choices of a request, and
//! hangs. So each choice of each prompt is dispatched like a request of its own, with its own hand-off, and the answers are put together
//! again ([`merge`]). Rejected: rooms as arrays, which SGLang takes for batches of prompts alone, and not for `n`.
//!
//! Invariants: the request is let in once, holds one place among those that run, and is counted once ([`Sum`]); each part is placed, retried and
//! carried on for itself, with a receipt of its own. A part that fails for good fails the request, and ends the others, and so does a
//! client that leaves. Parts are as many as `limits.max_choices` at most, and their bodies no more bytes than `limits.max_body_bytes`.

mod merge;

use std::{convert::Infallible, sync::Arc, time::Instant};

use axum::{
    body::{Body, to_bytes},
    response::Response,
};
use bytes::Bytes;
use dynamo_engine_api::{Endpoint, EngineError, GenerateRequest};
use dynamo_host_core::RequestFacts;
use futures_util::{
    FutureExt, StreamExt,
    future::{BoxFuture, try_join_all},
    stream::{self, BoxStream, SelectAll},
};
use http::{HeaderValue, header::CONTENT_TYPE, response};
use tracing::{Instrument, Span};

use self::merge::Merge;
use crate::{
    account::{Client, Sum},
    admit::Permit,
    config::{Limits, Migration},
    decode::{self, Bounds, Parts, decode},
    dispatch::{Asked, Dispatch},
    error::{Audience, RequestError},
    relay::Patience,
    request::{self, Lane, Notes},
    roster::Snapshot,
};

/// A request that is to be served in parts.
pub(crate) struct Several {
    pub(crate) asked: Asked,
    pub(crate) facts: RequestFacts,
    pub(crate) permit: Permit,
    pub(crate) patience: Patience,
    pub(crate) migration: Arc<Migration>,
    pub(crate) accepted: Instant,
    /// Since when the host has it, but for the time that it waited.
    pub(crate) since: Instant,
    pub(crate) bounds: Bounds,
}

/// The parts of a request, if that is the only way to serve it now.
///
/// # Errors
/// Why it has none, where it would have to.
pub(crate) fn of(
    lane: &Lane,
    snapshot: &Snapshot,
    facts: &RequestFacts,
    body: &Bytes,
    limits: &Limits,
) -> Result<Option<Parts>, RequestError> {
    if facts.choices < 2 || !snapshot.has_way_in_parts_only(facts, lane.roster.links()) {
        return Ok(None);
    }
    decode::parts(body, facts.prompts, facts.choices, limits.max_choices, limits.max_body_bytes).map(Some)
}

/// Serves a request in its parts.
///
/// # Errors
/// What one of them failed with, before anything was answered.
pub(crate) async fn serve(lane: &Arc<Lane>, several: Several, parts: Parts, notes: &mut Notes) -> Result<Response, RequestError> {
    let sum = Sum::new(lane, &several.facts, several.accepted);
    let (is_stream, endpoint) = (several.asked.ask.stream, several.facts.endpoint);
    let merge = Merge::new(parts.choices, parts.bodies.len());
    let answered = async {
        let tasks = begin(lane, several, parts, &sum).await.map_err(|error| Failure::Failed(error, None))?;
        if is_stream { streamed(tasks, merge, endpoint, lane.audience(), &sum).await } else { whole(tasks, &merge).await }
    };
    let answered = answered.await;
    match answered {
        Ok(response) => {
            sum.answer(response.status());
            Ok(response)
        }
        // What an engine says no with is the answer.
        Err(Failure::Refused(response)) => {
            sum.answer(response.status());
            Ok(*response)
        }
        Err(Failure::Failed(error, policy)) => {
            sum.set_aside();
            notes.policy = policy;
            Err(error)
        }
    }
}

/// A part that has begun to be answered, or why it is not.
type Task = BoxFuture<'static, Result<Response, Failure>>;

/// Why a part is not answered as it should be.
enum Failure {
    /// An engine's own word.
    Refused(Box<Response>),
    /// The host's, and who decided last.
    Failed(RequestError, Option<String>),
}

impl Failure {
    fn by_engine(reason: &str) -> Self {
        let error = EngineError::Protocol { engine: "an engine".to_owned(), reason: reason.to_owned() };
        Self::Failed(error.into(), None)
    }

    /// The event that ends a stream which had begun.
    async fn event(self, endpoint: Endpoint, audience: Audience) -> Bytes {
        match self {
            Self::Refused(response) => merge::error_event(&to_bytes(response.into_body(), usize::MAX).await.unwrap_or_default()),
            Self::Failed(error, _) => {
                error.record();
                error.event(endpoint, audience)
            }
        }
    }
}

/// What it takes to serve each part. Nothing is asked of anybody before that is polled.
async fn begin(lane: &Arc<Lane>, several: Several, parts: Parts, sum: &Arc<Sum>) -> Result<Vec<Task>, RequestError> {
    let Several { asked, facts, permit, patience, migration, since, bounds, .. } = several;
    let mut one = RequestFacts { choices: 1, prompts: 1, ..facts.clone() };
    let mut prompt = Arc::clone(&asked.prompt);
    let mut tasks: Vec<Task> = Vec::with_capacity(parts.bodies.len());
    for (index, body) in parts.bodies.into_iter().enumerate() {
        if facts.prompts > 1 && index % parts.choices == 0 {
            let own = decode(facts.endpoint, facts.id.clone(), body.clone(), bounds)?.facts;
            (one.prompt, one.prefix_key) = (own.prompt, own.prefix_key);
            let snapshot = lane.roster.snapshot();
            prompt = Arc::new(lane.prefixes.read(&mut one, &body, &snapshot).await);
        }
        let asked = Asked {
            ask: GenerateRequest { body, ..asked.ask.clone() },
            pinned: asked.pinned.clone(),
            prompt: Arc::clone(&prompt),
            recorder: asked.recorder.clone(),
            returns_ids: asked.returns_ids,
        };
        let (lane, mut facts, permit, migration) = (Arc::clone(lane), one.clone(), permit.clone(), Arc::clone(&migration));
        let client = Client::part(sum, index / parts.choices);
        let task = async move {
            let (mut notes, is_stream) = (Notes::default(), asked.ask.stream);
            let dispatch = Dispatch::new(&lane, asked, permit, client, patience, migration);
            match request::answered(dispatch, &mut facts, &mut notes, since).await {
                Ok(response) if !response.status().is_success() => Err(Failure::Refused(Box::new(response))),
                Ok(response) if is_stream != is_event_stream(&response) => {
                    Err(Failure::by_engine("it does not answer as a stream what it is asked for as one, or the other way"))
                }
                Ok(response) => Ok(response),
                Err(error) => Err(Failure::Failed(error, notes.policy)),
            }
        };
        tasks.push(task.instrument(Span::current()).boxed());
    }
    Ok(tasks)
}

fn is_event_stream(response: &Response) -> bool {
    response.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes).is_some_and(|kind| kind.starts_with(b"text/event-stream"))
}

/// The whole answers of all parts as one.
async fn whole(tasks: Vec<Task>, merge: &Merge) -> Result<Response, Failure> {
    let mut responses = try_join_all(tasks).await?.into_iter();
    let (mut head, mut answers) = (None, Vec::with_capacity(responses.len()));
    for response in &mut responses {
        let (parts, body) = response.into_parts();
        head.get_or_insert(parts);
        // It is in memory already.
        answers.push(to_bytes(body, usize::MAX).await.unwrap_or_default());
    }
    let body = merge.whole(&answers).ok_or_else(|| Failure::by_engine("its answer is no JSON object with choices"))?;
    Ok(Response::from_parts(head.expect("there are several parts"), Body::from(body)))
}

/// What comes of a part that is streamed.
enum Piece {
    Begun(response::Parts),
    Frames(Bytes),
    End,
    Failed(Failure),
}

fn pieces((part, task): (usize, Task)) -> BoxStream<'static, (usize, Piece)> {
    let pieces = task.into_stream().flat_map(|answered| match answered {
        Err(failure) => stream::once(async { Piece::Failed(failure) }).boxed(),
        Ok(response) => {
            let (head, body) = response.into_parts();
            // A body of the host's cannot fail.
            let frames = body.into_data_stream().filter_map(|frames| async { frames.ok().map(Piece::Frames) });
            let begun = stream::once(async { Piece::Begun(head) });
            begun.chain(frames).chain(stream::once(async { Piece::End })).boxed()
        }
    });
    pieces.map(move |piece| (part, piece)).boxed()
}

/// The streams of all parts as one, which begins with the first of them.
async fn streamed(
    tasks: Vec<Task>,
    merge: Merge,
    endpoint: Endpoint,
    audience: Audience,
    sum: &Arc<Sum>,
) -> Result<Response, Failure> {
    let mut pieces: SelectAll<_> = tasks.into_iter().enumerate().map(pieces).collect();
    let head = match pieces.next().await {
        Some((_, Piece::Begun(head))) => head,
        Some((_, Piece::Failed(failure))) => return Err(failure),
        _ => return Err(Failure::by_engine("it ended before it began")),
    };
    let merged = Merged { pieces, merge, endpoint, audience, span: Span::current(), is_over: false, _sum: Arc::clone(sum) };
    let frames = stream::unfold(merged, |mut merged| async move {
        let span = merged.span.clone();
        let frames = merged.next().instrument(span).await?;
        Some((Ok::<_, Infallible>(frames), merged))
    });
    Ok(Response::from_parts(head, Body::from_stream(frames)))
}

/// A streamed answer in parts. Dropped, all of them end, and then what they are summed up in.
struct Merged {
    pieces: SelectAll<BoxStream<'static, (usize, Piece)>>,
    merge: Merge,
    endpoint: Endpoint,
    audience: Audience,
    span: Span,
    is_over: bool,
    _sum: Arc<Sum>,
}

impl Merged {
    /// The next frames for the client; `None` at the end.
    async fn next(&mut self) -> Option<Bytes> {
        while let Some((part, piece)) = self.pieces.next().await {
            let failure = match piece {
                Piece::Begun(_) => continue,
                Piece::Frames(frames) => {
                    let (frames, is_error) = self.merge.frames(part, &frames);
                    if is_error {
                        self.cancel();
                    }
                    if frames.is_empty() {
                        continue;
                    }
                    return Some(frames);
                }
                Piece::End if self.merge.is_done(part) => continue,
                Piece::End => Failure::by_engine("its stream ended without an end"),
                Piece::Failed(failure) => failure,
            };
            self.cancel();
            return Some(failure.event(self.endpoint, self.audience).await);
        }
        if std::mem::replace(&mut self.is_over, true) { None } else { Some(self.merge.end()) }
    }

    /// One part failed: nobody waits for the others.
    fn cancel(&mut self) {
        self.pieces.clear();
        self.is_over = true;
    }
}
