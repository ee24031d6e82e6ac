//! The native fallback: what decides when a policy cannot.
//!
//! Least-loaded by requests in flight, then by prompt tokens still to compute. Equal workers are ordered by
//! the decision's seed, so that identical scores do not pile on one worker. It knows of roles only that a request does not begin
//! where others' prompts are decoded, as long as it can begin elsewhere.

use crate::{
    answer::{MAX_RANKED, Ranking},
    column::U32Column,
    fleet::Candidates,
    request::Stage,
    worker::Role,
};

/// Name of the fallback where a policy's name would stand.
pub const NAME: &str = "native";

/// What the fallback reads of candidates.
pub const READS: [U32Column; 2] = [U32Column::ActiveRequests, U32Column::ActivePrefillTokens];

/// Ranks the least loaded candidates for a stage. `seed` orders equals.
#[must_use]
pub fn least_loaded(candidates: &Candidates, stage: Stage, seed: u64) -> Ranking {
    let [requests, prefill] = READS.map(|column| candidates.u32_column(column, 0));
    let roles = reads_roles(candidates, stage).then(|| candidates.u32_column(U32Column::Role, 0));
    rank(&requests, &prefill, roles.as_deref(), seed)
}

/// Whether the fallback reads the column [`U32Column::Role`], too: only where roles differ, and a request begins.
#[must_use]
pub fn reads_roles(candidates: &Candidates, stage: Stage) -> bool {
    stage == Stage::Whole && candidates.have_different_roles()
}

/// The same, of the columns as they were read; they have at least one row. With roles, nobody is ranked whose work is decode
/// alone as long as there is somebody else: such workers are there for what others have prefilled.
#[must_use]
pub fn rank(requests: &[u32], prefill: &[u32], roles: Option<&[u32]>, seed: u64) -> Ranking {
    let begins = |row: u32| roles.is_none_or(|roles| roles[row as usize] != Role::Decode.code());
    let rows = || 0..requests.len() as u32;
    let is_choice = rows().any(begins);
    let mut best: Vec<(u32, u32, u64, u32)> = rows()
        .filter(|&row| !is_choice || begins(row))
        .map(|row| (requests[row as usize], prefill[row as usize], mix(seed, row), row))
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
        of_roles(&vec![Role::Aggregated; count as usize], Among::Whole)
    }

    fn of_roles(roles: &[Role], among: Among) -> Arc<Candidates> {
        let board = LoadBoard::new(roles.len() as u32);
        let workers = roles
            .iter()
            .enumerate()
            .map(|(i, &role)| {
                let spec = WorkerSpec {
                    name: i.to_string(),
                    model: "m".to_owned(),
                    role,
                    rank: 0,
                    block_size: None,
                    labels: BTreeMap::new(),
                };
                Worker {
                    id: spec.id("t"),
                    spec: Arc::new(spec),
                    state: WorkerState::Healthy,
                    adapters: Arc::default(),
                    handoff: Handoff { serves_whole: true, group: Some(1) },
                    joined_ms: 0,
                    load: board.claim().unwrap(),
                }
            })
            .collect();
        Fleet::new(1, workers).unwrap().candidates("m", among).unwrap()
    }

    #[test]
    fn a_request_begins_where_no_others_are_decoded_as_long_as_it_can() {
        use Role::{Aggregated, Both, Decode, Prefill};
        let ranked = |roles: &[Role], among, stage| -> Vec<Role> {
            let set = of_roles(roles, among);
            let ranking = least_loaded(&set, stage, 3);
            let mut roles: Vec<Role> = ranking.rows().iter().map(|&row| set.worker(row).spec.role).collect();
            roles.sort_by_key(|role| role.code());
            roles
        };
        let all = [Decode, Prefill, Both, Decode, Aggregated];
        assert_eq!(ranked(&all, Among::Everyone, Stage::Whole), [Aggregated, Prefill, Both]);
        assert_eq!(ranked(&[Prefill, Decode], Among::Everyone, Stage::Whole), [Prefill]);
        assert_eq!(ranked(&all, Among::Decoders, Stage::Decode), [Decode, Decode, Both]);
        assert_eq!(ranked(&[Decode, Decode], Among::Whole, Stage::Whole), [Decode, Decode], "there is nobody else");
    }

    #[test]
    fn fewer_requests_win_then_fewer_prompt_tokens() {
        let set = candidates(3);
        let load = |row: u32, tokens| InFlight::dispatch(Arc::clone(&set.worker(row).load), tokens, tokens, 0);
        let _in_flight = [load(0, 10), load(1, 5), load(2, 1), load(2, 1)];
        assert_eq!(least_loaded(&set, Stage::Whole, 0).rows(), [1, 0, 2]);
    }

    #[test]
    fn equal_workers_are_chosen_equally_often() {
        let set = candidates(8);
        let mut hits = [0; 8];
        for seed in 0..8000 {
            hits[least_loaded(&set, Stage::Whole, seed).rows()[0] as usize] += 1;
        }
        assert!(hits.iter().all(|hits| (800..1200).contains(hits)), "{hits:?}");
    }

    #[test]
    fn a_ranking_is_bounded() {
        assert_eq!(least_loaded(&candidates(100), Stage::Whole, 1).rows().len(), MAX_RANKED);
    }
}
