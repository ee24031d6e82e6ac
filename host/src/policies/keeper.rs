//! Keepers: the record of each slot, where all are kept, and what becomes of them at a start.
//!
//! Invariant: the record and the slot hold the same versions. Whoever changes the slot keeps the change here first; what
//! cannot be kept is not made.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use dynamo_host_core::{OnError, native};
use dynamo_host_policy::{Digest, Lifecycle, PolicyRuntime, PolicyVersion, read_component};
use dynamo_host_store::{SlotRecord, Store, StoreError, VersionRecord};

use super::{ChangeError, Seed, Wishes};
use crate::text::plain;

/// Versions in a record: the active one and eight to roll back to.
const MAX_VERSIONS: usize = 9;

/// Where changes of all slots are kept.
pub(super) enum Keeping {
    /// Nowhere: no state directory.
    Memory,
    /// On disk.
    Disk(Store),
    /// There is a directory, but it cannot be used.
    Broken(String),
}

impl Keeping {
    /// Opens the state.
    ///
    /// # Errors
    /// If another process has it. Whatever else is wrong is told by each keeper.
    pub(super) fn open(state_dir: Option<&Path>) -> Result<Self, StoreError> {
        match state_dir.map(Store::open) {
            None => Ok(Self::Memory),
            Some(Ok(store)) => Ok(Self::Disk(store)),
            Some(Err(error @ StoreError::InUse { .. })) => Err(error),
            Some(Err(error)) => Ok(Self::Broken(error.to_string())),
        }
    }
}

/// The record of a slot. Keepers of one host take turns: what one writes before its record, another's would sweep away.
pub(super) struct Keeper {
    slot: Arc<Lifecycle>,
    keeping: Arc<Keeping>,
    record: SlotRecord,
    /// What the start could not bring back.
    troubles: Vec<String>,
}

/// A seed that was read.
enum Wanted {
    Native,
    Component { bytes: Vec<u8>, settings: String },
}

impl Wanted {
    fn read(seed: &Seed, slot: &Lifecycle, max_bytes: usize) -> Result<Self, String> {
        match seed {
            Seed::Native => Ok(Self::Native),
            Seed::File { path, settings } => match read_component(path, max_bytes) {
                Ok(bytes) => Ok(Self::Component { bytes, settings: settings.clone() }),
                Err(error) => Err(format!("{}: {error}; name a policy component with --{}", path.display(), slot.name())),
            },
        }
    }

    fn record(&self) -> VersionRecord {
        match self {
            Self::Native => VersionRecord { policy: native::NAME.to_owned(), digest: String::new(), settings: String::new() },
            Self::Component { bytes, settings } => {
                VersionRecord { policy: String::new(), digest: Digest::of(bytes).to_string(), settings: settings.clone() }
            }
        }
    }
}

impl Keeper {
    /// Brings the slot back as it was; then applies the configuration, if it has changed. What is wrong is among the troubles.
    pub(super) fn open(runtime: &PolicyRuntime, slot: &Arc<Lifecycle>, keeping: &Arc<Keeping>, wishes: Wishes<'_>) -> Self {
        let mut keeper =
            Self { slot: Arc::clone(slot), keeping: Arc::clone(keeping), record: SlotRecord::default(), troubles: Vec::new() };
        let stored = match &**keeping {
            Keeping::Memory => None,
            Keeping::Disk(store) => store.slot(slot.name()).unwrap_or_else(|error| {
                keeper.complain("state", &error.to_string());
                None
            }),
            // What was active is not known, and whatever took its place could not be kept: native serves.
            Keeping::Broken(reason) => {
                slot.set_missing("unknown");
                slot.set_on_error(wishes.on_error.unwrap_or_default());
                keeper.complain("state", reason);
                return keeper;
            }
        };
        let wanted = wishes.seed.map(|seed| Wanted::read(seed, slot, runtime.limits().component_bytes));
        let is_news = match (&wanted, &stored) {
            (Some(Ok(wanted)), Some(stored)) => stored.seed.as_ref() != Some(&wanted.record()),
            _ => true,
        };
        if let Some(record) = stored {
            keeper.restore(runtime, record);
        }
        match wanted {
            Some(Ok(wanted)) if is_news => keeper.plant(runtime, &wanted),
            Some(Ok(_)) => tracing::info!(
                slot = %slot.name(), policy = slot.report().active.policy,
                "the slot's policy comes from the state directory; the configuration seeded it before"
            ),
            Some(Err(reason)) => {
                keeper.miss("configured");
                keeper.complain("seed", &reason);
            }
            None => {}
        }
        keeper.settle_on_error(wishes.on_error);
        keeper
    }

    /// What was said last of what happens on errors: by a command, or by the configuration if it has changed.
    fn settle_on_error(&mut self, wanted: Option<OnError>) {
        if let Some(wanted) = wanted.filter(|wanted| self.record.on_error_seed != Some(*wanted)) {
            let record = SlotRecord { on_error: Some(wanted), on_error_seed: Some(wanted), ..self.record.clone() };
            if let Err(error) = self.keep(record, None, &[]) {
                self.complain("seed", &format!("the configured on_error is in force, and not kept: {error}"));
            }
            self.slot.set_on_error(wanted);
        } else if let Some(kept) = self.record.on_error {
            self.slot.set_on_error(kept);
        }
    }

    /// The slot should hold a policy now, and does not.
    fn miss(&self, policy: &str) {
        if self.slot.pin().0.is_none() {
            self.slot.set_missing(policy);
        }
    }

    /// What the start could not bring back, in one text.
    pub(super) fn troubles(&self) -> Option<String> {
        (!self.troubles.is_empty()).then(|| self.troubles.join("; "))
    }

    fn complain(&mut self, what: &'static str, reason: &str) {
        let reason = plain(reason);
        metrics::counter!("dynamo_host_policy_restore_failures_total", "what" => what).increment(1);
        tracing::error!(slot = %self.slot.name(), "{reason}; serving with {}", self.slot.report().active.policy);
        self.troubles.push(reason);
    }

    /// Brings back what a record holds. What cannot be loaded is said; if it was the active one, native serves.
    fn restore(&mut self, runtime: &PolicyRuntime, record: SlotRecord) {
        let Keeping::Disk(store) = &*self.keeping else { return };
        let load = |version: &Option<VersionRecord>| -> Result<Option<Arc<PolicyVersion>>, String> {
            let Some(version) = version else { return Ok(None) };
            let bytes = store.component(&version.digest).map_err(|error| error.to_string())?;
            if Digest::of(&bytes).to_string() != version.digest {
                let path = store.component_path(&version.digest);
                return Err(format!("policy component {path:?} is damaged: its digest is another; activate the policy again"));
            }
            runtime.load(&bytes, &version.settings, Arc::clone(self.slot.state())).map(Some).map_err(|error| error.to_string())
        };
        let (mut versions, mut kept) = (Vec::new(), Vec::new());
        let last = record.versions.len().saturating_sub(1);
        let mut trouble = None;
        for (index, version) in record.versions.iter().enumerate() {
            let name = version.as_ref().map_or(native::NAME, |version| &version.policy);
            match load(version) {
                Ok(loaded) => versions.push(loaded),
                // The record keeps it: it may be repaired, and nothing that was asked for is forgotten.
                Err(reason) if index == last => {
                    trouble = Some((name, format!("the active policy {name:?} cannot be restored: {reason}")));
                    versions.push(None);
                }
                Err(reason) => {
                    metrics::counter!("dynamo_host_policy_restore_failures_total", "what" => "earlier").increment(1);
                    let reason = plain(&reason);
                    tracing::warn!(policy = name, "an earlier policy cannot be restored and not be rolled back to: {reason}");
                    continue;
                }
            }
            kept.push(version.clone());
        }
        self.slot.restore(versions);
        self.slot.set_bypass(record.bypass);
        if record.bypass {
            tracing::warn!(slot = %self.slot.name(), "the slot is bypassed, as it was: {} decides; end that with: dynamo-host policy bypass {} --off", native::NAME, self.slot.name());
        }
        self.record = SlotRecord { versions: kept, ..record.clone() };
        match trouble {
            Some((name, trouble)) => {
                self.miss(name);
                self.complain("active", &trouble);
            }
            None => {
                tracing::info!(slot = %self.slot.name(), policy = self.slot.report().active.policy, "restored from the state directory");
            }
        }
    }

    /// Activates what the configuration wants.
    fn plant(&mut self, runtime: &PolicyRuntime, wanted: &Wanted) {
        let loaded = match wanted {
            Wanted::Native => Ok((None, &[][..])),
            Wanted::Component { bytes, settings } => {
                runtime.load(bytes, settings, Arc::clone(self.slot.state())).map(|version| (Some(version), &bytes[..]))
            }
        };
        let (version, bytes) = match loaded {
            Ok(loaded) => loaded,
            Err(error) => {
                self.miss("configured");
                return self.complain("seed", &format!("the configured {} policy is not activated: {error}", self.slot.name()));
            }
        };
        // Native over native is no change, only remembered as what the configuration wants.
        let is_change = version.is_some() || self.record.versions.last().is_some_and(Option::is_some);
        let mut record = if is_change { self.with_next(version.as_ref()) } else { self.record.clone() };
        record.seed = Some(wanted.record());
        match self.keep(record, version.as_ref(), bytes) {
            Ok(()) if is_change => {
                self.slot.activate(version);
                // What the state could not bring back has been replaced.
                self.troubles.clear();
            }
            Ok(()) => {}
            Err(error) => {
                self.miss("configured");
                return self.complain("seed", &format!("the configured {} policy is not activated: {error}", self.slot.name()));
            }
        }
        tracing::info!(slot = %self.slot.name(), policy = self.slot.report().active.policy, "policy is active");
    }

    /// Keeps one more version as the active one. Blocks on the disk.
    pub(super) fn keep_next(&mut self, version: Option<&Arc<PolicyVersion>>, bytes: &[u8]) -> Result<Duration, ChangeError> {
        let begun = Instant::now();
        self.keep(self.with_next(version), version, bytes)?;
        Ok(begun.elapsed())
    }

    /// Keeps the version before the active one as the active one. Blocks on the disk.
    pub(super) fn keep_previous(&mut self) -> Result<Duration, ChangeError> {
        let begun = Instant::now();
        let mut record = self.record.clone();
        record.versions.pop();
        self.keep(record, None, &[])?;
        Ok(begun.elapsed())
    }

    /// Keeps what happens on errors. Blocks on the disk.
    pub(super) fn keep_on_error(&mut self, mode: OnError) -> Result<(), ChangeError> {
        self.keep(SlotRecord { on_error: Some(mode), ..self.record.clone() }, None, &[])
    }

    /// Keeps whether the kill switch is on. Blocks on the disk.
    ///
    /// # Errors
    /// Why it will be forgotten at a restart; it is in force all the same.
    pub(super) fn keep_bypass(&mut self, is_on: bool) -> Result<(), String> {
        // Whatever can be kept next, this is part of it.
        self.record.bypass = is_on;
        match &*self.keeping {
            Keeping::Memory => Err("this host has no --state-dir".to_owned()),
            Keeping::Disk(store) => store.put_slot(self.slot.name(), &self.record).map_err(|error| error.to_string()),
            Keeping::Broken(reason) => Err(reason.clone()),
        }
    }

    fn with_next(&self, version: Option<&Arc<PolicyVersion>>) -> SlotRecord {
        let mut record = self.record.clone();
        if record.versions.is_empty() {
            record.versions.push(None);
        }
        record.versions.push(version.map(|version| VersionRecord {
            policy: version.label().to_string(),
            digest: version.digest().to_string(),
            settings: version.settings().to_owned(),
        }));
        let surplus = record.versions.len().saturating_sub(MAX_VERSIONS);
        record.versions.drain(..surplus);
        record
    }

    /// Keeps a record, and first the component that is new in it.
    fn keep(&mut self, record: SlotRecord, version: Option<&Arc<PolicyVersion>>, bytes: &[u8]) -> Result<(), ChangeError> {
        match &*self.keeping {
            Keeping::Memory => {}
            Keeping::Disk(store) => {
                if let Some(version) = version {
                    store.put_component(&version.digest().to_string(), bytes)?;
                }
                store.put_slot(self.slot.name(), &record)?;
            }
            Keeping::Broken(reason) => return Err(ChangeError::StateBroken { reason: reason.clone() }),
        }
        self.record = record;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use dynamo_host_core::SlotName;
    use dynamo_host_policy::{Limits, Now, RoutingSlot};

    use super::*;

    #[test]
    fn record_and_slot_stay_alike_when_the_configuration_cannot_be_kept() {
        let directory = tempfile::tempdir().unwrap();
        let runtime = PolicyRuntime::new(Limits::default(), Arc::new(Now::default), None).unwrap();
        let routing = RoutingSlot::new(SlotName::ROUTING);
        let wishes = Wishes { seed: Some(&Seed::Native), on_error: None };
        let open = || {
            let keeping = Arc::new(Keeping::open(Some(directory.path())).unwrap());
            Keeper::open(&runtime, routing.lifecycle(), &keeping, wishes)
        };
        let keeper = open();
        assert_eq!((keeper.troubles(), routing.versions().len()), (None, 1), "native over native is no change");
        assert!(keeper.record.versions.is_empty() && keeper.record.seed.is_some());
        drop(keeper);

        // A directory in the place of the file that counts changes.
        let mut keeper = open();
        let file = directory.path().join("generation");
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        keeper.record.versions =
            vec![Some(VersionRecord { policy: "p@1".to_owned(), digest: "aa".to_owned(), settings: "{}".to_owned() })];
        let before = keeper.record.clone();
        keeper.plant(&runtime, &Wanted::Native);
        assert_eq!((keeper.record.clone(), routing.versions().len()), (before, 1));
        assert!(keeper.troubles().unwrap().contains("not activated"));
    }
}
