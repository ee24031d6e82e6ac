//! The admission policy before the queue: what it is told, and what it hears of those that it let in.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use dynamo_host_core::{
    Admitted, PoolState, RequestFacts, Role, SlotName,
    admission::{Quantiles, Verdict, free},
    id,
};
use dynamo_host_flow::PoolLoad;
use dynamo_host_policy::{AdmissionCall, AdmissionSlot, Decision, OutcomeRow, Pinned, PolicyRuntime, PolicyVersion};

use super::{SimulationError, UNIX_START_MS, runtime};
use crate::{engine::MODEL, outcome::Outcomes, queueing::AdmissionPolicy};

/// Latest values of which quantiles are told, and arrivals of which the share that was shed is.
const LATELY: usize = 512;
/// Percentiles that are told, evenly spaced.
const POINTS: usize = 21;
/// How old they may be, as in the host.
const QUANTILES_MS: u64 = 250;

/// The slot, with a policy in it.
pub(super) struct Admission {
    slot: AdmissionSlot,
    pinned: Pinned,
    version: Arc<PolicyVersion>,
    outcomes: Outcomes,
    pub(super) ttft: Lately,
    pub(super) itl: Lately,
    /// 1 for what was not let in, 0 for what was.
    shed: VecDeque<bool>,
    _runtime: PolicyRuntime,
}

impl Admission {
    pub(super) fn new(policy: &AdmissionPolicy, clock: &Arc<AtomicU64>) -> Result<Self, SimulationError> {
        let slot = AdmissionSlot::new(SlotName::ADMISSION);
        let runtime = runtime(clock)?;
        let version = runtime
            .load(&policy.bytes, &policy.settings, Arc::clone(slot.state()))
            .map_err(|source| SimulationError::Policy { name: policy.name.clone(), source })?;
        slot.activate(Some(Arc::clone(&version)));
        Ok(Self {
            pinned: slot.pin(),
            slot,
            version,
            outcomes: Outcomes::default(),
            ttft: Lately::default(),
            itl: Lately::default(),
            shed: VecDeque::new(),
            _runtime: runtime,
        })
    }

    /// How a request is let in; `None`: not at all.
    pub(super) fn ask(
        &mut self,
        facts: &RequestFacts,
        (workers, load): (u32, PoolLoad),
        native: Admitted,
        (now_ms, seed): (u64, u64),
    ) -> Option<Admitted> {
        let pool = PoolState {
            key: id::key(MODEL.as_bytes()),
            role: Role::Aggregated,
            ready_workers: workers,
            running_requests: load.running,
            free_requests: free(load.free),
            queued_requests: load.queued,
            queued_tokens: free(Some(u32::try_from(load.queued_tokens).unwrap_or(u32::MAX))),
            oldest_age_ms: load.oldest_age_ms,
            predicted_wait_ms: load.predicted_wait_ms,
            shed_rate: self.shed.iter().filter(|shed| **shed).count() as f32 / self.shed.len().max(1) as f32,
            ttft: self.ttft.quantiles(now_ms),
            itl: self.itl.quantiles(now_ms),
        };
        let call = AdmissionCall {
            request: Arc::new(facts.clone()),
            pools: [pool].into(),
            native,
            now_ms,
            unix_ms: UNIX_START_MS + now_ms,
            seed: seed.wrapping_add(facts.decision_id),
        };
        let Decision { verdict, .. } = self.slot.decide(&self.pinned, call);
        match verdict {
            Verdict::Admit(admitted) => Some(admitted),
            Verdict::Shed(_) => None,
        }
    }

    /// Whether a request was let in, by the policy and by the queue.
    pub(super) fn came(&mut self, is_shed: bool) {
        if self.shed.len() == LATELY {
            self.shed.pop_front();
        }
        self.shed.push_back(is_shed);
    }

    /// Something became of a request. Returns when outcomes are to be brought to the policy, if that is not known yet.
    pub(super) fn hear(&mut self, row: OutcomeRow, now: Duration) -> Option<Duration> {
        if self.version.observes() { self.outcomes.tell(row, now) } else { None }
    }

    /// Brings outcomes. Returns when the next are to be brought.
    pub(super) fn bring(&mut self, now: Duration) -> Option<Duration> {
        self.outcomes.bring(&self.version, now)
    }
}

/// The latest values of a latency.
#[derive(Default)]
pub(super) struct Lately {
    values: VecDeque<f32>,
    told: Option<(u64, Quantiles)>,
}

impl Lately {
    pub(super) fn add(&mut self, value: f32) {
        if value.is_nan() {
            return;
        }
        if self.values.len() == LATELY {
            self.values.pop_front();
        }
        self.values.push_back(value);
    }

    fn quantiles(&mut self, now_ms: u64) -> Quantiles {
        if let Some((at, told)) = &self.told
            && now_ms < at + QUANTILES_MS
        {
            return told.clone();
        }
        let mut sorted: Vec<f32> = self.values.iter().copied().collect();
        sorted.sort_unstable_by(f32::total_cmp);
        let points = (0..POINTS).filter_map(|point| sorted.get(point * sorted.len().saturating_sub(1) / (POINTS - 1)).copied());
        let quantiles = Quantiles(points.collect());
        self.told = Some((now_ms, quantiles.clone()));
        quantiles
    }
}
