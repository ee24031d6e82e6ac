//! Recent latencies: a histogram over a moving window, kept by whoever observes and read by whoever decides.
//!
//! Two windows take turns: what is read is the one before and what there is of the present, so that it is of the last
//! half to whole minute, and costs the same however much there is.

use std::sync::{Arc, Mutex, PoisonError};

use dynamo_host_core::admission::Quantiles;

/// How long a window is.
const WINDOW_MS: u64 = 30_000;
/// The first bucket's upper bound in milliseconds.
const FIRST_MS: f32 = 0.1;
/// Each bucket's upper bound over the one before: a value is known to within a twelfth.
const STEP: f32 = 1.08;
/// Buckets: up to a quarter of an hour and more.
const BUCKETS: usize = 210;

/// Latencies observed lately.
#[derive(Debug)]
pub(super) struct Recent(Mutex<Windows>);

#[derive(Debug)]
struct Windows {
    /// Number of the present window, counted from the clock's beginning.
    at: u64,
    present: [u32; BUCKETS],
    before: [u32; BUCKETS],
}

impl Default for Recent {
    fn default() -> Self {
        Self(Mutex::new(Windows { at: 0, present: [0; BUCKETS], before: [0; BUCKETS] }))
    }
}

impl Recent {
    pub(super) fn observe(&self, ms: f32, now_ms: u64) {
        let bucket = ((ms / FIRST_MS).ln() / STEP.ln()).ceil().clamp(0.0, (BUCKETS - 1) as f32) as usize;
        let mut windows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        windows.turn(now_ms);
        windows.present[bucket] = windows.present[bucket].saturating_add(1);
    }

    /// Values at each percentile from 0 to 100.
    pub(super) fn quantiles(&self, now_ms: u64) -> Quantiles {
        let counts: [u64; BUCKETS] = {
            let mut windows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            windows.turn(now_ms);
            std::array::from_fn(|bucket| u64::from(windows.present[bucket]) + u64::from(windows.before[bucket]))
        };
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

impl Windows {
    fn turn(&mut self, now_ms: u64) {
        let at = now_ms / WINDOW_MS;
        if at <= self.at {
            return;
        }
        let present = std::mem::replace(&mut self.present, [0; BUCKETS]);
        self.before = if at == self.at + 1 { present } else { [0; BUCKETS] };
        self.at = at;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_within_a_twelfth_of_what_was_observed() {
        let recent = Recent::default();
        for ms in 1..=1000 {
            recent.observe(ms as f32, 5);
        }
        let quantiles = recent.quantiles(10);
        for (percentile, expected) in [(0.0, 1.0), (50.0, 500.0), (99.0, 990.0), (100.0, 1000.0)] {
            let found = quantiles.at(percentile);
            assert!((found / expected - 1.0).abs() < 1.0 / 12.0, "p{percentile} is {found}");
        }
    }

    #[test]
    fn what_is_older_than_two_windows_is_forgotten_and_what_fits_no_bucket_is_in_the_nearest() {
        let recent = Recent::default();
        for ms in [0.0, 1e30] {
            recent.observe(ms, 0);
        }
        let quantiles = recent.quantiles(WINDOW_MS);
        assert!(quantiles.at(0.0) <= FIRST_MS && quantiles.at(100.0) > 900_000.0);
        assert_eq!(recent.quantiles(2 * WINDOW_MS), Quantiles::default());
        recent.observe(1.0, 100 * WINDOW_MS);
        assert!(recent.quantiles(100 * WINDOW_MS).at(50.0) > 0.0);
    }
}
