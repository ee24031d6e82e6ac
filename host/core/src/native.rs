//! The native fallback: what decides when a policy cannot.
//!
//! Least-loaded by requests in flight, then by prompt tokens still to compute. Equal workers are ordered by
//! the decision's seed, so that identical scores do not pile on one worker.

use crate::{
    answer::{MAX_RANKED, Ranking},
    column::U32Column,
    fleet::Candidates,
};

/// Name of the fallback where a policy's name would stand.
pub const NAME: &str = "native";

/// Ranks the least loaded candidates. `seed` orders equals.
#[must_use]
pub fn least_loaded(candidates: &Candidates, seed: u64) -> Ranking {
    let [requests, prefill] = READS.map(|column| candidates.u32_column(column, 0));
    rank(&requests, &prefill, seed)
}

/// What the fallback reads of candidates.
pub const READS: [U32Column; 2] = [U32Column::ActiveRequests, U32Column::ActivePrefillTokens];

/// The same, of the columns [`READS`] as they were read; they have at least one row.
#[must_use]
pub fn rank(requests: &[u32], prefill: &[u32], seed: u64) -> Ranking {
    let mut best: Vec<(u32, u32, u64, u32)> = (0..)
        .zip(requests.iter().zip(prefill.iter()))
        .map(|(row, (&requests, &prefill))| (requests, prefill, mix(seed, row), row))
        .collect();
    if best.len() > MAX_RANKED {
        best.select_nth_unstable(MAX_RANKED);
        best.truncate(MAX_RANKED);
    }
    best.sort_unstable();
    Ranking::new(best.into_iter().map(|(.., row)| row).collect(), requests.len() as u32)
        .expect("different rows of a set that has at least one")
}

/// A well-mixed function of seed and row (the finalizer of splitmix64, Steele et al. 2014).
fn mix(seed: u64, row: u32) -> u64 {
    let mut x = seed.wrapping_add(u64::from(row).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use super::*;
    use crate::{
        fleet::{Among, Fleet},
        load::{InFlight, LoadBoard},
        worker::{Handoff, Role, Worker, WorkerSpec, WorkerState},
    };

    fn candidates(count: u32) -> Arc<Candidates> {
        let board = LoadBoard::new(count);
        let workers = (0..count)
            .map(|i| {
                let spec = WorkerSpec {
                    name: i.to_string(),
                    model: "m".to_owned(),
                    role: Role::Aggregated,
                    rank: 0,
                    block_size: None,
                    labels: BTreeMap::new(),
                };
                Worker {
                    id: spec.id("t"),
                    spec: Arc::new(spec),
                    state: WorkerState::Healthy,
                    adapters: Arc::default(),
                    handoff: Handoff::default(),
                    joined_ms: 0,
                    load: board.claim().unwrap(),
                }
            })
            .collect();
        Fleet::new(1, workers).unwrap().candidates("m", Among::Whole).unwrap()
    }

    #[test]
    fn fewer_requests_win_then_fewer_prompt_tokens() {
        let set = candidates(3);
        let load = |row: u32, tokens| InFlight::dispatch(Arc::clone(&set.worker(row).load), tokens, tokens, 0);
        let _in_flight = [load(0, 10), load(1, 5), load(2, 1), load(2, 1)];
        assert_eq!(least_loaded(&set, 0).rows(), [1, 0, 2]);
    }

    #[test]
    fn equal_workers_are_chosen_equally_often() {
        let set = candidates(8);
        let mut hits = [0; 8];
        for seed in 0..8000 {
            hits[least_loaded(&set, seed).rows()[0] as usize] += 1;
        }
        assert!(hits.iter().all(|hits| (800..1200).contains(hits)), "{hits:?}");
    }

    #[test]
    fn a_ranking_is_bounded() {
        assert_eq!(least_loaded(&candidates(100), 1).rows().len(), MAX_RANKED);
    }
}
