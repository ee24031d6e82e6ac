//! Decisions of a slot: the policy's, or what its `on-error` says.
//!
//! Invariant: whoever decides instead of a policy is named with the cause, and counted.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use dynamo_host_core::{OnError, Rejection, answer, native};

use super::{Pinned, Slot};
use crate::{
    blueprint::Decided,
    call::{Explanation, Reading},
    fault::{FaultCause, PolicyFault},
    question::Question,
    record::{Instead, fallback_counter},
    version::{PolicyVersion, Undecided},
};

/// When a client that was refused may try again, if nothing better is known.
const RETRY_AFTER_MS: u32 = 1000;

/// Who decided. Its text is the header `x-dynamo-policy`.
#[derive(Clone, Debug)]
pub enum DecidedBy {
    /// The policy.
    Policy(Arc<PolicyVersion>),
    /// The native fallback, since no policy is active.
    Native,
    /// The native fallback, by the kill switch.
    Bypass,
    /// The native fallback, since the policy failed.
    Fallback(Failed),
    /// An earlier version, since the policy failed.
    LastGood(Arc<PolicyVersion>, Failed),
    /// Nobody, since the policy failed and the slot is closed then: the verdict is a rejection.
    Nobody(Failed),
}

/// The policy that did not decide, and why.
#[derive(Clone, Debug)]
pub struct Failed {
    /// `name@version`.
    pub policy: Arc<str>,
    /// Why.
    pub cause: FaultCause,
}

impl DecidedBy {
    /// The policy whose decision it is.
    #[must_use]
    pub fn version(&self) -> Option<&Arc<PolicyVersion>> {
        match self {
            Self::Policy(version) | Self::LastGood(version, _) => Some(version),
            Self::Native | Self::Bypass | Self::Fallback(_) | Self::Nobody(_) => None,
        }
    }
}

impl fmt::Display for DecidedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(version) => f.write_str(version.label()),
            Self::Native => f.write_str(native::NAME),
            Self::Bypass => write!(f, "{}; bypass", native::NAME),
            Self::Fallback(failed) => write!(f, "{}; {failed}", native::NAME),
            Self::LastGood(version, failed) => write!(f, "{}; {failed}", version.label()),
            Self::Nobody(failed) => write!(f, "{}; {failed}", OnError::Closed),
        }
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fallback={}; policy={}", self.cause, self.policy)
    }
}

/// A decision that can be carried out.
#[derive(Debug)]
pub struct Decision<V = answer::Verdict> {
    /// What to do.
    pub verdict: V,
    /// Who decided.
    pub by: DecidedBy,
    /// The policy's reasons, if they were asked for.
    pub explanations: Vec<Explanation>,
    /// What was read of the candidates, if that was asked for.
    pub readings: Vec<Reading>,
    /// How long it took.
    pub elapsed: Duration,
    /// Fuel that it took.
    pub fuel: u64,
}

impl<V> Decision<V> {
    fn of_policy(decided: Decided<V>, by: DecidedBy, start: Instant) -> Self {
        let Decided { verdict, explanations, readings, fuel } = decided;
        Self { verdict, by, explanations, readings, elapsed: start.elapsed(), fuel }
    }

    fn without_policy(verdict: V, by: DecidedBy, start: Instant) -> Self {
        Self { verdict, by, explanations: Vec::new(), readings: Vec::new(), elapsed: start.elapsed(), fuel: 0 }
    }

    fn native<Q: Question<Verdict = V>>(call: &Q, by: DecidedBy, start: Instant) -> Self {
        let (verdict, readings) = call.native();
        Self { readings, ..Self::without_policy(verdict, by, start) }
    }
}

impl<Q: Question> Slot<Q> {
    /// Decides: the pinned policy, or what the slot's `on-error` says if it cannot, or if it had its turns.
    #[must_use]
    pub fn decide(&self, pinned: &Pinned, call: Q) -> Decision<Q::Verdict> {
        if let Some(fault) = call.out_of_turns() {
            return self.decide_instead_of(pinned, &call, fault);
        }
        let start = Instant::now();
        if self.bypass.load(Relaxed) {
            return self.decide_bypassed(&call, start);
        }
        let Some(version) = &pinned.0 else { return self.decide_without_policy(&call, start) };
        match version.try_decide(call.clone()) {
            Ok(decided) => Decision::of_policy(decided, DecidedBy::Policy(Arc::clone(version)), start),
            Err(undecided) => self.decide_after_failure(version, undecided, &call, start),
        }
    }

    /// Decides though a policy is pinned: it had its turns. Never a hold.
    #[must_use]
    pub fn decide_instead_of(&self, pinned: &Pinned, call: &Q, fault: PolicyFault) -> Decision<Q::Verdict> {
        let start = Instant::now();
        if self.bypass.load(Relaxed) {
            return self.decide_bypassed(call, start);
        }
        match &pinned.0 {
            Some(version) => self.decide_after_failure(version, Undecided::Fault(fault), call, start),
            None => Decision::native(call, DecidedBy::Native, start),
        }
    }

    fn decide_bypassed(&self, call: &Q, start: Instant) -> Decision<Q::Verdict> {
        self.meters.bypassed.increment(1);
        Decision::native(call, DecidedBy::Bypass, start)
    }

    /// The slot holds no policy: natively, unless it should hold one and must not go without.
    fn decide_without_policy(&self, call: &Q, start: Instant) -> Decision<Q::Verdict> {
        let mode = self.on_error();
        if mode == OnError::Fallback {
            return Decision::native(call, DecidedBy::Native, start);
        }
        let Some(missing) = self.missing.load_full() else { return Decision::native(call, DecidedBy::Native, start) };
        let failed = Failed { policy: missing.as_str().into(), cause: FaultCause::Missing };
        let count = |instead| fallback_counter(self.state.slot(), &failed.policy, failed.cause, instead).increment(1);
        if mode == OnError::Closed {
            count(Instead::Nobody);
            return refused::<Q>(failed, RETRY_AFTER_MS, start);
        }
        match self.ask_last_good(None, call) {
            Some((version, decided)) => {
                count(Instead::LastGood);
                Decision::of_policy(decided, DecidedBy::LastGood(version, failed), start)
            }
            None => {
                count(Instead::Native);
                Decision::native(call, DecidedBy::Fallback(failed), start)
            }
        }
    }

    #[cold]
    fn decide_after_failure(
        &self,
        version: &Arc<PolicyVersion>,
        undecided: Undecided,
        call: &Q,
        start: Instant,
    ) -> Decision<Q::Verdict> {
        let failed = Failed { policy: Arc::clone(version.label()), cause: undecided.cause() };
        let (mode, now_ms) = (self.on_error(), call.now().monotonic_ms);
        if failed.cause == FaultCause::Revoked && mode != OnError::Fallback {
            return self.decide_after_rollback(version, undecided, call, start);
        }
        let last_good = || self.ask_last_good(Some(version), call);
        let (instead, decision) = match mode {
            OnError::Closed => (Instead::Nobody, refused::<Q>(failed, retry_after_ms(version, now_ms), start)),
            OnError::LastGood if let Some((earlier, decided)) = last_good() => {
                (Instead::LastGood, Decision::of_policy(decided, DecidedBy::LastGood(earlier, failed), start))
            }
            OnError::LastGood | OnError::Fallback => {
                (Instead::Native, Decision::native(call, DecidedBy::Fallback(failed), start))
            }
        };
        version.did_not_decide(undecided, instead, now_ms);
        decision
    }

    /// An operator's change is not worth a refusal: what is active now decides, as for any new request.
    fn decide_after_rollback(
        &self,
        revoked: &PolicyVersion,
        undecided: Undecided,
        call: &Q,
        start: Instant,
    ) -> Decision<Q::Verdict> {
        let failed = Failed { policy: Arc::clone(revoked.label()), cause: undecided.cause() };
        let Some(active) = self.active.load_full() else {
            revoked.did_not_decide(undecided, Instead::Native, call.now().monotonic_ms);
            return Decision::native(call, DecidedBy::Fallback(failed), start);
        };
        revoked.did_not_decide(undecided, Instead::LastGood, call.now().monotonic_ms);
        match active.try_decide(call.clone()) {
            Ok(decided) => Decision::of_policy(decided, DecidedBy::LastGood(active, failed), start),
            Err(undecided) => self.decide_after_failure(&active, undecided, call, start),
        }
    }

    /// What the newest sound version before the one that failed decides, if there is one.
    fn ask_last_good(&self, failed: Option<&Arc<PolicyVersion>>, call: &Q) -> Option<(Arc<PolicyVersion>, Decided<Q::Verdict>)> {
        ask(self.last_good(failed.map(Arc::as_ref))?, call)
    }
}

/// Asks a version in another's place. Not a hold: the request has waited for one policy already.
fn ask<Q: Question>(version: Arc<PolicyVersion>, call: &Q) -> Option<(Arc<PolicyVersion>, Decided<Q::Verdict>)> {
    let undecided = match version.try_decide(call.clone()) {
        Ok(decided) if Q::is_put_off(&decided.verdict) => return None,
        Ok(decided) => return Some((version, decided)),
        Err(undecided) => undecided,
    };
    version.did_not_decide(undecided, Instead::Native, call.now().monotonic_ms);
    None
}

fn refused<Q: Question>(failed: Failed, retry_after_ms: u32, start: Instant) -> Decision<Q::Verdict> {
    let slot = Q::WORLD.slot.as_str();
    let reason = format!("the {slot} policy failed, and requests are refused while it does; try again");
    let rejection = Rejection { status: 503, retry_after_ms: Some(retry_after_ms), reason };
    Decision::without_policy(Q::refusal(rejection), DecidedBy::Nobody(failed), start)
}

/// When a quarantined version may be tried again.
fn retry_after_ms(version: &PolicyVersion, now_ms: u64) -> u32 {
    let trial_ms = version.standing().quarantine().map_or(0, |quarantine| quarantine.trial_ms);
    u32::try_from(trial_ms.saturating_sub(now_ms)).unwrap_or(u32::MAX).max(RETRY_AFTER_MS)
}
