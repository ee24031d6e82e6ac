//! Switches: one engine's faults as they are now, and who of its requests is struck.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio::sync::watch;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{Faults, Target};

/// An engine's faults, which can be changed while it runs.
#[derive(Debug)]
pub struct Switches {
    state: Mutex<State>,
    pace: watch::Sender<Pace>,
    die_with: OnceLock<fn()>,
}

#[derive(Debug)]
struct State {
    faults: Arc<Faults>,
    /// Requests that came since they were set.
    asked: u64,
    /// How many of them were struck.
    struck: u32,
}

/// How the engine goes on, if at all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Pace {
    /// It generates nothing.
    pub(crate) is_paused: bool,
    /// It answers nothing.
    pub(crate) is_hung: bool,
    pub(crate) is_dead: bool,
    /// How many times as long its steps take.
    pub(crate) slow: f64,
}

/// What is done to one request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Strike(Option<Arc<Faults>>);

impl Strike {
    /// The faults that it met when it came.
    pub(crate) fn faults(&self) -> Option<&Faults> {
        self.0.as_deref()
    }
}

impl Switches {
    pub(crate) fn new(faults: Faults) -> Self {
        let (pace, _) = watch::channel(Pace { is_paused: false, is_hung: false, is_dead: false, slow: 1.0 });
        let switches =
            Self { state: Mutex::new(State { faults: Arc::default(), asked: 0, struck: 0 }), pace, die_with: OnceLock::new() };
        switches.set(faults);
        switches
    }

    /// Sets what it does wrong from now on, instead of what it did so far.
    pub fn set(&self, faults: Faults) {
        let is_hung = faults.hang == Some(0);
        let (is_paused, slow, dies) = (is_hung || faults.wedge == Some(0), faults.slow, faults.die == Some(0));
        *self.state() = State { faults: Arc::new(faults), asked: 0, struck: 0 };
        self.pace.send_modify(|pace| *pace = Pace { is_paused, is_hung, slow, ..*pace });
        if dies {
            self.die();
        }
    }

    /// What it does wrong.
    #[must_use]
    pub fn faults(&self) -> Arc<Faults> {
        Arc::clone(&self.state().faults)
    }

    /// How many requests were struck since the faults were set.
    #[must_use]
    pub fn struck(&self) -> u32 {
        self.state().struck
    }

    /// How a process of its own dies: `exit` must not return. Only the first call counts.
    pub fn die_with(&self, exit: fn()) {
        let _ = self.die_with.set(exit);
        if self.pace.borrow().is_dead {
            exit();
        }
    }

    /// What becomes of a request, or a part of one, that came now.
    pub(crate) fn strike(&self, target: Target) -> Strike {
        let mut state = self.state();
        if target != Target::Request && !state.faults.strikes(target) {
            return Strike(None);
        }
        let number = state.asked;
        state.asked += 1;
        let faults = &state.faults;
        let is_spared = faults.next.is_some_and(|next| state.struck >= next);
        if is_spared || !faults.strikes(target) || !is_picked(number, faults) {
            return Strike(None);
        }
        let faults = Arc::clone(faults);
        state.struck += 1;
        Strike(Some(faults))
    }

    /// The faults that a strike is of, while they are in force.
    pub(crate) fn still(&self, strike: &Strike) -> Option<Arc<Faults>> {
        let struck = strike.0.as_ref()?;
        Arc::ptr_eq(struck, &self.state().faults).then(|| Arc::clone(struck))
    }

    /// Tells of each change of the pace.
    pub(crate) fn pace(&self) -> watch::Receiver<Pace> {
        self.pace.subscribe()
    }

    pub(crate) fn die(&self) {
        self.pace.send_modify(|pace| pace.is_dead = true);
        if let Some(exit) = self.die_with.get() {
            exit();
        }
    }

    pub(crate) fn hang(&self) {
        self.pace.send_modify(|pace| (pace.is_paused, pace.is_hung) = (true, true));
    }

    pub(crate) fn wedge(&self) {
        self.pace.send_modify(|pace| pace.is_paused = true);
    }

    /// It was told to stop.
    pub(crate) fn stopping(&self) {
        if self.faults().stall_on_stop {
            self.wedge();
        }
    }

    /// Waits until it answers.
    pub(crate) async fn awake(&self) {
        // The sender is here: it cannot be gone.
        let _ = self.pace().wait_for(|pace| !pace.is_hung).await;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the request with this number is one of the share.
fn is_picked(number: u64, faults: &Faults) -> bool {
    // 53 bits are what a float has.
    let drawn = xxh3_64_with_seed(&number.to_le_bytes(), faults.seed) >> 11;
    (drawn as f64) < faults.share * (1_u64 << 53) as f64
}
