//! What is counted of a run.

use std::{collections::BTreeMap, time::Duration};

use dynamo_host_core::{Load, Role};
use dynamo_host_policy::{DecidedBy, Decision};

use super::{faults::FaultTally, service::QueueTally};
use crate::{
    engine::{Engine, Work},
    samples::{Intervals, Samples},
    trace::TraceRequest,
};

/// Points of the load over time: a fleet that works off a long queue after the last arrival is looked at less often.
const MAX_SAMPLES: usize = 480;

/// What came of dividing requests.
#[derive(Clone, Debug, Default)]
pub struct HandoffTally {
    /// Requests whose answer began after a hand-off.
    pub handed_over: u64,
    /// On a worker of the decode pool that computed the prompt itself.
    pub local: u64,
    /// On any other that did all of it.
    pub aggregated: u64,
    /// Transfers that were begun, less those that nobody wanted any more.
    pub fetches: u64,
    /// KV that nobody had begun to fetch in time.
    pub leases_lost: u64,
    /// Tokens whose KV came over …
    pub fetched_tokens: u64,
    /// … in so many bytes.
    pub bytes: u64,
    /// From a request's arrival to the end of its prefill for somebody else, in milliseconds.
    pub prefilled: Samples,
    /// From there to the first token elsewhere, in milliseconds.
    pub time: Samples,
    /// That part of it in which KV was under way.
    pub transfer: Samples,
}

impl HandoffTally {
    pub(super) fn moved(&mut self, tokens: u32, bytes: u64, took_ms: f64) {
        self.fetched_tokens += u64::from(tokens);
        self.bytes += bytes;
        self.transfer.add(took_ms);
    }
}

/// What the workers of one role did.
#[derive(Clone, Debug)]
pub struct PoolTally {
    /// Their role.
    pub role: Role,
    /// How many there are.
    pub workers: u64,
    /// Mean share of the time in which they computed.
    pub busy: f64,
    /// The busiest worker's time over the mean.
    pub imbalance: f64,
    /// Requests and parts of them that they were given.
    pub legs: u64,
    /// Prompt tokens that they were to compute …
    pub prompt_tokens: u64,
    /// … of which they had so many in their caches.
    pub cached_tokens: u64,
    /// Tokens of output.
    pub output_tokens: u64,
}

/// What is counted of a run.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Name of what decided, as it was given.
    pub name: String,
    /// `name@version` of the policy.
    pub policy: String,
    /// From a request's arrival to its first token, in milliseconds.
    pub ttft: Samples,
    /// From a request's arrival to its last token, in milliseconds.
    pub e2e: Samples,
    /// From one token of a request to the next, in milliseconds.
    pub(crate) itl: Intervals,
    /// Requests that the policy refused.
    pub rejected: u64,
    /// Requests that were given up after their last attempt failed.
    pub failed: u64,
    /// Requests that the queue refused or gave up, and those whose clients left.
    pub turned_away: u64,
    /// What the queue came to.
    pub queue: Option<Box<QueueTally>>,
    /// What faults came to.
    pub faults: Option<FaultTally>,
    /// What came of dividing requests; nothing where no worker has a role.
    pub handoffs: HandoffTally,
    /// What the workers of each role did.
    pub pools: Vec<PoolTally>,
    /// Prompt tokens.
    pub prompt_tokens: u64,
    /// Those that whoever computed the prompt had in its cache at the first admission.
    pub cached_tokens: u64,
    /// Output tokens.
    pub output_tokens: u64,
    /// Sequences that engines threw out of their KV memory, to be computed again.
    pub preemptions: u64,
    /// Decisions, those that held included.
    pub decisions: u64,
    /// Fuel of the policy's decisions.
    pub fuel: u64,
    /// Decisions that were another's, by cause.
    pub fallbacks: BTreeMap<String, u64>,
    /// Blocks that the prefix index had no room for: overlaps were too small then.
    pub refused_blocks: u64,
    /// From the first arrival to the last token.
    pub makespan: Duration,
    /// Share of that time in which each worker computed.
    pub busy: Vec<f64>,
    /// Requests in flight on each worker, at regular times.
    pub load: Vec<Vec<u32>>,
    /// Time between those.
    pub sample_every: Duration,
    /// Everything that happened.
    pub events: u64,
    /// Time that decisions took, with their look into the index, by the wall clock.
    pub deciding: Duration,
    /// Time that the run took, by the wall clock.
    pub wall: Duration,
}

impl Tally {
    pub(super) fn new(name: &str, policy: String, workers: usize) -> Self {
        Self { name: name.to_owned(), policy, busy: vec![0.0; workers], ..Self::default() }
    }

    /// Requests that have ended.
    pub(super) fn ended(&self) -> u64 {
        self.e2e.count() + self.rejected + self.failed + self.turned_away
    }

    pub(super) fn come(&mut self, request: &TraceRequest, at: Duration) {
        self.prompt_tokens += u64::from(request.prompt_tokens());
        self.makespan = self.makespan.max(at);
    }

    pub(super) fn decided(&mut self, decision: &Decision, elapsed: Duration) {
        self.decisions += 1;
        self.fuel += decision.fuel;
        self.deciding += elapsed;
        if let DecidedBy::Fallback(failed) | DecidedBy::LastGood(_, failed) | DecidedBy::Nobody(failed) = &decision.by {
            *self.fallbacks.entry(failed.cause.to_string()).or_default() += 1;
        }
    }

    /// An answer began, after a hand-off or not, on a worker of this role.
    pub(super) fn begun(&mut self, ttft_ms: f64, cached_tokens: u32, (is_remote, role): (bool, Role)) {
        *match (is_remote, role) {
            (true, _) => &mut self.handoffs.handed_over,
            (false, Role::Decode) => &mut self.handoffs.local,
            (false, _) => &mut self.handoffs.aggregated,
        } += 1;
        self.ttft.add(ttft_ms);
        self.cached_tokens += u64::from(cached_tokens);
    }

    pub(super) fn end(&mut self, e2e_ms: f64, output_tokens: u32, now: Duration) {
        self.e2e.add(e2e_ms);
        self.output_tokens += u64::from(output_tokens);
        self.makespan = self.makespan.max(now);
    }

    pub(super) fn sample(&mut self, engines: &[Engine]) {
        if self.load.len() == MAX_SAMPLES {
            let mut nth = 0..;
            self.load.retain(|_| nth.next().is_some_and(|nth: usize| nth.is_multiple_of(2)));
            self.sample_every *= 2;
        }
        self.load.push(engines.iter().map(|engine| engine.load.get(Load::ActiveRequests)).collect());
    }

    pub(super) fn close(&mut self, engines: &[Engine], wall: Duration) {
        let makespan = self.makespan.as_secs_f64().max(f64::MIN_POSITIVE);
        self.busy = engines.iter().map(|engine| engine.busy.as_secs_f64() / makespan).collect();
        self.pools = pools(engines, &self.busy);
        self.preemptions = engines.iter().map(|engine| engine.preemptions + engine.model.preemptions()).sum();
        self.wall = wall;
    }

    /// The busiest worker's time over the mean of all: 1 is even.
    #[must_use]
    pub fn imbalance(&self) -> f64 {
        imbalance(&self.busy)
    }

    /// Share of the prompt tokens that were cached.
    #[must_use]
    pub fn reuse(&self) -> f64 {
        self.cached_tokens as f64 / self.prompt_tokens.max(1) as f64
    }
}

fn mean(busy: &[f64]) -> f64 {
    busy.iter().sum::<f64>() / busy.len().max(1) as f64
}

fn imbalance(busy: &[f64]) -> f64 {
    let most = busy.iter().copied().fold(0.0, f64::max);
    if mean(busy) > 0.0 { most / mean(busy) } else { 1.0 }
}

fn pools(engines: &[Engine], busy: &[f64]) -> Vec<PoolTally> {
    let pool = |role: Role| {
        let of_role = || engines.iter().zip(busy).filter(move |(engine, _)| engine.role == role);
        let busy: Vec<f64> = of_role().map(|(_, &busy)| busy).collect();
        let sum = |of: fn(&Work) -> u64| of_role().map(|(engine, _)| of(&engine.work)).sum();
        PoolTally {
            role,
            workers: busy.len() as u64,
            busy: mean(&busy),
            imbalance: imbalance(&busy),
            legs: sum(|work| work.legs),
            prompt_tokens: sum(|work| work.prompt_tokens),
            cached_tokens: sum(|work| work.cached_tokens),
            output_tokens: sum(|work| work.output_tokens),
        }
    };
    let roles = [Role::Aggregated, Role::Both, Role::Prefill, Role::Decode];
    roles.into_iter().map(pool).filter(|pool| pool.workers > 0).collect()
}
