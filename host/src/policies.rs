//! Changes of policies, and what survives a restart.
//!
//! Contract: a change is loaded, then on disk, then swapped in, then answered; whatever fails, the slot keeps what it
//! had. What cannot be restored at start-up is said, and the native fallback serves.

mod keeper;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use dynamo_host_core::{OnError, SlotKind, SlotName};
use dynamo_host_policy::{
    AdmissionSlot, Lifecycle, LoadError, NoHistory, PolicyRuntime, PolicyVersion, RoutingSlot, SlotReport, VersionReport,
};
use dynamo_host_store::StoreError;
use serde::Serialize;
use tokio::sync::Mutex;

use self::keeper::{Keeper, Keeping};

/// What the configuration wants a slot to begin with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Seed {
    /// The native fallback.
    Native,
    /// A component with its settings.
    File { path: PathBuf, settings: String },
}

/// What the configuration says of a slot, where it says anything.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wishes<'a> {
    pub(crate) seed: Option<&'a Seed>,
    pub(crate) on_error: Option<OnError>,
}

/// Why a slot's policy was not changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChangeError {
    #[error("this host runs no slot {slot}; it runs: routing, admission")]
    NoSlot { slot: SlotName },
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("changes cannot be kept, so none are made: {reason}")]
    StateBroken { reason: String },
    #[error(transparent)]
    NoHistory(#[from] NoHistory),
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

/// Where a slot's kill switch stands.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Bypass {
    pub(crate) slot: String,
    pub(crate) bypass: bool,
    /// Why a restart forgets it, if it does.
    pub(crate) not_kept: Option<String>,
}

/// What happens in a slot when its policy fails.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct OnErrorChange {
    pub(crate) slot: String,
    pub(crate) on_error: OnError,
}

/// A slot, for people and tools: what it says of itself, and what the host knows.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct SlotStatus {
    #[serde(flatten)]
    pub(crate) report: SlotReport,
    /// Why it does not hold what it should: what the last start could not bring back. The next change ends it.
    trouble: Option<String>,
}

/// The slots of a host and their changes.
pub(crate) struct Policies {
    runtime: Arc<PolicyRuntime>,
    routing: Arc<RoutingSlot>,
    admission: Arc<AdmissionSlot>,
    /// Why a slot does not hold what it should.
    troubles: BySlot<Arc<ArcSwapOption<String>>>,
    /// Serializes changes of all slots, and owns the records of them.
    keepers: Arc<Mutex<BySlot<Keeper>>>,
}

/// Something of each slot.
struct BySlot<T> {
    routing: T,
    admission: T,
}

impl<T> BySlot<T> {
    fn map<U>(&self, map: impl Fn(&T) -> U) -> BySlot<U> {
        BySlot { routing: map(&self.routing), admission: map(&self.admission) }
    }

    /// That of a slot which this host runs.
    fn of(&self, slot: &SlotName) -> Result<&T, ChangeError> {
        match slot {
            SlotName { kind: SlotKind::Routing, model: None } => Ok(&self.routing),
            SlotName { kind: SlotKind::Admission, model: None } => Ok(&self.admission),
            _ => Err(ChangeError::NoSlot { slot: slot.clone() }),
        }
    }

    fn of_mut(&mut self, slot: &SlotName) -> Result<&mut T, ChangeError> {
        match slot {
            SlotName { kind: SlotKind::Routing, model: None } => Ok(&mut self.routing),
            SlotName { kind: SlotKind::Admission, model: None } => Ok(&mut self.admission),
            _ => Err(ChangeError::NoSlot { slot: slot.clone() }),
        }
    }
}

/// What the configuration says of each slot.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AllWishes<'a> {
    pub(crate) routing: Wishes<'a>,
    pub(crate) admission: Wishes<'a>,
}

impl Policies {
    /// Opens the state, restores what it holds, and seeds what it does not.
    ///
    /// # Errors
    /// If another process has the state directory. Whatever else is wrong is said, and the native fallback serves.
    pub(crate) fn open(runtime: Arc<PolicyRuntime>, state_dir: Option<&Path>, wishes: AllWishes<'_>) -> Result<Self, StoreError> {
        let routing = Arc::new(RoutingSlot::new(SlotName::ROUTING));
        let admission = Arc::new(AdmissionSlot::new(SlotName::ADMISSION));
        let keeping = Arc::new(Keeping::open(state_dir)?);
        let keepers = BySlot {
            routing: Keeper::open(&runtime, routing.lifecycle(), &keeping, wishes.routing),
            admission: Keeper::open(&runtime, admission.lifecycle(), &keeping, wishes.admission),
        };
        let troubles = keepers.map(|keeper| Arc::new(ArcSwapOption::from_pointee(keeper.troubles())));
        Ok(Self { runtime, routing, admission, troubles, keepers: Arc::new(Mutex::new(keepers)) })
    }

    /// The slot that routes.
    pub(crate) fn routing(&self) -> &Arc<RoutingSlot> {
        &self.routing
    }

    /// The slot that admits.
    pub(crate) fn admission(&self) -> &Arc<AdmissionSlot> {
        &self.admission
    }

    /// Bytes that a component may have.
    pub(crate) fn max_component_bytes(&self) -> usize {
        self.runtime.limits().component_bytes
    }

    /// What is in the slots.
    pub(crate) fn reports(&self) -> Vec<SlotStatus> {
        let status = |slot: &Lifecycle, trouble: &ArcSwapOption<String>| SlotStatus {
            report: slot.report(),
            trouble: trouble.load().as_deref().cloned(),
        };
        vec![status(&self.routing, &self.troubles.routing), status(&self.admission, &self.troubles.admission)]
    }

    /// Activates a component with settings, or the native fallback if `None`.
    ///
    /// # Cancel safety
    /// A change that has begun is made, whoever waits for it.
    pub(crate) async fn activate(&self, slot: &SlotName, policy: Option<(Vec<u8>, String)>) -> Result<Change, ChangeError> {
        let (lifecycle, runtime) = (Arc::clone(self.slot(slot)?), Arc::clone(&self.runtime));
        let trouble = Arc::clone(self.troubles.of(slot)?);
        self.change(slot, move |slot, keeper| {
            let begun = Instant::now();
            let (version, bytes) = match policy {
                None => (None, Vec::new()),
                Some((bytes, settings)) => (Some(runtime.load(&bytes, &settings, Arc::clone(lifecycle.state()))?), bytes),
            };
            let loaded = begun.elapsed();
            let stored = keeper.keep_next(version.as_ref(), &bytes)?;
            let swapped = timed_swap(|| lifecycle.activate(version.clone()));
            trouble.store(None);
            Ok(change(slot, version.as_ref(), [loaded, stored, swapped]))
        })
        .await
    }

    /// Goes back to what was active before.
    ///
    /// # Cancel safety
    /// A change that has begun is made, whoever waits for it.
    pub(crate) async fn rollback(&self, slot: &SlotName) -> Result<Change, ChangeError> {
        let lifecycle = Arc::clone(self.slot(slot)?);
        let trouble = Arc::clone(self.troubles.of(slot)?);
        self.change(slot, move |slot, keeper| {
            let last = lifecycle.prepare_rollback()?;
            let stored = keeper.keep_previous()?;
            let swapped = timed_swap(|| drop(lifecycle.rollback()));
            trouble.store(None);
            Ok(change(slot, last.0.as_ref(), [Duration::ZERO, stored, swapped]))
        })
        .await
    }

    /// Says what happens from now on when the policy fails.
    ///
    /// # Cancel safety
    /// A change that has begun is made, whoever waits for it.
    pub(crate) async fn set_on_error(&self, slot: &SlotName, mode: OnError) -> Result<OnErrorChange, ChangeError> {
        let lifecycle = Arc::clone(self.slot(slot)?);
        self.change(slot, move |slot, keeper| {
            keeper.keep_on_error(mode)?;
            lifecycle.set_on_error(mode);
            tracing::info!(%slot, on_error = %mode, "what happens on errors has changed");
            Ok(OnErrorChange { slot: slot.to_string(), on_error: mode })
        })
        .await
    }

    /// Turns the kill switch. It is in force at once, before it is kept and though it may not be: whoever needs it cannot
    /// wait for a change under way, or for a disk.
    ///
    /// # Cancel safety
    /// It is turned, and kept if that can be, whoever waits for it.
    pub(crate) async fn set_bypass(&self, slot: &SlotName, is_on: bool) -> Result<Bypass, ChangeError> {
        let (lifecycle, name) = (Arc::clone(self.slot(slot)?), slot.clone());
        lifecycle.set_bypass(is_on);
        let slot = slot.to_string();
        tracing::warn!(slot, "{}", if is_on { "bypassed: the native fallback decides" } else { "not bypassed any more" });
        let keepers = Arc::clone(&self.keepers);
        let kept = tokio::task::spawn_blocking(move || {
            let mut keepers = keepers.blocking_lock();
            // What is kept is what holds by then: switches may overtake one another.
            keepers.of_mut(&name).map(|keeper| keeper.keep_bypass(lifecycle.is_bypassed()))
        });
        let not_kept = kept.await.map_err(|error| ChangeError::Panicked(error.to_string()))??.err();
        if let Some(reason) = &not_kept {
            tracing::warn!(slot, "the kill switch is not kept over a restart: {reason}");
        }
        Ok(Bypass { slot, bypass: is_on, not_kept })
    }

    /// Makes one change after the other, on a thread that may block: they compile, and wait for the disk.
    async fn change<T: Send + 'static>(
        &self,
        slot: &SlotName,
        make: impl FnOnce(&SlotName, &mut Keeper) -> Result<T, ChangeError> + Send + 'static,
    ) -> Result<T, ChangeError> {
        let slot = slot.clone();
        let mut keepers = Arc::clone(&self.keepers).lock_owned().await;
        let made = tokio::task::spawn_blocking(move || make(&slot, keepers.of_mut(&slot)?));
        made.await.map_err(|error| ChangeError::Panicked(error.to_string()))?
    }

    fn slot(&self, slot: &SlotName) -> Result<&Arc<Lifecycle>, ChangeError> {
        BySlot { routing: self.routing.lifecycle(), admission: self.admission.lifecycle() }.of(slot).copied()
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

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use dynamo_host_policy::{Limits, Now};

    use super::*;

    #[tokio::test]
    async fn the_kill_switch_takes_hold_while_a_change_is_under_way_and_what_holds_last_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let runtime = Arc::new(PolicyRuntime::new(Limits::default(), Arc::new(Now::default), None).unwrap());
        let wishes = AllWishes::default();
        let policies = Policies::open(runtime, Some(directory.path()), wishes).unwrap();
        let change = Arc::clone(&policies.keepers).lock_owned().await;
        for is_on in [true, false] {
            let mut switch = std::pin::pin!(policies.set_bypass(&SlotName::ROUTING, is_on));
            let is_pending = std::future::poll_fn(|context| Poll::Ready(switch.as_mut().poll(context).is_pending())).await;
            assert!(is_pending, "it is not kept yet");
            assert_eq!(policies.routing().is_bypassed(), is_on, "and holds");
            // Whoever waited is gone.
        }
        let off = policies.set_bypass(&SlotName::ROUTING, false);
        let overtaken = async {
            policies.routing().set_bypass(true);
            drop(change);
        };
        let (off, ()) = tokio::join!(off, overtaken);
        assert_eq!(off.unwrap().not_kept, None);
        drop(policies);
        let runtime = Arc::new(PolicyRuntime::new(Limits::default(), Arc::new(Now::default), None).unwrap());
        // Those who left have work under way that still holds the state directory, and the database lets go of it a little later.
        let reopened = async {
            loop {
                match Policies::open(Arc::clone(&runtime), Some(directory.path()), wishes) {
                    Err(StoreError::InUse { .. }) => tokio::time::sleep(Duration::from_millis(5)).await,
                    opened => return opened.unwrap(),
                }
            }
        };
        let reopened = tokio::time::timeout(Duration::from_secs(60), reopened).await.expect("the state directory is let go of");
        assert!(reopened.routing().is_bypassed(), "what it was turned to meanwhile is what was kept");
    }
}
