//! The lines of a receipt: one JSON object for the decision, and one for each of its outcomes, joined by the decision's id.
//!
//! Contract: `"v"` is raised when a reader of the present one would misread what is written. Identities are sixteen hexadecimal
//! digits: JSON's numbers are floats elsewhere. `null` in a column is "not known"; a column that has one value in all rows is
//! that value alone. What has its default is left out.

mod values;

use std::{collections::BTreeMap, sync::Arc};

use dynamo_host_core::{Candidates, Endpoint, RecordedError, RequestFacts, Slo, TokenCount, WorkerId, answer::Verdict};
use dynamo_host_policy::{DecidedBy, Digest, Explanation, Failed, Reading, RouteCall};
use serde::{Deserialize, Serialize};

pub(crate) use self::values::Hex;
use self::values::{Cell, Values, column, measure, values};
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

/// One term of a policy's reasoning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Score {
    pub(crate) term: String,
    pub(crate) values: Values<Option<f32>>,
}

/// What a policy may read of the request. Neither text of the prompt nor tokens of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct FactsLine {
    pub(crate) endpoint: String,
    pub(crate) prompt_tokens: u32,
    /// Whether a tokenizer counted them.
    pub(crate) exact: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) adapter: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tenant_key: Option<Hex>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) session_key: Option<Hex>,
    pub(crate) prefix_key: Hex,
    #[serde(default, skip_serializing_if = "is_default")]
    pub(crate) priority: i32,
    /// Chosen by admission, as the class is.
    #[serde(default, skip_serializing_if = "is_default")]
    pub(crate) tier: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) class: Option<String>,
    #[serde(default, skip_serializing_if = "is_default")]
    pub(crate) generated_tokens: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_output_tokens: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) expected_output_tokens: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) slo_ttft_ms: Option<f32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) slo_itl_ms: Option<f32>,
    pub(crate) choices: u32,
    pub(crate) flags: u32,
    #[serde(default, skip_serializing_if = "is_default")]
    pub(crate) multimodal_items: u32,
    pub(crate) accepted_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) deadline_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "is_default")]
    pub(crate) attempt: u32,
    #[serde(default, skip_serializing_if = "is_default")]
    pub(crate) holds: u32,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) failed_workers: Vec<Hex>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
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
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) labels: BTreeMap<String, Values<Option<String>>>,
    pub(crate) done: Done,
    /// Names of the workers that were placed on, best first.
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
        let rows = rows_kept(count, 1 + readings.len() + explanations.len(), &decided.verdict);
        let (by, version, failed) = who(&decided.by);
        let settings = version.map(|version| Digest::of(version.settings().as_bytes()).to_string());
        let mut columns = BTreeMap::new();
        let mut labels = BTreeMap::new();
        for reading in readings {
            match reading {
                Reading::Column("worker-id", _) => {}
                Reading::Column(name, column) => drop(columns.insert((*name).to_owned(), values(column, &rows))),
                Reading::Label(key) => {
                    let of = |&row: &u32| candidates.worker(row).spec.labels.get(key).cloned();
                    labels.insert(key.clone(), Values::of(rows.iter().map(of).collect()));
                }
            }
        }
        let id = |&row: &u32| Hex(candidates.worker(row).id.0);
        let placed = match &decided.verdict {
            Verdict::Place(ranking) => ranking.rows(),
            Verdict::PlacePairs(_) | Verdict::Hold { .. } | Verdict::Reject(_) => &[],
        };
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
            labels,
            done: match &decided.verdict {
                Verdict::Place(ranking) => Done::Place(ranking.rows().iter().map(id).collect()),
                Verdict::PlacePairs(pairs) => Done::PlacePairs(pairs.iter().map(|(p, d)| (id(p), id(d))).collect()),
                Verdict::Hold { at_most_ms } => Done::HoldMs(*at_most_ms),
                Verdict::Reject(rejection) => Done::Reject(rejection.status),
            },
            names: placed.iter().map(|&row| candidates.worker(row).spec.name.clone()).collect(),
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
        let columns = self.columns.iter().map(|(name, values)| Ok((name.clone(), column(name, values, rows)?)));
        let labels = |row: usize| {
            let of = |(key, values): (&String, &Values<Option<String>>)| Some((key.clone(), values.get(row).cloned()??));
            self.labels.iter().filter_map(of).collect()
        };
        let workers = self.workers.iter().enumerate().map(|(row, id)| (WorkerId(id.0), labels(row)));
        let candidates = Candidates::recorded(workers.collect(), columns.collect::<Result<_, String>>()?);
        let candidates = candidates.map_err(|error: RecordedError| error.to_string())?;
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

    /// The workers that were placed on, best first.
    pub(crate) fn placed(&self) -> &[Hex] {
        match &self.done {
            Done::Place(workers) => workers,
            Done::PlacePairs(_) | Done::HoldMs(_) | Done::Reject(_) => &[],
        }
    }

    /// The name of a worker, if it was placed on; else its id.
    pub(crate) fn name_of(&self, worker: Hex) -> String {
        let named = self.placed().iter().zip(&self.names).find(|(id, _)| **id == worker);
        named.map_or_else(|| worker.to_string(), |(_, name)| crate::text::plain(name))
    }

    /// The last term's score of a worker: composed policies end with their total.
    pub(crate) fn score_of(&self, worker: Hex) -> Option<(&str, f32)> {
        let row = self.workers.iter().position(|id| *id == worker)?;
        let score = self.scores.last()?;
        Some((score.term.as_str(), score.values.get(row).copied()??))
    }
}

impl FactsLine {
    fn of(request: &RequestFacts) -> Self {
        Self {
            endpoint: request.endpoint.label().to_owned(),
            prompt_tokens: request.prompt.tokens,
            exact: request.prompt.exact,
            adapter: request.adapter.clone(),
            tenant_key: request.tenant_key().map(Hex),
            session_key: request.session_key.map(Hex),
            prefix_key: Hex(request.prefix_key),
            priority: request.priority,
            tier: request.tier,
            class: request.class.as_deref().map(str::to_owned),
            generated_tokens: request.generated_tokens,
            max_output_tokens: request.max_output_tokens,
            expected_output_tokens: request.expected_output_tokens,
            slo_ttft_ms: request.slo.ttft_ms,
            slo_itl_ms: request.slo.itl_ms,
            choices: request.choices,
            flags: request.flags,
            multimodal_items: request.multimodal_items,
            accepted_ms: request.accepted_ms,
            deadline_ms: request.deadline_ms,
            attempt: request.attempt,
            holds: request.holds,
            failed_workers: request.failed_workers.iter().map(|worker| Hex(worker.0)).collect(),
        }
    }

    fn request(&self, line: &DecisionLine) -> Result<RequestFacts, String> {
        let endpoint = Endpoint::ALL.into_iter().find(|endpoint| endpoint.label() == self.endpoint);
        let endpoint = endpoint.ok_or_else(|| format!("its endpoint {:?} is not known", self.endpoint))?;
        Ok(RequestFacts {
            decision_id: line.id.0,
            adapter: self.adapter.clone(),
            recorded_tenant_key: self.tenant_key.map(|key| key.0),
            priority: self.priority,
            tier: self.tier,
            class: self.class.as_deref().map(Into::into),
            session_key: self.session_key.map(|key| key.0),
            prefix_key: self.prefix_key.0,
            prompt: TokenCount { tokens: self.prompt_tokens, exact: self.exact },
            generated_tokens: self.generated_tokens,
            max_output_tokens: self.max_output_tokens,
            expected_output_tokens: self.expected_output_tokens,
            slo: Slo { ttft_ms: self.slo_ttft_ms, itl_ms: self.slo_itl_ms },
            choices: self.choices,
            flags: self.flags,
            multimodal_items: self.multimodal_items,
            accepted_ms: self.accepted_ms,
            deadline_ms: self.deadline_ms,
            attempt: self.attempt,
            holds: self.holds,
            failed_workers: self.failed_workers.iter().map(|worker| WorkerId(worker.0)).collect(),
            ..RequestFacts::new(line.request.clone(), line.model.clone(), endpoint)
        })
    }
}

/// Rows that a receipt keeps: those that were placed on, and as many others as fit; in order.
fn rows_kept(count: usize, per_row: usize, verdict: &Verdict) -> Vec<u32> {
    let most = (MAX_VALUES / per_row).max(dynamo_host_core::answer::MAX_RANKED);
    if count <= most {
        return (0..count as u32).collect();
    }
    let mut rows = match verdict {
        Verdict::Place(ranking) => ranking.rows().to_vec(),
        Verdict::PlacePairs(pairs) => pairs.iter().flat_map(|&(prefill, decode)| [prefill, decode]).collect(),
        Verdict::Hold { .. } | Verdict::Reject(_) => Vec::new(),
    };
    let others: Vec<u32> = (0..count as u32).filter(|row| !rows.contains(row)).take(most - rows.len()).collect();
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
