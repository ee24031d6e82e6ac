//! The admission policy before the queue: what it is told, and what it hears of those that it let in.

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use dynamo_host_core::{Admitted, RequestFacts, Role, SlotName, admission::Verdict, id};
use dynamo_host_flow::{Lately, PoolLoad};
use dynamo_host_policy::{AdmissionCall, AdmissionSlot, Decision, OutcomeRow, Pinned, PolicyRuntime, PolicyVersion};

use super::{SimulationError, UNIX_START_MS, runtime};
use crate::{engine::MODEL, outcome::Outcomes, queueing::AdmissionPolicy};

/// The slot, with a policy in it.
pub(super) struct Admission {
    slot: AdmissionSlot,
    pinned: Pinned,
    version: Arc<PolicyVersion>,
    outcomes: Outcomes,
    pub(super) lately: Lately,
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
            lately: Lately::default(),
            _runtime: runtime,
        })
    }

    /// `name@version` of the policy.
    pub(super) fn label(&self) -> &str {
        self.version.label()
    }

    /// How a request is let in; `None`: not at all.
    pub(super) fn ask(
        &mut self,
        facts: &RequestFacts,
        (workers, load): (u32, PoolLoad),
        native: Admitted,
        (now_ms, seed): (u64, u64),
    ) -> Option<Admitted> {
        let key = id::key(format!("{MODEL}\0{}", Role::Aggregated).as_bytes());
        let pool = self.lately.state((key, Role::Aggregated), workers, load, now_ms);
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

    /// Something became of a request. Returns when outcomes are to be brought to the policy, if that is not known yet.
    pub(super) fn hear(&mut self, row: OutcomeRow, now: Duration) -> Option<Duration> {
        if self.version.observes() { self.outcomes.tell(row, now) } else { None }
    }

    /// Brings outcomes. Returns when the next are to be brought.
    pub(super) fn bring(&mut self, now: Duration) -> Option<Duration> {
        self.outcomes.bring(&self.version, now)
    }
}
