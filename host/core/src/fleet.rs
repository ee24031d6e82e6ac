//! Fleet: the immutable snapshot of all workers that one decision sees, and the candidates drawn from it.
//!
//! Invariants: workers are in ascending id, and so are the rows of every candidate set; a set never holds a
//! worker that is not eligible. Identities and other columns that cannot change within a snapshot are
//! computed once per snapshot; load is read when it is asked for.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, OnceLock},
};

use crate::{
    UNKNOWN,
    column::{F32Column, U32Column, U64Column, topology_label},
    id::{self, WorkerId},
    load::{Load, LoadBoard, Recent},
    worker::{Role, Worker},
};

/// A set of workers that cannot be a fleet.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FleetError {
    /// Two workers have one identity.
    #[error("worker {name:?} with model {model:?} and rank {rank} is there twice; give one of them another name= or remove it")]
    Duplicate {
        /// Its name.
        name: String,
        /// Its model.
        model: String,
        /// Its rank.
        rank: u32,
    },
}

/// All workers at one moment.
#[derive(Debug)]
pub struct Fleet {
    generation: u64,
    workers: Arc<[Worker]>,
    models: BTreeSet<String>,
    eligible: BTreeMap<(String, u32), Arc<Candidates>>,
}

impl Fleet {
    /// Makes a snapshot.
    ///
    /// # Errors
    /// If two workers have one identity.
    pub fn new(generation: u64, mut workers: Vec<Worker>) -> Result<Self, FleetError> {
        workers.sort_by_key(|worker| worker.id);
        for pair in workers.windows(2) {
            if pair[0].id == pair[1].id {
                let spec = &pair[0].spec;
                return Err(FleetError::Duplicate { name: spec.name.clone(), model: spec.model.clone(), rank: spec.rank });
            }
        }
        let workers: Arc<[Worker]> = workers.into();
        let models = workers.iter().map(|worker| worker.spec.model.clone()).collect();
        let mut rows: BTreeMap<(String, u32), Vec<u32>> = BTreeMap::new();
        for (index, worker) in (0..).zip(workers.iter()) {
            if worker.state.is_eligible() {
                rows.entry((worker.spec.model.clone(), worker.spec.role.code())).or_default().push(index);
            }
        }
        let eligible = rows.into_iter().map(|(group, rows)| (group, Arc::new(Candidates::new(&workers, rows)))).collect();
        Ok(Self { generation, workers, models, eligible })
    }

    /// Counts snapshots: a later one has a greater number.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// All workers in ascending id.
    #[must_use]
    pub fn workers(&self) -> &[Worker] {
        &self.workers
    }

    /// Models that some worker serves, eligible or not.
    #[must_use]
    pub fn models(&self) -> &BTreeSet<String> {
        &self.models
    }

    /// Workers that may be given requests for `model` in `role`; `None` if there is none.
    #[must_use]
    pub fn candidates(&self, model: &str, role: Role) -> Option<Arc<Candidates>> {
        // The key is owned because a tuple of borrowed parts cannot be looked up; one short string a request.
        self.eligible.get(&(model.to_owned(), role.code())).cloned()
    }
}

/// The workers that may serve a request, in ascending id.
#[derive(Debug)]
pub struct Candidates {
    workers: Arc<[Worker]>,
    rows: Box<[u32]>,
    slots: Box<[u32]>,
    board: Arc<LoadBoard>,
    identities: [OnceLock<Arc<[u64]>>; U64Column::ALL.len()],
    unknown: OnceLock<Arc<[u32]>>,
    block_size: OnceLock<Arc<[u32]>>,
    labels: OnceLock<BTreeMap<String, Label>>,
}

/// One label over all rows.
#[derive(Debug)]
struct Label {
    /// Its values, sorted: a value's code is its position.
    values: Vec<String>,
    codes: Arc<[u32]>,
    /// The values as numbers, NaN where one is none; `None` if none is.
    numbers: Option<Arc<[f32]>>,
}

impl Candidates {
    /// # Panics
    /// If `rows` is empty: no candidates is `None`, not an empty set.
    fn new(workers: &Arc<[Worker]>, rows: Vec<u32>) -> Self {
        let worker = |row: u32| &workers[row as usize];
        let first = worker(*rows.first().expect("a candidate set has at least one row"));
        Self {
            slots: rows.iter().map(|&row| worker(row).load.index()).collect(),
            board: Arc::clone(first.load.board()),
            workers: Arc::clone(workers),
            rows: rows.into(),
            identities: Default::default(),
            unknown: OnceLock::new(),
            block_size: OnceLock::new(),
            labels: OnceLock::new(),
        }
    }

    /// Number of rows, at least 1.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.rows.len() as u32
    }

    /// The worker in a row.
    #[must_use]
    pub fn worker(&self, row: u32) -> &Worker {
        &self.workers[self.rows[row as usize] as usize]
    }

    /// All of them, in row order.
    pub fn iter(&self) -> impl Iterator<Item = &Worker> {
        self.rows.iter().map(|&row| &self.workers[row as usize])
    }

    /// Those that are not among `excluded`; `None` if nothing remains.
    #[must_use]
    pub fn without(self: &Arc<Self>, excluded: &[WorkerId]) -> Option<Arc<Self>> {
        if excluded.is_empty() {
            return Some(Arc::clone(self));
        }
        let rows: Vec<u32> =
            self.rows.iter().copied().filter(|&row| !excluded.contains(&self.workers[row as usize].id)).collect();
        (!rows.is_empty()).then(|| Arc::new(Self::new(&self.workers, rows)))
    }

    /// A column of identities.
    #[must_use]
    pub fn u64_column(&self, column: U64Column) -> Arc<[u64]> {
        let value = |worker: &Worker| match column {
            U64Column::WorkerId => worker.id.0,
            U64Column::EngineKey => id::key(worker.spec.name.as_bytes()),
            U64Column::PoolKey => id::key(format!("{}\0{}", worker.spec.model, worker.spec.role).as_bytes()),
        };
        Arc::clone(self.identities[column as usize].get_or_init(|| self.iter().map(value).collect()))
    }

    /// A column of `u32`. `now_ms` is the host's monotonic clock.
    #[must_use]
    pub fn u32_column(&self, column: U32Column, now_ms: u64) -> Arc<[u32]> {
        match column {
            U32Column::DpRank => self.iter().map(|worker| worker.spec.rank).collect(),
            U32Column::Role => self.iter().map(|worker| worker.spec.role.code()).collect(),
            U32Column::State => self.iter().map(|_| 0).collect(),
            U32Column::BlockSize => Arc::clone(self.block_size.get_or_init(|| self.iter().map(Worker::block_size).collect())),
            U32Column::ActivePrefillTokens => self.board.gather(Load::ActivePrefillTokens, &self.slots),
            U32Column::ActiveDecodeTokens => self.board.gather(Load::ActiveDecodeTokens, &self.slots),
            U32Column::ActiveRequests => self.board.gather(Load::ActiveRequests, &self.slots),
            U32Column::RecentAgeMs => self.board.gather_recent_age_ms(&self.slots, now_ms),
            U32Column::UpSeconds => self.iter().map(|worker| (now_ms.saturating_sub(worker.joined_ms) / 1000) as u32).collect(),
            // Not observed by this host yet: the contract's word for it is "unknown".
            U32Column::CachedDeviceTokens
            | U32Column::CachedHostTokens
            | U32Column::CachedDiskTokens
            | U32Column::CachedRemoteTokens
            | U32Column::QueuedRequests
            | U32Column::MaxRunningRequests
            | U32Column::MaxBatchedTokens
            | U32Column::KvTokensTotal
            | U32Column::KvTokensFree
            | U32Column::LoadAgeMs
            | U32Column::AdapterLoaded => self.unknown(),
        }
    }

    /// A column of `f32`.
    #[must_use]
    pub fn f32_column(&self, column: F32Column) -> Arc<[f32]> {
        match column {
            F32Column::RecentTtftMs => self.board.gather_recent(Recent::TtftMs, &self.slots),
            F32Column::RecentItlMs => self.board.gather_recent(Recent::ItlMs, &self.slots),
            F32Column::ErrorRate => self.board.gather_recent(Recent::ErrorRate, &self.slots),
            F32Column::RecentTokensPerSecond => self.iter().map(|_| f32::NAN).collect(),
            F32Column::Preference => self.iter().map(|_| 1.0).collect(),
        }
    }

    /// Codes of a label's values: their positions in the sorted list of all values.
    #[must_use]
    pub fn label_column(&self, key: &str) -> Arc<[u32]> {
        self.labels().get(key).map_or_else(|| self.unknown(), |label| Arc::clone(&label.codes))
    }

    /// The code of one value of a label, if some candidate has it.
    #[must_use]
    pub fn label_code(&self, key: &str, value: &str) -> Option<u32> {
        self.labels().get(key)?.values.binary_search_by(|other| other.as_str().cmp(value)).ok().map(|code| code as u32)
    }

    /// Codes of placement domains at a level of the contract.
    #[must_use]
    pub fn topology_column(&self, level: u32) -> Arc<[u32]> {
        topology_label(level).map_or_else(|| self.unknown(), |label| self.label_column(label))
    }

    /// A label that holds numbers; `None` if no candidate has it as a number.
    #[must_use]
    pub fn signal_column(&self, name: &str) -> Option<Arc<[f32]>> {
        self.labels().get(name)?.numbers.clone()
    }

    /// All labels of all rows: a policy that asks for one in a loop must not have it computed each time.
    fn labels(&self) -> &BTreeMap<String, Label> {
        self.labels.get_or_init(|| {
            let keys: BTreeSet<&String> = self.iter().flat_map(|worker| worker.spec.labels.keys()).collect();
            keys.into_iter().map(|key| (key.clone(), self.label(key))).collect()
        })
    }

    fn label(&self, key: &str) -> Label {
        let of = |worker: &'_ Worker| worker.spec.labels.get(key).cloned();
        let values: Vec<String> = self.iter().filter_map(of).collect::<BTreeSet<_>>().into_iter().collect();
        let code = |worker: &Worker| worker.spec.labels.get(key).and_then(|value| values.binary_search(value).ok());
        let codes = self.iter().map(|worker| code(worker).map_or(UNKNOWN, |code| code as u32)).collect();
        let number = |worker: &Worker| worker.spec.labels.get(key).and_then(|value| value.parse().ok()).unwrap_or(f32::NAN);
        let numbers: Arc<[f32]> = self.iter().map(number).collect();
        let numbers = numbers.iter().any(|number| !number.is_nan()).then_some(numbers);
        Label { values, codes, numbers }
    }

    fn unknown(&self) -> Arc<[u32]> {
        Arc::clone(self.unknown.get_or_init(|| self.iter().map(|_| UNKNOWN).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        load::InFlight,
        worker::{WorkerSpec, WorkerState},
    };

    fn worker(board: &Arc<LoadBoard>, name: &str, state: WorkerState, labels: &[(&str, &str)]) -> Worker {
        let spec = WorkerSpec {
            name: name.to_owned(),
            model: "m".to_owned(),
            role: Role::Aggregated,
            rank: 0,
            block_size: None,
            labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        };
        Worker { id: spec.id("t"), spec: Arc::new(spec), state, joined_ms: 0, load: board.claim().unwrap() }
    }

    fn fleet_of(names: &[&str]) -> (Fleet, Arc<LoadBoard>) {
        let board = LoadBoard::new(16);
        let workers = names.iter().map(|name| worker(&board, name, WorkerState::Healthy, &[])).collect();
        (Fleet::new(1, workers).unwrap(), board)
    }

    #[test]
    fn rows_are_in_ascending_id_and_load_follows_its_worker() {
        let (fleet, _board) = fleet_of(&["a", "b", "c", "d"]);
        let candidates = fleet.candidates("m", Role::Aggregated).unwrap();
        assert!(candidates.u64_column(U64Column::WorkerId).is_sorted());
        for row in 0..candidates.count() {
            let _busy = InFlight::dispatch(Arc::clone(&candidates.worker(row).load), 7);
            let column = candidates.u32_column(U32Column::ActivePrefillTokens, 0);
            let expected: Vec<u32> = (0..4).map(|r| if r == row { 7 } else { 0 }).collect();
            assert_eq!(*column, *expected);
        }
    }

    #[test]
    fn only_healthy_workers_of_the_model_and_role_are_candidates() {
        let board = LoadBoard::new(16);
        let states = [WorkerState::Healthy, WorkerState::Starting, WorkerState::Unreachable, WorkerState::Draining];
        let workers = states.iter().enumerate().map(|(i, state)| worker(&board, &i.to_string(), *state, &[])).collect();
        let fleet = Fleet::new(1, workers).unwrap();
        assert_eq!(fleet.candidates("m", Role::Aggregated).unwrap().count(), 1);
        assert!(fleet.candidates("m", Role::Prefill).is_none());
        assert!(fleet.candidates("other", Role::Aggregated).is_none());
        assert!(fleet.models().contains("m"));
    }

    #[test]
    fn excluded_workers_are_gone_and_nothing_left_is_none() {
        let (fleet, _board) = fleet_of(&["a", "b", "c"]);
        let all = fleet.candidates("m", Role::Aggregated).unwrap();
        let ids: Vec<WorkerId> = all.iter().map(|worker| worker.id).collect();
        let rest = all.without(&ids[..1]).unwrap();
        assert_eq!(rest.iter().map(|worker| worker.id).collect::<Vec<_>>(), ids[1..]);
        assert!(all.without(&ids).is_none());
    }

    #[test]
    fn a_duplicate_worker_is_named() {
        let board = LoadBoard::new(2);
        let twins = vec![worker(&board, "a", WorkerState::Healthy, &[]), worker(&board, "a", WorkerState::Starting, &[])];
        let error = Fleet::new(1, twins).unwrap_err().to_string();
        assert!(error.contains("\"a\"") && error.contains("twice"), "{error}");
    }

    #[test]
    fn labels_become_codes_and_numbers_become_signals() {
        let board = LoadBoard::new(4);
        let workers = vec![
            worker(&board, "a", WorkerState::Healthy, &[("gpu", "h200"), ("price", "2.5")]),
            worker(&board, "b", WorkerState::Healthy, &[("gpu", "h100"), ("price", "x")]),
            worker(&board, "c", WorkerState::Healthy, &[]),
        ];
        let fleet = Fleet::new(1, workers).unwrap();
        let candidates = fleet.candidates("m", Role::Aggregated).unwrap();
        let codes = candidates.label_column("gpu");
        for (row, worker) in (0..).zip(candidates.iter()) {
            let expected = worker.spec.labels.get("gpu").map_or(UNKNOWN, |value| candidates.label_code("gpu", value).unwrap());
            assert_eq!(codes[row as usize], expected);
        }
        assert_eq!(candidates.label_code("gpu", "b300"), None);
        let price = candidates.signal_column("price").unwrap();
        assert_eq!(price.iter().filter(|value| **value == 2.5).count(), 1);
        assert_eq!(price.iter().filter(|value| value.is_nan()).count(), 2);
        assert!(candidates.signal_column("gpu").is_none());
    }
}
