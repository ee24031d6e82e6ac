//! Changes of policies, and what survives a restart.
//!
//! Contract: a change is loaded, then on disk, then swapped in, then answered; whatever fails, the slot keeps what it
//! had. What cannot be restored at start-up is said, and the native fallback serves.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use dynamo_host_core::{SlotKind, SlotName, native};
use dynamo_host_policy::{Digest, LoadError, PolicyRuntime, PolicyVersion, RoutingSlot, SlotReport, VersionReport};
use dynamo_host_store::{SlotRecord, Store, StoreError, VersionRecord};
use serde::Serialize;
use tokio::sync::Mutex;

/// Versions in a record: the active one and eight to roll back to.
const MAX_VERSIONS: usize = 9;

/// What the configuration wants a slot to begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Seed {
    /// The native fallback.
    Native,
    /// A component with its settings.
    File { path: PathBuf, settings: String },
}

/// Why a slot's policy was not changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChangeError {
    #[error("this host runs no slot {slot}; it runs: routing")]
    NoSlot { slot: SlotName },
    #[error("{0}")]
    Load(#[from] LoadError),
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error("changes cannot be kept, so none are made: {reason}")]
    StateBroken { reason: String },
    #[error("slot {slot} has no earlier policy to roll back to; activate one with: dynamo-host policy activate {slot} FILE")]
    NoHistory { slot: SlotName },
    #[error("the change was given up: {0}")]
    Panicked(String),
}

/// A change that was made.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Change {
    pub(crate) slot: String,
    pub(crate) active: VersionReport,
    /// Time to inspect, compile, configure, probe and warm.
    pub(crate) load_ms: f64,
    /// Time to write it to disk.
    pub(crate) store_ms: f64,
    /// Time of the swap itself.
    pub(crate) swap_us: f64,
}

/// Where changes are kept.
enum Keeping {
    /// Nowhere: no state directory.
    Memory,
    /// On disk.
    Disk(Store),
    /// There is a directory, but it cannot be used.
    Broken(String),
}

/// The slots of a host and their changes.
pub(crate) struct Policies {
    runtime: Arc<PolicyRuntime>,
    routing: Arc<RoutingSlot>,
    /// Serializes changes, and owns the record of them.
    keeper: Mutex<Keeper>,
}

struct Keeper {
    keeping: Keeping,
    record: SlotRecord,
}

type Version = Option<Arc<PolicyVersion>>;

impl Policies {
    /// Opens the state, restores what it holds, and seeds what it does not.
    ///
    /// # Errors
    /// If another process has the state directory. Whatever else is wrong is said, and the native fallback serves.
    pub(crate) fn open(runtime: Arc<PolicyRuntime>, state_dir: Option<&Path>, seed: Option<&Seed>) -> Result<Self, StoreError> {
        let routing = Arc::new(RoutingSlot::new(SlotName::ROUTING));
        let keeping = match state_dir.map(Store::open) {
            None => Keeping::Memory,
            Some(Ok(store)) => Keeping::Disk(store),
            Some(Err(error @ StoreError::InUse { .. })) => return Err(error),
            Some(Err(error)) => {
                tracing::error!("{error}; serving with the native fallback");
                Keeping::Broken(error.to_string())
            }
        };
        let mut keeper = Keeper { keeping, record: SlotRecord::default() };
        let policies = |keeper| Self { runtime: Arc::clone(&runtime), routing: Arc::clone(&routing), keeper: Mutex::new(keeper) };

        let stored = match &keeper.keeping {
            Keeping::Disk(store) => store.slot(&SlotName::ROUTING).unwrap_or_else(|error| {
                tracing::error!("{error}; serving with the native fallback");
                None
            }),
            Keeping::Broken(_) => return Ok(policies(keeper)),
            Keeping::Memory => None,
        };
        let wanted = seed.map(|seed| (seed, keeper.seed(seed)));
        let is_news = match (&wanted, &stored) {
            (Some((_, Ok(wanted))), Some(stored)) => stored.seed.as_ref() != Some(&wanted.record()),
            (Some(_), _) => true,
            (None, _) => false,
        };
        if let Some(record) = stored {
            keeper.restore(&runtime, &routing, record);
            if wanted.is_some() && !is_news {
                tracing::info!(
                    policy = routing.report().active.policy,
                    "the slot's policy comes from the state directory; --routing seeded it before"
                );
            }
        }
        match wanted {
            Some((_, Ok(wanted))) if is_news => keeper.plant(&runtime, &routing, &wanted),
            Some((seed, Err(reason))) => {
                tracing::error!("{}: {reason}; serving with {}", seed.name(), routing.report().active.policy);
            }
            _ => {}
        }
        Ok(policies(keeper))
    }

    /// The slot that routes.
    pub(crate) fn routing(&self) -> &Arc<RoutingSlot> {
        &self.routing
    }

    /// What is in the slots.
    pub(crate) fn reports(&self) -> Vec<SlotReport> {
        vec![self.routing.report()]
    }

    /// Activates a component with settings, or the native fallback if `None`.
    pub(crate) async fn activate(&self, slot: &SlotName, policy: Option<(Vec<u8>, String)>) -> Result<Change, ChangeError> {
        let routing = self.slot(slot)?;
        let mut keeper = self.keeper.lock().await;
        let begun = Instant::now();
        let (version, bytes) = match policy {
            None => (None, Vec::new()),
            Some((bytes, settings)) => {
                let (runtime, state) = (Arc::clone(&self.runtime), Arc::clone(routing.state()));
                let load = move || runtime.load(&bytes, &settings, state).map(|version| (version, bytes));
                let (version, bytes) =
                    tokio::task::spawn_blocking(load).await.map_err(|error| ChangeError::Panicked(error.to_string()))??;
                (Some(version), bytes)
            }
        };
        let loaded = begun.elapsed();
        let stored = keeper.keep_next(version.as_ref(), &bytes)?;
        let swapped = timed_swap(|| routing.activate(version.clone()));
        Ok(change(slot, version.as_ref(), [loaded, stored, swapped]))
    }

    /// Goes back to what was active before.
    pub(crate) async fn rollback(&self, slot: &SlotName) -> Result<Change, ChangeError> {
        let routing = self.slot(slot)?;
        let mut keeper = self.keeper.lock().await;
        let mut versions = routing.versions();
        versions.pop();
        let last = versions.last().cloned().ok_or_else(|| ChangeError::NoHistory { slot: slot.clone() })?;
        let stored = keeper.keep_previous()?;
        let swapped = timed_swap(|| drop(routing.rollback()));
        Ok(change(slot, last.as_ref(), [Duration::ZERO, stored, swapped]))
    }

    fn slot(&self, slot: &SlotName) -> Result<&Arc<RoutingSlot>, ChangeError> {
        match slot {
            SlotName { kind: SlotKind::Routing, model: None } => Ok(&self.routing),
            _ => Err(ChangeError::NoSlot { slot: slot.clone() }),
        }
    }
}

/// A seed that was read.
enum Wanted {
    Native,
    Component { bytes: Vec<u8>, settings: String },
}

impl Wanted {
    fn record(&self) -> VersionRecord {
        match self {
            Self::Native => VersionRecord { policy: native::NAME.to_owned(), digest: String::new(), settings: String::new() },
            Self::Component { bytes, settings } => {
                VersionRecord { policy: String::new(), digest: Digest::of(bytes).to_string(), settings: settings.clone() }
            }
        }
    }
}

impl Seed {
    fn name(&self) -> String {
        match self {
            Self::Native => native::NAME.to_owned(),
            Self::File { path, .. } => path.display().to_string(),
        }
    }
}

impl Keeper {
    fn seed(&self, seed: &Seed) -> Result<Wanted, String> {
        match seed {
            Seed::Native => Ok(Wanted::Native),
            Seed::File { path, settings } => match fs::read(path) {
                Ok(bytes) => Ok(Wanted::Component { bytes, settings: settings.clone() }),
                Err(error) => Err(format!("cannot be read: {error}; name a policy component with --routing")),
            },
        }
    }

    /// Brings back what a record holds. What cannot be loaded is said; if it was the active one, native serves.
    fn restore(&mut self, runtime: &PolicyRuntime, routing: &RoutingSlot, record: SlotRecord) {
        let Keeping::Disk(store) = &self.keeping else { return };
        let load = |version: &Option<VersionRecord>| -> Result<Version, String> {
            let Some(version) = version else { return Ok(None) };
            let bytes = store.component(&version.digest).map_err(|error| error.to_string())?;
            if Digest::of(&bytes).to_string() != version.digest {
                let path = store.component_path(&version.digest);
                return Err(format!("policy component {path:?} is damaged: its digest is another; activate the policy again"));
            }
            runtime.load(&bytes, &version.settings, Arc::clone(routing.state())).map(Some).map_err(|error| error.to_string())
        };
        let mut versions = Vec::new();
        let last = record.versions.len().saturating_sub(1);
        let mut kept = Vec::new();
        for (index, version) in record.versions.iter().enumerate() {
            let name = version.as_ref().map_or(native::NAME, |version| &version.policy);
            match load(version) {
                Ok(loaded) => versions.push(loaded),
                // The record keeps it: it may be repaired, and nothing that was asked for is forgotten.
                Err(reason) if index == last => {
                    tracing::error!(
                        policy = name,
                        "the active policy cannot be restored: {reason}; serving with the native fallback"
                    );
                    versions.push(None);
                }
                Err(reason) => {
                    tracing::warn!(policy = name, "an earlier policy cannot be restored and not be rolled back to: {reason}");
                    continue;
                }
            }
            kept.push(version.clone());
        }
        routing.restore(versions);
        tracing::info!(policy = routing.report().active.policy, "restored from the state directory");
        self.record = SlotRecord { versions: kept, seed: record.seed };
    }

    /// Activates what the configuration wants.
    fn plant(&mut self, runtime: &PolicyRuntime, routing: &RoutingSlot, wanted: &Wanted) {
        let loaded = match wanted {
            Wanted::Native => Ok((None, &[][..])),
            Wanted::Component { bytes, settings } => {
                runtime.load(bytes, settings, Arc::clone(routing.state())).map(|version| (Some(version), &bytes[..]))
            }
        };
        let (version, bytes) = match loaded {
            Ok(loaded) => loaded,
            Err(error) => {
                tracing::error!(
                    "the configured routing policy is not activated: {error}; serving with {}",
                    routing.report().active.policy
                );
                return;
            }
        };
        let before = self.record.seed.replace(wanted.record());
        if let Err(error) = self.keep_next(version.as_ref(), bytes) {
            self.record.seed = before;
            tracing::error!("the configured routing policy is active, but will not be after a restart: {error}");
        }
        if version.is_some() || routing.pin().0.is_some() {
            routing.activate(version);
        }
        tracing::info!(policy = routing.report().active.policy, "routing policy is active");
    }

    /// Keeps one more version as the active one.
    fn keep_next(&mut self, version: Option<&Arc<PolicyVersion>>, bytes: &[u8]) -> Result<Duration, ChangeError> {
        let begun = Instant::now();
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
        if let (Keeping::Disk(store), Some(version)) = (&self.keeping, version) {
            store.put_component(&version.digest().to_string(), bytes)?;
        }
        self.keep(record)?;
        Ok(begun.elapsed())
    }

    /// Keeps the version before the active one as the active one.
    fn keep_previous(&mut self) -> Result<Duration, ChangeError> {
        let begun = Instant::now();
        let mut record = self.record.clone();
        record.versions.pop();
        self.keep(record)?;
        Ok(begun.elapsed())
    }

    fn keep(&mut self, record: SlotRecord) -> Result<(), ChangeError> {
        match &self.keeping {
            Keeping::Memory => {}
            Keeping::Disk(store) => store.put_slot(&SlotName::ROUTING, &record)?,
            Keeping::Broken(reason) => return Err(ChangeError::StateBroken { reason: reason.clone() }),
        }
        self.record = record;
        Ok(())
    }
}

fn timed_swap(swap: impl FnOnce()) -> Duration {
    let begun = Instant::now();
    swap();
    let took = begun.elapsed();
    metrics::counter!("dynamo_host_policy_swaps_total").increment(1);
    metrics::histogram!("dynamo_host_policy_swap_seconds").record(took);
    took
}

fn change(slot: &SlotName, version: Option<&Arc<PolicyVersion>>, [loaded, stored, swapped]: [Duration; 3]) -> Change {
    let active = VersionReport::of(version);
    tracing::info!(%slot, policy = active.policy, "policy is active");
    Change {
        slot: slot.to_string(),
        active,
        load_ms: loaded.as_secs_f64() * 1e3,
        store_ms: stored.as_secs_f64() * 1e3,
        swap_us: swapped.as_secs_f64() * 1e6,
    }
}
