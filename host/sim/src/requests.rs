//! Requests under way: what is known of each, and what came of those that have ended.

use std::{sync::Arc, time::Duration};

use dynamo_engine_mock::model::Event;
use dynamo_host_core::{Endpoint, RequestFacts, TokenCount, load::InFlight};
use dynamo_host_index::Prompt;

use crate::{engine::MODEL, trace::TraceRequest};

/// How long a request may take, as the host's default has it.
const REQUEST_TIMEOUT_MS: u64 = 3_600_000;

/// A request that waits for its placing.
pub(crate) struct Waiting {
    pub(crate) facts: RequestFacts,
    pub(crate) prompt: Prompt,
    pub(crate) holds: u32,
}

/// A request on a worker.
pub(crate) struct Placed {
    pub(crate) in_flight: InFlight,
    pub(crate) decision_id: u64,
    pub(crate) worker_id: u64,
    pub(crate) at: Duration,
    pub(crate) first_token: Duration,
    pub(crate) last_token: Duration,
    pub(crate) tokens: u32,
    /// Whether its policy learns of it.
    pub(crate) is_observed: bool,
}

/// What the host would know of a request.
pub(crate) fn facts(number: u32, request: &TraceRequest, now_ms: u64) -> RequestFacts {
    let mut facts = RequestFacts::new(format!("sim-{number}"), MODEL, Endpoint::Completions);
    facts.decision_id = u64::from(number);
    facts.prompt = TokenCount { tokens: request.prompt_tokens(), exact: true };
    facts.session_key = request.session.map(|session| dynamo_host_core::id::key(&session.to_le_bytes()));
    facts.prefix_key = request.prompt.first().map_or(0, |first| dynamo_host_core::id::key(&first.stream.to_le_bytes()));
    facts.accepted_ms = now_ms;
    facts.deadline_ms = Some(now_ms + REQUEST_TIMEOUT_MS);
    facts.flags = dynamo_host_core::request::flags::STREAM;
    facts
}

impl Placed {
    pub(crate) fn new(waiting: &Waiting, in_flight: InFlight, worker_id: u64, at: Duration, is_observed: bool) -> Self {
        let decision_id = waiting.facts.decision_id;
        Self { in_flight, decision_id, worker_id, at, first_token: at, last_token: at, tokens: 0, is_observed }
    }

    /// A token came. Returns the time since the one before it, if there was one.
    pub(crate) fn token(&mut self, event: &Event, now: Duration) -> Option<Duration> {
        self.in_flight.tokens(1, now.as_millis() as u64);
        self.tokens += 1;
        let since = now - self.last_token;
        self.last_token = now;
        if event.index == 0 {
            self.first_token = now;
            return None;
        }
        Some(since)
    }

    /// Mean time between its tokens in milliseconds; NaN below two.
    pub(crate) fn itl_ms(&self) -> f64 {
        if self.tokens < 2 { f64::NAN } else { ms(self.last_token - self.first_token) / f64::from(self.tokens - 1) }
    }
}

/// Milliseconds.
pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// A prompt's tokens for the index and for the engine.
pub(crate) fn shared_tokens(request: &TraceRequest) -> Arc<[u32]> {
    crate::prompt::tokens(&request.prompt)
}
