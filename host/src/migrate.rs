//! Migration: streams whose worker is lost go on with another one, and their clients see one unbroken stream.
//!
//! Contract: [`Course`] is what a request needs to be given to another worker, and [`Record`] what its client has; when a
//! worker is lost, [`carry_on`] makes the rest of the stream of both. Each choice that is not finished goes its own way (a
//! [`leg`]), asked of an engine in a form that it takes ([`ask`]); what comes is made part of the client's stream ([`splice`]),
//! with care for the place where the two meet ([`seam`]). One worker goes on, or, where nobody serves whole requests, two do: one
//! computes the prompt and what there is of the answer, the other makes the rest.
//! Streams without choices go on as chats ([`nested`]).
//!
//! Invariants: no token is lost or doubled; a stream has one role for each choice, one finish, one `[DONE]`; what cannot go on
//! soundly ends in an error that says why (`migration_unsound`), and without `[DONE]`.

mod ask;
mod ids;
mod leg;
mod nested;
mod record;
mod seam;
mod splice;
#[cfg(test)]
mod tests;
mod vigil;

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use dynamo_engine_api::{Endpoint, EngineError, GenerateRequest};
use dynamo_host_core::{RequestFacts, WorkerId, request::flags};
use dynamo_host_index::Prompt;
use dynamo_host_policy::Pinned;
use futures_util::{
    Stream, StreamExt,
    stream::{self, BoxStream, SelectAll},
};
use tracing::{Instrument, Span};

use self::{
    ask::{Original, Unsound},
    leg::{Leg, Piece, Shared},
    record::Choice,
    splice::Splice,
};
pub(crate) use self::{
    ids::without_ids,
    record::Record,
    vigil::{LOOK_EVERY, Lost, Vigil},
};
use crate::{
    account::Client, admit::Heard, config::Migration, error::RequestError, receipts::Recorder, relay::Patience, request::Lane,
};

/// What it takes to give a request to another worker.
#[derive(Clone)]
pub(crate) struct Course {
    pub(crate) lane: Arc<Lane>,
    pub(crate) migration: Arc<Migration>,
    pub(crate) pinned: Pinned,
    pub(crate) facts: RequestFacts,
    /// Workers that it was given to.
    pub(crate) attempts: u32,
    pub(crate) prompt: Arc<Prompt>,
    pub(crate) ask: GenerateRequest,
    pub(crate) recorder: Option<Recorder>,
    pub(crate) patience: Patience,
    pub(crate) client: Client,
    /// The admission policy that wants to hear of each attempt.
    pub(crate) heard: Option<Arc<Heard>>,
    /// Whether the client asked for token ids itself.
    pub(crate) returns_ids: bool,
}

impl Course {
    /// Whether somebody else could go on with what a worker has.
    pub(crate) fn has_other(&self, worker: WorkerId) -> bool {
        let endpoint = asked_as(self.facts.endpoint);
        let facts = RequestFacts { failed_workers: vec![worker], endpoint, ..self.facts.clone() };
        let snapshot = self.lane.roster.snapshot();
        snapshot.candidates(&facts).is_ok() || snapshot.is_left_to_pairs(&facts, self.lane.roster.links())
    }
}

/// How a worker was lost.
pub(crate) struct Loss {
    pub(crate) failure: EngineError,
    /// Its label in metrics.
    pub(crate) cause: &'static str,
    /// Since when the client waits.
    pub(crate) silent_since: Instant,
}

/// A piece of the rest of a stream.
pub(crate) enum Rest {
    /// Frames for the client, and how many tokens they hold.
    Frames(Bytes, u32),
    /// The last frames, and what the whole stream had: tokens of prompt and output.
    End(Bytes, u32, u32),
}

/// The rest of a stream, made by other workers.
pub(crate) type RestStream = BoxStream<'static, Result<Rest, RequestError>>;

/// Goes on with a stream.
///
/// # Errors
/// Why nobody can.
pub(crate) fn carry_on(course: Course, mut record: Record, loss: Loss, span: Span) -> Result<RestStream, RequestError> {
    let refuse = |reason| {
        metrics::counter!("dynamo_host_migrations_total", "cause" => loss.cause, "result" => "unsound").increment(1);
        Err(RequestError::MigrationUnsound { failure: loss.failure.clone(), reason })
    };
    record.fold();
    if record.is_over {
        return refuse("it is longer than migration.max_kept_bytes");
    }
    if record.said.has_unread {
        return refuse("it has events that the host cannot read");
    }
    let facts = &course.facts;
    let has = |flag: u32| facts.flags & flag != 0;
    let original =
        Original::read(facts.endpoint, &course.ask.body, has(flags::GUIDED), has(flags::TOOLS), facts.multimodal_items > 0);
    let original = match original {
        Ok(original) => original,
        Err(Unsound(reason)) => return refuse(reason),
    };
    let Record { mut said, .. } = record;
    let nested = said.nested.take();
    if nested.as_ref().is_some_and(|nested| !nested.has_begun()) {
        return refuse("its first event was not heard");
    }
    let (choices, prompts) = (facts.choices, original.prompts());
    let splice = Splice::new(original.endpoint(), &said, choices, prompts, course.returns_ids, facts.prompt.tokens);
    for (&index, choice) in said.choices.iter().filter(|(index, _)| **index < choices) {
        splice.tally.output(index, choice.tokens);
        if let Some(ids) = &choice.prompt_ids {
            splice.tally.prompt(original.prompt_of(index), ids.len() as u32);
        }
    }
    // What the stream itself says comes first: it is the engine's own count.
    // Of a prompt with images, the host knows the beginning only.
    if prompts == 1 && course.prompt.is_exact() && facts.multimodal_items == 0 {
        splice.tally.prompt(0, course.prompt.tokens().len() as u32);
    }
    let wants_usage = original.wants_usage() && !said.has_last_usage;
    let shared = Arc::new(Shared { course, original, splice });
    let mut legs = SelectAll::new();
    for index in 0..choices {
        let choice = said.choices.remove(&index).unwrap_or_else(Choice::new);
        if !choice.is_finished {
            let leg = Leg::new(Arc::clone(&shared), index, choice, &loss);
            legs.push(pieces(leg, span.clone()));
        }
    }
    let end = stream::once(async move {
        let tally = &shared.splice.tally;
        Ok(Rest::End(shared.splice.end(wants_usage), tally.prompt_tokens(), tally.output_tokens()))
    });
    let rest = legs.chain(end).boxed();
    Ok(match nested {
        Some(nested) => nested.retell(rest),
        None => rest,
    })
}

/// Whether an endpoint's streams have choices, with the ids of their tokens where engines are asked for them.
pub(crate) fn has_choices(endpoint: Endpoint) -> bool {
    matches!(endpoint, Endpoint::ChatCompletions | Endpoint::Completions)
}

/// What the rest of a stream is asked as: one without choices goes on as a chat.
fn asked_as(endpoint: Endpoint) -> Endpoint {
    if has_choices(endpoint) { endpoint } else { Endpoint::ChatCompletions }
}

/// What comes of a leg, to its end.
fn pieces(leg: Leg, span: Span) -> BoxStream<'static, Result<Rest, RequestError>> {
    let pieces = stream::unfold(Some(leg), move |leg| {
        let span = span.clone();
        async move {
            let mut leg = leg?;
            match leg.next().instrument(span).await {
                Ok(Some(Piece { frames, tokens })) => Some((Ok(Rest::Frames(frames, tokens)), Some(leg))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        }
    });
    is_stream(pieces).boxed()
}

fn is_stream<S: Stream<Item = Result<Rest, RequestError>>>(stream: S) -> S {
    stream
}
