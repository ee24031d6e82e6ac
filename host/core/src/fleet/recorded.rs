//! Candidates of a receipt: rows whose columns are what they were when somebody decided, so that it can be decided again.
//!
//! Contract: a column that was recorded is given as it was, bit by bit; one that was not is unknown in every row. Labels are
//! the rows' own, so that codes and signals come out as they were.

use std::{collections::BTreeMap, sync::Arc};

use super::Candidates;
use crate::{
    column::{Column, F32Column, LinkColumn, REACHABLE, U32Column, U64Column},
    id::WorkerId,
    kv::{Overlap, Tier},
    load::LoadBoard,
    worker::{Handoff, Role, Worker, WorkerSpec, WorkerState},
};

/// Columns of links, by their names in the contract and the row that KV would come from.
pub type LinkColumns = BTreeMap<(String, Option<u32>), Column>;

/// What a receipt tells of the candidates of a decision.
#[derive(Debug, Default)]
pub struct Recording {
    /// Workers in ascending id, with the labels that are known.
    pub rows: Vec<(WorkerId, BTreeMap<String, String>)>,
    /// Columns by their names in the contract.
    pub columns: BTreeMap<String, Column>,
    /// Columns of links.
    pub links: LinkColumns,
}

/// Columns by their names in the contract, and those of links.
#[derive(Debug)]
pub(super) struct Recorded {
    columns: BTreeMap<String, Column>,
    links: LinkColumns,
}

impl Recorded {
    pub(super) fn u64_column(&self, column: U64Column) -> Option<Arc<[u64]>> {
        match self.columns.get(column.name()) {
            Some(Column::U64(values)) => Some(Arc::clone(values)),
            _ => None,
        }
    }

    pub(super) fn u32_column(&self, name: &str) -> Option<Arc<[u32]>> {
        match self.columns.get(name) {
            Some(Column::U32(values)) => Some(Arc::clone(values)),
            _ => None,
        }
    }

    pub(super) fn reachable_column(&self, from: Option<u32>) -> Option<Arc<[u32]>> {
        match self.links.get(&(REACHABLE.to_owned(), from)) {
            Some(Column::U32(values)) => Some(Arc::clone(values)),
            _ => None,
        }
    }

    pub(super) fn link_column(&self, column: LinkColumn, from: Option<u32>) -> Option<Arc<[f32]>> {
        match self.links.get(&(column.name().to_owned(), from)) {
            Some(Column::F32(values)) => Some(Arc::clone(values)),
            _ => None,
        }
    }

    pub(super) fn f32_column(&self, column: F32Column) -> Option<Arc<[f32]>> {
        match self.columns.get(column.name()) {
            Some(Column::F32(values)) => Some(Arc::clone(values)),
            _ => None,
        }
    }
}

/// Rows that no host can have seen.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RecordedError {
    /// There are no rows.
    #[error("it has no candidates; a decision has at least one")]
    Empty,
    /// Rows are in ascending id.
    #[error("its workers are not in ascending order of their ids, as a host has them")]
    Order,
    /// A column is longer or shorter than the rows.
    #[error("its column {name} has {values} values for {rows} candidates")]
    Length {
        /// Which.
        name: String,
        /// How many it has.
        values: usize,
        /// How many there should be.
        rows: usize,
    },
}

impl Candidates {
    /// Candidates as a receipt tells of them. Their roles are those of the column, where it is there.
    ///
    /// # Errors
    /// If rows and columns do not fit together.
    pub fn recorded(recording: Recording) -> Result<Arc<Self>, RecordedError> {
        let Recording { rows, columns, links } = recording;
        let count = u32::try_from(rows.len()).unwrap_or(u32::MAX);
        if rows.is_empty() {
            return Err(RecordedError::Empty);
        }
        if !rows.is_sorted_by(|one, next| one.0 < next.0) {
            return Err(RecordedError::Order);
        }
        let of_links = links.iter().map(|((name, _), values)| (name.as_str(), values));
        let mut named = columns.iter().map(|(name, values)| (name.as_str(), values)).chain(of_links);
        if let Some((name, column)) = named.find(|(_, column)| column.len() != rows.len()) {
            return Err(RecordedError::Length { name: name.to_owned(), values: column.len(), rows: rows.len() });
        }
        let recorded = Recorded { columns, links };
        let roles = recorded.u32_column(U32Column::Role.name());
        let role = |row: usize| roles.as_ref().and_then(|roles| Role::of_code(roles[row])).unwrap_or_default();
        let board = LoadBoard::new(count);
        let worker = |(row, (id, labels)): (usize, (WorkerId, BTreeMap<String, String>))| {
            let spec =
                WorkerSpec { name: id.to_string(), model: String::new(), role: role(row), rank: 0, block_size: None, labels };
            Worker {
                id,
                spec: Arc::new(spec),
                state: WorkerState::Healthy,
                adapters: Arc::default(),
                handoff: Handoff::default(),
                joined_ms: 0,
                load: board.claim().expect("the board has a slot per row"),
            }
        };
        let workers: Arc<[Worker]> = rows.into_iter().enumerate().map(worker).collect();
        let candidates = Self::new(&workers, (0..count).collect(), false);
        Ok(Arc::new(Self { recorded: Some(Box::new(recorded)), ..candidates }))
    }

    /// Any column by its name in the contract, those of labels apart; `None` if there is none of this name.
    #[must_use]
    pub fn column(&self, name: &str, now_ms: u64, overlap: Option<&Overlap>) -> Option<Column> {
        if let Some((_, column)) = U64Column::ALL.iter().find(|(of, _)| *of == name) {
            return Some(self.u64_column(*column).into());
        }
        if let Some((_, column)) = U32Column::ALL.iter().find(|(of, _)| *of == name) {
            return Some(self.u32_column(*column, now_ms).into());
        }
        if let Some((_, column)) = F32Column::ALL.iter().find(|(of, _)| *of == name) {
            return Some(self.f32_column(*column).into());
        }
        let (_, tier) = Tier::COLUMNS.into_iter().find(|(of, _)| *of == name)?;
        Some(self.cached_column(tier, overlap).into())
    }

    /// Names of all columns that [`column`](Self::column) gives.
    pub fn column_names() -> impl Iterator<Item = &'static str> {
        let names = U64Column::ALL.iter().map(|(name, _)| *name).chain(U32Column::ALL.iter().map(|(name, _)| *name));
        names.chain(F32Column::ALL.iter().map(|(name, _)| *name)).chain(Tier::COLUMNS.map(|(name, _)| name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        UNKNOWN,
        fleet::{Among, Fleet, Ways},
        kv::Held,
        links::LinkBoard,
        load::{InFlight, LoadReport, Recent},
    };

    /// A column with floats by their bits, so that NaN is equal to NaN.
    fn bits(column: Column) -> Vec<u64> {
        match column {
            Column::U64(values) => values.to_vec(),
            Column::U32(values) => values.iter().map(|&value| value.into()).collect(),
            Column::F32(values) => values.iter().map(|value| value.to_bits().into()).collect(),
        }
    }

    #[test]
    fn what_is_made_of_all_columns_has_the_same_columns_labels_and_signals() {
        let board = LoadBoard::new(8);
        let mut in_flight = Vec::new();
        let workers = (0..5u32).map(|i| {
            let load = board.claim().unwrap();
            in_flight.extend((0..i).map(|request| {
                let mut booked = InFlight::dispatch(Arc::clone(&load), 100 + i, 50, u64::from(request));
                if request % 2 == 0 {
                    booked.tokens(3, 20);
                }
                booked
            }));
            load.report(&LoadReport { queued_requests: Some(i), kv_tokens_free: Some(7 * i), ..LoadReport::default() }, 10);
            if i > 2 {
                load.observe(Recent::TtftMs, 0.1 * i as f32);
                load.observed(15);
            }
            let labels: BTreeMap<_, _> = (i > 0).then(|| ("zone".to_owned(), format!("{}", i % 3))).into_iter().collect();
            let spec = WorkerSpec {
                name: i.to_string(),
                model: "m".to_owned(),
                role: [Role::Aggregated, Role::Prefill, Role::Decode, Role::Both][i as usize % 4],
                rank: i,
                block_size: None,
                labels,
            };
            let id = spec.id("t");
            Worker {
                id,
                spec: Arc::new(spec),
                state: WorkerState::Healthy,
                adapters: Arc::default(),
                handoff: Handoff { serves_whole: true, group: Some(1) },
                joined_ms: 0,
                load,
            }
        });
        let fleet = Fleet::new(1, workers.collect()).unwrap();
        let live = fleet.candidates("m", Among::Everyone).unwrap();
        let overlap = Overlap::new(vec![Held { slot: 1, tokens: [32, 16, 0, 0] }]);
        let read = |candidates: &Candidates, name: &str, overlap| bits(candidates.column(name, 5000, overlap).unwrap());

        let columns = Candidates::column_names().map(|name| (name.to_owned(), live.column(name, 5000, Some(&overlap)).unwrap()));
        let links = LinkBoard::default();
        links.arrived(1, 3, 1000, 10.0);
        links.failed(1, 4, 10);
        let ways = |from| Ways { from, prefilled_by: Some(live.worker(0).id), links: Some(&links) };
        let of_links = |candidates: &Candidates, from: Option<u32>| -> Vec<(&str, Column)> {
            let measure =
                |&(name, column): &(&'static str, LinkColumn)| (name, candidates.link_column(column, ways(from)).into());
            let reachable = candidates.reachable_column(ways(from), 5000).into();
            LinkColumn::ALL.iter().map(measure).chain([(REACHABLE, reachable)]).collect()
        };
        let recorded_links = [None, Some(2)].map(|from| (from, of_links(&live, from)));
        let recording = Recording {
            rows: live.iter().map(|worker| (worker.id, worker.spec.labels.clone())).collect(),
            columns: columns.collect(),
            links: recorded_links
                .iter()
                .flat_map(|(from, columns)| columns.iter().map(|(name, column)| (((*name).to_owned(), *from), column.clone())))
                .collect(),
        };
        let again = Candidates::recorded(recording).unwrap();
        for (from, columns) in recorded_links {
            for ((name, then), (_, now)) in columns.into_iter().zip(of_links(&again, from)) {
                assert_eq!(bits(now), bits(then), "{name}");
            }
        }
        assert!(again.iter().map(|worker| worker.spec.role).eq(live.iter().map(|worker| worker.spec.role)));
        for name in Candidates::column_names() {
            assert_eq!(read(&again, name, None), read(&live, name, Some(&overlap)), "{name}");
        }
        assert_eq!(again.label_column("zone"), live.label_column("zone"));
        assert_eq!(again.label_code("zone", "2"), live.label_code("zone", "2"));
        let signal = |candidates: &Candidates| bits(candidates.signal_column("zone").unwrap().into());
        assert_eq!(signal(&again), signal(&live));
    }

    #[test]
    fn what_was_not_recorded_is_unknown_and_what_does_not_fit_is_refused() {
        let recording = |ids: &[u64], columns: &[(&str, Column)]| Recording {
            rows: ids.iter().map(|&id| (WorkerId(id), BTreeMap::new())).collect(),
            columns: columns.iter().map(|(name, column)| ((*name).to_owned(), column.clone())).collect(),
            links: BTreeMap::new(),
        };
        let bare = Candidates::recorded(recording(&[1, 2], &[])).unwrap();
        assert_eq!(*bare.u32_column(U32Column::ActiveRequests, 0), [UNKNOWN; 2]);
        assert!(bare.f32_column(F32Column::Preference).iter().all(|value| value.is_nan()));
        assert_eq!(*bare.cached_column(Tier::Device, Some(&Overlap::default())), [UNKNOWN; 2]);
        assert_eq!(*bare.u64_column(U64Column::WorkerId), [1, 2]);
        assert_eq!(*bare.reachable_column(Ways::default(), 0), [0, 0]);
        assert_eq!(Candidates::recorded(recording(&[], &[])).unwrap_err(), RecordedError::Empty);
        assert_eq!(Candidates::recorded(recording(&[2, 1], &[])).unwrap_err(), RecordedError::Order);
        let short = Column::U32([0].into());
        let refused = |recording| Candidates::recorded(recording).unwrap_err().to_string();
        assert!(refused(recording(&[1, 2], &[("state", short.clone())])).contains("1 values for 2"));
        let of_link = BTreeMap::from([((REACHABLE.to_owned(), Some(0)), short)]);
        assert!(refused(Recording { links: of_link, ..recording(&[1, 2], &[]) }).contains("reachable has 1 values for 2"));
        let strange = Candidates::recorded(recording(&[1, 2], &[("role", Column::U32([2, 99].into()))])).unwrap();
        assert_eq!([0, 1].map(|row| strange.worker(row).spec.role), [Role::Decode, Role::Aggregated], "codes may grow");
    }
}
