//! The workers that may serve a request, as columns.

use std::{cell::OnceCell, ops::Range};

use crate::{UNKNOWN, bindings::dynamo::policy::candidates as host};

/// The workers that may serve this request, in ascending worker id. A position is a *row*.
///
/// Each column is one value per row, asked of the host when a policy first reads it. An unknown `u32` is
/// [`UNKNOWN`], an unknown float NaN. Amounts of work are in tokens.
#[derive(Debug, Default)]
pub struct Candidates {
    pub(crate) count: OnceCell<u32>,
    pub(crate) worker_id: OnceCell<Vec<u64>>,
    pub(crate) dp_rank: OnceCell<Vec<u32>>,
    pub(crate) pool: OnceCell<Vec<u32>>,
    pub(crate) role: OnceCell<Vec<u32>>,
    pub(crate) state: OnceCell<Vec<u32>>,
    pub(crate) block_size: OnceCell<Vec<u32>>,
    pub(crate) cached_device_tokens: OnceCell<Vec<u32>>,
    pub(crate) cached_host_tokens: OnceCell<Vec<u32>>,
    pub(crate) cached_disk_tokens: OnceCell<Vec<u32>>,
    pub(crate) cached_remote_tokens: OnceCell<Vec<u32>>,
    pub(crate) active_prefill_tokens: OnceCell<Vec<u32>>,
    pub(crate) active_decode_tokens: OnceCell<Vec<u32>>,
    pub(crate) active_requests: OnceCell<Vec<u32>>,
    pub(crate) queued_requests: OnceCell<Vec<u32>>,
    pub(crate) max_running_requests: OnceCell<Vec<u32>>,
    pub(crate) max_batched_tokens: OnceCell<Vec<u32>>,
    pub(crate) kv_tokens_total: OnceCell<Vec<u32>>,
    pub(crate) kv_tokens_free: OnceCell<Vec<u32>>,
    pub(crate) load_age_ms: OnceCell<Vec<u32>>,
    pub(crate) recent_ttft_ms: OnceCell<Vec<f32>>,
    pub(crate) recent_itl_ms: OnceCell<Vec<f32>>,
    pub(crate) recent_tokens_per_second: OnceCell<Vec<f32>>,
    pub(crate) error_rate: OnceCell<Vec<f32>>,
    pub(crate) up_seconds: OnceCell<Vec<u32>>,
    pub(crate) adapter_loaded: OnceCell<Vec<u32>>,
    pub(crate) preference: OnceCell<Vec<f32>>,
    pub(crate) labels: Vec<(String, Vec<u32>)>,
    pub(crate) signals: Vec<(String, Vec<f32>)>,
}

impl Candidates {
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

    /// Stable identity, equal on every host: keep what you keep between calls by this.
    pub fn worker_id(&self) -> &[u64] {
        self.pull(&self.worker_id, host::worker_id, u64::MAX)
    }

    /// Data-parallel rank within the engine.
    pub fn dp_rank(&self) -> &[u32] {
        self.pull(&self.dp_rank, host::dp_rank, 0)
    }

    /// Pool: equal values, same pool.
    pub fn pool(&self) -> &[u32] {
        self.pull(&self.pool, host::pool, 0)
    }

    /// 0 aggregated, 1 prefill, 2 decode.
    pub fn role(&self) -> &[u32] {
        self.pull(&self.role, host::role, 0)
    }

    /// 0 healthy, 1 suspect.
    pub fn state(&self) -> &[u32] {
        self.pull(&self.state, host::state, 0)
    }

    /// Tokens per KV block.
    pub fn block_size(&self) -> &[u32] {
        self.pull(&self.block_size, host::block_size, UNKNOWN)
    }

    /// Tokens of the prompt's prefix in the worker's device memory.
    pub fn cached_device_tokens(&self) -> &[u32] {
        self.pull(&self.cached_device_tokens, host::cached_device_tokens, UNKNOWN)
    }

    /// Further tokens that it can load from host memory.
    pub fn cached_host_tokens(&self) -> &[u32] {
        self.pull(&self.cached_host_tokens, host::cached_host_tokens, UNKNOWN)
    }

    /// Further tokens that it can load from disk.
    pub fn cached_disk_tokens(&self) -> &[u32] {
        self.pull(&self.cached_disk_tokens, host::cached_disk_tokens, UNKNOWN)
    }

    /// Further tokens that it can load from a remote store or peer.
    pub fn cached_remote_tokens(&self) -> &[u32] {
        self.pull(&self.cached_remote_tokens, host::cached_remote_tokens, UNKNOWN)
    }

    /// Prompt tokens of requests without a first token.
    pub fn active_prefill_tokens(&self) -> &[u32] {
        self.pull(&self.active_prefill_tokens, host::active_prefill_tokens, UNKNOWN)
    }

    /// Context tokens of requests that decode.
    pub fn active_decode_tokens(&self) -> &[u32] {
        self.pull(&self.active_decode_tokens, host::active_decode_tokens, UNKNOWN)
    }

    /// Requests in flight.
    pub fn active_requests(&self) -> &[u32] {
        self.pull(&self.active_requests, host::active_requests, UNKNOWN)
    }

    /// Requests that wait inside the engine.
    pub fn queued_requests(&self) -> &[u32] {
        self.pull(&self.queued_requests, host::queued_requests, UNKNOWN)
    }

    /// Requests that the engine runs at once.
    pub fn max_running_requests(&self) -> &[u32] {
        self.pull(&self.max_running_requests, host::max_running_requests, UNKNOWN)
    }

    /// Tokens that the engine computes in one step.
    pub fn max_batched_tokens(&self) -> &[u32] {
        self.pull(&self.max_batched_tokens, host::max_batched_tokens, UNKNOWN)
    }

    /// KV capacity in tokens.
    pub fn kv_tokens_total(&self) -> &[u32] {
        self.pull(&self.kv_tokens_total, host::kv_tokens_total, UNKNOWN)
    }

    /// KV capacity that is free or holds only reusable cache.
    pub fn kv_tokens_free(&self) -> &[u32] {
        self.pull(&self.kv_tokens_free, host::kv_tokens_free, UNKNOWN)
    }

    /// Age of what the engine last reported of its load.
    pub fn load_age_ms(&self) -> &[u32] {
        self.pull(&self.load_age_ms, host::load_age_ms, UNKNOWN)
    }

    /// Recent time to first token.
    pub fn recent_ttft_ms(&self) -> &[f32] {
        self.pull(&self.recent_ttft_ms, host::recent_ttft_ms, f32::NAN)
    }

    /// Recent time between tokens.
    pub fn recent_itl_ms(&self) -> &[f32] {
        self.pull(&self.recent_itl_ms, host::recent_itl_ms, f32::NAN)
    }

    /// Recent output throughput.
    pub fn recent_tokens_per_second(&self) -> &[f32] {
        self.pull(&self.recent_tokens_per_second, host::recent_tokens_per_second, f32::NAN)
    }

    /// Share of recent requests that failed, 0 to 1.
    pub fn error_rate(&self) -> &[f32] {
        self.pull(&self.error_rate, host::error_rate, f32::NAN)
    }

    /// Seconds since the worker joined.
    pub fn up_seconds(&self) -> &[u32] {
        self.pull(&self.up_seconds, host::up_seconds, UNKNOWN)
    }

    /// Whether the request's adapter is loaded: 1 yes, 0 no.
    pub fn adapter_loaded(&self) -> &[u32] {
        self.pull(&self.adapter_loaded, host::adapter_loaded, UNKNOWN)
    }

    /// The operator's preference: a factor on cost, 1 neutral, lower is preferred.
    pub fn preference(&self) -> &[f32] {
        self.pull(&self.preference, host::preference, 1.0)
    }

    /// Placement domain by level (0 host, 1 rack, 2 zone, 3 region): equal values, same domain.
    pub fn topology(&self, level: u32) -> Vec<u32> {
        if cfg!(target_arch = "wasm32") { host::topology(level) } else { vec![UNKNOWN; self.count() as usize] }
    }

    /// Label by key: equal values, same label.
    pub fn label(&self, key: &str) -> Vec<u32> {
        if cfg!(target_arch = "wasm32") {
            host::label(key)
        } else {
            let given = self.labels.iter().find(|(name, _)| name == key);
            given.map_or_else(|| vec![UNKNOWN; self.count() as usize], |(_, codes)| codes.clone())
        }
    }

    /// The code that [`label`](Self::label) uses for a value; `None` if no candidate has it.
    pub fn label_code(&self, key: &str, value: &str) -> Option<u32> {
        if cfg!(target_arch = "wasm32") { host::label_code(key, value) } else { None }
    }

    /// A numeric column that the operator defines: a label that is a number, an engine's gauge, a price.
    pub fn signal(&self, name: &str) -> Option<Vec<f32>> {
        if cfg!(target_arch = "wasm32") {
            host::signal(name)
        } else {
            self.signals.iter().find(|(given, _)| given == name).map(|(_, values)| values.clone())
        }
    }
}
