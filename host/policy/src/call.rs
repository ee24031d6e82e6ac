//! What a guest can see and say during one call: the data of its store.

use std::sync::Arc;

use dynamo_host_core::{Answer, Candidates, RequestFacts};
use wasmtime::ResourceLimiter;

use crate::{fault::Refusal, limits::Limits, state::SlotState};

/// Everything that a routing decision reads. It holds no prompt text.
#[derive(Clone, Debug)]
pub struct RouteCall {
    /// Facts of the request.
    pub request: Arc<RequestFacts>,
    /// The workers that may serve it.
    pub candidates: Arc<Candidates>,
    /// The host's monotonic clock.
    pub now_ms: u64,
    /// Wall clock.
    pub unix_ms: u64,
    /// Seed of the decision's randomness.
    pub seed: u64,
    /// Whether the policy's reasons are recorded.
    pub explain: bool,
}

/// One term of a policy's reasoning, a value per candidate.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// The term.
    pub term: String,
    /// Its values, in row order.
    pub values: Vec<f32>,
}

/// What became of one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OutcomeRow {
    /// The decision that placed it.
    pub decision_id: u64,
    /// The worker that served it last.
    pub worker_id: u64,
    /// Time to first token; NaN without one.
    pub ttft_ms: f32,
    /// Mean time between tokens; NaN below two.
    pub itl_ms: f32,
    /// Tokens of output.
    pub output_tokens: u32,
    /// Code of how it ended (`outcomes.end`).
    pub end: u32,
}

/// Ended requests, for `observe`.
pub type OutcomeBatch = Arc<[OutcomeRow]>;

/// What the present call is about. Import functions refuse to work outside of their place.
#[derive(Debug)]
pub(crate) enum Subject {
    /// `configure`, `settings-schema` or instantiation.
    Setup,
    /// `route`.
    Route(RouteCall),
    /// `observe`.
    Observe(OutcomeBatch),
}

/// A guest's store data.
#[derive(Debug)]
pub(crate) struct Guest {
    limits: Arc<Limits>,
    pub(crate) state: Arc<SlotState>,
    /// For log lines: `name@version`.
    pub(crate) label: Arc<str>,
    pub(crate) subject: Subject,
    pub(crate) now_ms: u64,
    pub(crate) unix_ms: u64,
    pub(crate) random: u64,
    pub(crate) answer: Option<Answer>,
    pub(crate) explanations: Vec<Explanation>,
    /// The last message at level error: a panic's text.
    pub(crate) said: Option<String>,
    host_bytes_left: usize,
    log_lines_left: u32,
    metric_updates_left: u32,
}

impl Guest {
    pub(crate) fn new(limits: Arc<Limits>, state: Arc<SlotState>, label: Arc<str>) -> Self {
        let mut guest = Self {
            limits,
            state,
            label,
            subject: Subject::Setup,
            now_ms: 0,
            unix_ms: 0,
            random: 0,
            answer: None,
            explanations: Vec::new(),
            said: None,
            host_bytes_left: 0,
            log_lines_left: 0,
            metric_updates_left: 0,
        };
        guest.begin(Subject::Setup);
        guest
    }

    /// Starts a call: quotas are full, nothing is answered.
    pub(crate) fn begin(&mut self, subject: Subject) {
        if let Subject::Route(call) = &subject {
            self.now_ms = call.now_ms;
            self.unix_ms = call.unix_ms;
            self.random = call.seed;
        }
        self.subject = subject;
        self.answer = None;
        self.explanations.clear();
        self.said = None;
        self.host_bytes_left = self.limits.host_bytes;
        self.log_lines_left = self.limits.log_lines;
        self.metric_updates_left = self.limits.metric_updates;
    }

    /// Ends a call: what it held is let go.
    pub(crate) fn end(&mut self) {
        self.subject = Subject::Setup;
    }

    /// Charges a call across the boundary that moves `bytes`.
    pub(crate) fn charge(&mut self, bytes: usize) -> wasmtime::Result<()> {
        let cost = bytes.saturating_add(Limits::HOST_CALL_BYTES);
        match self.host_bytes_left.checked_sub(cost) {
            Some(left) => {
                self.host_bytes_left = left;
                Ok(())
            }
            None => Err(wasmtime::Error::new(Refusal::HostBytes { limit: self.limits.host_bytes })),
        }
    }

    /// The decision under way.
    pub(crate) fn route(&self, function: &'static str) -> wasmtime::Result<&RouteCall> {
        match &self.subject {
            Subject::Route(call) => Ok(call),
            _ => Err(wasmtime::Error::new(Refusal::OutOfPlace { function, allowed: "route" })),
        }
    }

    /// The outcomes to learn from.
    pub(crate) fn outcomes(&self, function: &'static str) -> wasmtime::Result<&OutcomeBatch> {
        match &self.subject {
            Subject::Observe(batch) => Ok(batch),
            _ => Err(wasmtime::Error::new(Refusal::OutOfPlace { function, allowed: "observe" })),
        }
    }

    /// Cuts a message to its bound; `None` if the call has used up its lines.
    pub(crate) fn log_line<'a>(&mut self, message: &'a str) -> Option<&'a str> {
        self.log_lines_left = self.log_lines_left.checked_sub(1)?;
        Some(&message[..message.floor_char_boundary(self.limits.log_line_bytes)])
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
}
