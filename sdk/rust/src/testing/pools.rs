//! Pools that a test gives.

use super::{column, given};
use crate::Pools;

/// The latencies that a test gives; within the sandbox, none.
#[derive(Debug, Default)]
pub(crate) struct GivenQuantiles {
    ttft_ms: Vec<(f32, Vec<f32>)>,
    itl_ms: Vec<(f32, Vec<f32>)>,
}

impl GivenQuantiles {
    pub(crate) fn recent_ttft_ms(&self, percentile: f32, count: u32) -> Vec<f32> {
        find(&self.ttft_ms, percentile, count)
    }

    pub(crate) fn recent_itl_ms(&self, percentile: f32, count: u32) -> Vec<f32> {
        find(&self.itl_ms, percentile, count)
    }
}

/// What was given last for exactly this percentile; unknown in every row if nothing was.
fn find(given: &[(f32, Vec<f32>)], percentile: f32, count: u32) -> Vec<f32> {
    let known = given.iter().rfind(|(at, _)| *at == percentile).map(|(_, values)| values.clone());
    known.unwrap_or_else(|| vec![f32::NAN; count as usize])
}

/// For tests: see [`testing`](crate::testing). A column that is not as long as there are pools panics.
impl Pools {
    /// Pools for a test: of whole requests, with the keys 0, 1, 2, …. What else no `with_` gives is unknown.
    ///
    /// # Panics
    /// If `count` is 0: a request of no pool is not asked about.
    #[must_use]
    pub fn test(count: u32) -> Self {
        assert!(count > 0, "there is at least one pool");
        let keys: Vec<u64> = (0..count.into()).collect();
        Self { count: given(count), pool_key: given(keys), ..Self::default() }
    }

    /// Gives [`pool_key`](Self::pool_key).
    #[must_use]
    pub fn with_pool_key(self, values: impl Into<Vec<u64>>) -> Self {
        Self { pool_key: column(self.count(), values), ..self }
    }

    /// Gives [`role`](Self::role).
    #[must_use]
    pub fn with_role(self, values: impl Into<Vec<u32>>) -> Self {
        Self { role: column(self.count(), values), ..self }
    }

    /// Gives [`ready_workers`](Self::ready_workers).
    #[must_use]
    pub fn with_ready_workers(self, values: impl Into<Vec<u32>>) -> Self {
        Self { ready_workers: column(self.count(), values), ..self }
    }

    /// Gives [`running_requests`](Self::running_requests).
    #[must_use]
    pub fn with_running_requests(self, values: impl Into<Vec<u32>>) -> Self {
        Self { running_requests: column(self.count(), values), ..self }
    }

    /// Gives [`free_requests`](Self::free_requests).
    #[must_use]
    pub fn with_free_requests(self, values: impl Into<Vec<u32>>) -> Self {
        Self { free_requests: column(self.count(), values), ..self }
    }

    /// Gives [`queued_requests`](Self::queued_requests).
    #[must_use]
    pub fn with_queued_requests(self, values: impl Into<Vec<u32>>) -> Self {
        Self { queued_requests: column(self.count(), values), ..self }
    }

    /// Gives [`queued_tokens`](Self::queued_tokens).
    #[must_use]
    pub fn with_queued_tokens(self, values: impl Into<Vec<u32>>) -> Self {
        Self { queued_tokens: column(self.count(), values), ..self }
    }

    /// Gives [`oldest_age_ms`](Self::oldest_age_ms).
    #[must_use]
    pub fn with_oldest_age_ms(self, values: impl Into<Vec<u32>>) -> Self {
        Self { oldest_age_ms: column(self.count(), values), ..self }
    }

    /// Gives [`predicted_wait_ms`](Self::predicted_wait_ms).
    #[must_use]
    pub fn with_predicted_wait_ms(self, values: impl Into<Vec<f32>>) -> Self {
        Self { predicted_wait_ms: column(self.count(), values), ..self }
    }

    /// Gives [`shed_rate`](Self::shed_rate).
    #[must_use]
    pub fn with_shed_rate(self, values: impl Into<Vec<f32>>) -> Self {
        Self { shed_rate: column(self.count(), values), ..self }
    }

    /// Gives [`recent_ttft_ms`](Self::recent_ttft_ms) at one percentile.
    ///
    /// # Panics
    /// If there is not one value per row.
    #[must_use]
    pub fn with_recent_ttft_ms(mut self, percentile: f32, values: impl Into<Vec<f32>>) -> Self {
        let values = values.into();
        assert_eq!(values.len(), self.count() as usize, "a column has one value per row");
        self.given.ttft_ms.push((percentile, values));
        self
    }

    /// Gives [`recent_itl_ms`](Self::recent_itl_ms) at one percentile.
    ///
    /// # Panics
    /// If there is not one value per row.
    #[must_use]
    pub fn with_recent_itl_ms(mut self, percentile: f32, values: impl Into<Vec<f32>>) -> Self {
        let values = values.into();
        assert_eq!(values.len(), self.count() as usize, "a column has one value per row");
        self.given.itl_ms.push((percentile, values));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{UNKNOWN, role};

    #[test]
    fn what_a_test_does_not_give_is_unknown() {
        let pools = Pools::test(2).with_queued_requests([3, 0]).with_recent_ttft_ms(50.0, [12.0, 13.0]);
        assert_eq!((pools.queued_requests(), pools.free_requests()), (&[3, 0][..], &[UNKNOWN; 2][..]));
        assert_eq!((pools.role(), pools.pool_key()), (&[role::AGGREGATED; 2][..], &[0, 1][..]));
        assert_eq!(pools.recent_ttft_ms(50.0), [12.0, 13.0]);
        assert!(pools.recent_ttft_ms(99.0).iter().chain(pools.predicted_wait_ms()).all(|ms| ms.is_nan()));
    }
}
