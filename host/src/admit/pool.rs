//! A model's pool as requests find it: what it was like lately, how long answers are, and which of its workers do what.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
};

use dynamo_host_core::{PoolState, RequestFacts, Role, admission::Quantiles, id};
use dynamo_host_flow::{Lately, PoolLoad};
use serde::Serialize;

/// Tokens of output that are expected of a model that nothing is known of.
const EXPECTED_OUTPUT: f32 = 256.0;
/// Weight of the newest answer in the average of their lengths: about the last fifty count.
const ALPHA: f32 = 0.02;

/// The workers of one model, whatever their roles: its requests wait in one line.
#[derive(Debug)]
pub(super) struct Pool {
    /// Key of that line, equal on every host.
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
    /// Average length of a choice, as bits; NaN before the first.
    output: AtomicU32,
    /// Where there are roles: the workers of each, those first where requests begin.
    parts: Mutex<Parts>,
    lately: Mutex<Lately>,
}

/// The workers of each role, as they were last measured.
#[derive(Debug, Default)]
struct Parts {
    rows: Vec<Part>,
    measured_ms: u64,
}

/// A model's workers of one role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Part {
    pub(super) role: Role,
    #[serde(rename = "ready_workers")]
    pub(super) ready: u32,
    pub(super) running: u32,
    /// Requests that they could be given at once.
    pub(super) free: u32,
}

impl Pool {
    /// A model's pool, without a worker that is known.
    pub(super) fn new(model: &str, now_ms: u64) -> Self {
        Self {
            key: key(model, Role::Aggregated),
            model: model.to_owned(),
            running: AtomicU32::new(0),
            least: AtomicU32::new(0),
            ready: AtomicU32::new(0),
            is_strained: AtomicBool::new(false),
            empty_since_ms: AtomicU64::new(now_ms),
            output: AtomicU32::new(f32::NAN.to_bits()),
            parts: Mutex::default(),
            lately: Mutex::default(),
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

    /// What it was like lately.
    pub(super) fn lately(&self) -> MutexGuard<'_, Lately> {
        lock(&self.lately)
    }

    /// Its workers by role were measured.
    pub(super) fn measured(&self, rows: Vec<Part>, now_ms: u64) {
        *lock(&self.parts) = Parts { rows, measured_ms: now_ms };
    }

    /// Its last worker is gone.
    pub(super) fn left(&self) {
        self.ready.store(0, Relaxed);
        self.is_strained.store(false, Relaxed);
        *lock(&self.parts) = Parts::default();
    }

    /// Its workers by role; none where all are aggregated.
    pub(super) fn parts(&self) -> Vec<Part> {
        lock(&self.parts).rows.clone()
    }

    /// Whether its workers by role were measured longer ago than this.
    pub(super) fn is_older_than(&self, age_ms: u64, now_ms: u64) -> bool {
        let parts = lock(&self.parts);
        !parts.rows.is_empty() && now_ms > parts.measured_ms + age_ms
    }

    /// What people are told of it: all of its workers.
    pub(super) fn state(&self, load: PoolLoad, now_ms: u64) -> PoolState {
        self.lately().state((self.key, Role::Aggregated), self.ready.load(Relaxed), load, now_ms)
    }

    /// What an admission policy is told of it: one pool for each role, and first the one that requests go to first. They wait
    /// before that one, and what they wait for afterwards has no line of its own. Prompts are computed in the one, and tokens made
    /// in the other: so it is with their latencies.
    pub(super) fn states(&self, load: PoolLoad, now_ms: u64) -> Vec<PoolState> {
        let whole = self.state(load, now_ms);
        let parts = self.parts();
        if parts.is_empty() {
            return vec![whole];
        }
        let of_role = |(row, part): (usize, &Part)| {
            let is_first = row == 0;
            let has_ttft = is_first || matches!(part.role, Role::Aggregated | Role::Both);
            let has_itl = part.role != Role::Prefill || parts.len() == 1;
            let line = if is_first { whole.clone() } else { PoolState { free_requests: part.free, ..without_line(&whole) } };
            PoolState {
                key: key(&self.model, part.role),
                role: part.role,
                ready_workers: part.ready,
                running_requests: part.running,
                ttft: if has_ttft { whole.ttft.clone() } else { Quantiles::default() },
                itl: if has_itl { whole.itl.clone() } else { Quantiles::default() },
                ..line
            }
        };
        parts.iter().enumerate().map(of_role).collect()
    }
}

/// A pool in which nobody waits.
fn without_line(pool: &PoolState) -> PoolState {
    let (queued_requests, queued_tokens, oldest_age_ms) = (0, 0, 0);
    PoolState { queued_requests, queued_tokens, oldest_age_ms, predicted_wait_ms: 0.0, shed_rate: 0.0, ..pool.clone() }
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_request_will_be_is_learnt_and_never_more_than_it_asks_for() {
        let pool = Pool::new("m", 0);
        assert_eq!((pool.expected_output(None), pool.expected_output(Some(3)), pool.expected_output(Some(0))), (256, 3, 1));
        for _ in 0..500 {
            pool.answered(40.0);
        }
        assert_eq!((pool.expected_output(None), pool.expected_output(Some(1000)), pool.expected_output(Some(3))), (40, 40, 3));
    }

    fn part(role: Role, ready: u32) -> Part {
        Part { role, ready, running: 1, free: 7 }
    }

    #[test]
    fn a_policy_is_told_of_each_role_and_first_of_where_requests_begin() {
        let pool = Pool::new("m", 0);
        pool.lately().first_token(100.0, 0);
        pool.lately().tokens(10.0, 0);
        let load = PoolLoad { queued: 5, free: Some(3), predicted_wait_ms: 9.0, ..PoolLoad::default() };
        let whole = pool.states(load, 0);
        assert_eq!((whole.len(), whole[0].key, whole[0].role), (1, id::key(b"m\0aggregated"), Role::Aggregated));
        pool.measured(vec![part(Role::Prefill, 2), part(Role::Decode, 3)], 0);
        let [prefill, decode] = &pool.states(load, 300)[..] else { panic!("two roles") };
        assert_eq!((prefill.key, decode.key), (id::key(b"m\0prefill"), id::key(b"m\0decode")));
        assert_eq!((prefill.ready_workers, decode.ready_workers), (2, 3));
        assert_eq!((prefill.queued_requests, decode.queued_requests), (5, 0));
        assert_eq!((prefill.free_requests, decode.free_requests, decode.predicted_wait_ms), (3, 7, 0.0));
        assert!(prefill.ttft.at(50.0) > 90.0 && prefill.itl.at(50.0).is_nan());
        assert!(decode.itl.at(50.0) > 9.0 && decode.ttft.at(50.0).is_nan());
        // Who can do all of it has both.
        pool.measured(vec![part(Role::Both, 2), part(Role::Decode, 3)], 0);
        let [both, _] = &pool.states(load, 600)[..] else { panic!("two roles") };
        assert!(both.ttft.at(50.0) > 90.0 && both.itl.at(50.0) > 9.0);
    }

    #[test]
    fn a_pools_key_is_that_of_the_contract() {
        assert_eq!(Pool::new("m", 0).key, id::key(b"m\0aggregated"));
    }
}
