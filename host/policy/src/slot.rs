//! A slot: which policy decides now, which one did before, and what decides when it cannot.
//!
//! [`Lifecycle`] is what all slots have in common, whatever their policies are asked; a [`Slot`] is one with the question that
//! is decided in it.
//!
//! A change is one atomic pointer swap. A request pins the version that it began with and keeps it to its end, unless
//! that version is rolled back, quarantined or bypassed: then something else decides the rest of it.

mod decide;
mod report;

use std::{
    marker::PhantomData,
    ops::Deref,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU8, Ordering::Relaxed},
    },
};

use arc_swap::ArcSwapOption;
use dynamo_host_core::{OnError, SlotName};

pub use self::{
    decide::{DecidedBy, Decision, Failed},
    report::{QuarantineReport, SlotReport, VersionReport, VersionState},
};
use crate::{
    question::{AdmissionCall, Question, RouteCall},
    state::SlotState,
    version::PolicyVersion,
};

/// Versions that can be rolled back to.
const MAX_HISTORY: usize = 8;

/// A place where questions of one kind are decided.
pub struct Slot<Q> {
    lifecycle: Arc<Lifecycle>,
    question: PhantomData<fn(Q)>,
}

/// The place where routing is decided.
pub type RoutingSlot = Slot<RouteCall>;

/// The place where admission is decided.
pub type AdmissionSlot = Slot<AdmissionCall>;

impl<Q: Question> Slot<Q> {
    /// A slot that decides natively until a policy is activated.
    #[must_use]
    pub fn new(name: SlotName) -> Self {
        debug_assert_eq!(name.kind, Q::WORLD.slot, "policies of another world would be loaded for it");
        Self { lifecycle: Arc::new(Lifecycle::new(name)), question: PhantomData }
    }

    /// What it holds, whatever is asked in it.
    #[must_use]
    pub fn lifecycle(&self) -> &Arc<Lifecycle> {
        &self.lifecycle
    }
}

impl<Q> Deref for Slot<Q> {
    type Target = Lifecycle;

    fn deref(&self) -> &Lifecycle {
        &self.lifecycle
    }
}

/// What a slot holds: its policy and those before it, its kill switch, and what happens when the policy fails.
pub struct Lifecycle {
    name: SlotName,
    state: Arc<SlotState>,
    active: ArcSwapOption<PolicyVersion>,
    /// What was active before, oldest first; `None` is the native fallback. The lock also serializes changes.
    history: Mutex<Vec<Option<Arc<PolicyVersion>>>>,
    /// The kill switch.
    bypass: AtomicBool,
    on_error: AtomicU8,
    /// Name of the policy that should be active and could not be brought back.
    missing: ArcSwapOption<String>,
    meters: Meters,
}

struct Meters {
    bypass: metrics::Gauge,
    bypassed: metrics::Counter,
}

/// The version that a request keeps to its end; the native fallback if `None`.
#[derive(Clone, Debug)]
pub struct Pinned(pub Option<Arc<PolicyVersion>>);

impl Pinned {
    /// Whether it is to be shown workers of all roles: see [`PolicyVersion::tells_roles_apart`]. What decides in its place can be
    /// shown them, too.
    #[must_use]
    pub fn tells_roles_apart(&self) -> bool {
        self.0.as_ref().is_some_and(|version| version.tells_roles_apart())
    }
}

/// A rollback without anything to go back to.
#[derive(Debug, thiserror::Error)]
#[error("slot {slot} has no earlier policy to roll back to; activate one with: dynamo-host policy activate {slot} FILE")]
pub struct NoHistory {
    slot: SlotName,
}

impl Lifecycle {
    fn new(name: SlotName) -> Self {
        let meters = Meters {
            bypass: metrics::gauge!("dynamo_host_policy_bypass", "slot" => name.to_string()),
            bypassed: metrics::counter!("dynamo_host_policy_bypassed_total", "slot" => name.to_string()),
        };
        Self {
            state: Arc::new(SlotState::of(&name)),
            name,
            active: ArcSwapOption::empty(),
            history: Mutex::default(),
            bypass: AtomicBool::new(false),
            on_error: AtomicU8::new(OnError::default() as u8),
            missing: ArcSwapOption::empty(),
            meters,
        }
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

    /// The kill switch: while it is on, the native fallback makes every decision from the next one on, those of requests
    /// that keep a version too. Off, all is as it was.
    pub fn set_bypass(&self, is_on: bool) {
        self.bypass.store(is_on, Relaxed);
        self.meters.bypass.set(f64::from(u8::from(is_on)));
    }

    /// Whether the kill switch is on.
    #[must_use]
    pub fn is_bypassed(&self) -> bool {
        self.bypass.load(Relaxed)
    }

    /// Says what happens from now on when the policy fails.
    pub fn set_on_error(&self, mode: OnError) {
        let history = self.history();
        self.on_error.store(mode as u8, Relaxed);
        self.arrange(&history);
    }

    /// What happens when the policy fails.
    #[must_use]
    pub fn on_error(&self) -> OnError {
        let mode = self.on_error.load(Relaxed);
        OnError::ALL.into_iter().find(|known| *known as u8 == mode).unwrap_or_default()
    }

    /// Says that the policy of this name should be active and is not, until something is activated.
    pub fn set_missing(&self, policy: &str) {
        self.missing.store(Some(Arc::new(policy.to_owned())));
    }

    /// Swaps in a version, or the native fallback. Requests under way keep what they have.
    pub fn activate(&self, version: Option<Arc<PolicyVersion>>) {
        let mut history = self.history();
        let before = self.active.swap(version);
        self.missing.store(None);
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
        self.arrange(&history);
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
        self.missing.store(None);
        if let Some(bad) = self.active.swap(last.clone()) {
            bad.revoke();
            bad.retire();
            if self.state.clear_if_full() {
                tracing::warn!(slot = %self.name, "the policies' state was full and is empty now, since {} was rolled back", bad.label());
            }
        }
        self.arrange(&history);
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
        self.arrange(&history);
    }

    /// Has the version that would decide if the active one failed make ready for it, if it may have to.
    fn arrange(&self, history: &[Option<Arc<PolicyVersion>>]) {
        if self.on_error() == OnError::LastGood
            && let Some(stand_in) = sound(history, self.active.load().as_deref())
        {
            stand_in.stand_by();
        }
    }

    /// The newest earlier version that is sound. `None`: the native fallback is.
    fn last_good(&self, failed: Option<&PolicyVersion>) -> Option<Arc<PolicyVersion>> {
        let version = sound(&self.history(), failed)?;
        version.stand_by();
        Some(version)
    }

    fn history(&self) -> std::sync::MutexGuard<'_, Vec<Option<Arc<PolicyVersion>>>> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The newest of these that is neither quarantined nor revoked, and not the same component with the same settings as the
/// one that failed. If the native fallback was active after that, it is the last that was good.
fn sound(history: &[Option<Arc<PolicyVersion>>], failed: Option<&PolicyVersion>) -> Option<Arc<PolicyVersion>> {
    let same = |one: &PolicyVersion, other: &PolicyVersion| one.digest() == other.digest() && one.settings() == other.settings();
    let differs = |version: &PolicyVersion| failed.is_none_or(|failed| !same(version, failed));
    let newest_first = history.iter().rev().map_while(Option::as_ref);
    newest_first.into_iter().find(|version| version.is_open() && differs(version)).cloned()
}
