//! The scorers of the library.
//!
//! Three ways lead from what is counted to a score, each for its kind of column:
//! - a *share* that is one already, such as the part of the prompt that is cached: itself;
//! - a *load*, which may be 0: its distance from the largest among the candidates, as a part of that;
//! - a *time* or *price*, which is never 0: how many times the least fits into it.

use super::Scorer;
use crate::{Candidates, Request, UNKNOWN};

/// A `u32` of the contract as a number, NaN where it is unknown.
fn known(value: u32) -> f32 {
    if value == UNKNOWN { f32::NAN } else { value as f32 }
}

/// At most 1. Not `min`, which prefers any number to NaN.
fn at_most_one(share: f32) -> f32 {
    if share > 1.0 { 1.0 } else { share }
}

fn write(scores: &mut [f32], values: impl Iterator<Item = f32>) {
    for (score, value) in scores.iter_mut().zip(values) {
        *score = value;
    }
}

/// 1 for one worker, 0 for all others.
fn only(worker: u64, candidates: &Candidates, scores: &mut [f32]) {
    write(scores, candidates.worker_id().iter().map(|&other| if other == worker { 1.0 } else { 0.0 }));
}

/// The largest value that is known; `None` if none is.
fn largest(values: &[u32]) -> Option<u32> {
    // One more than each, so that the unknown wrap to 0.
    values.iter().map(|&value| value.wrapping_add(1)).max().unwrap_or(0).checked_sub(1)
}

/// `1 - load / largest`; all 1 where all are idle.
fn less_is_better(loads: &[u32], scores: &mut [f32]) {
    let Some(largest) = largest(loads) else { return };
    let scale = if largest == 0 { 0.0 } else { 1.0 / largest as f32 };
    write(scores, loads.iter().map(|&load| 1.0 - known(load) * scale));
}

/// `least / time`. What is not above 0, or not finite, is as good as unknown.
fn quicker_is_better(times: &[f32], scores: &mut [f32]) {
    // As integers, whose minimum becomes SIMD: floats above 0 are ordered as their bits, and less one, all else is larger.
    let below = |time: f32| time.to_bits().wrapping_sub(1);
    let infinite = below(f32::INFINITY);
    let least = times.iter().map(|&time| below(time)).min();
    let Some(least) = least.filter(|&least| least < infinite).map(|least| f32::from_bits(least + 1)) else { return };
    write(scores, times.iter().map(|&time| if below(time) < infinite { least / time } else { f32::NAN }));
}

/// Scorers without parameters: their name, what they read, and how it becomes a score.
macro_rules! scorers {
    ($($(#[$doc:meta])+ $scorer:ident, $name:literal, |$request:pat_param, $candidates:pat_param, $scores:pat_param| $score:expr;)+) => {
        $(
            $(#[$doc])+
            #[derive(Clone, Copy, Debug)]
            pub struct $scorer;

            impl Scorer for $scorer {
                fn name(&self) -> &str {
                    $name
                }

                fn score(&self, $request: &Request, $candidates: &Candidates, $scores: &mut [f32]) {
                    $score
                }
            }
        )+
    };
}

scorers! {
    /// Few prompt tokens that are still to be computed.
    ActivePrefill, "active_prefill", |_, candidates, scores| less_is_better(candidates.active_prefill_tokens(), scores);
    /// Few context tokens that decode.
    ActiveDecode, "active_decode", |_, candidates, scores| less_is_better(candidates.active_decode_tokens(), scores);
    /// Few requests in flight.
    ActiveRequests, "active_requests", |_, candidates, scores| less_is_better(candidates.active_requests(), scores);
    /// Few requests that wait inside the engine, as it reports.
    Queue, "queue", |_, candidates, scores| less_is_better(candidates.queued_requests(), scores);
    /// A large part of the KV capacity free, as the engine reports.
    KvFree, "kv_free", |_, candidates, scores| {
        let (free, total) = (candidates.kv_tokens_free(), candidates.kv_tokens_total());
        if largest(free).is_some() {
            // A capacity of nothing is none that is known.
            let capacity = |total: u32| if total == 0 { f32::NAN } else { known(total) };
            write(scores, free.iter().zip(total).map(|(&free, &total)| at_most_one(known(free) / capacity(total))));
        }
    };
    /// Few of the recent requests failed.
    ErrorRate, "error_rate", |_, candidates, scores| write(scores, candidates.error_rate().iter().map(|rate| 1.0 - rate));
    /// A short recent time to first token.
    RecentTtft, "recent_ttft", |_, candidates, scores| quicker_is_better(candidates.recent_ttft_ms(), scores);
    /// A short recent time between tokens.
    RecentItl, "recent_itl", |_, candidates, scores| quicker_is_better(candidates.recent_itl_ms(), scores);
    /// The operator's preference for this request: lower is preferred.
    Preference, "preference", |_, candidates, scores| quicker_is_better(candidates.preference(), scores);
    /// The request's adapter is loaded. Nothing is known of a request without one.
    Adapter, "adapter", |request, candidates, scores| {
        if request.adapter().is_some() {
            write(scores, candidates.adapter_loaded().iter().map(|&loaded| at_most_one(known(loaded))));
        }
    };
    /// The worker that last served the session, or by its key the one that all hosts agree on. Nothing is known of a request
    /// without a session.
    SessionAffinity, "session_affinity", |request, candidates, scores| {
        let last = request.affinity_worker().filter(|worker| candidates.worker_id().binary_search(worker).is_ok());
        if let Some(home) = last.or_else(|| home(request.session_key()?, candidates)) {
            only(home, candidates, scores);
        }
    };
    /// The worker that all hosts agree on for prompts that begin like this one.
    PrefixAffinity, "prefix_affinity", |request, candidates, scores| {
        if let Some(home) = home(request.prefix_key(), candidates) {
            only(home, candidates, scores);
        }
    };
}

/// A large part of the prompt is cached. What lies further away than in device memory counts less, as it has to be loaded.
#[derive(Clone, Copy, Debug)]
pub struct CachedPrefix {
    /// Worth of a token in host memory, of one in device memory.
    pub host: f32,
    /// Worth of a token on disk.
    pub disk: f32,
    /// Worth of a token in a remote store or peer.
    pub remote: f32,
}

impl Default for CachedPrefix {
    fn default() -> Self {
        Self { host: 0.75, disk: 0.5, remote: 0.5 }
    }
}

impl Scorer for CachedPrefix {
    fn name(&self) -> &str {
        "cached_prefix"
    }

    fn score(&self, request: &Request, candidates: &Candidates, scores: &mut [f32]) {
        let prompt = request.prompt_tokens();
        if prompt == UNKNOWN || prompt == 0 || largest(candidates.cached_device_tokens()).is_none() {
            return;
        }
        // What is unknown of the further tiers is not there for all that anybody can tell; of the device it is unknown.
        let further = |tokens: u32| if tokens == UNKNOWN { 0.0 } else { tokens as f32 };
        let share = 1.0 / prompt as f32;
        let tiers = candidates
            .cached_device_tokens()
            .iter()
            .zip(candidates.cached_host_tokens())
            .zip(candidates.cached_disk_tokens())
            .zip(candidates.cached_remote_tokens());
        write(
            scores,
            tiers.map(|(((&device, &host), &disk), &remote)| {
                let worth = known(device) + self.host * further(host) + self.disk * further(disk) + self.remote * further(remote);
                at_most_one(worth * share)
            }),
        );
    }
}

/// The operator's label has a value. A worker without the label has not.
#[derive(Clone, Debug)]
pub struct LabelMatch {
    /// Name of the label.
    pub key: String,
    /// Its value.
    pub value: String,
}

impl Scorer for LabelMatch {
    fn name(&self) -> &str {
        &self.key
    }

    fn score(&self, _: &Request, candidates: &Candidates, scores: &mut [f32]) {
        if let Some(code) = candidates.label_code(&self.key, &self.value) {
            write(scores, candidates.label(&self.key).iter().map(|&label| if label == code { 1.0 } else { 0.0 }));
        }
    }
}

/// A numeric column that the operator defines: its distance from the worst among the candidates.
#[derive(Clone, Debug)]
pub struct Signal {
    /// Name of the column.
    pub name: String,
    /// Whether more is better.
    pub more_is_better: bool,
}

impl Scorer for Signal {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&self, _: &Request, candidates: &Candidates, scores: &mut [f32]) {
        let Some(values) = candidates.signal(&self.name) else { return };
        let finite = || values.iter().filter(|value| value.is_finite());
        let (low, high) =
            finite().fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &value| (low.min(value), high.max(value)));
        let scale = if high > low { 1.0 / (high - low) } else { 0.0 };
        write(
            scores,
            values.iter().map(|&value| match (value.is_finite(), self.more_is_better) {
                (false, _) => f32::NAN,
                (true, true) => 1.0 - (high - value) * scale,
                (true, false) => 1.0 - (value - low) * scale,
            }),
        );
    }
}

/// The worker that a key belongs to, the same on every host: rendezvous hashing (Thaler and Ravishankar 1998). When
/// workers come and go, only keys of those move. `None` for the key that stands for "unknown".
#[must_use]
pub fn home(key: u64, candidates: &Candidates) -> Option<u64> {
    let best = candidates.worker_id().iter().max_by_key(|&&worker| (rendezvous(key, worker), worker));
    best.filter(|_| key != u64::MAX).copied()
}

/// How much a worker is the one for a key: the most among the candidates is the key's home.
#[must_use]
pub fn rendezvous(key: u64, worker: u64) -> u64 {
    // The finalizer of splitmix64 over both: ids and keys are hashes already, and need only be mixed.
    let x = key.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ worker.rotate_left(32);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
