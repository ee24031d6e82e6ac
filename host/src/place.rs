//! Placing: the policy is asked where a request shall go, or a part of it.
//!
//! Contract: what comes back are [`Way`]s that can be gone as they are, best first, whatever the policy said of them: a worker that
//! only prefills is never taken for one that answers, and nobody is placed where its KV cannot reach. Which workers are asked
//! about follows from the part, the request, and whether the policy tells roles apart:
//!
//! | part | asked about | stage |
//! |---|---|---|
//! | a request whose KV may be handed over | where it may begin; all workers, for who tells roles apart | `whole`; `prefill` where all only prefill |
//! | one whose KV may not, or for which there is no pair | those that serve whole requests | `whole` |
//! | the rest of a stream, and what engines refused in parts | the same; where nobody is left who does that, as for its beginning | `whole`; `prefill` |
//! | decode | those that the prefill worker's KV can reach | `decode` |

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use dynamo_host_core::{
    Among, Candidates, Overlap, RequestFacts, Role, Worker, WorkerId,
    answer::{MAX_HOLD, MAX_HOLDS, Verdict},
    native,
    request::Stage,
};
use dynamo_host_index::Prompt;
use dynamo_host_policy::{DecidedBy, Decision, Pinned, PolicyVersion, RouteCall};

use crate::{
    clock::unix_ms,
    error::RequestError,
    handoff,
    receipts::Recorder,
    relay::Patience,
    request::{Lane, Notes},
    roster::Snapshot,
    trace,
};

/// Which part of a request is to be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// All of it, from its beginning.
    Beginning,
    /// All of it, or what is left of it, on one worker; over a pair only where nobody is left who serves whole requests.
    Whole,
    /// Decode of what this worker prefills or has prefilled.
    Decode(WorkerId),
}

/// One way to serve what was placed, by rows of its candidates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// All that was asked about, on one worker.
    Alone(u32),
    /// Prefill on this worker; who decodes is asked next.
    Prefill(u32),
    /// Prefill on the first, decode on the second.
    Pair(u32, u32),
}

impl Way {
    /// The row of the worker that is asked first.
    pub(crate) fn first(self) -> u32 {
        match self {
            Self::Alone(row) | Self::Prefill(row) | Self::Pair(row, _) => row,
        }
    }
}

/// What is asked, and by whom it is answered.
#[derive(Clone, Copy)]
pub(crate) struct Inquiry<'a> {
    pub(crate) part: Part,
    pub(crate) pinned: &'a Pinned,
    pub(crate) prompt: &'a Prompt,
    pub(crate) recorder: Option<&'a Recorder>,
    pub(crate) patience: &'a Patience,
    /// Until when it may be held, if that is before the request's own end.
    pub(crate) until: Option<Instant>,
}

/// Ways to try, best first, and who ranked them.
pub(crate) struct Placing {
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) candidates: Arc<Candidates>,
    /// What the workers held of the prompt when it was ranked.
    pub(crate) overlap: Arc<Overlap>,
    pub(crate) ways: Vec<Way>,
    /// `x-dynamo-policy`.
    pub(crate) policy: String,
    by: DecidedBy,
    /// Identity of the decision.
    pub(crate) decision_id: u64,
    /// Where it is recorded, if it is.
    pub(crate) recorder: Option<Recorder>,
    /// For how long the policy held the request.
    pub(crate) held: Duration,
}

impl Placing {
    /// The version that learns what becomes of the request.
    pub(crate) fn observed_version(&self) -> Option<Arc<PolicyVersion>> {
        self.by.version().filter(|version| version.observes()).map(Arc::clone)
    }

    /// The workers that are asked first, best first, by row.
    pub(crate) fn rows(&self) -> impl Iterator<Item = u32> {
        self.ways.iter().map(|way| way.first())
    }
}

/// Asks the policy where a request, or a part of it, shall go, again and again while it holds it. The facts say afterwards what was
/// asked.
///
/// # Errors
/// [`RequestError::NoWorker`] if there is nobody for it; what the policy refuses it with; that its time is over.
pub(crate) async fn place(
    lane: &Lane,
    inquiry: &Inquiry<'_>,
    facts: &mut RequestFacts,
    notes: &mut Notes,
) -> Result<Placing, RequestError> {
    let Inquiry { part, pinned, prompt, recorder, patience, until } = *inquiry;
    let until = until.unwrap_or(patience.deadline).min(patience.deadline);
    let mut changes = lane.roster.changes();
    let mut held = Duration::ZERO;
    facts.decision_id = lane.next_decision();
    facts.prefilled_by = if let Part::Decode(worker) = part { Some(worker) } else { None };
    for holds in 0..=MAX_HOLDS {
        let begun = Instant::now();
        let snapshot = lane.roster.snapshot();
        facts.holds = holds;
        let may_begin_apart = match part {
            Part::Beginning => snapshot.has_pair(facts, lane.roster.links()),
            Part::Whole => snapshot.is_left_to_pairs(facts, lane.roster.links()),
            Part::Decode(_) => false,
        };
        let (stage, candidates) =
            if may_begin_apart { to_begin(lane, pinned, facts, &snapshot)? } else { asked_about(lane, part, facts, &snapshot)? };
        let candidates = lane.queue.with_room(candidates, facts);
        facts.stage = stage;
        let overlap = lane.prefixes.overlap(facts, prompt);
        let call = RouteCall {
            request: Arc::new(facts.clone()),
            candidates: Arc::clone(&candidates),
            overlap: Some(Arc::clone(&overlap)),
            links: snapshot.may_hand_over(facts).then(|| Arc::clone(lane.roster.links())),
            now_ms: lane.clock.now_ms(),
            unix_ms: unix_ms(),
            // Asked again, a policy that decides by chance must not repeat itself.
            seed: facts.decision_id ^ u64::from(holds) << 60,
            explain: recorder.is_some(),
        };
        let draft = recorder.map(|recorder| recorder.draft(&call));
        let seed = call.seed;
        let mut decision = lane.routing.decide(pinned, call);
        if let Some(draft) = draft {
            draft.close(&mut decision);
        }
        lane.meters.route.record(begun.elapsed());
        trace::stage("route", begun);
        let Decision { verdict, by, .. } = decision;
        let policy = by.to_string();
        notes.policy = Some(policy.clone());
        let ways: Vec<Way> = match verdict {
            Verdict::Place(ranking) => ranking.rows().iter().map(|&row| Way::Alone(row)).collect(),
            Verdict::PlacePairs(pairs) => pairs.into_iter().map(|(prefill, decode)| Way::Pair(prefill, decode)).collect(),
            Verdict::Reject(rejection) if matches!(by, DecidedBy::Nobody(_)) => {
                return Err(RequestError::PolicyFailed(rejection));
            }
            Verdict::Reject(rejection) => return Err(RequestError::Rejected(rejection)),
            Verdict::Hold { at_most_ms } => {
                let begun = Instant::now();
                let pause = Duration::from_millis(u64::from(at_most_ms)).min(MAX_HOLD);
                let _ = tokio::time::timeout_at((begun + pause).min(until).into(), changes.changed()).await;
                held += begun.elapsed();
                if Instant::now() >= until {
                    return Err(patience.exceeded());
                }
                continue;
            }
        };
        let ways = if may_begin_apart || part == Part::Beginning {
            let roads = Roads { lane, snapshot: &snapshot, candidates: &candidates, facts };
            roads.passable(ways, seed)?
        } else {
            ways
        };
        let (decision_id, recorder) = (facts.decision_id, recorder.cloned());
        return Ok(Placing { snapshot, candidates, overlap, ways, policy, by, decision_id, recorder, held });
    }
    unreachable!("a policy that had its turns is not asked, and nobody who decides instead holds")
}

/// Where a request may begin that has a pair to go over, and the stage in which that is asked about.
fn to_begin(
    lane: &Lane,
    pinned: &Pinned,
    facts: &RequestFacts,
    snapshot: &Snapshot,
) -> Result<(Stage, Arc<Candidates>), RequestError> {
    if pinned.tells_roles_apart() {
        return Ok((Stage::Whole, snapshot.candidates_among(facts, Among::Everyone)?));
    }
    let links = lane.roster.links();
    let beginning = snapshot.candidates_among(facts, Among::Beginning)?;
    let begins = |worker: &Worker| worker.spec.role != Role::Prefill || snapshot.reaches_any(facts, worker, links);
    let beginning = beginning.of(begins).unwrap_or(beginning);
    Ok((beginning.beginning_stage(), beginning))
}

/// The workers that any other part may be placed on, and the stage.
fn asked_about(
    lane: &Lane,
    part: Part,
    facts: &RequestFacts,
    snapshot: &Snapshot,
) -> Result<(Stage, Arc<Candidates>), RequestError> {
    match part {
        Part::Decode(worker) => Ok((Stage::Decode, snapshot.decoders(facts, worker, lane.roster.links())?)),
        Part::Beginning | Part::Whole => {
            let whole = snapshot.for_whole(facts)?;
            // Workers that failed this one request are no missing pool.
            let is_first = part == Part::Beginning && (facts.attempt, facts.holds) == (0, 0);
            if let Some(cause) = is_first.then(|| snapshot.missing_for_pairs(facts)).flatten() {
                handoff::fell_back(cause);
            }
            Ok((Stage::Whole, whole))
        }
    }
}

/// What makes a way one that can be gone.
struct Roads<'a> {
    lane: &'a Lane,
    snapshot: &'a Snapshot,
    candidates: &'a Arc<Candidates>,
    facts: &'a RequestFacts,
}

impl Roads<'_> {
    /// The ways that can be gone, of those that were decided; where none can, those of the native fallback.
    fn passable(&self, decided: Vec<Way>, seed: u64) -> Result<Vec<Way>, RequestError> {
        let mut ways: Vec<Way> = Vec::with_capacity(decided.len());
        for way in decided.into_iter().filter_map(|way| self.of(way)) {
            if !ways.contains(&way) {
                ways.push(way);
            }
        }
        if ways.is_empty() {
            tracing::warn!("a policy placed a request where nobody can serve it; the least loaded worker is taken that can");
            let can = |worker: &Worker| self.of_worker(worker, 0).is_some();
            let able = self.candidates.of(can).ok_or_else(|| self.snapshot.no_worker(self.facts))?;
            let rows = native::least_loaded(&able, self.facts.stage, seed);
            let row_of = |id: WorkerId| (0..self.candidates.count()).find(|&row| self.candidates.worker(row).id == id);
            let rows = rows.rows().iter().filter_map(|&row| row_of(able.worker(row).id));
            ways.extend(rows.filter_map(|row| self.of_worker(self.candidates.worker(row), row)));
        }
        Ok(ways)
    }

    fn of(&self, way: Way) -> Option<Way> {
        match way {
            Way::Alone(row) | Way::Prefill(row) => self.of_worker(self.candidates.worker(row), row),
            Way::Pair(prefill, decode) => {
                let [from, to] = [prefill, decode].map(|row| self.candidates.worker(row));
                if self.snapshot.reaches(from, to, self.lane.roster.links()) {
                    return Some(way);
                }
                // One who prefills and cannot reach that one may reach another.
                self.prefills(from).then_some(Way::Prefill(prefill)).or_else(|| self.of_worker(to, decode))
            }
        }
    }

    /// What placing a request on a worker means.
    fn of_worker(&self, worker: &Worker, row: u32) -> Option<Way> {
        match worker.spec.role {
            Role::Prefill if self.prefills(worker) => Some(Way::Prefill(row)),
            _ if worker.handoff.serves_whole => Some(Way::Alone(row)),
            Role::Both if self.prefills(worker) => Some(Way::Prefill(row)),
            _ => None,
        }
    }

    fn prefills(&self, worker: &Worker) -> bool {
        self.snapshot.may_hand_over(self.facts) && self.snapshot.reaches_any(self.facts, worker, self.lane.roster.links())
    }
}
