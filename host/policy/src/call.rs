//! What a guest can see and say during one call: the data of its store.

use std::{sync::Arc, time::Duration};

use dynamo_host_core::{Admitted, Answer, Column, Rejection, RequestFacts, admission};
use wasmtime::ResourceLimiter;

use crate::{
    fault::Refusal,
    limits::Limits,
    question::{AdmissionCall, Question, RouteCall},
    runtime::Now,
    state::SlotState,
};

/// What was read of the candidates for one decision, as it was read: columns of load may be others a moment later.
#[derive(Clone, Debug, PartialEq)]
pub enum Reading {
    /// A column, by its name in the contract.
    Column(&'static str, Column),
    /// A column of links, by its name in the contract, and the row that KV would come from.
    Link(&'static str, Option<u32>, Column),
    /// A label, as codes, as numbers or as a level of the topology.
    Label(String),
}

/// Readings that are kept of one decision.
const MAX_READINGS: usize = 128;

/// One term of a policy's reasoning, a value per candidate.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// The term.
    pub term: String,
    /// Its values, in row order.
    pub values: Vec<f32>,
}

/// What became of one attempt of a request, or of one that came to no worker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OutcomeRow {
    /// The decision that placed it, or let it in.
    pub decision_id: u64,
    /// The worker; `u64::MAX` if it came to none.
    pub worker_id: u64,
    /// Time to first token; NaN without one.
    pub ttft_ms: f32,
    /// Mean time between tokens; NaN below two.
    pub itl_ms: f32,
    /// Time that it waited in the host's queue; NaN where nobody knows.
    pub queue_ms: f32,
    /// Tokens of output.
    pub output_tokens: u32,
    /// Code of how it ended (`outcomes.end`).
    pub end: u32,
}

/// Outcomes that wait for `observe` at most; what comes beyond them is dropped.
pub const OUTCOMES_WAITING: usize = 8192;

/// Rows that `observe` is given at most.
pub const OUTCOMES_AT_ONCE: usize = 1024;

/// How long it is left alone between two batches that are not full.
pub const OUTCOMES_EVERY: Duration = Duration::from_millis(250);

/// Ended requests, for `observe`.
pub type OutcomeBatch = Arc<[OutcomeRow]>;

/// What the present call is about. Import functions refuse to work outside of their place.
#[derive(Debug)]
pub enum Subject {
    /// `configure`, `settings-schema` or instantiation.
    Setup,
    /// `route`.
    Route(RouteCall),
    /// `admit`.
    Admit(AdmissionCall),
    /// `observe`.
    Observe(OutcomeBatch),
}

/// A guest's store data.
#[derive(Debug)]
pub struct Guest {
    limits: Arc<Limits>,
    /// The slot's, or a scratch one on trial and during set-up.
    pub(crate) state: Arc<SlotState>,
    /// On trial: what it logs and counts is not for the operator.
    pub(crate) is_muted: bool,
    /// For log lines: `name@version`.
    pub(crate) label: Arc<str>,
    pub(crate) subject: Subject,
    pub(crate) now: Now,
    random: u64,
    /// What was answered to `route`.
    pub(crate) routing: Option<Answer>,
    /// What was answered to `admit`.
    pub(crate) admission: Option<admission::Answer>,
    /// Where the request stands if it is admitted.
    pub(crate) admitted: Admitted,
    pub(crate) explanations: Vec<Explanation>,
    pub(crate) readings: Vec<Reading>,
    /// The last message at level error: a panic's text.
    pub(crate) said: Option<String>,
    log_lines_left: u32,
    metric_updates_left: u32,
}

impl Guest {
    /// A guest that is being set up: with scratch state, and heard by nobody.
    pub(crate) fn new(limits: Arc<Limits>, label: Arc<str>, now: Now) -> Self {
        let (log_lines_left, metric_updates_left) = (limits.log_lines, limits.metric_updates);
        Self {
            limits,
            state: Arc::default(),
            is_muted: true,
            label,
            subject: Subject::Setup,
            now,
            random: 0,
            routing: None,
            admission: None,
            admitted: Admitted::default(),
            explanations: Vec::new(),
            readings: Vec::new(),
            said: None,
            log_lines_left,
            metric_updates_left,
        }
    }

    /// Ends the set-up: from now on it works on the slot's state, and is heard.
    pub(crate) fn go_live(&mut self, state: Arc<SlotState>) {
        self.state = state;
        self.is_muted = false;
    }

    /// Starts a call: quotas are full, nothing is answered.
    pub(crate) fn begin(&mut self, subject: Subject, now: Now, seed: u64) {
        self.now = now;
        self.random = seed;
        self.admitted = match &subject {
            Subject::Admit(call) => call.native.clone(),
            _ => Admitted::default(),
        };
        self.subject = subject;
        self.routing = None;
        self.admission = None;
        self.explanations.clear();
        self.readings.clear();
        self.said = None;
        self.log_lines_left = self.limits.log_lines;
        self.metric_updates_left = self.limits.metric_updates;
    }

    /// Ends a call: what it held is let go.
    pub(crate) fn end(&mut self) {
        self.subject = Subject::Setup;
    }

    /// The request that is decided about, and the time.
    pub(crate) fn asked(&self, function: &'static str) -> wasmtime::Result<(&RequestFacts, Now)> {
        match &self.subject {
            Subject::Route(call) => Ok((&call.request, call.now())),
            Subject::Admit(call) => Ok((&call.request, call.now())),
            _ => Err(wasmtime::Error::new(Refusal::OutOfPlace { function, allowed: "a decision" })),
        }
    }

    /// The admission decision under way.
    pub(crate) fn admit(&self, function: &'static str) -> wasmtime::Result<&AdmissionCall> {
        match &self.subject {
            Subject::Admit(call) => Ok(call),
            _ => Err(wasmtime::Error::new(Refusal::OutOfPlace { function, allowed: "admit" })),
        }
    }

    /// The routing decision under way.
    pub(crate) fn route(&self, function: &'static str) -> wasmtime::Result<&RouteCall> {
        match &self.subject {
            Subject::Route(call) => Ok(call),
            _ => Err(wasmtime::Error::new(Refusal::OutOfPlace { function, allowed: "route" })),
        }
    }

    /// Takes note of what it reads, once each, if that is wanted.
    pub(crate) fn note(&mut self, reading: impl FnOnce() -> Reading) {
        let is_wanted = matches!(&self.subject, Subject::Route(call) if call.explain);
        if !is_wanted || self.readings.len() >= MAX_READINGS {
            return;
        }
        let reading = reading();
        let is_known = self.readings.iter().any(|known| match (known, &reading) {
            (Reading::Column(known, _), Reading::Column(name, _)) => known == name,
            (Reading::Link(known, known_from, _), Reading::Link(name, from, _)) => (known, known_from) == (name, from),
            (Reading::Label(known), Reading::Label(key)) => known == key,
            _ => false,
        });
        if !is_known {
            self.readings.push(reading);
        }
    }

    /// The outcomes to learn from.
    pub(crate) fn outcomes(&self, function: &'static str) -> wasmtime::Result<&OutcomeBatch> {
        match &self.subject {
            Subject::Observe(batch) => Ok(batch),
            _ => Err(wasmtime::Error::new(Refusal::OutOfPlace { function, allowed: "observe" })),
        }
    }

    /// Name of the slot that it decides in, for metrics.
    pub(crate) fn slot(&self) -> String {
        self.state.slot().to_string()
    }

    /// A message as it may be logged, cut to its bound and on one line.
    pub(crate) fn printable(&self, message: &str) -> String {
        let cut = &message[..message.floor_char_boundary(self.limits.log_line_bytes)];
        cut.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
    }

    /// An error for the client as a policy wants it; when to try again is cut to its bound, and counted.
    pub(crate) fn rejection(&self, status: u16, retry_after_ms: Option<u32>, reason: &str) -> Rejection {
        if retry_after_ms.is_some_and(|ms| ms > admission::MAX_RETRY_AFTER_MS) && !self.is_muted {
            let labels = [("slot", self.slot()), ("policy", self.label.to_string())];
            metrics::counter!("dynamo_host_policy_retry_after_cut_total", &labels).increment(1);
        }
        let retry_after_ms = retry_after_ms.map(|ms| ms.min(admission::MAX_RETRY_AFTER_MS));
        Rejection { status, retry_after_ms, reason: self.printable(reason) }
    }

    /// Whether the call may log one more line, by its own quota and by its slot's.
    pub(crate) fn may_log(&mut self) -> bool {
        let Some(left) = self.log_lines_left.checked_sub(1) else { return false };
        self.log_lines_left = left;
        let per_second = self.limits.log_lines_per_second;
        self.state.may_log(per_second, self.now.monotonic_ms)
    }

    /// Whether the call may update one more metric.
    pub(crate) fn metric_update(&mut self) -> bool {
        self.metric_updates_left.checked_sub(1).map(|left| self.metric_updates_left = left).is_some()
    }

    /// The next 64 bits of the decision's randomness: splitmix64 (Steele et al. 2014).
    pub(crate) fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}

impl ResourceLimiter for Guest {
    fn memory_growing(&mut self, _current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        // An error ends the guest here, so that its cause is certain; `false` would surface as some later panic.
        if desired > self.limits.memory_bytes {
            return Err(wasmtime::Error::new(Refusal::Memory { limit: self.limits.memory_bytes }));
        }
        Ok(true)
    }

    fn table_growing(&mut self, _current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        if desired > self.limits.table_elements {
            return Err(wasmtime::Error::new(Refusal::Table { limit: self.limits.table_elements }));
        }
        Ok(true)
    }

    fn instances(&self) -> usize {
        Limits::CORE_INSTANCES
    }

    fn memories(&self) -> usize {
        Limits::MEMORIES
    }

    fn tables(&self) -> usize {
        Limits::TABLES
    }
}
