//! A routing policy that misbehaves in a way of choice, at requests of choice.
//!
//! It decides well until a request asks for exactly `at_max_output_tokens` tokens: so it passes its probe, as a policy
//! that fails in production would have.

mod deeds;

use std::cell::{Cell, RefCell};

use dynamo_policy_sdk::{
    Candidates, Decision, Outcomes, Request, Router, clock, end, entropy, rank,
    schemars::{self, JsonSchema},
    serde::{self, Deserialize},
    telemetry,
};

/// Which misbehaviour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(crate = "serde", rename_all = "kebab-case")]
#[schemars(crate = "schemars")]
pub enum Mode {
    /// None.
    #[default]
    Good,
    /// A panic.
    Trap,
    /// An endless loop.
    Loop,
    /// Memory without end.
    Memory,
    /// A little more memory with each call, never given back.
    Leak,
    /// Recursion without end.
    Recursion,
    /// Bulk memory writes: few instructions, much work.
    Bulk,
    /// Endless calls of the host.
    HostCalls,
    /// A row that does not exist.
    OutOfRange,
    /// A row twice.
    Duplicate,
    /// No rows.
    Empty,
    /// More rows than allowed.
    TooMany,
    /// An answer of more than a megabyte.
    HugeAnswer,
    /// No answer.
    NoAnswer,
    /// A rejection with status 200.
    BadStatus,
    /// A rejection.
    Reject,
    /// A rejection that tells whose request it is.
    Gossip,
    /// Pairs of workers, one that prefills and one that it reaches, as far as there are any: no misbehaviour.
    Pairs,
    /// Never anything but hold.
    Hold,
    /// A flood of log lines and metrics.
    Flood,
    /// A flood of metric names, different ones at each request.
    MetricFlood,
    /// A flood of state, until there is no more room.
    StateFlood,
    /// NaN and infinity wherever a float may be handed out.
    NotFinite,
    /// Another row at each call, by what this instance remembers.
    Remember,
    /// A panic while it learns from outcomes.
    TrapInObserve,
    /// An endless loop while it learns from outcomes.
    LoopInObserve,
    /// A panic while the settings are read.
    TrapInConfigure,
    /// An endless loop while the settings are read.
    LoopInConfigure,
    /// Much work while the settings are read, within bounds.
    SlowConfigure,
    /// A panic at every request, the probe's too.
    TrapAlways,
}

/// What an operator can set: the misbehaviour, and what must all be true of a request for it to happen.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
#[schemars(crate = "schemars")]
pub struct Settings {
    /// The misbehaviour.
    pub mode: Mode,
    /// It asks for so many tokens.
    pub at_max_output_tokens: u32,
    /// It was placed so often before.
    pub from_attempt: u32,
    /// It is the n-th of those that this instance is given, or a multiple of that.
    pub every: u32,
    /// Rows that a good decision ranks at most.
    pub rows: usize,
    /// It comes before this moment of `clock.unix-ms`; settings are read well until then, too.
    pub until_unix_ms: u64,
    /// It comes from this moment on.
    pub from_unix_ms: u64,
}

impl Default for Settings {
    fn default() -> Self {
        let (until_unix_ms, from_unix_ms) = (u64::MAX, 0);
        Self { mode: Mode::Good, at_max_output_tokens: 13, from_attempt: 0, every: 1, rows: 16, until_unix_ms, from_unix_ms }
    }
}

/// The policy.
pub struct Hostile {
    settings: Settings,
    /// Requests that asked for the misbehaviour.
    calls: Cell<u32>,
    hoard: RefCell<Vec<Vec<u8>>>,
}

impl Router for Hostile {
    type Settings = Settings;

    fn new(settings: Settings) -> Result<Self, String> {
        if settings.is_time() {
            deeds::in_configure(settings.mode);
        }
        Ok(Self { settings, calls: Cell::new(0), hoard: RefCell::default() })
    }

    fn route(&self, request: &Request, candidates: &Candidates) -> Decision {
        match self.settings.mode {
            _ if !self.is_due(request) => self.good(candidates),
            Mode::Gossip => gossip(request),
            _ => deeds::in_route(self, candidates),
        }
    }

    /// Counts how what it placed has ended, when it does not misbehave here.
    fn observe(&self, outcomes: &Outcomes) {
        deeds::in_observe(self.settings.mode);
        for (name, code) in
            [("done", end::DONE), ("cancelled", end::CANCELLED), ("failed", end::FAILED), ("refused", end::REFUSED)]
        {
            let count = outcomes.end().iter().filter(|&&end| end == code).count();
            if count > 0 {
                telemetry::counter_add(&format!("ended_{name}"), count as u64);
            }
        }
    }
}

/// Tells the client what the policy may know of it.
fn gossip(request: &Request) -> Decision {
    let tenant = request.tenant().unwrap_or("nobody");
    let reason = format!("{tenant} asks {} with priority {}", request.endpoint(), request.priority());
    Decision::Reject { status: 403, retry_after: None, reason }
}

impl Settings {
    fn is_time(&self) -> bool {
        (self.from_unix_ms..self.until_unix_ms).contains(&clock::unix_ms())
    }
}

impl Hostile {
    fn is_due(&self, request: &Request) -> bool {
        let Settings { mode, at_max_output_tokens, from_attempt, every, .. } = self.settings;
        let is_asked_for = mode == Mode::TrapAlways
            || mode == Mode::Remember
            || request.max_output_tokens() == at_max_output_tokens && request.attempt() >= from_attempt;
        if !is_asked_for || !self.settings.is_time() {
            return false;
        }
        self.calls.set(self.calls.get() + 1);
        self.calls.get().is_multiple_of(every.max(1))
    }

    fn pairs(&self, candidates: &Candidates) -> Decision {
        let rows = 0..candidates.role().len() as u32;
        let reached_by = |from: u32| (0..).zip(candidates.links().reachable(from)).filter(|&(_, reaches)| reaches == 1);
        let pairs: Vec<(u32, u32)> = rows.flat_map(|from| reached_by(from).map(move |(to, _)| (from, to))).take(16).collect();
        if pairs.is_empty() { self.good(candidates) } else { Decision::PlaceDisaggregated(pairs) }
    }

    fn good(&self, candidates: &Candidates) -> Decision {
        let costs = candidates.active_requests().iter().map(|&requests| requests as f32);
        let mut rows = rank::lowest_rows(costs, entropy::next());
        rows.truncate(self.settings.rows);
        Decision::Place(rows)
    }
}

dynamo_policy_sdk::register!(Hostile);
