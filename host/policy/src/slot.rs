//! A slot: which policy decides now, which one did before, and what decides when it cannot.
//!
//! A change is one atomic pointer swap. A request pins the version that it began with and keeps it to its end, unless
//! that version is rolled back: then the native fallback decides the rest of it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use dynamo_host_core::{SlotName, answer::Verdict, native};
use serde::Serialize;

use crate::{
    call::{Explanation, RouteCall},
    fault::{FaultCause, PolicyFault},
    state::SlotState,
    version::PolicyVersion,
};

/// Versions that can be rolled back to.
const MAX_HISTORY: usize = 8;

/// The place where routing is decided.
pub struct RoutingSlot {
    name: SlotName,
    state: Arc<SlotState>,
    active: ArcSwapOption<PolicyVersion>,
    /// What was active before, oldest first; `None` is the native fallback. The lock also serializes changes.
    history: Mutex<Vec<Option<Arc<PolicyVersion>>>>,
}

/// The version that a request keeps to its end; the native fallback if `None`.
#[derive(Clone, Debug)]
pub struct Pinned(pub Option<Arc<PolicyVersion>>);

/// Who decided.
#[derive(Clone, Debug)]
pub enum DecidedBy {
    /// The policy.
    Policy(Arc<PolicyVersion>),
    /// The native fallback, because no policy is active or because it failed.
    Native(Option<FaultCause>),
}

/// A decision that can be carried out.
#[derive(Debug)]
pub struct Decision {
    /// What to do.
    pub verdict: Verdict,
    /// Who decided.
    pub by: DecidedBy,
    /// The policy's reasons, if they were asked for.
    pub explanations: Vec<Explanation>,
    /// How long it took.
    pub elapsed: Duration,
    /// Fuel that it took.
    pub fuel: u64,
}

/// A rollback without anything to go back to.
#[derive(Debug, thiserror::Error)]
#[error("slot {slot} has no earlier policy to roll back to; activate one with: dynamo-host policy activate {slot} FILE")]
pub struct NoHistory {
    slot: SlotName,
}

impl RoutingSlot {
    /// A slot that decides natively until a policy is activated.
    #[must_use]
    pub fn new(name: SlotName) -> Self {
        Self { name, state: Arc::default(), active: ArcSwapOption::empty(), history: Mutex::default() }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &SlotName {
        &self.name
    }

    /// What its policies keep; give it to [`PolicyRuntime::load`](crate::PolicyRuntime::load).
    #[must_use]
    pub fn state(&self) -> &Arc<SlotState> {
        &self.state
    }

    /// The version that decides now, for a request to keep.
    #[must_use]
    pub fn pin(&self) -> Pinned {
        Pinned(self.active.load_full())
    }

    /// Swaps in a version, or the native fallback. Requests under way keep what they have.
    pub fn activate(&self, version: Option<Arc<PolicyVersion>>) {
        let mut history = self.history();
        let before = self.active.swap(version);
        if let Some(older) = history.last().into_iter().flatten().next() {
            older.retire();
        }
        if let Some(before) = &before {
            before.step_down();
        }
        history.push(before);
        if history.len() > MAX_HISTORY {
            history.remove(0);
        }
    }

    /// Makes ready what a rollback would put back, and names it. Blocks while instances are made, so that the swap itself
    /// does not.
    ///
    /// # Errors
    /// If nothing was active before.
    pub fn prepare_rollback(&self) -> Result<Pinned, NoHistory> {
        let last = self.history().last().cloned().ok_or_else(|| NoHistory { slot: self.name.clone() })?;
        if let Some(last) = &last {
            last.wake();
        }
        Ok(Pinned(last))
    }

    /// Puts back what was active before; what is active now is revoked. See [`prepare_rollback`](Self::prepare_rollback).
    ///
    /// # Errors
    /// If nothing was active before.
    pub fn rollback(&self) -> Result<Pinned, NoHistory> {
        let mut history = self.history();
        let last = history.pop().ok_or_else(|| NoHistory { slot: self.name.clone() })?;
        if let Some(bad) = self.active.swap(last.clone()) {
            bad.revoke();
            bad.retire();
        }
        Ok(Pinned(last))
    }

    /// What is active and what was before, oldest first: what a store must keep.
    #[must_use]
    pub fn versions(&self) -> Vec<Option<Arc<PolicyVersion>>> {
        let history = self.history();
        history.iter().cloned().chain([self.active.load_full()]).collect()
    }

    /// Replaces the whole of active and history, as [`versions`](Self::versions) gave it before a restart.
    pub fn restore(&self, mut versions: Vec<Option<Arc<PolicyVersion>>>) {
        let mut history = self.history();
        self.active.store(versions.pop().flatten());
        for earlier in versions.iter().flatten() {
            earlier.retire();
        }
        *history = versions;
    }

    /// Decides: the pinned policy, or natively if it cannot.
    #[must_use]
    pub fn decide(&self, pinned: &Pinned, call: RouteCall) -> Decision {
        let start = Instant::now();
        let cause = match &pinned.0 {
            Some(version) => match version.route(call.clone()) {
                Ok(routed) => {
                    return Decision {
                        verdict: routed.verdict,
                        by: DecidedBy::Policy(Arc::clone(version)),
                        explanations: routed.explanations,
                        elapsed: start.elapsed(),
                        fuel: routed.fuel,
                    };
                }
                Err(fault) => Some(self.fall_back(version, &fault)),
            },
            None => None,
        };
        Self::decide_natively(&call, cause, start)
    }

    /// Decides natively, though a policy is pinned: it had its turns.
    #[must_use]
    pub fn decide_instead_of(&self, pinned: &Pinned, call: &RouteCall, fault: &PolicyFault) -> Decision {
        let cause = pinned.0.as_ref().map(|version| self.fall_back(version, fault));
        Self::decide_natively(call, cause, Instant::now())
    }

    fn decide_natively(call: &RouteCall, cause: Option<FaultCause>, start: Instant) -> Decision {
        Decision {
            verdict: Verdict::Place(native::least_loaded(&call.candidates, call.seed)),
            by: DecidedBy::Native(cause),
            explanations: Vec::new(),
            elapsed: start.elapsed(),
            fuel: 0,
        }
    }

    /// Counts a fault, and logs the first of its kind: a policy that fails at every request must not flood the log.
    fn fall_back(&self, version: &Arc<PolicyVersion>, fault: &PolicyFault) -> FaultCause {
        metrics::counter!(
            "dynamo_host_policy_fallbacks_total",
            "slot" => self.name.to_string(), "policy" => version.label().to_string(), "cause" => fault.cause.as_str()
        )
        .increment(1);
        if version.record(fault) {
            tracing::warn!(
                slot = %self.name, policy = %version.label(), cause = %fault.cause,
                "policy failed, the native fallback decides: {}; further failures of this cause are only counted", fault.detail
            );
        }
        fault.cause
    }

    fn history(&self) -> std::sync::MutexGuard<'_, Vec<Option<Arc<PolicyVersion>>>> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is in the slot, for people and tools.
    #[must_use]
    pub fn report(&self) -> SlotReport {
        let mut versions = self.versions();
        let active = versions.pop().flatten();
        SlotReport {
            slot: self.name.to_string(),
            active: VersionReport::of(active.as_ref()),
            previous: versions.iter().rev().map(|version| VersionReport::of(version.as_ref())).collect(),
        }
    }
}

/// A slot, for people and tools.
#[derive(Clone, Debug, Serialize)]
pub struct SlotReport {
    /// Its name.
    pub slot: String,
    /// What decides now.
    pub active: VersionReport,
    /// What did before, latest first.
    pub previous: Vec<VersionReport>,
}

/// A policy version, for people and tools.
#[derive(Clone, Debug, Serialize)]
pub struct VersionReport {
    /// `name@version`, or `native`.
    pub policy: String,
    /// Digest of its bytes.
    pub digest: Option<String>,
    /// Its settings.
    pub settings: Option<serde_json::Value>,
    /// Decisions asked of it since it was loaded.
    pub calls: u64,
    /// How often the native fallback decided instead, by cause.
    pub fallbacks: BTreeMap<String, u64>,
    /// What the last failure said.
    pub last_fault: Option<String>,
}

impl VersionReport {
    /// Describes a version; the native fallback if `None`.
    #[must_use]
    pub fn of(version: Option<&Arc<PolicyVersion>>) -> Self {
        let Some(version) = version else {
            return Self {
                policy: native::NAME.to_owned(),
                digest: None,
                settings: None,
                calls: 0,
                fallbacks: BTreeMap::new(),
                last_fault: None,
            };
        };
        let faults = version.faults();
        Self {
            policy: version.label().to_string(),
            digest: Some(version.digest().to_string()),
            settings: serde_json::from_str(version.settings()).ok(),
            calls: version.calls(),
            fallbacks: faults.by_cause.iter().map(|(cause, count)| (cause.to_string(), *count)).collect(),
            last_fault: faults.last.map(|fault| fault.to_string()),
        }
    }
}
