//! Links: what is known of the ways by which KV goes from one worker to another.
//!
//! A link is a pair (prefill, decode), by their slots on the load board. Only links that were used are kept. One that fails
//! several times in a row is avoided for a while that doubles; others are not, even of the same workers.
//!
//! Rates are in tokens of prompt whose KV arrived, by the time from asking the decode worker to its first token: as the host
//! sees it, with all that the engine does in between.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Failures in a row after which a link is avoided.
pub const FAILURES: u32 = 3;
/// For how long at first, and at most, in milliseconds.
pub const AVOIDED_MS: u64 = 5_000;
/// See [`AVOIDED_MS`].
pub const AVOIDED_AT_MOST_MS: u64 = 160_000;
/// Weight of the newest observation.
const ALPHA: f32 = 0.2;

/// What is known of one link.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Link {
    /// Recent tokens, and milliseconds that they took.
    tokens: f32,
    ms: f32,
    /// Recent share that failed, 0 to 1.
    error_rate: f32,
    failures: u32,
    avoided_until_ms: u64,
    avoided_for_ms: u64,
}

impl Link {
    /// Recent tokens per second; NaN if nothing has arrived.
    #[must_use]
    pub fn tokens_per_second(&self) -> f32 {
        if self.ms > 0.0 { self.tokens * 1000.0 / self.ms } else { f32::NAN }
    }

    /// Recent time of a hand-off in milliseconds; NaN if nothing has arrived.
    #[must_use]
    pub fn handoff_ms(&self) -> f32 {
        if self.ms > 0.0 { self.ms } else { f32::NAN }
    }

    /// Recent share of hand-offs that failed, 0 to 1.
    #[must_use]
    pub fn error_rate(&self) -> f32 {
        self.error_rate
    }

    /// Whether it is left alone for now.
    #[must_use]
    pub fn is_avoided(&self, now_ms: u64) -> bool {
        now_ms < self.avoided_until_ms
    }

    /// For how long it is left alone yet, in milliseconds; `None` if it is not.
    #[must_use]
    pub fn avoided_ms(&self, now_ms: u64) -> Option<u64> {
        self.is_avoided(now_ms).then(|| self.avoided_until_ms - now_ms)
    }
}

/// All links.
#[derive(Debug, Default)]
pub struct LinkBoard(Mutex<BySlot<BySlot<Link>>>);

/// By slot: of the worker that prefills, and within that of the one that decodes.
type BySlot<T> = HashMap<u32, T, BuildHasherDefault<SlotHasher>>;

/// Hashes slots, which are the host's own small numbers: a column looks up one for each candidate.
#[derive(Default)]
struct SlotHasher(u64);

impl Hasher for SlotHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u32(byte.into()));
    }

    fn write_u32(&mut self, slot: u32) {
        // Fibonacci hashing (Knuth 1973); the table takes the lowest bits and the highest.
        self.0 = (self.0 ^ u64::from(slot)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

impl LinkBoard {
    /// The KV of `tokens` tokens came over, and the first token after it, within `ms` milliseconds.
    pub fn arrived(&self, from: u32, to: u32, tokens: u32, ms: f32) {
        let mut links = self.lock();
        let link = links.entry(from).or_default().entry(to).or_default();
        let alpha = if link.ms > 0.0 { ALPHA } else { 1.0 };
        link.tokens += alpha * (tokens as f32 - link.tokens);
        link.ms += alpha * (ms.max(0.001) - link.ms);
        link.error_rate -= ALPHA * link.error_rate;
        (link.failures, link.avoided_until_ms, link.avoided_for_ms) = (0, 0, 0);
    }

    /// A hand-off went well, and nobody knows how long it took.
    pub fn worked(&self, from: u32, to: u32) {
        // Of one that nothing is known of, nothing has to be forgotten.
        if let Some(link) = self.lock().get_mut(&from).and_then(|links| links.get_mut(&to)) {
            link.error_rate -= ALPHA * link.error_rate;
            (link.failures, link.avoided_until_ms, link.avoided_for_ms) = (0, 0, 0);
        }
    }

    /// A hand-off failed that is the link's doing, as far as one can tell.
    pub fn failed(&self, from: u32, to: u32, now_ms: u64) {
        let mut links = self.lock();
        let link = links.entry(from).or_default().entry(to).or_default();
        link.error_rate += ALPHA * (1.0 - link.error_rate);
        link.failures += 1;
        if link.failures >= FAILURES {
            link.avoided_for_ms = (link.avoided_for_ms * 2).clamp(AVOIDED_MS, AVOIDED_AT_MOST_MS);
            link.avoided_until_ms = now_ms + link.avoided_for_ms;
        }
    }

    /// What is known of a link; `None` if it was never used.
    #[must_use]
    pub fn get(&self, from: u32, to: u32) -> Option<Link> {
        self.lock().get(&from)?.get(&to).copied()
    }

    /// What is known of the links from one worker to others, in their order.
    #[must_use]
    pub fn gather(&self, from: u32, to: &[u32]) -> Vec<Option<Link>> {
        let links = self.lock();
        match links.get(&from) {
            Some(links) => to.iter().map(|to| links.get(to).copied()).collect(),
            None => vec![None; to.len()],
        }
    }

    /// Whether a link is left alone for now.
    #[must_use]
    pub fn is_avoided(&self, from: u32, to: u32, now_ms: u64) -> bool {
        self.get(from, to).is_some_and(|link| link.is_avoided(now_ms))
    }

    /// All that were used, as (prefill, decode) slots.
    #[must_use]
    pub fn all(&self) -> Vec<(u32, u32, Link)> {
        let links = self.lock();
        links.iter().flat_map(|(&from, links)| links.iter().map(move |(&to, &link)| (from, to, link))).collect()
    }

    /// Those that are left alone for now.
    #[must_use]
    pub fn avoided(&self, now_ms: u64) -> Vec<(u32, u32)> {
        let links = self.lock();
        let avoided = links.iter().flat_map(|(&from, links)| links.iter().map(move |(&to, link)| (from, to, link)));
        avoided.filter(|(.., link)| link.is_avoided(now_ms)).map(|(from, to, _)| (from, to)).collect()
    }

    /// Forgets all links of a worker that is gone.
    pub fn forget(&self, slot: u32) {
        let mut links = self.lock();
        links.remove(&slot);
        links.retain(|_, links| {
            links.remove(&slot);
            !links.is_empty()
        });
    }

    fn lock(&self) -> MutexGuard<'_, BySlot<BySlot<Link>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_that_keeps_failing_is_avoided_for_longer_each_time_and_others_are_not() {
        let links = LinkBoard::default();
        for _ in 0..FAILURES {
            assert!(!links.is_avoided(0, 1, 100));
            links.failed(0, 1, 100);
        }
        assert!(links.is_avoided(0, 1, 100) && !links.is_avoided(0, 2, 100) && !links.is_avoided(1, 0, 100));
        assert_eq!((links.avoided(100), links.avoided(100 + AVOIDED_MS)), (vec![(0, 1)], Vec::new()));
        assert_eq!(links.all()[0].2.avoided_ms(200), Some(AVOIDED_MS - 100));
        assert!(!links.is_avoided(0, 1, 100 + AVOIDED_MS), "it is tried again");
        links.failed(0, 1, 10_000);
        assert!(links.is_avoided(0, 1, 10_000 + AVOIDED_MS) && !links.is_avoided(0, 1, 10_000 + 2 * AVOIDED_MS));
        links.arrived(0, 1, 1000, 10.0);
        assert!(!links.is_avoided(0, 1, 10_001));
        links.forget(1);
        assert_eq!(links.get(0, 1), None);
    }

    #[test]
    fn links_of_one_worker_to_a_thousand_are_gathered_as_they_are_got_one_by_one() {
        let links = LinkBoard::default();
        for to in (0..1000).step_by(3) {
            links.arrived(7, to, to, 1.0);
            links.failed(to, 7, 0);
        }
        let to: Vec<u32> = (0..1000).rev().collect();
        let gathered = links.gather(7, &to);
        assert!(to.iter().zip(&gathered).all(|(&to, link)| *link == links.get(7, to)));
        assert_eq!(gathered.iter().flatten().count(), 334);
        assert_eq!(links.gather(2000, &to), vec![None; 1000]);
        links.forget(7);
        assert!(links.lock().is_empty(), "nothing is kept of a worker that is gone");
    }

    #[test]
    fn a_rate_is_of_recent_tokens_and_times() {
        let links = LinkBoard::default();
        links.arrived(0, 1, 1000, 10.0);
        assert_eq!(links.get(0, 1).unwrap().tokens_per_second(), 100_000.0);
        (0..50).for_each(|_| links.arrived(0, 1, 1000, 20.0));
        let rate = links.get(0, 1).unwrap().tokens_per_second();
        assert!((49_000.0..52_000.0).contains(&rate), "{rate}");
    }
}
