//! The bytes that receipts may take of the disk in one second.
//!
//! What is sampled costs what its lines turn out to be, known when they are made: so what exceeds a second is a debt that the
//! next ones pay, and the rate holds over time.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Instant,
};

/// The budget, and what was spent of it.
pub(super) struct Budget {
    since: Instant,
    /// Of one second.
    bytes: u64,
    /// The second since then, and the bytes that it owes: 32 bits each.
    spent: AtomicU64,
}

impl Budget {
    pub(super) fn new(bytes: u64) -> Self {
        Self { since: Instant::now(), bytes, spent: AtomicU64::new(0) }
    }

    /// Whether the present second has any left.
    pub(super) fn has_room(&self) -> bool {
        self.owed(self.spent.load(Relaxed), self.second()) < self.bytes
    }

    /// Spends them, whether there is room or not.
    pub(super) fn spend(&self, bytes: u64) {
        self.spend_in(self.second(), bytes);
    }

    fn spend_in(&self, second: u64, bytes: u64) {
        let spent = |spent: u64| {
            let bytes = self.owed(spent, second).saturating_add(bytes).min(u64::from(u32::MAX));
            Some(second << 32 | bytes)
        };
        let _ = self.spent.fetch_update(Relaxed, Relaxed, spent);
    }

    fn second(&self) -> u64 {
        self.since.elapsed().as_secs() & 0xffff_ffff
    }

    /// What is owed of what was spent, each second since then having paid its part.
    fn owed(&self, spent: u64, second: u64) -> u64 {
        let passed = second.saturating_sub(spent >> 32);
        (spent & 0xffff_ffff).saturating_sub(passed.saturating_mul(self.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_exceeds_a_second_is_paid_by_the_next_ones() {
        let budget = Budget::new(1000);
        let owed = |second| budget.owed(budget.spent.load(Relaxed), second);
        budget.spend_in(0, 900);
        assert_eq!((owed(0), owed(1)), (900, 0));
        budget.spend_in(0, 2600);
        assert_eq!([owed(0), owed(1), owed(3), owed(4), owed(1000)], [3500, 2500, 500, 0, 0]);
        budget.spend_in(3, 400);
        assert_eq!((owed(3), owed(4)), (900, 0));
        budget.spend_in(3, u64::MAX);
        assert_eq!(owed(3), u64::from(u32::MAX), "it does not run over");
    }
}
