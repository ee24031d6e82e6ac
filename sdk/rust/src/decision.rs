//! What a policy decides.

use std::time::Duration;

use crate::bindings::dynamo::policy::routing_answer as host;

/// What a routing policy decides.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Place the request on the first of these rows that takes it: 1 to 16 different rows, best first.
    Place(Vec<u32>),
    /// Place prefill and decode at once: pairs of rows (prefill, decode), best first.
    PlaceDisaggregated(Vec<(u32, u32)>),
    /// Ask again when the fleet changes, or after this time.
    Hold(Duration),
    /// Answer the client with an error.
    Reject {
        /// 400 to 599.
        status: u16,
        /// When the client should try again.
        retry_after: Option<Duration>,
        /// For the client.
        reason: String,
    },
    /// Let the slot's fallback decide; it is counted as `no-answer`.
    Abstain,
}

impl Decision {
    /// Tells the host.
    pub(crate) fn answer(self) {
        match self {
            Self::Place(rows) => host::place(&rows),
            Self::PlaceDisaggregated(pairs) => host::place_disaggregated(&pairs),
            Self::Hold(at_most) => host::hold(millis(at_most)),
            Self::Reject { status, retry_after, reason } => host::reject(status, retry_after.map(millis), &reason),
            Self::Abstain => {}
        }
    }
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// Whether this decision's reasons are being recorded.
#[must_use]
pub fn explain_wanted() -> bool {
    cfg!(target_arch = "wasm32") && host::explain_wanted()
}

/// Records one term of the reasoning, a value per row. Costs nothing unless [`explain_wanted`].
pub fn explain(term: &str, values: impl FnOnce() -> Vec<f32>) {
    if explain_wanted() {
        host::explain(term, &values());
    }
}
