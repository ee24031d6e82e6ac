//! Fleet: the immutable snapshot of all workers that one decision sees, and the candidates drawn from it.
//!
//! Invariants: workers are in ascending id, and so are the rows of every candidate set; a set never holds a
//! worker that is not eligible. Identities and other columns that cannot change within a snapshot are
//! computed once per snapshot; load is read when it is asked for.

mod links;
mod recorded;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, OnceLock},
};

use self::recorded::Recorded;
pub use self::{
    links::Ways,
    recorded::{LinkColumns, RecordedError, Recording},
};
use crate::{
    UNKNOWN,
    column::{F32Column, U32Column, U64Column, topology_label},
    id::{self, WorkerId},
    kv::{Overlap, Tier},
    load::{Load, LoadBoard, Recent, Reported},
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
    eligible: HashMap<String, Eligible>,
}

/// Which of a model's workers a decision is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Among {
    /// Those that serve whole requests. Aggregated ones, where there are any; else the decode pool, else the prefill pool, as
    /// far as their engines do that.
    Whole,
    /// All that serve whole requests, of whatever role: for a request that all of [`Whole`](Self::Whole) have failed.
    AnyWhole,
    /// Those where a request may begin, if its KV may be handed over: those that serve it whole, and those that prefill for
    /// somebody. Where that cannot be, the same as [`Whole`](Self::Whole).
    Beginning,
    /// All of them, for who tells roles apart; without anybody to hand over to, the same as [`Whole`](Self::Whole).
    Everyone,
    /// Those that decode what others have prefilled.
    Decoders,
}

/// The eligible workers of a model: all of them, and for each adapter those that have it.
#[derive(Debug, Default)]
struct Eligible {
    all: Parts,
    adapted: HashMap<String, Parts>,
}

/// The candidates of each part of the work.
#[derive(Debug, Default)]
struct Parts {
    whole: Option<Arc<Candidates>>,
    any_whole: Option<Arc<Candidates>>,
    beginning: Option<Arc<Candidates>>,
    everyone: Option<Arc<Candidates>>,
    decoders: Option<Arc<Candidates>>,
}

impl Parts {
    fn new(workers: &Arc<[Worker]>, rows: Vec<u32>, have_adapter: bool) -> Self {
        let worker = |row: u32| &workers[row as usize];
        let some = |keep: &dyn Fn(&Worker) -> bool| -> Option<Vec<u32>> {
            let rows: Vec<u32> = rows.iter().copied().filter(|&row| keep(worker(row))).collect();
            (!rows.is_empty()).then_some(rows)
        };
        let candidates = |rows: Vec<u32>| Arc::new(Candidates::new(workers, rows, have_adapter));
        if rows.iter().all(|&row| worker(row).spec.role == Role::Aggregated) {
            let all = (!rows.is_empty()).then(|| candidates(rows));
            return Self { whole: all.clone(), any_whole: all.clone(), beginning: all.clone(), everyone: all, decoders: None };
        }
        let serves = |role: &dyn Fn(Role) -> bool| some(&|worker| worker.handoff.serves_whole && role(worker.spec.role));
        let whole = serves(&|role| matches!(role, Role::Aggregated | Role::Both))
            .or_else(|| serves(&|role| role == Role::Decode))
            .or_else(|| serves(&|role| role == Role::Prefill));
        let has_partner = |of: &Worker| of.spec.role.prefills() && rows.iter().any(|&row| of.hands_to(worker(row)));
        let decoders = some(&|worker| worker.spec.role.decodes());
        let (beginning, everyone) = if rows.iter().any(|&row| has_partner(worker(row))) {
            let begins = |worker: &Worker| match worker.spec.role {
                Role::Aggregated | Role::Both => worker.handoff.serves_whole,
                Role::Prefill => has_partner(worker),
                Role::Decode => false,
            };
            (some(&begins), Some(rows.clone()))
        } else {
            (whole.clone(), whole.clone())
        };
        let parts = [whole, serves(&|_| true), beginning, everyone, decoders];
        let [whole, any_whole, beginning, everyone, decoders] = parts.map(|rows| rows.map(candidates));
        Self { whole, any_whole, beginning, everyone, decoders }
    }

    fn among(&self, among: Among) -> Option<Arc<Candidates>> {
        match among {
            Among::Whole => &self.whole,
            Among::AnyWhole => &self.any_whole,
            Among::Beginning => &self.beginning,
            Among::Everyone => &self.everyone,
            Among::Decoders => &self.decoders,
        }
        .clone()
    }
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
        // By borrowed names: thousands of workers have few of them.
        let mut models: HashMap<&str, HashMap<Option<&str>, Vec<u32>>> = HashMap::new();
        for (index, worker) in (0..).zip(workers.iter()) {
            let groups = models.entry(&worker.spec.model).or_default();
            if worker.state.is_eligible() {
                groups.entry(None).or_default().push(index);
                for adapter in worker.adapters.iter() {
                    groups.entry(Some(adapter)).or_default().push(index);
                }
            }
        }
        let names = models.keys().map(|&model| model.to_owned()).collect();
        let mut eligible: HashMap<String, Eligible> = HashMap::with_capacity(models.len());
        for (model, groups) in models {
            let mut of_model = Eligible::default();
            for (adapter, rows) in groups {
                let parts = Parts::new(&workers, rows, adapter.is_some());
                match adapter {
                    Some(adapter) => drop(of_model.adapted.insert(adapter.to_owned(), parts)),
                    None => of_model.all = parts,
                }
            }
            eligible.insert(model.to_owned(), of_model);
        }
        Ok(Self { generation, models: names, eligible, workers })
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

    /// Workers that may be given requests for `model`; `None` if there is none.
    #[must_use]
    pub fn candidates(&self, model: &str, among: Among) -> Option<Arc<Candidates>> {
        self.eligible.get(model)?.all.among(among)
    }

    /// Those of them that have a LoRA adapter loaded; `None` if there is none.
    #[must_use]
    pub fn candidates_with(&self, model: &str, adapter: &str, among: Among) -> Option<Arc<Candidates>> {
        self.eligible.get(model)?.adapted.get(adapter)?.among(among)
    }
}

/// The workers that may serve a request, in ascending id.
#[derive(Debug)]
pub struct Candidates {
    workers: Arc<[Worker]>,
    rows: Box<[u32]>,
    slots: Box<[u32]>,
    board: Arc<LoadBoard>,
    /// Whether they were chosen by an adapter, which all of them have.
    have_adapter: bool,
    identities: [OnceLock<Arc<[u64]>>; U64Column::ALL.len()],
    unknown: OnceLock<Arc<[u32]>>,
    block_size: OnceLock<Arc<[u32]>>,
    labels: OnceLock<BTreeMap<String, Label>>,
    different_roles: OnceLock<bool>,
    /// What the columns were when somebody decided, of a set that is made of a receipt.
    recorded: Option<Box<Recorded>>,
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
    fn new(workers: &Arc<[Worker]>, rows: Vec<u32>, have_adapter: bool) -> Self {
        let worker = |row: u32| &workers[row as usize];
        let first = worker(*rows.first().expect("a candidate set has at least one row"));
        Self {
            slots: rows.iter().map(|&row| worker(row).load.index()).collect(),
            board: Arc::clone(first.load.board()),
            workers: Arc::clone(workers),
            rows: rows.into(),
            have_adapter,
            identities: Default::default(),
            unknown: OnceLock::new(),
            block_size: OnceLock::new(),
            labels: OnceLock::new(),
            different_roles: OnceLock::new(),
            recorded: None,
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

    /// A worker of the fleet that these were drawn from, a candidate or not.
    #[must_use]
    pub fn find(&self, worker: WorkerId) -> Option<&Worker> {
        self.workers.binary_search_by_key(&worker, |of| of.id).ok().map(|place| &self.workers[place])
    }

    /// All of them, in row order.
    pub fn iter(&self) -> impl Iterator<Item = &Worker> {
        self.rows.iter().map(|&row| &self.workers[row as usize])
    }

    /// Those that are to be kept by what they are; the same set if all are, `None` if nothing remains.
    #[must_use]
    pub fn of(self: &Arc<Self>, keep: impl Fn(&Worker) -> bool) -> Option<Arc<Self>> {
        if self.iter().all(&keep) {
            return Some(Arc::clone(self));
        }
        let rows: Vec<u32> = self.rows.iter().copied().filter(|&row| keep(&self.workers[row as usize])).collect();
        (!rows.is_empty()).then(|| Arc::new(Self::new(&self.workers, rows, self.have_adapter)))
    }

    /// Those that are not among `excluded`; `None` if nothing remains.
    #[must_use]
    pub fn without(self: &Arc<Self>, excluded: &[WorkerId]) -> Option<Arc<Self>> {
        if excluded.is_empty() {
            return Some(Arc::clone(self));
        }
        let rows: Vec<u32> =
            self.rows.iter().copied().filter(|&row| !excluded.contains(&self.workers[row as usize].id)).collect();
        (!rows.is_empty()).then(|| Arc::new(Self::new(&self.workers, rows, self.have_adapter)))
    }

    /// Those that are to be kept by their slot on the load board and the requests that they have; the same set if all are,
    /// `None` if nothing remains.
    #[must_use]
    pub fn kept(self: &Arc<Self>, keep: impl Fn(u32, u32) -> bool) -> Option<Arc<Self>> {
        let active = self.board.gather(Load::ActiveRequests, &self.slots);
        let is_kept = |place: usize| keep(self.slots[place], active[place]);
        if (0..self.rows.len()).all(is_kept) {
            return Some(Arc::clone(self));
        }
        let rows: Vec<u32> = (0..self.rows.len()).filter(|&place| is_kept(place)).map(|place| self.rows[place]).collect();
        (!rows.is_empty()).then(|| Arc::new(Self::new(&self.workers, rows, self.have_adapter)))
    }

    /// A column of identities.
    #[must_use]
    pub fn u64_column(&self, column: U64Column) -> Arc<[u64]> {
        if let Some(recorded) = self.recorded.as_ref().and_then(|recorded| recorded.u64_column(column)) {
            return recorded;
        }
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
        if let Some(recorded) = &self.recorded {
            return recorded.u32_column(column.name()).unwrap_or_else(|| self.unknown());
        }
        match column {
            U32Column::DpRank => self.iter().map(|worker| worker.spec.rank).collect(),
            U32Column::Role => self.iter().map(|worker| worker.spec.role.code()).collect(),
            U32Column::State => self.iter().map(|worker| worker.state.code()).collect(),
            U32Column::BlockSize => self.block_size(),
            U32Column::ActivePrefillTokens => self.board.gather(Load::ActivePrefillTokens, &self.slots),
            U32Column::ActiveUncachedTokens => self.board.gather(Load::ActiveUncachedTokens, &self.slots),
            U32Column::PrefillBusyMs => self.board.gather_prefill_busy_ms(&self.slots, now_ms),
            U32Column::ActiveDecodeTokens => self.board.gather(Load::ActiveDecodeTokens, &self.slots),
            U32Column::ActiveRequests => self.board.gather(Load::ActiveRequests, &self.slots),
            U32Column::RecentAgeMs => self.board.gather_recent_age_ms(&self.slots, now_ms),
            U32Column::UpSeconds => self.iter().map(|worker| (now_ms.saturating_sub(worker.joined_ms) / 1000) as u32).collect(),
            U32Column::QueuedRequests => self.board.gather_reported(Reported::QueuedRequests, &self.slots),
            U32Column::MaxRunningRequests => self.board.gather_reported(Reported::MaxRunningRequests, &self.slots),
            U32Column::MaxBatchedTokens => self.board.gather_reported(Reported::MaxBatchedTokens, &self.slots),
            U32Column::KvTokensTotal => self.board.gather_reported(Reported::KvTokensTotal, &self.slots),
            U32Column::KvTokensFree => self.board.gather_reported(Reported::KvTokensFree, &self.slots),
            U32Column::LoadAgeMs => self.board.gather_load_age_ms(&self.slots, now_ms),
            U32Column::AdapterLoaded if self.have_adapter => self.iter().map(|_| 1).collect(),
            // No adapter is asked for, or not observed by this host yet: the contract's word for it is "unknown".
            U32Column::AdapterLoaded => self.unknown(),
        }
    }

    /// A column of what the workers hold of the request's prefix in one tier; unknown if nobody has looked.
    #[must_use]
    pub fn cached_column(&self, tier: Tier, overlap: Option<&Overlap>) -> Arc<[u32]> {
        if let Some(recorded) = &self.recorded {
            return recorded.u32_column(tier.column()).unwrap_or_else(|| self.unknown());
        }
        Overlap::column(overlap, tier, &self.slots)
    }

    /// Tokens per KV block: as configured, else as the engine reports it.
    fn block_size(&self) -> Arc<[u32]> {
        let configured = self.block_size.get_or_init(|| self.iter().map(|w| w.spec.block_size.unwrap_or(UNKNOWN)).collect());
        if !configured.contains(&UNKNOWN) {
            return Arc::clone(configured);
        }
        let reported = self.board.gather_reported(Reported::BlockSize, &self.slots);
        configured.iter().zip(reported.iter()).map(|(&set, &said)| if set == UNKNOWN { said } else { set }).collect()
    }

    /// A column of `f32`.
    #[must_use]
    pub fn f32_column(&self, column: F32Column) -> Arc<[f32]> {
        if let Some(recorded) = &self.recorded {
            return recorded.f32_column(column).unwrap_or_else(|| self.iter().map(|_| f32::NAN).collect());
        }
        match column {
            F32Column::RecentTtftMs => self.board.gather_recent(Recent::TtftMs, &self.slots),
            F32Column::RecentItlMs => self.board.gather_recent(Recent::ItlMs, &self.slots),
            F32Column::ErrorRate => self.board.gather_recent(Recent::ErrorRate, &self.slots),
            F32Column::RecentTokensPerSecond => self.board.gather_recent(Recent::TokensPerSecond, &self.slots),
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
mod tests;
