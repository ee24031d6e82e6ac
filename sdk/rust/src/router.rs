//! The trait that a routing policy implements.

use std::cell::OnceCell;

use schemars::JsonSchema;
use serde::{Deserialize, de::DeserializeOwned};

use crate::{Candidates, Decision, Request, bindings::dynamo::policy::outcomes as host};

/// A routing policy: chooses the workers for a request.
pub trait Router: Sized + 'static {
    /// What an operator can set, from JSON. Reject unknown keys (`#[serde(deny_unknown_fields)]`) and give defaults
    /// (`#[serde(default)]`), since a policy without settings gets `{}`.
    type Settings: DeserializeOwned + JsonSchema;

    /// Makes the policy. Called once per instance; there are several, and each may vanish at any time.
    ///
    /// # Errors
    /// Which setting is wrong and what is accepted; the operator sees it and the policy is not activated.
    fn new(settings: Self::Settings) -> Result<Self, String>;

    /// Decides one request.
    fn route(&self, request: &Request, candidates: &Candidates) -> Decision;

    /// Learns from ended requests. Called now and then, on one instance, off the request path.
    fn observe(&self, _outcomes: &Outcomes) {}
}

/// For a policy that takes no settings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoSettings {}

/// Values of [`Outcomes::end`]. Further ones may come.
pub mod end {
    /// The answer is complete.
    pub const DONE: u32 = 0;
    /// The client left.
    pub const CANCELLED: u32 = 1;
    /// It failed.
    pub const FAILED: u32 = 2;
    /// It was rejected.
    pub const REJECTED: u32 = 3;
}

/// What became of requests that were placed: columns, one value per ended request.
#[derive(Debug, Default)]
pub struct Outcomes {
    decision_id: OnceCell<Vec<u64>>,
    worker_id: OnceCell<Vec<u64>>,
    ttft_ms: OnceCell<Vec<f32>>,
    itl_ms: OnceCell<Vec<f32>>,
    output_tokens: OnceCell<Vec<u32>>,
    end: OnceCell<Vec<u32>>,
}

impl Outcomes {
    /// The decision that placed the request.
    pub fn decision_id(&self) -> &[u64] {
        self.decision_id.get_or_init(host::decision_id)
    }

    /// The worker that served it last.
    pub fn worker_id(&self) -> &[u64] {
        self.worker_id.get_or_init(host::worker_id)
    }

    /// Time to first token; NaN if there was none.
    pub fn ttft_ms(&self) -> &[f32] {
        self.ttft_ms.get_or_init(host::ttft_ms)
    }

    /// Mean time between tokens; NaN below two tokens.
    pub fn itl_ms(&self) -> &[f32] {
        self.itl_ms.get_or_init(host::itl_ms)
    }

    /// Tokens of output.
    pub fn output_tokens(&self) -> &[u32] {
        self.output_tokens.get_or_init(host::output_tokens)
    }

    /// How each ended, see [`end`].
    pub fn end(&self) -> &[u32] {
        self.end.get_or_init(host::end)
    }
}
