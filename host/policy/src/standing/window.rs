//! Calls and faults of the last moments, by tenths of a window.
//!
//! Calls are counted on the hot path, by atomics alone: a counter, and once in a tenth of the window what it was then.
//! Threads that meet at the turn of a tenth may miscount by a call or two, which decides nothing.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// Parts of a window.
const TICKS: u64 = 10;
/// A power of two above [`TICKS`].
const RING: usize = 16;

/// Calls so far, and how many of them fell into the window.
pub(super) struct Calls {
    tick_ms: u64,
    total: AtomicU64,
    /// Those that failed through no fault of the policy.
    excused: AtomicU64,
    next_tick_ms: AtomicU64,
    /// Calls, without those excused, at the beginning of each tick.
    at_tick: [AtomicU64; RING],
}

fn tick_ms(window: Duration) -> u64 {
    (window.as_millis() as u64 / TICKS).max(1)
}

impl Calls {
    pub(super) fn new(window: Duration) -> Self {
        Self {
            tick_ms: tick_ms(window),
            total: AtomicU64::new(0),
            excused: AtomicU64::new(0),
            next_tick_ms: AtomicU64::new(0),
            at_tick: [const { AtomicU64::new(0) }; RING],
        }
    }

    /// Counts one.
    pub(super) fn count(&self, now_ms: u64) {
        let due = self.next_tick_ms.load(Relaxed);
        if now_ms >= due {
            self.turn(due, now_ms);
        }
        self.total.fetch_add(1, Relaxed);
    }

    /// Takes one back that says nothing about the policy.
    pub(super) fn excuse(&self) {
        self.excused.fetch_add(1, Relaxed);
    }

    /// All.
    pub(super) fn total(&self) -> u64 {
        self.total.load(Relaxed)
    }

    /// Those within the window, without those excused.
    pub(super) fn within_window(&self, now_ms: u64) -> u64 {
        let first = (now_ms / self.tick_ms).saturating_sub(TICKS - 1);
        self.judged().saturating_sub(self.slot(first).load(Relaxed))
    }

    /// Those before now are not within the window.
    pub(super) fn forget(&self, now_ms: u64) {
        self.next_tick_ms.store((now_ms / self.tick_ms + 1) * self.tick_ms, Relaxed);
        self.at_tick.iter().for_each(|slot| slot.store(self.judged(), Relaxed));
    }

    #[cold]
    fn turn(&self, due: u64, now_ms: u64) {
        let tick = now_ms / self.tick_ms;
        if self.next_tick_ms.compare_exchange(due, (tick + 1) * self.tick_ms, Relaxed, Relaxed).is_ok() {
            let judged = self.judged();
            for tick in (due / self.tick_ms).max(tick.saturating_sub(TICKS))..=tick {
                self.slot(tick).store(judged, Relaxed);
            }
        }
    }

    fn judged(&self) -> u64 {
        self.total().saturating_sub(self.excused.load(Relaxed))
    }

    fn slot(&self, tick: u64) -> &AtomicU64 {
        &self.at_tick[tick as usize % RING]
    }
}

/// Faults within the window.
#[derive(Default)]
pub(super) struct Faults {
    last_tick: u64,
    at_tick: [u32; TICKS as usize],
}

impl Faults {
    /// Counts one; how many there are within the window.
    pub(super) fn add(&mut self, now_ms: u64, window: Duration) -> u32 {
        // Another thread's clock may have been read a moment before.
        let tick = (now_ms / tick_ms(window)).max(self.last_tick);
        for passed in (self.last_tick + 1).max((tick + 1).saturating_sub(TICKS))..=tick {
            self.at_tick[(passed % TICKS) as usize] = 0;
        }
        self.last_tick = tick;
        self.at_tick[(tick % TICKS) as usize] += 1;
        self.at_tick.iter().sum()
    }
}
