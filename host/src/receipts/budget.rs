//! What receipts may take in one second: requests that are recorded, and bytes of the disk.
//!
//! A request is taken or not; its bytes are what its lines turn out to be, known when they are made: so what exceeds a second is
//! a debt that the next ones pay, and the rate holds over time.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Instant,
};

/// The budget, and what was spent of it.
pub(super) struct Budget {
    since: Instant,
    /// Of one second.
    amount: u64,
    /// The second since then, and what it owes: 32 bits each.
    spent: AtomicU64,
}

impl Budget {
    pub(super) fn new(amount: u64) -> Self {
        Self { since: Instant::now(), amount, spent: AtomicU64::new(0) }
    }

    /// Whether the present second has any left.
    pub(super) fn has_room(&self) -> bool {
        self.owed(self.spent.load(Relaxed), self.second()) < self.amount
    }

    /// Spends one, if there is room.
    pub(super) fn take_one(&self) -> bool {
        let second = self.second();
        let taken = |spent: u64| {
            let owed = self.owed(spent, second);
            (owed < self.amount).then(|| second << 32 | (owed + 1))
        };
        self.spent.fetch_update(Relaxed, Relaxed, taken).is_ok()
    }

    /// Spends them, whether there is room or not.
    pub(super) fn spend(&self, amount: u64) {
        self.spend_in(self.second(), amount);
    }

    fn spend_in(&self, second: u64, amount: u64) {
        let spent = |spent: u64| {
            let owed = self.owed(spent, second).saturating_add(amount).min(u64::from(u32::MAX));
            Some(second << 32 | owed)
        };
        let _ = self.spent.fetch_update(Relaxed, Relaxed, spent);
    }

    fn second(&self) -> u64 {
        self.since.elapsed().as_secs() & 0xffff_ffff
    }

    /// What is owed of what was spent, each second since then having paid its part.
    fn owed(&self, spent: u64, second: u64) -> u64 {
        let passed = second.saturating_sub(spent >> 32);
        (spent & 0xffff_ffff).saturating_sub(passed.saturating_mul(self.amount))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_after_the_other_is_taken_until_there_is_no_room() {
        let budget = Budget::new(u64::from(u32::MAX));
        assert!(budget.take_one() && budget.take_one());
        budget.spend(u64::MAX);
        assert!(!budget.take_one() && !budget.has_room());
    }

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
