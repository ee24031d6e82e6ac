//! Outcomes that a test gives.

use super::{column, given};
use crate::Outcomes;

/// For tests: see [`testing`](crate::testing). A column that is not as long as the outcomes panics.
impl Outcomes {
    /// Outcomes for a test: what no `with_` gives is unknown, and how they ended is [`DONE`](crate::end::DONE).
    #[must_use]
    pub fn test(count: u32) -> Self {
        Self { count: given(count), ..Self::default() }
    }

    /// Gives [`decision_id`](Self::decision_id).
    #[must_use]
    pub fn with_decision_id(self, values: impl Into<Vec<u64>>) -> Self {
        Self { decision_id: column(self.count(), values), ..self }
    }

    /// Gives [`worker_id`](Self::worker_id).
    #[must_use]
    pub fn with_worker_id(self, values: impl Into<Vec<u64>>) -> Self {
        Self { worker_id: column(self.count(), values), ..self }
    }

    /// Gives [`ttft_ms`](Self::ttft_ms).
    #[must_use]
    pub fn with_ttft_ms(self, values: impl Into<Vec<f32>>) -> Self {
        Self { ttft_ms: column(self.count(), values), ..self }
    }

    /// Gives [`itl_ms`](Self::itl_ms).
    #[must_use]
    pub fn with_itl_ms(self, values: impl Into<Vec<f32>>) -> Self {
        Self { itl_ms: column(self.count(), values), ..self }
    }

    /// Gives [`queue_ms`](Self::queue_ms).
    #[must_use]
    pub fn with_queue_ms(self, values: impl Into<Vec<f32>>) -> Self {
        Self { queue_ms: column(self.count(), values), ..self }
    }

    /// Gives [`output_tokens`](Self::output_tokens).
    #[must_use]
    pub fn with_output_tokens(self, values: impl Into<Vec<u32>>) -> Self {
        Self { output_tokens: column(self.count(), values), ..self }
    }

    /// Gives [`end`](Self::end).
    #[must_use]
    pub fn with_end(self, values: impl Into<Vec<u32>>) -> Self {
        Self { end: column(self.count(), values), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{UNKNOWN, end};

    #[test]
    fn what_a_test_does_not_give_is_unknown() {
        let outcomes = Outcomes::test(2).with_ttft_ms([12.0, f32::NAN]);
        assert_eq!(outcomes.ttft_ms()[0], 12.0);
        assert!(outcomes.itl_ms().iter().all(|itl| itl.is_nan()));
        assert_eq!((outcomes.output_tokens(), outcomes.end()), (&[UNKNOWN; 2][..], &[end::DONE; 2][..]));
        assert_eq!(Outcomes::test(0).iter().len(), 0);
    }

    #[test]
    fn a_row_reads_its_own_values() {
        let outcomes = Outcomes::test(2).with_worker_id([5, 6]).with_decision_id([1, 1]).with_end([end::FAILED, end::DONE]);
        let rows: Vec<_> = outcomes.iter().map(|row| (row.row(), row.decision_id(), row.worker_id(), row.end())).collect();
        assert_eq!(rows, [(0, 1, 5, end::FAILED), (1, 1, 6, end::DONE)]);
    }
}
