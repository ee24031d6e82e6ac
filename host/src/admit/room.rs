//! Room: how much the workers can run at once, told to the flow, so that requests wait here, where they can still be put
//! in another order, and not inside engines.
//!
//! A request that is handed from one worker to another spends its life where it is decoded, so that those workers are the room for
//! requests; prompts have the room of those who compute them. Which worker takes it is seen to where that one is chosen.
//!
//! A worker runs as many requests at once as the operator says, else as many as its engine says, else a default. One whose
//! engine has requests waiting, and more altogether than it has of us, is full until it has not: other clients fill it. Two
//! readings of its load in a row must say so, since they come at another moment than ours is counted. It is given one request at
//! a time all the same, or others could keep us out for ever. What runs on workers that accept nothing is no part of the room, and takes nothing from it.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use dynamo_host_core::{Among, Load, LoadSlot, Role, load::Reported};
use dynamo_host_flow::Room;

use super::pool::{Part, Pool};
use crate::roster::Snapshot;

/// How old what an engine says of its queue may be: older, it tells nothing of now.
const FRESH_MS: u32 = 3000;
/// Requests by which what an engine says may differ from what is counted here, beside a quarter of these.
const SLACK: u32 = 2;
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
    /// Where there are roles: the one of the workers where requests begin.
    begins: Option<Role>,
    /// Share of its prompts that has to be computed.
    uncached: f32,
}

#[derive(Debug)]
struct Place {
    load: Arc<LoadSlot>,
    role: Role,
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
                let uncached = known.map_or(1.0, |known| known.uncached);
                OfPool { begins: begins(snapshot, &worker.spec.model), uncached, pool, workers: Vec::new() }
            });
            of_pool.workers.push(Place {
                load: Arc::clone(&worker.load),
                role: worker.spec.role,
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
        for OfPool { pool, workers, begins, uncached } in pools {
            // Those who only prefill are where requests live if there is nobody else.
            let lives = |role: Role, has_others: bool| role != Role::Prefill || !has_others;
            let has_others = workers.iter().any(|place| place.is_ready && place.role != Role::Prefill);
            let computes =
                |role: Role| if *begins == Some(Role::Prefill) { role != Role::Decode } else { lives(role, has_others) };
            let mut parts: Vec<Part> = Vec::new();
            let (mut ready, mut requests, mut least) = (0, 0u32, u32::MAX);
            let mut tokens = (assumed.prefill_steps > 0).then_some(0u32);
            let (mut in_prefill, mut to_compute) = (0u64, 0u64);
            let mut is_strained = false;
            for Place { load, role, is_ready, max_running } in workers {
                let active = load.get(Load::ActiveRequests);
                let (lives, computes) = (lives(*role, has_others), computes(*role));
                if computes {
                    in_prefill += u64::from(load.get(Load::ActivePrefillTokens));
                    to_compute += u64::from(load.get(Load::ActiveUncachedTokens));
                }
                if !*is_ready {
                    requests = requests.saturating_add(if lives { active } else { 0 });
                    is_strained |= active > 0;
                    continue;
                }
                ready += u32::from(lives);
                let max = max_running.or(load.get_reported(Reported::MaxRunningRequests).filter(|&max| max > 0));
                let max = max.unwrap_or(assumed.max_running);
                let is_full = is_full_of_others(queueing, load, now_ms);
                let limit = if is_full { 1 } else { max };
                limits.0[load.index() as usize].store(limit, Relaxed);
                least = least.min(limit);
                // What runs beyond it takes nothing from the others.
                requests = requests.saturating_add(if lives { limit.max(active) } else { 0 });
                is_strained |= active > limit;
                if begins.is_some() {
                    count(&mut parts, Part { role: *role, ready: 1, running: active, free: limit.saturating_sub(active) });
                }
                if !computes {
                    continue;
                }
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
            // Those first where requests begin.
            parts.sort_by_key(|part| (Some(part.role) != *begins, part.role.code()));
            pool.measured(parts, now_ms);
            rooms.push((Arc::clone(pool), Room { workers: ready, requests: Some(requests), tokens }));
        }
        rooms
    }
}

/// The role of a model's workers where its requests begin; `None`: all are aggregated.
fn begins(snapshot: &Snapshot, model: &str) -> Option<Role> {
    let beginning = snapshot.fleet().candidates(model, Among::Beginning)?;
    let has_roles = |worker: &dynamo_host_core::Worker| worker.spec.role != Role::Aggregated;
    if !beginning.iter().any(has_roles) && snapshot.fleet().candidates(model, Among::Decoders).is_none() {
        return None;
    }
    let all = [Role::Aggregated, Role::Both, Role::Prefill, Role::Decode];
    all.into_iter().find(|role| beginning.iter().any(|worker| worker.spec.role == *role))
}

/// Counts a worker to those of its role.
fn count(parts: &mut Vec<Part>, of: Part) {
    match parts.iter_mut().find(|part| part.role == of.role) {
        None => parts.push(of),
        Some(part) => {
            part.ready += of.ready;
            part.running = part.running.saturating_add(of.running);
            part.free = part.free.saturating_add(of.free);
        }
    }
}

/// Whether an engine has requests of others waiting.
fn is_full_of_others(queueing: &mut HashMap<u32, Queueing>, load: &LoadSlot, now_ms: u64) -> bool {
    let queued = load.get_reported(Reported::QueuedRequests).unwrap_or(0);
    let all = load.get_reported(Reported::RunningRequests).unwrap_or(0).saturating_add(queued);
    let ours = load.get(Load::ActiveRequests);
    let has_others = queued > 0 && all > ours.saturating_add(ours / 4).saturating_add(SLACK);
    let age_ms = load.load_age_ms(now_ms).filter(|&age| age <= FRESH_MS);
    let Some(age_ms) = age_ms.filter(|_| has_others) else {
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

#[cfg(test)]
mod tests {
    use dynamo_host_core::{LoadBoard, LoadReport, load::InFlight};

    use super::*;

    /// A pool of workers, as (operator's bound, engine's report).
    fn lineup(load: &[Arc<LoadSlot>], max_running: Option<u32>) -> Lineup {
        let place = |load: &Arc<LoadSlot>| Place { load: Arc::clone(load), role: Role::Aggregated, is_ready: true, max_running };
        let workers = load.iter().map(place).collect();
        let of = OfPool { pool: Arc::new(Pool::new("m", 0)), workers, begins: None, uncached: 1.0 };
        Lineup { generation: None, pools: vec![of], queueing: HashMap::new() }
    }

    fn measured(lineup: &mut Lineup, now_ms: u64) -> (Room, Limits) {
        let limits = Limits::new(8);
        let rooms = lineup.measure(Assumed { max_running: 256, prefill_steps: 4 }, &limits, now_ms);
        (rooms[0].1, limits)
    }

    fn report(load: &LoadSlot, [running, queued]: [u32; 2], now_ms: u64) {
        let (running_requests, queued_requests) = (Some(running), Some(queued));
        let report = LoadReport {
            running_requests,
            queued_requests,
            max_running_requests: Some(10),
            max_batched_tokens: Some(1000),
            ..LoadReport::default()
        };
        load.report(&report, now_ms);
    }

    #[test]
    fn a_worker_runs_what_the_operator_says_or_its_engine_or_what_is_assumed() {
        let board = LoadBoard::new(8);
        let loads: Vec<_> = (0..2).map(|_| board.claim().unwrap()).collect();
        let room = |max_running| measured(&mut lineup(&loads, max_running), 0).0;
        assert_eq!(room(None), Room { workers: 2, requests: Some(512), tokens: None });
        report(&loads[0], [0, 0], 0);
        assert_eq!(room(None), Room { workers: 2, requests: Some(266), tokens: None }, "the other one does not say");
        report(&loads[1], [0, 0], 0);
        assert_eq!(room(None), Room { workers: 2, requests: Some(20), tokens: Some(8000) });
        assert_eq!(room(Some(3)).requests, Some(6));
    }

    #[test]
    fn an_engine_that_others_fill_is_given_one_at_a_time_until_they_do_not() {
        let load = LoadBoard::new(8).claim().unwrap();
        let mut lineup = lineup(&[Arc::clone(&load)], None);
        let _ours = [0; 2].map(|_| InFlight::dispatch(Arc::clone(&load), 1, 1, 0));
        let mut requests = |[running, queued]: [u32; 2], now_ms| {
            report(&load, [running, queued], now_ms);
            measured(&mut lineup, now_ms + 10).0.requests
        };
        assert_eq!(requests([1, 1], 0), Some(10), "these are ours");
        assert_eq!(requests([1, 1], 1000), Some(10));
        assert_eq!(requests([10, 20], 2000), Some(10), "it has said so once");
        assert_eq!(requests([10, 20], 3000), Some(2), "what runs goes on");
        assert_eq!(requests([10, 0], 4000), Some(10));
        assert_eq!(requests([10, 20], 5000), Some(10));
        assert_eq!(requests([10, 20], 6000), Some(2));
        let (room, limits) = measured(&mut lineup, 6000 + u64::from(FRESH_MS) + 1);
        assert_eq!(room.requests, Some(10), "what it said is too old");
        assert!(limits.has_room(load.index(), 9) && !limits.has_room(load.index(), 10));
    }

    #[test]
    fn what_is_cached_takes_no_room_of_prompts_to_be_computed() {
        let load = LoadBoard::new(8).claim().unwrap();
        report(&load, [0, 0], 0);
        let mut lineup = lineup(&[Arc::clone(&load)], None);
        let _ours = InFlight::dispatch(Arc::clone(&load), 1000, 100, 0);
        for _ in 0..200 {
            measured(&mut lineup, 0);
        }
        let tokens = measured(&mut lineup, 0).0.tokens.unwrap();
        assert!((39_000..=41_000).contains(&tokens), "{tokens}");
    }

    #[test]
    fn what_runs_where_nothing_new_may_takes_no_room_from_others() {
        let board = LoadBoard::new(8);
        let loads: Vec<_> = (0..2).map(|_| board.claim().unwrap()).collect();
        let mut lineup = lineup(&loads, Some(4));
        lineup.pools[0].workers[0].is_ready = false;
        let left = InFlight::dispatch(Arc::clone(&loads[0]), 1, 1, 0);
        let pool = Arc::clone(&lineup.pools[0].pool);
        assert_eq!(measured(&mut lineup, 0).0, Room { workers: 1, requests: Some(5), tokens: None });
        assert!(pool.is_strained.load(Relaxed));
        drop(left);
        assert_eq!(measured(&mut lineup, 0).0.requests, Some(4));
        assert!(!pool.is_strained.load(Relaxed));
    }
    /// A pool of two that prefill and two that decode, each for four requests.
    fn split(loads: &[Arc<LoadSlot>]) -> Lineup {
        let mut lineup = lineup(loads, Some(4));
        let of = &mut lineup.pools[0];
        of.begins = Some(Role::Prefill);
        for (place, role) in of.workers.iter_mut().zip([Role::Prefill, Role::Prefill, Role::Decode, Role::Decode]) {
            place.role = role;
        }
        lineup
    }

    #[test]
    fn requests_have_the_room_of_those_who_decode_and_prompts_of_those_who_compute_them() {
        let board = LoadBoard::new(8);
        let loads: Vec<_> = (0..4).map(|_| board.claim().unwrap()).collect();
        loads.iter().for_each(|load| report(load, [0, 0], 0));
        let mut lineup = split(&loads);
        let pool = Arc::clone(&lineup.pools[0].pool);
        assert_eq!(measured(&mut lineup, 0).0, Room { workers: 2, requests: Some(8), tokens: Some(8000) });
        let row = |role, running, free| Part { role, ready: 2, running, free };
        assert_eq!(pool.parts(), [row(Role::Prefill, 0, 8), row(Role::Decode, 0, 8)]);
        let _ours = InFlight::dispatch(Arc::clone(&loads[0]), 1, 1, 0);
        let (room, limits) = measured(&mut lineup, 0);
        assert_eq!((room.requests, pool.parts()[0]), (Some(8), row(Role::Prefill, 1, 7)));
        assert!(limits.has_room(loads[0].index(), 3) && !limits.has_room(loads[0].index(), 4), "each has a bound of its own");
        // Those who prefill serve, where there is nobody else.
        lineup.pools[0].workers[2..].iter_mut().for_each(|place| place.is_ready = false);
        lineup.pools[0].begins = Some(Role::Prefill);
        assert_eq!(measured(&mut lineup, 0).0, Room { workers: 2, requests: Some(8), tokens: Some(8000) });
        // And nobody prefills for others: prompts are computed where they are decoded.
        lineup.pools[0].workers[2..].iter_mut().for_each(|place| place.is_ready = true);
        lineup.pools[0].workers[..2].iter_mut().for_each(|place| place.is_ready = false);
        lineup.pools[0].begins = Some(Role::Decode);
        assert_eq!(measured(&mut lineup, 0).0.tokens, Some(8000));
        assert_eq!(pool.parts(), [row(Role::Decode, 0, 8)]);
    }
}
