//! The pools that could serve a request, as columns.

use std::{cell::OnceCell, ops::Range};

use crate::{UNKNOWN, bindings::admission::dynamo::policy::admission_pools as host, codes::role, testing::GivenQuantiles};

/// The pools that could serve a request, and what waits for them.
///
/// Columns: one value per pool, all in the same order. A position is a *row* and is valid during one call. Row 0 is the pool
/// that the request would go to first: the workers of its model that take whole requests, or prefill where roles are apart.
/// The other pools of its model follow. Amounts are of the whole pool, over all tenants and classes. An unknown `u32`
/// is [`UNKNOWN`], an unknown float NaN.
///
/// Each column is asked of the host when a policy first reads it, the latencies each time.
#[derive(Debug, Default)]
pub struct Pools {
    pub(crate) count: OnceCell<u32>,
    pub(crate) pool_key: OnceCell<Vec<u64>>,
    pub(crate) role: OnceCell<Vec<u32>>,
    pub(crate) ready_workers: OnceCell<Vec<u32>>,
    pub(crate) running_requests: OnceCell<Vec<u32>>,
    pub(crate) free_requests: OnceCell<Vec<u32>>,
    pub(crate) queued_requests: OnceCell<Vec<u32>>,
    pub(crate) queued_tokens: OnceCell<Vec<u32>>,
    pub(crate) oldest_age_ms: OnceCell<Vec<u32>>,
    pub(crate) predicted_wait_ms: OnceCell<Vec<f32>>,
    pub(crate) shed_rate: OnceCell<Vec<f32>>,
    pub(crate) given: GivenQuantiles,
}

impl Pools {
    /// Number of rows, at least 1.
    pub fn count(&self) -> u32 {
        *self.count.get_or_init(|| if cfg!(target_arch = "wasm32") { host::count() } else { 0 })
    }

    /// The rows: `0..count`.
    pub fn rows(&self) -> Range<u32> {
        0..self.count()
    }

    /// The column, asked of the host once; outside the sandbox, where there is no host to ask, unknown in every row.
    fn pull<'a, T: Clone>(&self, cell: &'a OnceCell<Vec<T>>, host: fn() -> Vec<T>, unknown: T) -> &'a [T] {
        cell.get_or_init(|| if cfg!(target_arch = "wasm32") { host() } else { vec![unknown; self.count() as usize] })
    }

    /// Key of the pool (model and role), equal on every host. What is kept of a pool is kept by this.
    pub fn pool_key(&self) -> &[u64] {
        self.pull(&self.pool_key, host::pool_key, u64::MAX)
    }

    /// What work its workers do, see [`role`].
    pub fn role(&self) -> &[u32] {
        self.pull(&self.role, host::role, role::AGGREGATED)
    }

    /// Workers that accept requests.
    pub fn ready_workers(&self) -> &[u32] {
        self.pull(&self.ready_workers, host::ready_workers, UNKNOWN)
    }

    /// Requests that run.
    pub fn running_requests(&self) -> &[u32] {
        self.pull(&self.running_requests, host::running_requests, UNKNOWN)
    }

    /// Requests that could be started at once; [`UNKNOWN`] where nothing limits them.
    pub fn free_requests(&self) -> &[u32] {
        self.pull(&self.free_requests, host::free_requests, UNKNOWN)
    }

    /// Requests that wait in the host's queue.
    pub fn queued_requests(&self) -> &[u32] {
        self.pull(&self.queued_requests, host::queued_requests, UNKNOWN)
    }

    /// Prompt tokens that wait in the host's queue.
    pub fn queued_tokens(&self) -> &[u32] {
        self.pull(&self.queued_tokens, host::queued_tokens, UNKNOWN)
    }

    /// Age of the oldest waiting request; 0 if none waits.
    pub fn oldest_age_ms(&self) -> &[u32] {
        self.pull(&self.oldest_age_ms, host::oldest_age_ms, UNKNOWN)
    }

    /// What the host predicts that the request would wait in its queue, standing there as the host's configuration says.
    pub fn predicted_wait_ms(&self) -> &[f32] {
        self.pull(&self.predicted_wait_ms, host::predicted_wait_ms, f32::NAN)
    }

    /// Share of recent requests that were shed or refused, 0 to 1.
    pub fn shed_rate(&self) -> &[f32] {
        self.pull(&self.shed_rate, host::shed_rate, f32::NAN)
    }

    /// Recent times to first token, without the wait in the host's queue, at a percentile from 0 to 100.
    pub fn recent_ttft_ms(&self, percentile: f32) -> Vec<f32> {
        if cfg!(target_arch = "wasm32") {
            host::recent_ttft_ms(percentile)
        } else {
            self.given.recent_ttft_ms(percentile, self.count())
        }
    }

    /// Recent times between tokens, at a percentile from 0 to 100.
    pub fn recent_itl_ms(&self, percentile: f32) -> Vec<f32> {
        if cfg!(target_arch = "wasm32") {
            host::recent_itl_ms(percentile)
        } else {
            self.given.recent_itl_ms(percentile, self.count())
        }
    }
}
