//! Numbers for rooms and transfers: random to look at, never the same twice in a process, and with odds of one in 2^63 for those
//! of two processes.

use std::{
    collections::hash_map::RandomState,
    hash::BuildHasher as _,
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    },
};

/// SGLang keeps rooms as signed numbers of 64 bits.
const MASK: u64 = i64::MAX as u64;

/// Random at the process's start: the standard library has its seeds from the system.
static PROCESS: LazyLock<[u64; 2]> = LazyLock::new(|| {
    let random = RandomState::new();
    [random.hash_one(0), random.hash_one(1)]
});
static NEXT: AtomicU64 = AtomicU64::new(0);

/// A number of 63 bits that is not 0, which SGLang takes for its own warm-up.
pub(super) fn number() -> u64 {
    loop {
        let number = scattered(PROCESS[0].wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) & MASK);
        if number != 0 {
            return number;
        }
    }
}

/// A name that nobody else has.
pub(super) fn name() -> String {
    format!("{:016x}{:016x}", PROCESS[1], number())
}

/// Each number of 63 bits is made another one, and no two the same: multiplication by an odd number and a shifted difference
/// can be undone.
fn scattered(mut number: u64) -> u64 {
    for factor in [0x9e37_79b9_7f4a_7c15_u64, 0xbf58_476d_1ce4_e5b9] {
        number ^= number >> 31;
        number = number.wrapping_mul(factor) & MASK;
    }
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_number_comes_twice_and_all_have_63_bits() {
        let numbers: Vec<u64> = (0..100_000).map(|_| number()).collect();
        assert_eq!(numbers.iter().collect::<HashSet<_>>().len(), numbers.len());
        assert!(numbers.iter().all(|&number| (1..=MASK).contains(&number)));
        let high = numbers.iter().filter(|&&number| number > MASK / 2).count();
        assert!((45_000..55_000).contains(&high), "{high} of 100,000 are in the upper half");
    }

    #[test]
    fn neighbours_are_scattered_apart() {
        let scattered: HashSet<u64> = (0..10_000).chain(MASK - 10_000..=MASK).map(scattered).collect();
        assert_eq!(scattered.len(), 20_001);
    }

    #[test]
    fn names_are_not_the_same_twice() {
        assert_ne!(name(), name());
        assert_eq!(name().len(), 32);
    }
}
