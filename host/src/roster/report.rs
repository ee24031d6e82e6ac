//! The roster for people and tools: one row for each worker, and what is wrong with the sources.

use dynamo_host_core::{Load, Role, WorkerState, load::Reported};
use serde::Serialize;

use super::{
    Member, Origin, Problem, Roster,
    member::Standing,
    split::{self, HandoffReport},
};
use crate::kv::KvReport;

/// A worker, for people and tools.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct WorkerReport {
    /// `None` until the engine has said which models it serves.
    pub(crate) id: Option<String>,
    pub(crate) name: String,
    pub(crate) source: Origin,
    pub(crate) url: String,
    pub(crate) kind: &'static str,
    pub(crate) model: Option<String>,
    pub(crate) adapters: Vec<String>,
    pub(crate) rank: u32,
    pub(crate) role: Role,
    /// `None`: it serves whole requests only, or has not said which models it serves.
    pub(crate) handoff: Option<HandoffReport>,
    pub(crate) state: WorkerState,
    pub(crate) active_requests: u32,
    /// Prompts whose KV its engine keeps for whoever decodes.
    pub(crate) staged_handoffs: u32,
    /// Of those: prompt tokens before the first token, those of them to be computed, and context that decodes.
    pub(crate) active_prefill_tokens: u32,
    pub(crate) active_uncached_tokens: u32,
    pub(crate) active_decode_tokens: u32,
    pub(crate) served: u64,
    /// What the engine last reported, and how long ago that was.
    pub(crate) queued_requests: Option<u32>,
    pub(crate) kv_tokens_total: Option<u32>,
    pub(crate) kv_tokens_free: Option<u32>,
    pub(crate) load_age_ms: Option<u32>,
    /// `None` until there is a worker.
    pub(crate) kv: Option<KvReport>,
    /// Why it is out of service, or serves less than it could.
    pub(crate) trouble: Option<String>,
    /// Why what it reports was not learnt last time.
    pub(crate) load_trouble: Option<String>,
}

/// What metrics say of one engine's workers.
#[derive(Clone, Debug)]
pub(crate) struct WorkerTally {
    pub(crate) worker: String,
    /// Requests that it was ever given.
    pub(crate) requests: u64,
    /// How the worst of its breakers stands: 0 closed, 1 half-open, 2 open; `None`: none ever opened.
    pub(crate) breaker: Option<u8>,
}

/// What is wrong with a source of workers.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct SourceProblem {
    pub(crate) source: Origin,
    #[serde(flatten)]
    pub(crate) problem: Problem,
}

impl Roster {
    /// All workers, with what the next request sees.
    pub(crate) fn report(&self) -> Vec<WorkerReport> {
        self.publish();
        let (now_ms, is_checked) = (self.clock.now_ms(), self.health().check_handoffs);
        let members: Vec<_> = self.members().values().cloned().collect();
        let report = members.iter().flat_map(|member| report_of(member, is_checked, now_ms)).collect();
        // What changed while it was written is in it, and must hold for the next request all the same.
        self.publish();
        report
    }

    /// What metrics say of the workers that there are now, by name.
    pub(crate) fn tallies(&self) -> Vec<WorkerTally> {
        let members: Vec<_> = self.members().values().cloned().collect();
        let of = |member: &Member| WorkerTally {
            worker: member.config.name.clone(),
            requests: member.given(),
            breaker: member.standing().vitals.iter().filter_map(|vitals| vitals.shown()).max(),
        };
        members.iter().map(|member| of(member)).collect()
    }

    /// One engine's workers; `None` if there is no such engine.
    pub(crate) fn report_of(&self, name: &str) -> Option<Vec<WorkerReport>> {
        self.publish();
        let member = self.members().get(name).cloned()?;
        let report = report_of(&member, self.health().check_handoffs, self.clock.now_ms());
        self.publish();
        Some(report)
    }

    /// What is wrong with the sources.
    pub(crate) fn problems(&self) -> Vec<SourceProblem> {
        let problems = self.problems.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let of = |(source, problems): (&Origin, &Vec<Problem>)| {
            let source = source.clone();
            problems.clone().into_iter().map(move |problem| SourceProblem { source: source.clone(), problem })
        };
        problems.iter().flat_map(of).collect()
    }
}

fn report_of(member: &Member, is_checked: bool, now_ms: u64) -> Vec<WorkerReport> {
    let standing = member.standing();
    if standing.workers.is_empty() {
        return vec![bare(member, &standing)];
    }
    let full = |place: usize| {
        let (worker, feed, vitals) = (&standing.workers[place], &standing.feeds[place], &standing.vitals[place]);
        let handoff = split::report(member, &standing, place, is_checked);
        let no_handoffs = || handoff.as_ref()?.reason.as_ref().map(|reason| format!("it gets no hand-offs: {reason}"));
        WorkerReport {
            state: vitals.refine(standing.state(), now_ms),
            trouble: standing.trouble.clone().or_else(|| vitals.trouble(now_ms)).or_else(no_handoffs),
            handoff,
            id: Some(worker.id.to_string()),
            model: Some(worker.spec.model.clone()),
            adapters: worker.adapters.to_vec(),
            rank: worker.spec.rank,
            active_requests: worker.load.get(Load::ActiveRequests),
            active_prefill_tokens: worker.load.get(Load::ActivePrefillTokens),
            active_uncached_tokens: worker.load.get(Load::ActiveUncachedTokens),
            active_decode_tokens: worker.load.get(Load::ActiveDecodeTokens),
            served: worker.load.served(),
            queued_requests: worker.load.get_reported(Reported::QueuedRequests),
            kv_tokens_total: worker.load.get_reported(Reported::KvTokensTotal),
            kv_tokens_free: worker.load.get_reported(Reported::KvTokensFree),
            load_age_ms: worker.load.load_age_ms(now_ms),
            kv: Some(feed.report(now_ms)),
            ..bare(member, &standing)
        }
    };
    (0..standing.workers.len()).map(full).collect()
}

/// What is known of an engine that has not said what it serves.
fn bare(member: &Member, standing: &Standing) -> WorkerReport {
    WorkerReport {
        id: None,
        name: member.config.name.clone(),
        source: member.origin.clone(),
        url: member.config.url.clone(),
        kind: member.engine.kind(),
        model: None,
        adapters: Vec::new(),
        rank: 0,
        role: member.config.role,
        handoff: None,
        state: standing.state(),
        active_requests: 0,
        staged_handoffs: member.kept(),
        active_prefill_tokens: 0,
        active_uncached_tokens: 0,
        active_decode_tokens: 0,
        served: 0,
        queued_requests: None,
        kv_tokens_total: None,
        kv_tokens_free: None,
        load_age_ms: None,
        kv: None,
        trouble: standing.trouble.clone(),
        load_trouble: standing.load_trouble.clone(),
    }
}
