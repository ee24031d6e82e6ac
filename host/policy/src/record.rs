//! The record of a version's faults: counted by cause, for metrics and for people.
//!
//! A quarantined version is passed over at every request, so that this one cause is counted without a lock or an
//! allocation; all others have cost a failed call already.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use metrics::{Counter, Gauge};

use crate::fault::{FaultCause, PolicyFault};

/// Who decided instead of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Instead {
    Native,
    LastGood,
    Nobody,
}

impl Instead {
    const ALL: [Self; 3] = [Self::Native, Self::LastGood, Self::Nobody];

    /// Metric label.
    fn as_str(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::LastGood => "last-good",
            Self::Nobody => "nobody",
        }
    }
}

impl fmt::Display for Instead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "the native fallback decides",
            Self::LastGood => "the last good version decides",
            Self::Nobody => "requests are refused",
        })
    }
}

/// Counts a decision that a policy did not make.
pub(crate) fn fallback_counter(slot: &str, policy: &str, cause: FaultCause, instead: Instead) -> Counter {
    metrics::counter!(
        "dynamo_host_policy_fallbacks_total",
        "slot" => slot.to_owned(), "policy" => policy.to_owned(), "cause" => cause.as_str(), "decided_by" => instead.as_str()
    )
}

/// A version's faults.
pub(crate) struct FaultRecord {
    slot: Arc<str>,
    policy: Arc<str>,
    /// By who decided instead, in the order of [`Instead::ALL`].
    quarantined: OnceLock<[Counter; 3]>,
    seen: Mutex<Seen>,
}

/// What was seen so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// Decisions that it failed to make.
    pub(crate) by_cause: BTreeMap<FaultCause, u64>,
    /// Batches that it failed to learn from.
    pub(crate) observe: BTreeMap<FaultCause, u64>,
    /// What the last one of either said.
    pub(crate) last: Option<PolicyFault>,
    is_quarantined: bool,
    /// It has been replaced: nobody needs to be told of its quarantine.
    is_out_of_service: bool,
    is_shown: bool,
}

impl FaultRecord {
    pub(crate) fn new(slot: &Arc<str>, policy: &Arc<str>) -> Self {
        Self { slot: Arc::clone(slot), policy: Arc::clone(policy), quarantined: OnceLock::new(), seen: Mutex::default() }
    }

    /// Counts a decision that somebody else made.
    pub(crate) fn count(&self, cause: FaultCause, instead: Instead) {
        fallback_counter(&self.slot, &self.policy, cause, instead).increment(1);
    }

    /// The same, of a quarantined version.
    pub(crate) fn count_quarantined(&self, instead: Instead) {
        let counter = |instead| fallback_counter(&self.slot, &self.policy, FaultCause::Quarantined, instead);
        self.quarantined.get_or_init(|| Instead::ALL.map(counter))[instead as usize].increment(1);
    }

    /// Takes note of a fault; `true` if it is the first of its cause.
    pub(crate) fn note(&self, fault: &PolicyFault) -> bool {
        let mut seen = self.lock();
        seen.last = Some(fault.clone());
        is_first(seen.by_cause.entry(fault.cause).or_default())
    }

    /// Takes note of a fault while it learnt; `true` if it is the first of its cause.
    pub(crate) fn note_observe(&self, fault: &PolicyFault) -> bool {
        let labels =
            [("slot", self.slot.to_string()), ("policy", self.policy.to_string()), ("cause", fault.cause.as_str().to_owned())];
        metrics::counter!("dynamo_host_policy_observe_failures_total", &labels).increment(1);
        let mut seen = self.lock();
        seen.last = Some(fault.clone());
        is_first(seen.observe.entry(fault.cause).or_default())
    }

    pub(crate) fn enter_quarantine(&self, cause: FaultCause) {
        metrics::counter!(
            "dynamo_host_policy_quarantines_total",
            "slot" => self.slot.to_string(), "policy" => self.policy.to_string(), "cause" => cause.as_str()
        )
        .increment(1);
        self.change(|seen| seen.is_quarantined = true);
    }

    pub(crate) fn leave_quarantine(&self) {
        self.change(|seen| seen.is_quarantined = false);
    }

    /// Whether it decides now, or has been replaced.
    pub(crate) fn serve(&self, is_in_service: bool) {
        self.change(|seen| seen.is_out_of_service = !is_in_service);
    }

    /// What was seen so far.
    pub(crate) fn seen(&self) -> Seen {
        self.lock().clone()
    }

    /// Changes something, and the gauge with it. It counts: two versions may have one label.
    fn change(&self, change: impl FnOnce(&mut Seen)) {
        let mut seen = self.lock();
        change(&mut seen);
        let shown = seen.is_quarantined && !seen.is_out_of_service;
        if shown != std::mem::replace(&mut seen.is_shown, shown) {
            self.gauge().increment(if shown { 1.0 } else { -1.0 });
        }
    }

    fn gauge(&self) -> Gauge {
        metrics::gauge!(
            "dynamo_host_policy_quarantined", "slot" => self.slot.to_string(), "policy" => self.policy.to_string()
        )
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for FaultRecord {
    fn drop(&mut self) {
        self.serve(false);
    }
}

fn is_first(count: &mut u64) -> bool {
    *count += 1;
    *count == 1
}
