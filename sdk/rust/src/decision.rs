//! What a policy decides.

use std::time::Duration;

use crate::{bindings::router::dynamo::policy::routing_answer as host, testing::services as native};

/// What a routing policy decides. Later hosts may offer further kinds of decision.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Decision {
    /// Place the request on the first of these rows that takes it: 1 to 16 rows, best first, each at most once.
    Place(Vec<u32>),
    /// Place prefill and decode at once: pairs of rows (prefill, decode), best first, at most 16, each at most once. In the
    /// stage [`WHOLE`](crate::stage::WHOLE) alone, for policies that read [`Links`](crate::Links).
    PlaceDisaggregated(Vec<(u32, u32)>),
    /// Ask again when the fleet changes, or after this time. A bounded number of times, never past the deadline; blocks
    /// nobody behind it.
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

/// Milliseconds, rounded up: less than one must not become 0, which means something else.
pub(crate) fn millis(duration: Duration) -> u32 {
    let is_rounded_up = !duration.subsec_nanos().is_multiple_of(1_000_000);
    u32::try_from(duration.as_millis() + u128::from(is_rounded_up)).unwrap_or(u32::MAX)
}

/// Whether this decision's reasons are being recorded.
#[must_use]
pub fn explain_wanted() -> bool {
    if cfg!(target_arch = "wasm32") { host::explain_wanted() } else { native::explain_wanted() }
}

/// Records one term of the reasoning, a value per candidate in row order. Costs nothing unless [`explain_wanted`].
pub fn explain(term: &str, values: impl FnOnce() -> Vec<f32>) {
    if explain_wanted() {
        let values = values();
        if cfg!(target_arch = "wasm32") { host::explain(term, &values) } else { native::explain(term, values) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_below_a_millisecond_is_not_none() {
        assert_eq!([0, 1, 1_000_000, 1_000_001].map(|nanos| millis(Duration::from_nanos(nanos))), [0, 1, 1, 2]);
        assert_eq!(millis(Duration::MAX), u32::MAX);
    }
}
