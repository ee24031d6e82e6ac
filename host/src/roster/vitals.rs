//! Vitals: what became of the requests that one worker had, and what that means for the next ones.
//!
//! Contract: one for each worker (model and rank), for as long as it is there. Every attempt on it ends here once, whichever
//! way it ends. What is decided of it is `host/flow`'s; here it meets the clock, the snapshot and the metrics.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use dynamo_engine_api::EngineError;
use dynamo_host_core::{WorkerId, WorkerState};
use dynamo_host_flow::{self as flow, Breaker, Ejection, Ended, Failure, Measure, OutlierRules, Place, Slow, Stand};
use tokio::sync::watch;

use super::{GivenUp, Member, Roster, Snapshot};

/// One worker's breaker, and whether it is left out as an outlier.
pub(super) struct Vitals {
    /// The worker's name, for metrics and the log.
    name: String,
    /// How often it was found to make no token though it answers.
    mutes: AtomicU64,
    inner: Mutex<Inner>,
}

/// What one request sees of its worker while it waits for it: whether it has gone, or makes no tokens any more.
pub(crate) struct Signs {
    given_up: watch::Receiver<GivenUp>,
    vitals: Arc<Vitals>,
    /// [`Vitals::mutes`] when the request was given to it.
    mutes: u64,
}

impl Signs {
    pub(super) fn new(given_up: watch::Receiver<GivenUp>, vitals: Arc<Vitals>) -> Self {
        let mutes = vitals.mutes.load(Relaxed);
        Self { given_up, vitals, mutes }
    }

    /// Whether what the worker has is to be given to others.
    pub(crate) fn given_up(&self) -> GivenUp {
        *self.given_up.borrow()
    }

    /// Whether it was found to make no tokens since the request was given to it.
    pub(crate) fn was_mute(&self) -> bool {
        self.vitals.mutes.load(Relaxed) != self.mutes
    }
}

#[derive(Default)]
struct Inner {
    breaker: Breaker,
    ejection: Ejection,
    /// What the log last said.
    shown: Shown,
    ever_opened: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Shown {
    #[default]
    Closed,
    HalfOpen,
    Open,
}

impl Vitals {
    pub(super) fn new(name: &str) -> Arc<Self> {
        Arc::new(Self { name: name.to_owned(), mutes: AtomicU64::new(0), inner: Mutex::default() })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of a worker whose engine was found in this one.
    pub(super) fn refine(&self, found: WorkerState, now_ms: u64) -> WorkerState {
        if found != WorkerState::Healthy {
            return found;
        }
        let mut inner = self.inner();
        match (inner.breaker.stand(now_ms), inner.ejection.place(now_ms)) {
            (Stand::Open { .. }, _) => WorkerState::Tripped,
            (_, Place::Out { .. }) => WorkerState::Ejected,
            (Stand::HalfOpen, _) | (_, Place::Trial) => WorkerState::Suspect,
            (Stand::Closed, Place::In) => WorkerState::Healthy,
        }
    }

    /// Why it is not healthy though it answers, for people.
    pub(super) fn trouble(&self, now_ms: u64) -> Option<String> {
        let mut inner = self.inner();
        let stand = inner.breaker.stand(now_ms);
        let cause = inner.breaker.cause();
        let because = || cause.map_or_else(String::new, |cause| format!(", after {cause}"));
        let wait = |until_ms: u64| until_ms.saturating_sub(now_ms).div_ceil(1000);
        match (stand, inner.ejection.place(now_ms)) {
            (Stand::Open { until_ms }, _) => {
                Some(format!("its breaker is open{}; it is tried again in {} s", because(), wait(until_ms)))
            }
            (_, Place::Out { until_ms }) => {
                let slow = inner.ejection.slow()?;
                Some(format!("it is left out: {slow}; it is tried again in {} s", wait(until_ms)))
            }
            (Stand::HalfOpen, _) => Some(format!("its breaker is half-open{}; a few requests are tried", because())),
            (_, Place::Trial) => Some("it was much slower than its pool; a few requests are tried".to_owned()),
            (Stand::Closed, Place::In) => None,
        }
    }

    /// Whether it may be given one more request while it is suspect.
    pub(super) fn has_room(&self, rules: &flow::BreakerRules, active_requests: u32, now_ms: u64) -> bool {
        let mut inner = self.inner();
        let is_on_trial = inner.ejection.place(now_ms) == Place::Trial;
        inner.breaker.has_room(rules, now_ms) && (!is_on_trial || active_requests < rules.trials)
    }

    /// Whether it is half-open.
    pub(super) fn is_half_open(&self, now_ms: u64) -> bool {
        self.inner().breaker.stand(now_ms) == Stand::HalfOpen
    }

    /// How its breaker stands, as metrics have it; `None`: it never opened.
    pub(super) fn shown(&self) -> Option<u8> {
        let inner = self.inner();
        inner.ever_opened.then_some(inner.shown as u8)
    }

    /// Its engine is another, or back from where nobody reached it.
    pub(super) fn recover(&self, now_ms: u64) {
        let mut inner = self.inner();
        inner.breaker.recover(now_ms);
        inner.ejection.forget(now_ms);
        self.show(&mut inner, now_ms);
    }

    /// Its medians, and whether it is on trial.
    pub(super) fn measure(&self, rules: &OutlierRules, now_ms: u64) -> (Measure, bool) {
        let mut inner = self.inner();
        (inner.ejection.measure(rules, now_ms), inner.ejection.place(now_ms) == Place::Trial)
    }

    pub(super) fn eject(&self, slow: Slow, rules: &OutlierRules, now_ms: u64) {
        let cause = if matches!(slow, Slow::Ttft { .. }) { "ttft" } else { "itl" };
        metrics::counter!("dynamo_host_worker_ejections_total", "cause" => cause).increment(1);
        tracing::warn!(worker = self.name, "worker is left out for a while: {slow}");
        self.inner().ejection.eject(slow, rules, now_ms);
    }

    pub(super) fn readmit(&self, now_ms: u64) {
        tracing::info!(worker = self.name, "worker is as fast as its pool again");
        self.inner().ejection.readmit(now_ms);
    }

    /// It was asked for a token, and made none: it is given nothing more, and what it has as a whole goes elsewhere if it can.
    pub(super) fn is_mute(&self, failure: Failure, rules: &flow::BreakerRules, now_ms: u64) {
        self.mutes.fetch_add(1, Relaxed);
        self.trip(failure, rules, now_ms);
    }

    /// Opens the breaker, whatever was counted.
    fn trip(&self, failure: Failure, rules: &flow::BreakerRules, now_ms: u64) {
        let mut inner = self.inner();
        inner.breaker.trip(failure, rules, now_ms);
        self.show(&mut inner, now_ms);
    }

    fn begin(&self, now_ms: u64) -> flow::Attempt {
        self.inner().breaker.begin(now_ms)
    }

    /// It is asked by a canary.
    pub(super) fn begin_beside(&self, now_ms: u64) -> flow::Attempt {
        self.inner().breaker.begin_beside(now_ms)
    }

    fn progress(&self, attempt: &mut flow::Attempt, rules: &flow::BreakerRules, now_ms: u64) {
        let mut inner = self.inner();
        inner.breaker.progress(attempt, rules, now_ms);
        self.show(&mut inner, now_ms);
    }

    pub(super) fn end(&self, attempt: flow::Attempt, ended: Ended, rules: &flow::BreakerRules, now_ms: u64) {
        let mut inner = self.inner();
        inner.breaker.end(attempt, ended, rules, now_ms);
        self.show(&mut inner, now_ms);
    }

    /// Brings the breaker's stand to metrics and log, if it is another.
    pub(super) fn show_now(&self, now_ms: u64) {
        self.show(&mut self.inner(), now_ms);
    }

    fn show(&self, inner: &mut Inner, now_ms: u64) {
        let stand = inner.breaker.stand(now_ms);
        let now = match stand {
            Stand::Closed => Shown::Closed,
            Stand::HalfOpen => Shown::HalfOpen,
            Stand::Open { .. } => Shown::Open,
        };
        if now == inner.shown {
            return;
        }
        inner.shown = now;
        inner.ever_opened = true;
        let cause = inner.breaker.cause();
        match stand {
            Stand::Closed => tracing::info!(worker = self.name, "worker's breaker is closed"),
            Stand::HalfOpen => tracing::info!(worker = self.name, "worker's breaker is half-open: a few requests are tried"),
            Stand::Open { until_ms } => {
                let (label, text) = cause.map_or(("none", String::new()), |cause| (cause.label(), cause.to_string()));
                metrics::counter!("dynamo_host_breaker_opens_total", "cause" => label).increment(1);
                tracing::warn!(worker = self.name, ms = until_ms.saturating_sub(now_ms), "worker's breaker is open: {text}");
            }
        }
    }
}

/// One request on one worker, as its breaker counts it. Dropped without an end, nobody was at fault.
pub(crate) struct Attempt {
    roster: Arc<Roster>,
    member: Arc<Member>,
    vitals: Arc<Vitals>,
    ticket: Option<flow::Attempt>,
}

/// How an attempt went, for its worker's vitals.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub(crate) ended: Ended,
    /// From its dispatch; NaN if there was no token.
    pub(crate) ttft_ms: f32,
    /// NaN if there were not two tokens.
    pub(crate) itl_ms: f32,
    /// Tokens of its prompt that had to be computed.
    pub(crate) uncached_tokens: u32,
}

impl Attempt {
    /// Whether what its worker has is given to others since that drains, and not since it failed.
    pub(crate) fn is_moved(&self) -> bool {
        *self.member.given_up.borrow() == GivenUp::Drained
    }

    /// It came to its first token.
    pub(crate) fn progress(&mut self) {
        if let Some(ticket) = &mut self.ticket {
            let rules = self.roster.health().breaker_rules();
            self.vitals.progress(ticket, &rules, self.roster.clock.now_ms());
        }
    }

    /// It ended.
    pub(crate) fn end(&mut self, outcome: Outcome) {
        let Some(ticket) = self.ticket.take() else { return };
        let now_ms = self.roster.clock.now_ms();
        let before = self.vitals.refine(WorkerState::Healthy, now_ms);
        {
            let latencies = &mut self.vitals.inner().ejection.latencies;
            latencies.first_token(outcome.ttft_ms, outcome.uncached_tokens, now_ms);
            latencies.tokens(outcome.itl_ms, now_ms);
        }
        self.vitals.end(ticket, outcome.ended, &self.roster.health().breaker_rules(), now_ms);
        if before != self.vitals.refine(WorkerState::Healthy, now_ms) {
            self.roster.publish_soon();
        }
        if matches!(outcome.ended, Ended::Failed(_)) {
            self.member.probe_now.notify_one();
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            let now_ms = self.roster.clock.now_ms();
            self.vitals.end(ticket, Ended::Untold, &self.roster.health().breaker_rules(), now_ms);
        }
    }
}

impl Roster {
    /// A worker of this snapshot is given a request.
    pub(crate) fn attempt(self: &Arc<Self>, snapshot: &Snapshot, worker: WorkerId) -> Attempt {
        let seat = snapshot.seat(worker);
        let ticket = seat.vitals.begin(self.clock.now_ms());
        seat.member.note_given();
        Attempt {
            roster: Arc::clone(self),
            member: Arc::clone(&seat.member),
            vitals: Arc::clone(&seat.vitals),
            ticket: Some(ticket),
        }
    }
}

/// What an engine's error says of its worker.
pub(crate) fn failure(error: &EngineError, had_token: bool) -> Failure {
    match error {
        EngineError::Connect { .. } => Failure::Connect,
        EngineError::Timeout { .. } if had_token => Failure::Stall,
        EngineError::Timeout { .. } => Failure::Timeout,
        EngineError::Broken { .. } | EngineError::Incomplete { .. } => Failure::Broken,
        EngineError::InStream { .. } => Failure::InStream,
        EngineError::Unhealthy { .. } => Failure::Unhealthy,
        EngineError::Protocol { .. } => Failure::Protocol,
    }
}
