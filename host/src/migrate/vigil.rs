//! Vigil: whether a worker that is silent is slow, or will not say anything any more.
//!
//! Bounds: between tokens a multiple of what is usual for the worker; to the first token by how much is to be computed. A worker
//! that moves on other requests lives, and gets more time; how it moves is read from the load board, so that it costs a
//! stream nothing while tokens come. A worker that was given up is not waited for at all. A whole answer is silent until it is there: it
//! is lost when all its tokens would have come, and its worker moves for nobody; or when that made no token for the roster's canary.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use dynamo_engine_api::EngineError;
use dynamo_host_core::{
    Load,
    load::{LoadSlot, Recent},
};

use crate::roster::{GivenUp, Signs};

/// How often a silent stream is looked at.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Time between tokens that is no stall yet, in multiples of what is usual.
const ITL_MULTIPLE: f32 = 20.0;
const ITL_FLOOR: Duration = Duration::from_secs(1);
/// Without any observation of the worker.
const ITL_UNKNOWN: Duration = Duration::from_secs(5);
/// By how much more a worker that moves on others may be silent.
const ALIVE_MULTIPLE: u32 = 10;
/// A prompt's time in multiples of what is usual, where others' prompts are computed between tokens, and to the first one.
const TTFT_MULTIPLE: f32 = 4.0;
const FIRST_MULTIPLE: f32 = 20.0;
const FIRST_FLOOR: Duration = Duration::from_secs(5);
/// Without any observation of the worker: engines take long for their first request.
const FIRST_UNKNOWN: Duration = Duration::from_secs(30);
/// Prompt tokens a second that the slowest of engines computes.
const SLOWEST_PREFILL: f32 = 200.0;

/// Watches over one attempt.
pub(crate) struct Vigil {
    slot: Arc<LoadSlot>,
    signs: Signs,
    /// How long any stream may be silent.
    idle: Duration,
    /// Tokens that a whole answer may have.
    may_make: Option<u32>,
    /// Whether it is looked for stalls, and for workers that are given up.
    is_on: bool,
    /// Tokens that its worker ever made, when it was last looked, and when it was last seen to have made more.
    made: u64,
    moved: Instant,
}

/// Why nothing is waited for any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    Idle,
    Stalled { after: Duration },
    GivenUp(GivenUp),
}

impl Vigil {
    pub(crate) fn new(slot: &Arc<LoadSlot>, signs: Signs, idle: Duration, is_on: bool) -> Self {
        Self { slot: Arc::clone(slot), signs, idle, may_make: None, is_on, made: slot.output_tokens(), moved: Instant::now() }
    }

    /// Whether a stream is lost that has been silent since `last`. `has_tokens`: some engines begin before they have computed the
    /// prompt.
    pub(crate) fn within(&mut self, last: Instant, now: Instant, has_tokens: bool) -> Option<Lost> {
        if has_tokens { self.between_tokens(last, now) } else { self.before_first(last, now) }
    }

    fn between_tokens(&mut self, last: Instant, now: Instant) -> Option<Lost> {
        let usual = self.recent(Recent::ItlMs, ITL_MULTIPLE).map_or(ITL_UNKNOWN, |usual| usual.max(ITL_FLOOR));
        let is_computing = self.slot.get(Load::ActivePrefillTokens) > 0;
        let prefill = self.recent(Recent::TtftMs, TTFT_MULTIPLE).filter(|_| is_computing).unwrap_or_default();
        self.look(last, now, usual + prefill)
    }

    /// Whether a request is lost whose answer has not begun since `asked`. `uncached`: tokens to be computed for it and for
    /// those before it.
    pub(crate) fn before_first(&mut self, asked: Instant, now: Instant) -> Option<Lost> {
        let bound = self.first_bound();
        match self.look(asked, now, bound) {
            // It may wait in the queue of an engine that moves, for as long as any stream may be silent.
            Some(Lost::Stalled { .. }) if now - self.moved < bound => None,
            lost => lost,
        }
    }

    /// How many tokens a whole answer may have.
    pub(crate) fn may_make(&mut self, tokens: Option<u32>) {
        self.may_make = tokens;
    }

    /// Whether a request is lost whose whole answer has not come since `asked`: all its tokens would be there by now, and the
    /// worker moves for nobody. Of an answer without a limit, or a worker of which nothing is known, nobody can say, until it
    /// was asked for a token and made none (`roster::canary`).
    pub(crate) fn whole(&mut self, asked: Instant, now: Instant) -> Option<Lost> {
        self.look_for_moves(now);
        if let Some(lost) = self.given_up() {
            return Some(lost);
        }
        let after = now.saturating_duration_since(asked);
        if self.is_on && self.signs.was_mute() {
            return Some(Lost::Stalled { after });
        }
        let (tokens, usual) = (self.may_make?, self.recent(Recent::ItlMs, ITL_MULTIPLE)?);
        let first = self.first_bound();
        let is_silent = now.saturating_duration_since(self.moved) >= first;
        (self.is_on && is_silent && after >= first + usual.saturating_mul(tokens)).then_some(Lost::Stalled { after })
    }

    /// Whether the worker is given up, be it just before the request was given to it: who placed it saw it as it was a moment
    /// ago.
    fn given_up(&self) -> Option<Lost> {
        let given_up = if self.is_on { self.signs.given_up() } else { GivenUp::Not };
        (given_up != GivenUp::Not).then_some(Lost::GivenUp(given_up))
    }

    fn look(&mut self, since: Instant, now: Instant, bound: Duration) -> Option<Lost> {
        self.look_for_moves(now);
        if let Some(lost) = self.given_up() {
            return Some(lost);
        }
        let silent = now.saturating_duration_since(since);
        if silent >= self.idle {
            return Some(Lost::Idle);
        }
        let is_alive = now.saturating_duration_since(self.moved) < bound;
        let bound = if is_alive { bound * ALIVE_MULTIPLE } else { bound };
        (self.is_on && silent >= bound).then_some(Lost::Stalled { after: silent })
    }

    fn look_for_moves(&mut self, now: Instant) {
        let made = self.slot.output_tokens();
        if std::mem::replace(&mut self.made, made) != made {
            self.moved = now;
        }
    }

    /// How long the first token may take of a worker that moves for nobody.
    fn first_bound(&self) -> Duration {
        let uncached = self.slot.get(Load::ActiveUncachedTokens) as f32 / SLOWEST_PREFILL;
        let usual = self.recent(Recent::TtftMs, FIRST_MULTIPLE).unwrap_or(FIRST_UNKNOWN);
        FIRST_FLOOR.max(Duration::from_secs_f32(uncached)).max(usual)
    }

    fn recent(&self, recent: Recent, multiple: f32) -> Option<Duration> {
        let [value] = *self.slot.board().gather_recent(recent, &[self.slot.index()]) else { return None };
        (value.is_finite() && value >= 0.0).then(|| Duration::from_secs_f32((value * multiple / 1000.0).min(3600.0)))
    }
}

impl Lost {
    /// As an engine's failure.
    pub(crate) fn error(self, worker: &str, idle: Duration) -> EngineError {
        let engine = format!("worker {worker}");
        let unhealthy = |reason: String| EngineError::Unhealthy { engine: engine.clone(), reason };
        match self {
            Self::Idle => EngineError::Timeout { engine, after: idle },
            Self::Stalled { after } => unhealthy(format!("nothing came from it for {} ms", after.as_millis())),
            Self::GivenUp(GivenUp::Drained) => unhealthy("it was drained, and the grace is over".to_owned()),
            Self::GivenUp(_) => unhealthy("it does not answer any more".to_owned()),
        }
    }

    /// The cause's label in metrics.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Idle => "engine_timeout",
            Self::Stalled { .. } => "stalled",
            Self::GivenUp(GivenUp::Drained) => "drained",
            Self::GivenUp(_) => "unresponsive",
        }
    }
}
