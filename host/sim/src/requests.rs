//! Requests under way: what is known of each, and what came of those that have ended.

use std::{sync::Arc, time::Duration};

use dynamo_engine_mock::model::{Event, SequenceId, TransferId};
use dynamo_host_core::{Endpoint, RequestFacts, TokenCount, WorkerId, load::InFlight};
use dynamo_host_index::Prompt;

use crate::{engine::MODEL, trace::TraceRequest};

/// How long a request may take, as the host's default has it.
const REQUEST_TIMEOUT_MS: u64 = 3_600_000;

/// A request that waits for its placing.
pub(crate) struct Waiting {
    pub(crate) facts: RequestFacts,
    pub(crate) prompt: Prompt,
    pub(crate) holds: u32,
    pub(crate) before: Before,
    /// KV that is kept for it: it is to be placed for its decode.
    pub(crate) kept: Option<Kept>,
}

/// What earlier attempts came to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Before {
    /// Tokens of output.
    pub(crate) tokens: u32,
    /// When the last of them came.
    pub(crate) last_token: Duration,
    /// Workers that failed it, oldest first.
    pub(crate) failed: Vec<WorkerId>,
    /// Decisions about it.
    pub(crate) decisions: u32,
    /// Tokens of its prompt that whoever computed it for somebody else had cached.
    pub(crate) cached_tokens: Option<u32>,
}

/// KV of a prompt that its engine keeps until it is fetched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kept {
    /// The engine that has it, and what it is there.
    pub(crate) place: Place,
    /// Of the lives of that engine.
    pub(crate) life: u32,
    /// Since when.
    pub(crate) since: Duration,
}

/// Which part of a request an engine was given.
pub(crate) enum Leg {
    /// All of it.
    Whole,
    /// Its prompt: all that it takes to go on elsewhere, and where, if that was said at once.
    Prefill { facts: Box<RequestFacts>, prompt: Prompt, decoder: Option<WorkerId> },
    /// Its output, from KV that is kept elsewhere until it is here.
    Decode { kept: Kept, transfer: Fetching },
}

/// How far a decode leg is with its KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fetching {
    /// The engine has no room for it yet.
    Waits,
    /// It is under way.
    UnderWay(TransferId),
    /// It is there.
    Done,
}

/// A request on a worker.
pub(crate) struct Placed {
    pub(crate) in_flight: InFlight,
    /// The request.
    pub(crate) number: u32,
    pub(crate) decision_id: u64,
    pub(crate) leg: Leg,
    /// The worker, the engine, and what the request is there.
    pub(crate) place: Place,
    pub(crate) before: Before,
    /// When it came.
    pub(crate) at: Duration,
    /// When the worker was given it: later, if its policy held it.
    pub(crate) dispatched: Duration,
    pub(crate) first_token: Duration,
    pub(crate) last_token: Duration,
    pub(crate) tokens: u32,
    /// Whether its policy learns of it.
    pub(crate) is_observed: bool,
}

/// Where a request went.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) id: WorkerId,
    pub(crate) worker: u32,
    pub(crate) sequence: SequenceId,
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

impl Before {
    /// Identity of the next decision about a request: the first one's is its number.
    pub(crate) fn next_decision(&mut self, number: u32) -> u64 {
        self.decisions += 1;
        u64::from(self.decisions - 1) << 32 | u64::from(number)
    }
}

impl Placed {
    /// Tokens of output, those of earlier attempts too.
    pub(crate) fn all_tokens(&self) -> u32 {
        self.before.tokens + self.tokens
    }

    /// A token came. Returns the time since the one before it, of whichever attempt, if there was one.
    pub(crate) fn token(&mut self, event: &Event, now: Duration) -> Option<Duration> {
        self.in_flight.tokens(1, now.as_millis() as u64);
        self.tokens += 1;
        let since = now - self.last_token;
        self.last_token = now;
        if event.index == 0 {
            self.first_token = now;
        }
        (self.all_tokens() > 1).then_some(since)
    }

    /// From its dispatch to its first token, in milliseconds: the worker's time, as the host takes it down.
    pub(crate) fn ttft_ms(&self) -> f64 {
        ms(self.first_token - self.dispatched)
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

#[cfg(test)]
mod tests {
    use dynamo_engine_mock::model::{EngineModel, FinishReason, Sequence};
    use dynamo_host_core::LoadBoard;

    use super::*;

    #[test]
    fn what_a_policy_held_a_request_for_is_not_the_workers_time() {
        let in_flight = InFlight::dispatch(LoadBoard::new(1).claim().unwrap(), 0, 0, 100);
        let (at, dispatched) = (Duration::ZERO, Duration::from_millis(100));
        let sequence = Sequence {
            prompt: [1].into(),
            first_output_token: 0,
            output_tokens: 1,
            finish: FinishReason::Stop,
            salt: 0,
            hold: false,
            remote: false,
        };
        let sequence = EngineModel::new(crate::default_profile()).unwrap().submit(at, sequence).unwrap();
        let placed = Placed {
            in_flight,
            number: 0,
            decision_id: 0,
            leg: Leg::Whole,
            place: Place { id: WorkerId(1), worker: 0, sequence },
            before: Before::default(),
            at,
            dispatched,
            first_token: Duration::from_millis(500),
            last_token: dispatched,
            tokens: 0,
            is_observed: false,
        };
        assert_eq!((placed.ttft_ms(), placed.at), (400.0, at));
    }

    #[test]
    fn each_decision_about_a_request_has_an_identity_of_its_own() {
        let mut before = Before::default();
        assert_eq!([before.next_decision(7), before.next_decision(7)], [7, 1 << 32 | 7]);
    }
}
