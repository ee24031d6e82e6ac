//! One candidate: a row of the columns.

use crate::Candidates;

/// One row of [`Candidates`]: reads its own value of each column, which is asked of the host when the first row's is
/// read.
///
/// ```
/// use dynamo_policy_sdk::{Candidates, Decision};
///
/// let candidates = Candidates::test(3).with_active_requests([4, 0, 2]);
/// let idlest = candidates.iter().min_by_key(|candidate| candidate.active_requests()).unwrap();
/// assert_eq!(Decision::Place(vec![idlest.row()]), Decision::Place(vec![1]));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    candidates: &'a Candidates,
    row: u32,
}

impl<'a> Candidate<'a> {
    pub(crate) fn new(candidates: &'a Candidates, row: u32) -> Self {
        Self { candidates, row }
    }

    /// Its position, as a [`Decision`](crate::Decision) names it.
    #[must_use]
    pub fn row(self) -> u32 {
        self.row
    }

    /// See [`Candidates::worker_id`].
    #[must_use]
    pub fn worker_id(self) -> u64 {
        self.candidates.worker_id()[self.row as usize]
    }

    /// See [`Candidates::engine_key`].
    #[must_use]
    pub fn engine_key(self) -> u64 {
        self.candidates.engine_key()[self.row as usize]
    }

    /// See [`Candidates::dp_rank`].
    #[must_use]
    pub fn dp_rank(self) -> u32 {
        self.candidates.dp_rank()[self.row as usize]
    }

    /// See [`Candidates::pool_key`].
    #[must_use]
    pub fn pool_key(self) -> u64 {
        self.candidates.pool_key()[self.row as usize]
    }

    /// See [`Candidates::role`].
    #[must_use]
    pub fn role(self) -> u32 {
        self.candidates.role()[self.row as usize]
    }

    /// See [`Candidates::state`].
    #[must_use]
    pub fn state(self) -> u32 {
        self.candidates.state()[self.row as usize]
    }

    /// See [`Candidates::block_size`].
    #[must_use]
    pub fn block_size(self) -> u32 {
        self.candidates.block_size()[self.row as usize]
    }

    /// See [`Candidates::cached_device_tokens`].
    #[must_use]
    pub fn cached_device_tokens(self) -> u32 {
        self.candidates.cached_device_tokens()[self.row as usize]
    }

    /// See [`Candidates::cached_host_tokens`].
    #[must_use]
    pub fn cached_host_tokens(self) -> u32 {
        self.candidates.cached_host_tokens()[self.row as usize]
    }

    /// See [`Candidates::cached_disk_tokens`].
    #[must_use]
    pub fn cached_disk_tokens(self) -> u32 {
        self.candidates.cached_disk_tokens()[self.row as usize]
    }

    /// See [`Candidates::cached_remote_tokens`].
    #[must_use]
    pub fn cached_remote_tokens(self) -> u32 {
        self.candidates.cached_remote_tokens()[self.row as usize]
    }

    /// See [`Candidates::active_prefill_tokens`].
    #[must_use]
    pub fn active_prefill_tokens(self) -> u32 {
        self.candidates.active_prefill_tokens()[self.row as usize]
    }

    /// See [`Candidates::active_uncached_tokens`].
    #[must_use]
    pub fn active_uncached_tokens(self) -> u32 {
        self.candidates.active_uncached_tokens()[self.row as usize]
    }

    /// See [`Candidates::prefill_busy_ms`].
    #[must_use]
    pub fn prefill_busy_ms(self) -> u32 {
        self.candidates.prefill_busy_ms()[self.row as usize]
    }

    /// See [`Candidates::active_decode_tokens`].
    #[must_use]
    pub fn active_decode_tokens(self) -> u32 {
        self.candidates.active_decode_tokens()[self.row as usize]
    }

    /// See [`Candidates::active_requests`].
    #[must_use]
    pub fn active_requests(self) -> u32 {
        self.candidates.active_requests()[self.row as usize]
    }

    /// See [`Candidates::queued_requests`].
    #[must_use]
    pub fn queued_requests(self) -> u32 {
        self.candidates.queued_requests()[self.row as usize]
    }

    /// See [`Candidates::max_running_requests`].
    #[must_use]
    pub fn max_running_requests(self) -> u32 {
        self.candidates.max_running_requests()[self.row as usize]
    }

    /// See [`Candidates::max_batched_tokens`].
    #[must_use]
    pub fn max_batched_tokens(self) -> u32 {
        self.candidates.max_batched_tokens()[self.row as usize]
    }

    /// See [`Candidates::kv_tokens_total`].
    #[must_use]
    pub fn kv_tokens_total(self) -> u32 {
        self.candidates.kv_tokens_total()[self.row as usize]
    }

    /// See [`Candidates::kv_tokens_free`].
    #[must_use]
    pub fn kv_tokens_free(self) -> u32 {
        self.candidates.kv_tokens_free()[self.row as usize]
    }

    /// See [`Candidates::load_age_ms`].
    #[must_use]
    pub fn load_age_ms(self) -> u32 {
        self.candidates.load_age_ms()[self.row as usize]
    }

    /// See [`Candidates::recent_ttft_ms`].
    #[must_use]
    pub fn recent_ttft_ms(self) -> f32 {
        self.candidates.recent_ttft_ms()[self.row as usize]
    }

    /// See [`Candidates::recent_itl_ms`].
    #[must_use]
    pub fn recent_itl_ms(self) -> f32 {
        self.candidates.recent_itl_ms()[self.row as usize]
    }

    /// See [`Candidates::recent_tokens_per_second`].
    #[must_use]
    pub fn recent_tokens_per_second(self) -> f32 {
        self.candidates.recent_tokens_per_second()[self.row as usize]
    }

    /// See [`Candidates::error_rate`].
    #[must_use]
    pub fn error_rate(self) -> f32 {
        self.candidates.error_rate()[self.row as usize]
    }

    /// See [`Candidates::recent_age_ms`].
    #[must_use]
    pub fn recent_age_ms(self) -> u32 {
        self.candidates.recent_age_ms()[self.row as usize]
    }

    /// See [`Candidates::up_seconds`].
    #[must_use]
    pub fn up_seconds(self) -> u32 {
        self.candidates.up_seconds()[self.row as usize]
    }

    /// See [`Candidates::adapter_loaded`].
    #[must_use]
    pub fn adapter_loaded(self) -> u32 {
        self.candidates.adapter_loaded()[self.row as usize]
    }

    /// See [`Candidates::preference`].
    #[must_use]
    pub fn preference(self) -> f32 {
        self.candidates.preference()[self.row as usize]
    }
}
