//! Room: how much the workers can run at once, told to the flow, so that requests wait here, where they can still be put
//! in another order, and not inside engines.
//!
//! A worker runs as many requests at once as the operator says, else as many as its engine says, else a default. One whose
//! engine has others' requests waiting is full until it has not: two readings of its load in a row must say so, since one
//! alone may be of our own on their way into a step. It is given one request at a time all the same, or others could keep
//! us out for ever. What runs on workers that accept nothing is no part of the room, and takes nothing from it.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use dynamo_host_core::{Load, LoadSlot, load::Reported};
use dynamo_host_flow::Room;

use super::pool::Pool;
use crate::roster::Snapshot;

/// How old what an engine says of its queue may be: older, it tells nothing of now.
const FRESH_MS: u32 = 3000;
/// Weight of the newest sample of how much of prompts is to be computed.
const ALPHA: f32 = 0.1;
/// The least share of prompts that is reckoned to be computed.
const LEAST_UNCACHED: f32 = 0.02;

/// What each worker can run, by its place on the load board.
#[derive(Debug)]
pub(super) struct Limits(Box<[AtomicU32]>);

impl Limits {
    pub(super) fn new(workers: u32) -> Self {
        Self((0..workers).map(|_| AtomicU32::new(u32::MAX)).collect())
    }

    /// Whether a worker with so many requests can be given another.
    pub(super) fn has_room(&self, slot: u32, active: u32) -> bool {
        self.0.get(slot as usize).is_none_or(|limit| active < limit.load(Relaxed))
    }
}

/// The workers of all pools, as one snapshot has them, and what was last seen of them.
#[derive(Debug, Default)]
pub(super) struct Lineup {
    generation: Option<u64>,
    pools: Vec<OfPool>,
    /// Workers whose engines had requests waiting, by their place on the board.
    queueing: HashMap<u32, Queueing>,
}

#[derive(Debug)]
struct OfPool {
    pool: Arc<Pool>,
    workers: Vec<Place>,
    /// Share of its prompts that has to be computed.
    uncached: f32,
}

#[derive(Debug)]
struct Place {
    load: Arc<LoadSlot>,
    is_ready: bool,
    /// As the operator says.
    max_running: Option<u32>,
}

/// An engine that has requests waiting.
#[derive(Clone, Copy, Debug)]
struct Queueing {
    /// When it last said so.
    at_ms: u64,
    /// How often in a row.
    readings: u32,
}

/// What is assumed of workers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Assumed {
    /// Requests that a worker runs at once whose engine does not say.
    pub(super) max_running: u32,
    /// Steps' worth of prompts that may wait for their prefill on each; 0: any number.
    pub(super) prefill_steps: u32,
}

impl Lineup {
    pub(super) fn is_of(&self, snapshot: &Snapshot) -> bool {
        self.generation == Some(snapshot.fleet().generation())
    }

    /// Takes the workers of a snapshot. `pool` finds a model's pool; those that have no workers any more are given back.
    pub(super) fn take(&mut self, snapshot: &Snapshot, pool: impl Fn(&str) -> Arc<Pool>) -> Vec<Arc<Pool>> {
        let mut by_model: HashMap<&str, OfPool> = HashMap::new();
        for (place, worker) in snapshot.fleet().workers().iter().enumerate() {
            let of_pool = by_model.entry(&worker.spec.model).or_insert_with(|| {
                let pool = pool(&worker.spec.model);
                let known = self.pools.iter().find(|known| Arc::ptr_eq(&known.pool, &pool));
                OfPool { uncached: known.map_or(1.0, |known| known.uncached), pool, workers: Vec::new() }
            });
            of_pool.workers.push(Place {
                load: Arc::clone(&worker.load),
                is_ready: worker.state.is_eligible(),
                max_running: snapshot.max_running(place),
            });
        }
        let pools: Vec<OfPool> = by_model.into_values().collect();
        let is_gone = |old: &OfPool| !pools.iter().any(|new| Arc::ptr_eq(&new.pool, &old.pool));
        let gone = self.pools.iter().filter(|old| is_gone(old)).map(|old| Arc::clone(&old.pool)).collect();
        self.pools = pools;
        self.generation = Some(snapshot.fleet().generation());
        gone
    }

    /// Workers of all pools.
    pub(super) fn count(&self) -> usize {
        self.pools.iter().map(|of| of.workers.len()).sum()
    }

    /// Measures the room of each pool, and sets what each worker can run.
    pub(super) fn measure(&mut self, assumed: Assumed, limits: &Limits, now_ms: u64) -> Vec<(Arc<Pool>, Room)> {
        let Self { pools, queueing, .. } = self;
        let mut rooms = Vec::with_capacity(pools.len());
        for OfPool { pool, workers, uncached } in pools {
            let (mut ready, mut requests, mut least) = (0, 0u32, u32::MAX);
            let mut tokens = (assumed.prefill_steps > 0).then_some(0u32);
            let (mut in_prefill, mut to_compute) = (0u64, 0u64);
            let mut is_strained = false;
            for Place { load, is_ready, max_running } in workers {
                let active = load.get(Load::ActiveRequests);
                in_prefill += u64::from(load.get(Load::ActivePrefillTokens));
                to_compute += u64::from(load.get(Load::ActiveUncachedTokens));
                if !*is_ready {
                    requests = requests.saturating_add(active);
                    is_strained |= active > 0;
                    continue;
                }
                ready += 1;
                let max = max_running.or(load.get_reported(Reported::MaxRunningRequests).filter(|&max| max > 0));
                let max = max.unwrap_or(assumed.max_running);
                let is_full = is_full_of_others(queueing, load, now_ms);
                let limit = if is_full { 1 } else { max };
                limits.0[load.index() as usize].store(limit, Relaxed);
                least = least.min(limit);
                // What runs beyond it takes nothing from the others.
                requests = requests.saturating_add(limit.max(active));
                is_strained |= active > limit;
                let step = load.get_reported(Reported::MaxBatchedTokens);
                tokens = tokens.zip(step).map(|(sum, step)| {
                    let more = if is_full { 0 } else { step.saturating_mul(assumed.prefill_steps) };
                    sum.saturating_add(more)
                });
            }
            if in_prefill > 0 {
                *uncached += ALPHA * (to_compute as f32 / in_prefill as f32 - *uncached);
            }
            // The flow counts whole prompts.
            let tokens = tokens.map(|tokens| (tokens as f32 / uncached.max(LEAST_UNCACHED)) as u32);
            pool.least.store(least, Relaxed);
            pool.ready.store(ready, Relaxed);
            pool.is_strained.store(is_strained, Relaxed);
            rooms.push((Arc::clone(pool), Room { workers: ready, requests: Some(requests), tokens }));
        }
        rooms
    }
}

/// Whether an engine has more waiting than what is on its way into a step.
fn is_full_of_others(queueing: &mut HashMap<u32, Queueing>, load: &LoadSlot, now_ms: u64) -> bool {
    let queued = load.get_reported(Reported::QueuedRequests).unwrap_or(0);
    let age_ms = load.load_age_ms(now_ms).filter(|&age| age <= FRESH_MS);
    let Some(age_ms) = age_ms.filter(|_| queued > 0) else {
        if !queueing.is_empty() {
            queueing.remove(&load.index());
        }
        return false;
    };
    let at_ms = now_ms.saturating_sub(u64::from(age_ms));
    let seen = queueing.entry(load.index()).or_insert(Queueing { at_ms, readings: 1 });
    if at_ms > seen.at_ms {
        *seen = Queueing { at_ms, readings: seen.readings.saturating_add(1) };
    }
    seen.readings > 1
}
