//! The workers that may serve a request, as columns.

use std::{cell::OnceCell, ops::Range};

use crate::{
    Candidate, UNKNOWN,
    bindings::router::dynamo::policy::candidates as host,
    codes::{role, worker_state},
    testing::{Given, GivenLinks},
};

/// The workers that may serve this request: those of the right model, role, health and adapter. A policy ranks them; it
/// cannot widen the set.
///
/// Columns: one value per candidate, all in the same order, ascending worker id. A position is a *row* and is valid
/// during one call. A column is computed when a policy first reads it and is constant then; columns read one after
/// another may be moments apart. An unknown `u32` is [`UNKNOWN`], an unknown float NaN. No observation is not idle: see
/// [`load_age_ms`](Self::load_age_ms). All amounts of work are in tokens.
///
/// What hosts count themselves (`active_*`) covers every host that shares this fleet, and is known at once. What engines
/// report (`queued_requests`, `kv_tokens_*`) is as old as `load_age_ms` says. What hosts observe (`recent_*`,
/// `error_rate`) are moving averages over about the last ten requests; they do not decay, so that a worker that is
/// avoided keeps them: see [`recent_age_ms`](Self::recent_age_ms).
///
/// Slices are the fast way: a loop over them becomes SIMD. [`iter`](Self::iter) is the convenient one: it costs a check
/// per row and column that is read.
#[derive(Debug, Default)]
pub struct Candidates {
    pub(crate) count: OnceCell<u32>,
    pub(crate) worker_id: OnceCell<Vec<u64>>,
    pub(crate) engine_key: OnceCell<Vec<u64>>,
    pub(crate) dp_rank: OnceCell<Vec<u32>>,
    pub(crate) pool_key: OnceCell<Vec<u64>>,
    pub(crate) role: OnceCell<Vec<u32>>,
    pub(crate) state: OnceCell<Vec<u32>>,
    pub(crate) block_size: OnceCell<Vec<u32>>,
    pub(crate) cached_device_tokens: OnceCell<Vec<u32>>,
    pub(crate) cached_host_tokens: OnceCell<Vec<u32>>,
    pub(crate) cached_disk_tokens: OnceCell<Vec<u32>>,
    pub(crate) cached_remote_tokens: OnceCell<Vec<u32>>,
    pub(crate) active_prefill_tokens: OnceCell<Vec<u32>>,
    pub(crate) active_uncached_tokens: OnceCell<Vec<u32>>,
    pub(crate) prefill_busy_ms: OnceCell<Vec<u32>>,
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
    pub(crate) recent_age_ms: OnceCell<Vec<u32>>,
    pub(crate) up_seconds: OnceCell<Vec<u32>>,
    pub(crate) adapter_loaded: OnceCell<Vec<u32>>,
    pub(crate) preference: OnceCell<Vec<f32>>,
    pub(crate) given: Given,
    pub(crate) given_links: GivenLinks,
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

    /// One [`Candidate`] after the other, in row order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Candidate<'_>> + DoubleEndedIterator + Clone {
        self.rows().map(|row| Candidate::new(self, row))
    }

    /// The column, asked of the host once; outside the sandbox, where there is no host to ask, unknown in every row.
    fn pull<'a, T: Clone>(&self, cell: &'a OnceCell<Vec<T>>, host: fn() -> Vec<T>, unknown: T) -> &'a [T] {
        cell.get_or_init(|| if cfg!(target_arch = "wasm32") { host() } else { vec![unknown; self.count() as usize] })
    }

    /// Stable identity, a hash of namespace, worker name, model and rank; equal on every host. What a policy keeps between
    /// calls it keeps by this.
    pub fn worker_id(&self) -> &[u64] {
        self.pull(&self.worker_id, host::worker_id, u64::MAX)
    }

    /// Key of the engine: ranks of one engine share it, and nothing else does.
    pub fn engine_key(&self) -> &[u64] {
        self.pull(&self.engine_key, host::engine_key, u64::MAX)
    }

    /// Data-parallel rank within the engine.
    pub fn dp_rank(&self) -> &[u32] {
        self.pull(&self.dp_rank, host::dp_rank, 0)
    }

    /// Key of the pool (model and role).
    pub fn pool_key(&self) -> &[u64] {
        self.pull(&self.pool_key, host::pool_key, 0)
    }

    /// What work it does, see [`role`].
    pub fn role(&self) -> &[u32] {
        self.pull(&self.role, host::role, role::AGGREGATED)
    }

    /// How it fares, see [`worker_state`].
    pub fn state(&self) -> &[u32] {
        self.pull(&self.state, host::state, worker_state::HEALTHY)
    }

    /// Tokens per KV block.
    pub fn block_size(&self) -> &[u32] {
        self.pull(&self.block_size, host::block_size, UNKNOWN)
    }

    /// Tokens of this prompt's prefix that the worker holds in device memory.
    pub fn cached_device_tokens(&self) -> &[u32] {
        self.pull(&self.cached_device_tokens, host::cached_device_tokens, UNKNOWN)
    }

    /// Further tokens, beyond the device's, that it can load from host memory.
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

    /// Prompt tokens of requests that were sent and have not answered their first token.
    pub fn active_prefill_tokens(&self) -> &[u32] {
        self.pull(&self.active_prefill_tokens, host::active_prefill_tokens, UNKNOWN)
    }

    /// Of [`active_prefill_tokens`](Self::active_prefill_tokens), those that the worker did not hold when it was given the
    /// request, as far as the host knew: what it has to compute.
    pub fn active_uncached_tokens(&self) -> &[u32] {
        self.pull(&self.active_uncached_tokens, host::active_uncached_tokens, UNKNOWN)
    }

    /// Milliseconds since the worker last ended a prefill, or since the first prompt came to an idle one, whichever is
    /// later; 0 if it has nothing to prefill.
    pub fn prefill_busy_ms(&self) -> &[u32] {
        self.pull(&self.prefill_busy_ms, host::prefill_busy_ms, UNKNOWN)
    }

    /// Context tokens (prompt and output) of requests that are decoding.
    pub fn active_decode_tokens(&self) -> &[u32] {
        self.pull(&self.active_decode_tokens, host::active_decode_tokens, UNKNOWN)
    }

    /// Requests in flight.
    pub fn active_requests(&self) -> &[u32] {
        self.pull(&self.active_requests, host::active_requests, UNKNOWN)
    }

    /// Requests that wait inside the engine, as the engine reports.
    pub fn queued_requests(&self) -> &[u32] {
        self.pull(&self.queued_requests, host::queued_requests, UNKNOWN)
    }

    /// Requests that the engine runs at once at most.
    pub fn max_running_requests(&self) -> &[u32] {
        self.pull(&self.max_running_requests, host::max_running_requests, UNKNOWN)
    }

    /// Tokens that the engine computes in one step at most.
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

    /// Age of what the engine last reported of its load. Unknown: it never did.
    pub fn load_age_ms(&self) -> &[u32] {
        self.pull(&self.load_age_ms, host::load_age_ms, UNKNOWN)
    }

    /// Recent time to first token, from sending a request to the worker.
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

    /// Time since these were last observed: `recent_*` and `error_rate`.
    pub fn recent_age_ms(&self) -> &[u32] {
        self.pull(&self.recent_age_ms, host::recent_age_ms, UNKNOWN)
    }

    /// Seconds since the worker joined.
    pub fn up_seconds(&self) -> &[u32] {
        self.pull(&self.up_seconds, host::up_seconds, UNKNOWN)
    }

    /// Whether the request's adapter is loaded: 1 yes, 0 no.
    pub fn adapter_loaded(&self) -> &[u32] {
        self.pull(&self.adapter_loaded, host::adapter_loaded, UNKNOWN)
    }

    /// The operator's preference for this request: a factor on cost, 1 neutral, lower is preferred.
    pub fn preference(&self) -> &[f32] {
        self.pull(&self.preference, host::preference, 1.0)
    }

    /// Placement domain by level, see [`topology`](mod@crate::topology): equal values, same domain. Asked of the host at each call: keep it.
    pub fn topology(&self, level: u32) -> Vec<u32> {
        if cfg!(target_arch = "wasm32") {
            host::topology(level)
        } else {
            self.given.topology(level).unwrap_or_else(|| self.unknown())
        }
    }

    /// Label by key: equal values, same label. Unknown: the worker has no such label. Codes are valid during one call.
    /// Asked of the host at each call: keep it.
    pub fn label(&self, key: &str) -> Vec<u32> {
        if cfg!(target_arch = "wasm32") { host::label(key) } else { self.given.label(key).unwrap_or_else(|| self.unknown()) }
    }

    /// The code that [`label`](Self::label) uses for a value; `None` if no candidate has it. Asked of the host at each
    /// call.
    pub fn label_code(&self, key: &str, value: &str) -> Option<u32> {
        if cfg!(target_arch = "wasm32") { host::label_code(key, value) } else { self.given.label_code(key, value) }
    }

    /// A numeric column by name, which the operator defines: a label that is a number, an engine's gauge, a price.
    /// `None` if there is no such column. Asked of the host at each call: keep it.
    pub fn signal(&self, name: &str) -> Option<Vec<f32>> {
        if cfg!(target_arch = "wasm32") { host::signal(name) } else { self.given.signal(name) }
    }

    fn unknown(&self) -> Vec<u32> {
        vec![UNKNOWN; self.count() as usize]
    }
}
