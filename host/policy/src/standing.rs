//! Standing: whether a version may be asked, and what it did lately.
//!
//! One atomic word holds it, so that asking costs one read: *open*; *quarantined* until a moment; *on trial*, which lets
//! one request through at a time; *revoked*, for good. A version that fails too often goes into quarantine. When its
//! back-off is over, the next request is its trial: a good answer ends the quarantine, a fault doubles the back-off.
//!
//! Invariants: time is what callers say it is; a call of an open version takes no lock; whoever leaves a trial, however,
//! ends it. Rejected: a window that begins with the first fault (a burst of eight would look like a share of all calls),
//! and consecutive faults (one good answer in seven would hide the rest).

mod window;

#[cfg(test)]
mod tests;

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use self::window::{Calls, Faults};
use crate::{fault::FaultCause, limits::QuarantineLimits};

/// The gate of a version that is asked. Any other number that is none of these is when its next trial is due.
const OPEN: u64 = 0;
const ON_TRIAL: u64 = u64::MAX - 1;
const REVOKED: u64 = u64::MAX;

/// Whether a version may be asked.
pub(crate) struct Standing {
    limits: QuarantineLimits,
    gate: AtomicU64,
    calls: Calls,
    /// Requests that came while it was quarantined.
    skipped: AtomicU64,
    record: Mutex<Record>,
}

#[derive(Default)]
struct Record {
    faults: Faults,
    /// The present quarantine.
    quarantine: Option<Quarantine>,
    /// The last back-off, and when the quarantine that it belonged to ended.
    last: Option<(Duration, u64)>,
    /// Quarantines so far.
    count: u64,
}

/// A quarantine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Quarantine {
    /// What the last fault was that led to it, or that of the last trial.
    pub(crate) cause: FaultCause,
    /// When it began.
    pub(crate) since_ms: u64,
    /// From the last fault to the next trial.
    pub(crate) backoff: Duration,
    /// When the next trial is due.
    pub(crate) trial_ms: u64,
    /// Trials that failed.
    pub(crate) failed_trials: u32,
    /// What led to it: faults within the window, and calls.
    pub(crate) faults: u32,
    pub(crate) calls: u64,
}

/// Whether a request may ask.
pub(crate) enum Leave<'a> {
    /// It may.
    Open,
    /// It may, and what comes of it ends the quarantine or prolongs it.
    Trial(Trial<'a>),
    /// It may not, for [`FaultCause::Quarantined`] or [`FaultCause::Revoked`].
    Shut(FaultCause),
}

impl Standing {
    pub(crate) fn new(limits: QuarantineLimits) -> Self {
        let calls = Calls::new(limits.window);
        Self { limits, gate: AtomicU64::new(OPEN), calls, skipped: AtomicU64::new(0), record: Mutex::default() }
    }

    /// Whether a request may ask now; counts it.
    pub(crate) fn ask(&self, now_ms: u64) -> Leave<'_> {
        match self.gate.load(Relaxed) {
            OPEN => {
                self.calls.count(now_ms);
                Leave::Open
            }
            gate => self.ask_the_shut(gate, now_ms),
        }
    }

    fn ask_the_shut(&self, gate: u64, now_ms: u64) -> Leave<'_> {
        if gate == REVOKED {
            return Leave::Shut(FaultCause::Revoked);
        }
        if now_ms >= gate && self.gate.compare_exchange(gate, ON_TRIAL, Relaxed, Relaxed).is_ok() {
            self.calls.count(now_ms);
            return Leave::Trial(Trial { standing: self, now_ms, is_over: false });
        }
        self.skipped.fetch_add(1, Relaxed);
        Leave::Shut(FaultCause::Quarantined)
    }

    /// Takes note that a call of an open version failed; the quarantine, if that leads to one.
    pub(crate) fn fault(&self, cause: FaultCause, now_ms: u64) -> Option<Quarantine> {
        if !cause.is_the_policys_own() {
            // A trial excuses itself.
            if self.is_open() {
                self.calls.excuse();
            }
            return None;
        }
        let mut record = self.record();
        // What was under way when the quarantine began changes nothing any more.
        if !self.is_open() {
            return None;
        }
        let faults = record.faults.add(now_ms, self.limits.window);
        let calls = self.calls.within_window(now_ms).max(faults.into());
        if faults < self.limits.faults || f64::from(faults) < self.limits.share * calls as f64 {
            return None;
        }
        let backoff = self.next_backoff(record.last, now_ms);
        let trial_ms = later(now_ms, backoff);
        let quarantine = Quarantine { cause, since_ms: now_ms, backoff, trial_ms, failed_trials: 0, faults, calls };
        self.gate.compare_exchange(OPEN, trial_ms, Relaxed, Relaxed).ok()?;
        record.quarantine = Some(quarantine);
        record.count += 1;
        record.faults = Faults::default();
        Some(quarantine)
    }

    /// Twice the last one, if that quarantine ended lately; half of it for each healthy stretch since then.
    fn next_backoff(&self, last: Option<(Duration, u64)>, now_ms: u64) -> Duration {
        let QuarantineLimits { first_backoff, max_backoff, healthy, .. } = self.limits;
        let Some((backoff, ended_ms)) = last else { return first_backoff };
        let stretches = now_ms.saturating_sub(ended_ms) / (healthy.as_millis() as u64).max(1);
        let next = match u32::try_from(stretches) {
            Ok(0) => backoff * 2,
            Ok(stretches) => backoff / 2u32.saturating_pow(stretches),
            Err(_) => first_backoff,
        };
        next.clamp(first_backoff, max_backoff)
    }

    /// Shuts it for good.
    pub(crate) fn revoke(&self) {
        self.gate.store(REVOKED, Relaxed);
    }

    pub(crate) fn is_open(&self) -> bool {
        self.gate.load(Relaxed) == OPEN
    }

    pub(crate) fn is_revoked(&self) -> bool {
        self.gate.load(Relaxed) == REVOKED
    }

    /// The present quarantine.
    pub(crate) fn quarantine(&self) -> Option<Quarantine> {
        if self.is_revoked() { None } else { self.record().quarantine }
    }

    /// Quarantines so far.
    pub(crate) fn quarantines(&self) -> u64 {
        self.record().count
    }

    /// Requests that came while it was quarantined.
    pub(crate) fn skipped(&self) -> u64 {
        self.skipped.load(Relaxed)
    }

    /// Requests that asked it.
    pub(crate) fn calls(&self) -> u64 {
        self.calls.total()
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The one request that a quarantined version is tried with.
pub(crate) struct Trial<'a> {
    standing: &'a Standing,
    now_ms: u64,
    is_over: bool,
}

impl Trial<'_> {
    /// It was good: the version is open again. The quarantine that has ended, unless the version was revoked meanwhile.
    pub(crate) fn passed(mut self) -> Option<Quarantine> {
        self.is_over = true;
        let mut record = self.standing.record();
        let ended = record.quarantine.take()?;
        record.last = Some((ended.backoff, self.now_ms));
        // What it was asked before must not dilute what it does from now on.
        self.standing.calls.forget(self.now_ms);
        self.standing.gate.compare_exchange(ON_TRIAL, OPEN, Relaxed, Relaxed).ok().map(|_| ended)
    }

    /// It failed: the back-off doubles.
    pub(crate) fn failed(mut self, cause: FaultCause) {
        self.is_over = true;
        self.put_off(|quarantine, limits| {
            quarantine.cause = cause;
            quarantine.failed_trials += 1;
            quarantine.backoff = (quarantine.backoff * 2).min(limits.max_backoff);
            quarantine.backoff
        });
    }

    /// The next trial is after the time that `change` says.
    fn put_off(&self, change: impl FnOnce(&mut Quarantine, &QuarantineLimits) -> Duration) {
        let mut record = self.standing.record();
        let Some(quarantine) = &mut record.quarantine else { return };
        let pause = change(quarantine, &self.standing.limits);
        quarantine.trial_ms = later(self.now_ms, pause);
        // It stays as it is if the version was revoked meanwhile.
        let _ = self.standing.gate.compare_exchange(ON_TRIAL, quarantine.trial_ms, Relaxed, Relaxed);
    }
}

impl Drop for Trial<'_> {
    /// Nothing came of it that says anything about the policy.
    fn drop(&mut self) {
        if !self.is_over {
            self.standing.calls.excuse();
            self.put_off(|quarantine, limits| quarantine.backoff.min(limits.first_backoff));
        }
    }
}

/// A moment after `now_ms`, never one that the gate uses as a word.
fn later(now_ms: u64, pause: Duration) -> u64 {
    now_ms.saturating_add((pause.as_millis() as u64).max(1)).min(ON_TRIAL - 1)
}
