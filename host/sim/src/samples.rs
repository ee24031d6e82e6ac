//! Samples of a latency and their quantiles; and the simulator's own randomness.

use serde::Serialize;

/// All samples of one latency, in milliseconds.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    values: Vec<f32>,
    sum: f64,
    is_sorted: bool,
}

/// What is told of samples. All 0 without any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Quantiles {
    /// How many there are.
    pub count: u64,
    /// Their mean.
    pub mean: f64,
    /// Half are at most this.
    pub p50: f64,
    /// Nine tenths are.
    pub p90: f64,
    /// All but a hundredth are.
    pub p99: f64,
    /// All are.
    pub max: f64,
}

/// A point of a distribution.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Share {
    /// So many in a hundred …
    pub percent: f64,
    /// … are at most this.
    pub ms: f64,
}

impl Share {
    /// A distribution: every hundredth, and its tail.
    pub(crate) fn all(mut quantile: impl FnMut(f64) -> f64) -> Vec<Self> {
        let percents = (1..100).map(f64::from).chain([99.5, 99.9, 100.0]);
        percents.map(|percent| Self { percent, ms: quantile(percent / 100.0) }).collect()
    }
}

impl Samples {
    /// Adds a sample.
    pub fn add(&mut self, value: f64) {
        self.values.push(value as f32);
        self.sum += value;
        self.is_sorted = false;
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.values.len() as u64
    }

    /// The sample that a share of them are at most, by nearest rank.
    #[must_use]
    pub fn quantile(&mut self, share: f64) -> f64 {
        self.sort();
        let rank = (share * self.values.len() as f64).ceil() as usize;
        self.values.get(rank.saturating_sub(1)).copied().map_or(0.0, f64::from)
    }

    /// What is told of them.
    #[must_use]
    pub fn quantiles(&mut self) -> Quantiles {
        let count = self.values.len() as u64;
        if count == 0 {
            return Quantiles::default();
        }
        let mean = self.sum / count as f64;
        Quantiles {
            count,
            mean,
            p50: self.quantile(0.5),
            p90: self.quantile(0.9),
            p99: self.quantile(0.99),
            max: self.quantile(1.0),
        }
    }

    fn sort(&mut self) {
        if !self.is_sorted {
            self.values.sort_unstable_by(f32::total_cmp);
            self.is_sorted = true;
        }
    }
}

/// Steps of an [`Intervals`] between a value and its double: quantiles are within a thousandth.
const STEPS: usize = 1024;
/// The least value that it tells from 0.
const LEAST: f64 = 1e-3;
/// Doublings from there: up to about twelve days in milliseconds.
const DOUBLINGS: usize = 40;

/// Samples that are too many to keep: counts of values that are equal within a thousandth, and their exact sum.
#[derive(Clone, Debug)]
pub(crate) struct Intervals {
    counts: Vec<u64>,
    count: u64,
    sum: f64,
    max: f64,
}

impl Default for Intervals {
    fn default() -> Self {
        Self { counts: vec![0; STEPS * DOUBLINGS], count: 0, sum: 0.0, max: 0.0 }
    }
}

impl Intervals {
    /// Adds `times` samples of one value.
    pub(crate) fn add(&mut self, value: f64, times: u64) {
        self.counts[Self::place(value)] += times;
        self.count += times;
        self.sum += value * times as f64;
        self.max = self.max.max(value);
    }

    fn place(value: f64) -> usize {
        let scaled = (value / LEAST).max(1.0);
        // The exponent and the first ten bits of the mantissa: linear within a doubling.
        let place = (scaled.to_bits() >> (52 - STEPS.ilog2())) as usize - (1023 << STEPS.ilog2());
        place.min(STEPS * DOUBLINGS - 1)
    }

    /// Upper end of a place.
    fn value(place: usize) -> f64 {
        let scaled = f64::from_bits((place as u64 + (1023 << STEPS.ilog2())) << (52 - STEPS.ilog2()));
        scaled * (1.0 + 0.5 / STEPS as f64) * LEAST
    }

    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let rank = ((share * self.count as f64).ceil() as u64).max(1);
        let mut seen = 0;
        let place = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank
        });
        place.map_or(0.0, |place| Self::value(place).min(self.max))
    }

    pub(crate) fn quantiles(&self) -> Quantiles {
        if self.count == 0 {
            return Quantiles::default();
        }
        let [p50, p90, p99] = [0.5, 0.9, 0.99].map(|share| self.quantile(share));
        Quantiles { count: self.count, mean: self.sum / self.count as f64, p50, p90, p99, max: self.max }
    }
}

/// Randomness that is the same for the same seed, in every release: splitmix64 (Steele et al. 2014).
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// From 0 to below 1.
    pub(crate) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Exponentially distributed with this mean.
    pub(crate) fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples_by_nearest_rank() {
        let mut samples = Samples::default();
        assert_eq!(samples.quantiles(), Quantiles::default());
        for value in (1..=100).rev() {
            samples.add(f64::from(value));
        }
        let expected = Quantiles { count: 100, mean: 50.5, p50: 50.0, p90: 90.0, p99: 99.0, max: 100.0 };
        assert_eq!(samples.quantiles(), expected);
    }

    #[test]
    fn intervals_are_within_a_thousandth() {
        let (mut exact, mut intervals) = (Samples::default(), Intervals::default());
        let mut random = Random::new(7);
        for _ in 0..10_000 {
            let value = random.exponential(20.0);
            exact.add(value);
            intervals.add(value, 1);
        }
        for share in [0.01, 0.5, 0.9, 0.99] {
            let (exact, near) = (exact.quantile(share), intervals.quantile(share));
            assert!((near / exact - 1.0).abs() < 1e-3, "{exact} {near}");
        }
        let (exact, near) = (exact.quantiles(), intervals.quantiles());
        assert!((near.mean - exact.mean).abs() < 1e-9 && near.count == exact.count);
    }

    #[test]
    fn randomness_has_the_stated_mean() {
        let mut random = Random::new(1);
        let mean = (0..100_000).map(|_| random.exponential(3.0)).sum::<f64>() / 100_000.0;
        assert!((mean - 3.0).abs() < 0.05, "{mean}");
    }
}
