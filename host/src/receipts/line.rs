//! The lines of a receipt: one JSON object for the decision, and one for each of its outcomes, joined by the decision's id.
//!
//! Contract: `"v"` is raised when a reader of the present one would misread what is written. Identities are sixteen hexadecimal
//! digits: JSON's numbers are floats elsewhere. `null` in a column is "not known"; a column that has one value in all rows is
//! that value alone. What has its default is left out.

mod facts;
mod values;

use std::{collections::BTreeMap, sync::Arc};

use dynamo_host_core::{
    Candidates, Column, RecordedError, Recording, Role, Stage, WorkerId,
    answer::{MAX_RANKED, Verdict},
    column::U32Column,
};
use dynamo_host_policy::{DecidedBy, Digest, Explanation, Failed, Reading, RouteCall};
use serde::{Deserialize, Serialize};

use self::values::{Cell, Values, column, link_column, measure, values};
pub(crate) use self::{facts::FactsLine, values::Hex};
use super::Decided;

/// Version of the form.
pub(crate) const VERSION: u32 = 1;
/// Values of columns, labels and scores in one receipt; of larger fleets rows are left out.
const MAX_VALUES: usize = 100_000;

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(crate) enum Line {
    Decision(Box<DecisionLine>),
    Outcome(Box<OutcomeLine>),
}

/// Who decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum By {
    Policy,
    Native,
    Bypass,
    Fallback,
    LastGood,
    Nobody,
}

/// The policy that should have decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct FailedLine {
    pub(crate) policy: String,
    pub(crate) cause: String,
}

/// What was decided.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Done {
    /// Workers, best first.
    Place(Vec<Hex>),
    /// Pairs of workers (prefill, decode), best first.
    PlacePairs(Vec<(Hex, Hex)>),
    HoldMs(u32),
    /// With this status.
    Reject(u16),
}

/// What is chosen of the candidates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// A worker.
    One(Hex),
    /// Who prefills, and who decodes.
    Pair(Hex, Hex),
}

/// One term of a policy's reasoning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Score {
    pub(crate) term: String,
    pub(crate) values: Values<Option<f32>>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// A column of the ways by which KV goes from one worker to each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct LinkLine {
    pub(crate) column: String,
    /// The worker that would prefill; none: the one that does or did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<Hex>,
    pub(crate) values: Values<Cell>,
}

/// A decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct DecisionLine {
    pub(crate) v: u32,
    pub(crate) id: Hex,
    /// `x-request-id`.
    pub(crate) request: String,
    pub(crate) unix_ms: u64,
    /// The host's monotonic clock.
    pub(crate) now_ms: u64,
    pub(crate) slot: String,
    pub(crate) model: String,
    pub(crate) by: By,
    /// `name@version`, or `native`.
    pub(crate) policy: String,
    /// Of the policy's bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) digest: Option<String>,
    /// Digest of its settings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) settings: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) failed: Option<FailedLine>,
    pub(crate) facts: FactsLine,
    pub(crate) seed: Hex,
    /// How many there were.
    pub(crate) candidates: u32,
    /// How many of them are left out below, since there were too many.
    #[serde(default, skip_serializing_if = "is_default")]
    pub(crate) rows_cut: u32,
    /// Their ids, in row order.
    pub(crate) workers: Vec<Hex>,
    pub(crate) columns: BTreeMap<String, Values<Cell>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) links: Vec<LinkLine>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) labels: BTreeMap<String, Values<Option<String>>>,
    pub(crate) done: Done,
    /// Names of the workers that were placed on, best first; of pairs, both.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) names: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) scores: Vec<Score>,
    pub(crate) fuel: u64,
    pub(crate) us: f32,
}

/// What became of the request on one worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct OutcomeLine {
    pub(crate) v: u32,
    /// The decision's.
    pub(crate) id: Hex,
    pub(crate) unix_ms: u64,
    pub(crate) worker: Hex,
    pub(crate) name: String,
    /// `done`, `cancelled`, `failed`, `rejected`.
    pub(crate) end: String,
    /// Of the client's answer; none if the worker failed and the request went on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) status: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) ttft_ms: Option<f32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) itl_ms: Option<f32>,
    pub(crate) prompt_tokens: u32,
    pub(crate) output_tokens: u32,
    /// What the worker was believed to hold of the prompt.
    pub(crate) cached_predicted: u32,
    /// What the engine says that it held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cached_reported: Option<u32>,
}

impl DecisionLine {
    /// The line of a decision, with as many rows as it may hold.
    pub(crate) fn of(decided: &Decided) -> Self {
        let Decided { candidates, readings, explanations, .. } = decided;
        let count = candidates.count() as usize;
        let rows = rows_kept(count, 2 + readings.len() + explanations.len(), &decided.verdict);
        let (by, version, failed) = who(&decided.by);
        let settings = version.map(|version| Digest::of(version.settings().as_bytes()).to_string());
        let id = |&row: &u32| Hex(candidates.worker(row).id.0);
        let mut columns = roles(candidates, &rows);
        let mut labels = BTreeMap::new();
        let mut links = Vec::new();
        for reading in readings {
            match reading {
                Reading::Column("worker-id", _) => {}
                Reading::Column(name, column) => drop(columns.insert((*name).to_owned(), values(column, &rows))),
                Reading::Link(name, from, column) if from.is_none_or(|from| rows.binary_search(&from).is_ok()) => {
                    links.push(LinkLine {
                        column: (*name).to_owned(),
                        from: from.as_ref().map(id),
                        values: values(column, &rows),
                    });
                }
                // Of a row that was left out, or of none.
                Reading::Link(..) => {}
                Reading::Label(key) => {
                    let of = |&row: &u32| candidates.worker(row).spec.labels.get(key).cloned();
                    labels.insert(key.clone(), Values::of(rows.iter().map(of).collect()));
                }
            }
        }
        Self {
            v: VERSION,
            id: Hex(decided.request.decision_id),
            request: decided.request.id.clone(),
            unix_ms: decided.unix_ms,
            now_ms: decided.now_ms,
            slot: decided.slot.clone(),
            model: decided.request.model.clone(),
            by,
            policy: version.map_or_else(|| dynamo_host_core::native::NAME.to_owned(), |version| version.label().to_string()),
            digest: version.map(|version| version.digest().to_string()),
            settings,
            failed: failed.map(|failed| FailedLine { policy: failed.policy.to_string(), cause: failed.cause.to_string() }),
            facts: FactsLine::of(&decided.request),
            seed: Hex(decided.seed),
            candidates: candidates.count(),
            rows_cut: (count - rows.len()) as u32,
            workers: rows.iter().map(id).collect(),
            columns,
            links,
            labels,
            done: match &decided.verdict {
                Verdict::Place(ranking) => Done::Place(ranking.rows().iter().map(id).collect()),
                Verdict::PlacePairs(pairs) => Done::PlacePairs(pairs.iter().map(|(p, d)| (id(p), id(d))).collect()),
                Verdict::Hold { at_most_ms } => Done::HoldMs(*at_most_ms),
                Verdict::Reject(rejection) => Done::Reject(rejection.status),
            },
            names: placed(&decided.verdict).into_iter().map(|row| candidates.worker(row).spec.name.clone()).collect(),
            scores: explanations.iter().map(|term| score(term, count, &rows)).collect(),
            fuel: decided.fuel,
            us: decided.elapsed.as_secs_f32() * 1e6,
        }
    }

    /// The call as it was, with the candidates that it was about.
    ///
    /// # Errors
    /// If the line does not fit together.
    pub(crate) fn call(&self) -> Result<RouteCall, String> {
        let rows = self.workers.len();
        let labels = |row: usize| {
            let of = |(key, values): (&String, &Values<Option<String>>)| Some((key.clone(), values.get(row).cloned()??));
            self.labels.iter().filter_map(of).collect()
        };
        let columns = self.columns.iter().map(|(name, values)| Ok((name.clone(), column(name, values, rows)?)));
        let links = self.links.iter().map(|LinkLine { column, from, values }| {
            let from =
                from.map(|from| self.row_of(from).ok_or_else(|| format!("its links begin at {from}, which is no candidate")));
            Ok(((column.clone(), from.transpose()?), link_column(column, values, rows)?))
        });
        let recording = Recording {
            rows: self.workers.iter().enumerate().map(|(row, id)| (WorkerId(id.0), labels(row))).collect(),
            columns: columns.collect::<Result<_, String>>()?,
            links: links.collect::<Result<_, String>>()?,
        };
        let candidates = Candidates::recorded(recording).map_err(|error: RecordedError| error.to_string())?;
        Ok(RouteCall {
            request: Arc::new(self.facts.request(self)?),
            candidates,
            overlap: None,
            links: None,
            now_ms: self.now_ms,
            unix_ms: self.unix_ms,
            seed: self.seed.0,
            // As it was asked then: a policy may decide otherwise when it explains.
            explain: true,
        })
    }

    /// The roles of the candidates.
    pub(crate) fn roles(&self) -> Vec<Role> {
        let column = self.columns.get(U32Column::Role.name());
        let role = |row: usize| match column.and_then(|column| column.get(row)) {
            Some(Cell::Amount(code)) => Role::of_code(*code).unwrap_or_default(),
            _ => Role::Aggregated,
        };
        (0..self.workers.len()).map(role).collect()
    }

    /// The same as it would be put to a policy that does not tell roles apart: where the request begins, and without links.
    pub(crate) fn of_beginning(&self) -> Self {
        let roles = self.roles();
        let rows: Vec<usize> = (0..roles.len()).filter(|&row| roles[row] != Role::Decode).collect();
        let is_split = rows.iter().all(|&row| roles[row] == Role::Prefill);
        let stage = is_split.then(|| Stage::Prefill.label().to_owned());
        Self {
            facts: FactsLine { stage, ..self.facts.clone() },
            workers: rows.iter().map(|&row| self.workers[row]).collect(),
            columns: self.columns.iter().map(|(name, values)| (name.clone(), values.only(&rows))).collect(),
            labels: self.labels.iter().map(|(key, values)| (key.clone(), values.only(&rows))).collect(),
            links: Vec::new(),
            ..self.clone()
        }
    }

    /// What was chosen, best first: a worker, or one that prefills and one that decodes.
    pub(crate) fn choices(&self) -> Vec<Choice> {
        match &self.done {
            Done::Place(workers) => workers.iter().map(|&worker| Choice::One(worker)).collect(),
            Done::PlacePairs(pairs) => pairs.iter().map(|&(prefill, decode)| Choice::Pair(prefill, decode)).collect(),
            Done::HoldMs(_) | Done::Reject(_) => Vec::new(),
        }
    }

    /// The workers that were placed on, in the order of their names.
    pub(crate) fn placed(&self) -> Vec<Hex> {
        self.choices().into_iter().flat_map(Choice::workers).collect()
    }

    /// The name of a worker, if it was placed on; else its id.
    pub(crate) fn name_of(&self, worker: Hex) -> String {
        let named = self.placed().into_iter().zip(&self.names).find(|(id, _)| *id == worker);
        named.map_or_else(|| worker.to_string(), |(_, name)| crate::text::plain(name))
    }

    /// A choice by names.
    pub(crate) fn text_of(&self, choice: Choice) -> String {
        match choice {
            Choice::One(worker) => self.name_of(worker),
            Choice::Pair(prefill, decode) => format!("{} + {}", self.name_of(prefill), self.name_of(decode)),
        }
    }

    fn row_of(&self, worker: Hex) -> Option<u32> {
        self.workers.binary_search(&worker).ok().map(|row| row as u32)
    }

    /// The last term's score of a worker: composed policies end with their total.
    pub(crate) fn score_of(&self, worker: Hex) -> Option<(&str, f32)> {
        let row = self.row_of(worker)?;
        let score = self.scores.last()?;
        Some((score.term.as_str(), score.values.get(row as usize).copied()??))
    }
}

impl Choice {
    /// Its workers: one, or who prefills and who decodes.
    pub(crate) fn workers(self) -> impl Iterator<Item = Hex> {
        let (first, second) = match self {
            Self::One(worker) => (worker, None),
            Self::Pair(prefill, decode) => (prefill, Some(decode)),
        };
        std::iter::once(first).chain(second)
    }
}

/// Rows that were placed on, in order: of pairs, both.
fn placed(verdict: &Verdict) -> Vec<u32> {
    match verdict {
        Verdict::Place(ranking) => ranking.rows().to_vec(),
        Verdict::PlacePairs(pairs) => pairs.iter().flat_map(|&(prefill, decode)| [prefill, decode]).collect(),
        Verdict::Hold { .. } | Verdict::Reject(_) => Vec::new(),
    }
}

/// The column of roles, whether it was read or not: without it, a pair means nothing. None where all do all of the work.
fn roles(candidates: &Candidates, rows: &[u32]) -> BTreeMap<String, Values<Cell>> {
    if candidates.iter().all(|worker| worker.spec.role == Role::Aggregated) {
        return BTreeMap::new();
    }
    let roles = Column::U32(candidates.iter().map(|worker| worker.spec.role.code()).collect());
    BTreeMap::from([(U32Column::Role.name().to_owned(), values(&roles, rows))])
}

/// Rows that a receipt keeps: those that were placed on, and as many others as fit; in order.
fn rows_kept(count: usize, per_row: usize, verdict: &Verdict) -> Vec<u32> {
    let most = (MAX_VALUES / per_row).max(2 * MAX_RANKED);
    if count <= most {
        return (0..count as u32).collect();
    }
    let mut rows = placed(verdict);
    rows.sort_unstable();
    rows.dedup();
    let others: Vec<u32> = (0..count as u32).filter(|row| rows.binary_search(row).is_err()).take(most - rows.len()).collect();
    rows.extend(others);
    rows.sort_unstable();
    rows
}

/// A term over the kept rows; one that is not about candidates is kept as it is.
fn score(term: &Explanation, count: usize, rows: &[u32]) -> Score {
    let is_of_rows = term.values.len() == count;
    let values = if is_of_rows {
        rows.iter().map(|&row| measure(term.values[row as usize])).collect()
    } else {
        term.values.iter().copied().map(measure).collect()
    };
    Score { term: term.term.clone(), values: if is_of_rows { Values::of(values) } else { Values::Each(values) } }
}

type Who<'a> = (By, Option<&'a Arc<dynamo_host_policy::PolicyVersion>>, Option<&'a Failed>);

fn who(by: &DecidedBy) -> Who<'_> {
    match by {
        DecidedBy::Policy(version) => (By::Policy, Some(version), None),
        DecidedBy::Native => (By::Native, None, None),
        DecidedBy::Bypass => (By::Bypass, None, None),
        DecidedBy::Fallback(failed) => (By::Fallback, None, Some(failed)),
        DecidedBy::LastGood(version, failed) => (By::LastGood, Some(version), Some(failed)),
        DecidedBy::Nobody(failed) => (By::Nobody, None, Some(failed)),
    }
}
