//! A pool as requests find it: what its latencies were lately, how much it refused, how long answers are.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
};

use dynamo_host_core::{
    PoolState, RequestFacts, Role,
    admission::{Quantiles, free},
    id,
};
use dynamo_host_flow::PoolLoad;

use super::recent::Recent;

/// Tokens of output that are expected of a model that nothing is known of.
const EXPECTED_OUTPUT: f32 = 256.0;
/// Weight of the newest answer in the average of their lengths: about the last fifty count.
const ALPHA: f32 = 0.02;
/// How long quantiles may be used that were computed once.
const QUANTILES_MS: u64 = 250;
/// How long a window is over which refusals are counted; what is read is of one to two of them.
const SHED_WINDOW_MS: u64 = 10_000;

/// The workers of one model and role.
#[derive(Debug)]
pub(super) struct Pool {
    /// Key of model and role, equal on every host.
    pub(super) key: u64,
    pub(super) model: String,
    /// Requests that run.
    pub(super) running: AtomicU32,
    /// The least that one of its workers runs at once: with fewer altogether, none can be full.
    pub(super) least: AtomicU32,
    /// Its workers that accept requests.
    pub(super) ready: AtomicU32,
    /// Whether workers run more than they are to: what ends there makes no room.
    pub(super) is_strained: AtomicBool,
    /// Since when it has no worker that accepts requests; `u64::MAX`: it has one.
    pub(super) empty_since_ms: AtomicU64,
    /// From a request's start to its first token.
    pub(super) ttft: Recent,
    pub(super) itl: Recent,
    /// Average length of a choice, as bits; NaN before the first.
    output: AtomicU32,
    shed: Mutex<Shed>,
    quantiles: Mutex<Option<(u64, Quantiles, Quantiles)>>,
}

/// Requests that were let in and refused, in the present window and the one before.
#[derive(Debug, Default)]
struct Shed {
    at: u64,
    present: [u32; 2],
    before: [u32; 2],
}

impl Pool {
    pub(super) fn new(model: &str) -> Self {
        Self {
            key: key(model, Role::Aggregated),
            model: model.to_owned(),
            running: AtomicU32::new(0),
            least: AtomicU32::new(0),
            ready: AtomicU32::new(0),
            is_strained: AtomicBool::new(false),
            empty_since_ms: AtomicU64::new(u64::MAX),
            ttft: Recent::default(),
            itl: Recent::default(),
            output: AtomicU32::new(f32::NAN.to_bits()),
            shed: Mutex::default(),
            quantiles: Mutex::default(),
        }
    }

    /// Tokens of output that a request is expected to have, for each choice: no more than it asks for.
    pub(super) fn expected_output(&self, max_output_tokens: Option<u32>) -> u32 {
        let average = f32::from_bits(self.output.load(Relaxed));
        let usual = if average.is_nan() { EXPECTED_OUTPUT } else { average.ceil() } as u32;
        max_output_tokens.map_or(usual, |max| max.min(usual)).max(1)
    }

    /// An answer had choices of this length, on average.
    pub(super) fn answered(&self, tokens: f32) {
        let old = f32::from_bits(self.output.load(Relaxed));
        // A lost race loses one observation of an average.
        let new = if old.is_nan() { tokens } else { old + ALPHA * (tokens - old) };
        self.output.store(new.to_bits(), Relaxed);
    }

    /// A request was let in, or refused.
    pub(super) fn count(&self, is_refused: bool, now_ms: u64) {
        let mut shed = lock(&self.shed);
        shed.turn(now_ms);
        shed.present[usize::from(is_refused)] += 1;
    }

    fn shed_rate(&self, now_ms: u64) -> f32 {
        let mut shed = lock(&self.shed);
        shed.turn(now_ms);
        let [admitted, refused] = [0, 1].map(|of| shed.present[of] + shed.before[of]);
        if refused == 0 { 0.0 } else { refused as f32 / (admitted + refused) as f32 }
    }

    /// What an admission policy is told of it.
    pub(super) fn state(&self, load: PoolLoad, now_ms: u64) -> PoolState {
        let (ttft, itl) = self.quantiles(now_ms);
        PoolState {
            key: self.key,
            role: Role::Aggregated,
            ready_workers: self.ready.load(Relaxed),
            running_requests: load.running,
            free_requests: free(load.free),
            queued_requests: load.queued,
            queued_tokens: free(Some(u32::try_from(load.queued_tokens).unwrap_or(u32::MAX))),
            oldest_age_ms: load.oldest_age_ms,
            predicted_wait_ms: load.predicted_wait_ms,
            shed_rate: self.shed_rate(now_ms),
            ttft,
            itl,
        }
    }

    fn quantiles(&self, now_ms: u64) -> (Quantiles, Quantiles) {
        let mut known = lock(&self.quantiles);
        match &*known {
            Some((at, ttft, itl)) if now_ms < at + QUANTILES_MS => (ttft.clone(), itl.clone()),
            _ => {
                let (ttft, itl) = (self.ttft.quantiles(now_ms), self.itl.quantiles(now_ms));
                *known = Some((now_ms, ttft.clone(), itl.clone()));
                (ttft, itl)
            }
        }
    }
}

/// Key of a pool.
pub(super) fn key(model: &str, role: Role) -> u64 {
    id::key(format!("{model}\0{role}").as_bytes())
}

/// Tokens of work that a request is expected to be.
pub(super) fn work(facts: &RequestFacts) -> u32 {
    let output = facts.expected_output_tokens.unwrap_or(0).saturating_mul(facts.choices);
    facts.prompt.tokens.saturating_add(output)
}

impl Shed {
    fn turn(&mut self, now_ms: u64) {
        let at = now_ms / SHED_WINDOW_MS;
        if at > self.at {
            let present = std::mem::take(&mut self.present);
            self.before = if at == self.at + 1 { present } else { [0; 2] };
            self.at = at;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_request_will_be_is_learnt_and_never_more_than_it_asks_for() {
        let pool = Pool::new("m");
        assert_eq!((pool.expected_output(None), pool.expected_output(Some(3)), pool.expected_output(Some(0))), (256, 3, 1));
        for _ in 0..500 {
            pool.answered(40.0);
        }
        assert_eq!((pool.expected_output(None), pool.expected_output(Some(1000)), pool.expected_output(Some(3))), (40, 40, 3));
    }

    #[test]
    fn refusals_are_a_share_of_the_last_seconds() {
        let pool = Pool::new("m");
        assert_eq!(pool.shed_rate(0), 0.0);
        for is_refused in [true, false, false, false] {
            pool.count(is_refused, 1);
        }
        assert_eq!((pool.shed_rate(2), pool.shed_rate(SHED_WINDOW_MS)), (0.25, 0.25));
        assert_eq!(pool.shed_rate(2 * SHED_WINDOW_MS), 0.0);
    }

    #[test]
    fn a_pools_key_is_that_of_the_contract() {
        assert_eq!(Pool::new("m").key, id::key(b"m\0aggregated"));
    }
}
