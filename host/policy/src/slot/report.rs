//! Reports: what is in a slot, for people and tools.

use std::{collections::BTreeMap, sync::Arc};

use dynamo_host_core::{OnError, native};
use serde::Serialize;

use super::Lifecycle;
use crate::{fault::FaultCause, standing::Quarantine, version::PolicyVersion};

impl Lifecycle {
    /// What is in the slot, for people and tools.
    #[must_use]
    pub fn report(&self) -> SlotReport {
        let mut versions = self.versions();
        let active = versions.pop().flatten();
        SlotReport {
            slot: self.name.to_string(),
            on_error: self.on_error(),
            bypass: self.is_bypassed(),
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
    /// What happens when the policy fails.
    pub on_error: OnError,
    /// Whether the kill switch is on: the native fallback decides, whatever is active.
    pub bypass: bool,
    /// What decides now.
    pub active: VersionReport,
    /// What did before, latest first.
    pub previous: Vec<VersionReport>,
}

/// A policy version, for people and tools.
#[derive(Clone, Debug, Default, Serialize)]
pub struct VersionReport {
    /// `name@version`, or `native`.
    pub policy: String,
    /// Digest of its bytes.
    pub digest: Option<String>,
    /// Its settings.
    pub settings: Option<serde_json::Value>,
    /// Whether it is asked.
    pub state: VersionState,
    /// Why it is not asked, and until when, if it is quarantined.
    pub quarantine: Option<QuarantineReport>,
    /// How often it was quarantined.
    pub quarantines: u64,
    /// Decisions asked of it since it was loaded.
    pub calls: u64,
    /// How often something else decided instead, by cause.
    pub fallbacks: BTreeMap<String, u64>,
    /// Batches of outcomes that it failed to learn from, by cause.
    pub observe_failures: BTreeMap<String, u64>,
    /// What the last failure said.
    pub last_fault: Option<String>,
}

/// Whether a version is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum VersionState {
    /// It is, where it is active.
    #[default]
    Ready,
    /// It failed too often lately: only its trials are.
    Quarantined,
    /// It was rolled back: never.
    Revoked,
}

/// A quarantine, for people and tools.
#[derive(Clone, Debug, Serialize)]
pub struct QuarantineReport {
    /// Cause of the last fault that led to it, or of the last trial's.
    pub cause: String,
    /// When it began, in milliseconds since 1970-01-01 UTC.
    pub since_unix_ms: u64,
    /// Seconds that it has lasted.
    pub for_s: f64,
    /// Seconds until the next trial; 0: the next request is it.
    pub next_trial_in_s: f64,
    /// Seconds from the last fault to the next trial.
    pub backoff_s: f64,
    /// Trials that failed.
    pub failed_trials: u32,
    /// What led to it: faults within the window.
    pub faults: u32,
    /// What led to it: calls within the window.
    pub calls: u64,
}

impl VersionReport {
    /// Describes a version; the native fallback if `None`.
    #[must_use]
    pub fn of(version: Option<&Arc<PolicyVersion>>) -> Self {
        let Some(version) = version else {
            return Self { policy: native::NAME.to_owned(), ..Self::default() };
        };
        let (standing, seen) = (version.standing(), version.record().seen());
        let quarantine = standing.quarantine();
        let state = match quarantine {
            _ if standing.is_revoked() => VersionState::Revoked,
            Some(_) => VersionState::Quarantined,
            None => VersionState::Ready,
        };
        let mut fallbacks = by_name(&seen.by_cause);
        if standing.skipped() > 0 {
            fallbacks.insert(FaultCause::Quarantined.to_string(), standing.skipped());
        }
        Self {
            policy: version.label().to_string(),
            digest: Some(version.digest().to_string()),
            settings: serde_json::from_str(version.settings()).ok(),
            state,
            quarantine: quarantine.map(|quarantine| QuarantineReport::of(&quarantine, version)),
            quarantines: standing.quarantines(),
            calls: version.calls(),
            fallbacks,
            observe_failures: by_name(&seen.observe),
            last_fault: seen.last.map(|fault| fault.to_string()),
        }
    }
}

impl QuarantineReport {
    fn of(quarantine: &Quarantine, version: &PolicyVersion) -> Self {
        let now = version.now();
        let lasted_ms = now.monotonic_ms.saturating_sub(quarantine.since_ms);
        Self {
            cause: quarantine.cause.to_string(),
            since_unix_ms: now.unix_ms.saturating_sub(lasted_ms),
            for_s: seconds(lasted_ms),
            next_trial_in_s: seconds(quarantine.trial_ms.saturating_sub(now.monotonic_ms)),
            backoff_s: quarantine.backoff.as_secs_f64(),
            failed_trials: quarantine.failed_trials,
            faults: quarantine.faults,
            calls: quarantine.calls,
        }
    }
}

fn by_name(counts: &BTreeMap<FaultCause, u64>) -> BTreeMap<String, u64> {
    counts.iter().map(|(cause, count)| (cause.to_string(), *count)).collect()
}

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}
