//! What a pool was like lately, as admission policies are told of it: its latencies, the share that it refused.
//!
//! Latencies are histograms over a moving window. Two windows take turns: what is read is the one before and what there is of the
//! present, so that it is of the last half to whole minute, and costs the same however much there is. Refusals are counted likewise.

use std::sync::Arc;

use dynamo_host_core::{
    PoolState, Role,
    admission::{Quantiles, free},
};

use crate::PoolLoad;

/// How long a window of latencies is.
const WINDOW_MS: u64 = 30_000;
/// The first bucket's upper bound in milliseconds.
const FIRST_MS: f32 = 0.1;
/// Each bucket's upper bound over the one before: a value is known to within a twelfth.
const STEP: f32 = 1.08;
/// Buckets: up to a quarter of an hour and more.
const BUCKETS: usize = 210;
/// How long quantiles may be used that were computed once.
const QUANTILES_MS: u64 = 250;
/// How long a window is over which refusals are counted.
const SHED_WINDOW_MS: u64 = 10_000;

/// What a pool was like lately. All times are milliseconds of one clock that does not go back.
#[derive(Debug, Default)]
pub struct Lately {
    ttft: Histogram,
    itl: Histogram,
    /// Requests that were let in, and refused.
    came: Windows<2>,
    /// When quantiles were last computed, of both.
    told: Option<(u64, Quantiles, Quantiles)>,
}

impl Lately {
    /// A request came to its first token so long after its start; NaN tells nothing.
    pub fn first_token(&mut self, ms: f32, now_ms: u64) {
        self.ttft.observe(ms, now_ms);
    }

    /// Tokens followed each other at this distance; NaN tells nothing.
    pub fn tokens(&mut self, ms: f32, now_ms: u64) {
        self.itl.observe(ms, now_ms);
    }

    /// A request was let in, or was refused or waited for nothing.
    pub fn came(&mut self, is_refused: bool, now_ms: u64) {
        self.came.count(usize::from(is_refused), now_ms, SHED_WINDOW_MS);
    }

    /// The share of the last ten to twenty seconds' requests that were refused, 0 to 1.
    pub fn shed_rate(&mut self, now_ms: u64) -> f32 {
        let [admitted, refused] = self.came.counts(now_ms, SHED_WINDOW_MS);
        if refused == 0 { 0.0 } else { refused as f32 / (admitted + refused) as f32 }
    }

    /// What an admission policy is told of a pool of so many workers that are ready.
    pub fn state(&mut self, (key, role): (u64, Role), ready_workers: u32, load: PoolLoad, now_ms: u64) -> PoolState {
        let (ttft, itl) = self.quantiles(now_ms);
        PoolState {
            key,
            role,
            ready_workers,
            running_requests: load.running,
            free_requests: free(load.free),
            queued_requests: load.queued,
            queued_tokens: free(Some(u32::try_from(load.queued_tokens).unwrap_or(u32::MAX))),
            oldest_age_ms: load.oldest_age_ms,
            predicted_wait_ms: load.predicted_wait_ms,
            shed_rate: self.shed_rate(now_ms),
            ttft,
            itl,
        }
    }

    fn quantiles(&mut self, now_ms: u64) -> (Quantiles, Quantiles) {
        if let Some((at, ttft, itl)) = &self.told
            && now_ms < at + QUANTILES_MS
        {
            return (ttft.clone(), itl.clone());
        }
        let (ttft, itl) = (self.ttft.quantiles(now_ms), self.itl.quantiles(now_ms));
        self.told = Some((now_ms, ttft.clone(), itl.clone()));
        (ttft, itl)
    }
}

/// Counts of several kinds, of the present window and the one before.
#[derive(Debug)]
struct Windows<const KINDS: usize> {
    /// Number of the present window, counted from the clock's beginning.
    at: u64,
    present: [u32; KINDS],
    before: [u32; KINDS],
}

impl<const KINDS: usize> Default for Windows<KINDS> {
    fn default() -> Self {
        Self { at: 0, present: [0; KINDS], before: [0; KINDS] }
    }
}

impl<const KINDS: usize> Windows<KINDS> {
    fn count(&mut self, kind: usize, now_ms: u64, window_ms: u64) {
        self.turn(now_ms / window_ms);
        self.present[kind] = self.present[kind].saturating_add(1);
    }

    fn counts(&mut self, now_ms: u64, window_ms: u64) -> [u64; KINDS] {
        self.turn(now_ms / window_ms);
        std::array::from_fn(|kind| u64::from(self.present[kind]) + u64::from(self.before[kind]))
    }

    fn turn(&mut self, at: u64) {
        if at <= self.at {
            return;
        }
        let present = std::mem::replace(&mut self.present, [0; KINDS]);
        self.before = if at == self.at + 1 { present } else { [0; KINDS] };
        self.at = at;
    }
}

/// Latencies by their size.
#[derive(Debug, Default)]
struct Histogram(Windows<BUCKETS>);

impl Histogram {
    fn observe(&mut self, ms: f32, now_ms: u64) {
        if ms.is_nan() {
            return;
        }
        let bucket = ((ms / FIRST_MS).ln() / STEP.ln()).ceil().clamp(0.0, (BUCKETS - 1) as f32) as usize;
        self.0.count(bucket, now_ms, WINDOW_MS);
    }

    /// Values at each percentile from 0 to 100.
    fn quantiles(&mut self, now_ms: u64) -> Quantiles {
        let counts = self.0.counts(now_ms, WINDOW_MS);
        let total: u64 = counts.iter().sum();
        if total == 0 {
            return Quantiles::default();
        }
        let (mut bucket, mut passed) = (0, counts[0]);
        let values: Arc<[f32]> = (0..=100)
            .map(|percent| {
                let rank = (total - 1) * percent / 100 + 1;
                while passed < rank {
                    bucket += 1;
                    passed += counts[bucket];
                }
                middle_ms(bucket)
            })
            .collect();
        Quantiles(values)
    }
}

/// What stands for all values of a bucket.
fn middle_ms(bucket: usize) -> f32 {
    FIRST_MS * STEP.powf(bucket as f32 - 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_within_a_twelfth_of_what_was_observed() {
        let mut recent = Histogram::default();
        for ms in 1..=1000 {
            recent.observe(ms as f32, 5);
        }
        recent.observe(f32::NAN, 5);
        let quantiles = recent.quantiles(10);
        for (percentile, expected) in [(0.0, 1.0), (50.0, 500.0), (99.0, 990.0), (100.0, 1000.0)] {
            let found = quantiles.at(percentile);
            assert!((found / expected - 1.0).abs() < 1.0 / 12.0, "p{percentile} is {found}");
        }
    }

    #[test]
    fn what_is_older_than_two_windows_is_forgotten_and_what_fits_no_bucket_is_in_the_nearest() {
        let mut recent = Histogram::default();
        for ms in [0.0, 1e30] {
            recent.observe(ms, 0);
        }
        let quantiles = recent.quantiles(WINDOW_MS);
        assert!(quantiles.at(0.0) <= FIRST_MS && quantiles.at(100.0) > 900_000.0);
        assert_eq!(recent.quantiles(2 * WINDOW_MS), Quantiles::default());
        recent.observe(1.0, 100 * WINDOW_MS);
        assert!(recent.quantiles(100 * WINDOW_MS).at(50.0) > 0.0);
    }

    #[test]
    fn refusals_are_a_share_of_the_last_seconds() {
        let mut lately = Lately::default();
        assert_eq!(lately.shed_rate(0), 0.0);
        for is_refused in [true, false, false, false] {
            lately.came(is_refused, 1);
        }
        assert_eq!((lately.shed_rate(2), lately.shed_rate(SHED_WINDOW_MS)), (0.25, 0.25));
        assert_eq!(lately.shed_rate(2 * SHED_WINDOW_MS), 0.0);
    }

    #[test]
    fn a_policy_is_told_the_load_with_what_was_lately() {
        let mut lately = Lately::default();
        lately.first_token(100.0, 1);
        let load = PoolLoad { running: 3, queued_tokens: u64::MAX, ..PoolLoad::default() };
        let state = lately.state((7, Role::Decode), 2, load, 2);
        assert_eq!((state.key, state.role, state.ready_workers, state.running_requests), (7, Role::Decode, 2, 3));
        assert!(state.ttft.at(50.0) > 90.0 && state.itl.at(50.0).is_nan());
        lately.first_token(100_000.0, 3);
        assert!(lately.state((7, Role::Decode), 2, load, 4).ttft.at(100.0) < 110.0, "what was computed is used for a while");
        assert!(lately.state((7, Role::Decode), 2, load, 4 + QUANTILES_MS).ttft.at(100.0) > 90_000.0);
    }
}
