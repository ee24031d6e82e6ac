//! Outliers: workers that are much slower than the others of their pool, and for how long they are left out.
//!
//! Contract: no clock. A worker is compared by the median of its last requests with the median of its pool, and by how far
//! the pool spreads (median absolute deviation), so that neither one slow request nor one slow worker moves the measure. The
//! time to the first token is taken per token that had to be computed, so that long prompts are no fault. No more than a
//! share of a pool is left out, whatever it is out for, and never the last one that serves.

/// Requests that a worker's median is of.
const SAMPLES: usize = 16;
/// Requests that it takes.
const LEAST_SAMPLES: usize = 5;
/// Workers that a pool's median takes.
const LEAST_WORKERS: usize = 3;
/// Samples that are older say nothing any more.
const MAX_AGE_MS: u64 = 60_000;
/// What a prompt costs before its first token is computed, in tokens: short ones are no slower per token than long ones.
const FIXED_TOKENS: f32 = 256.0;
/// Deviations, beside the factor, that make an outlier.
const DEVIATIONS: f32 = 5.0;
/// A median absolute deviation is this part of a standard deviation.
const MAD_TO_SIGMA: f32 = 1.4826;
/// The least deviation that is believed, as a share of the median.
const LEAST_SPREAD: f32 = 0.1;
/// Differences that nobody feels, in milliseconds: per 1,000 tokens of prompt, and between tokens.
const LEAST_TTFT_MS: f32 = 50.0;
const LEAST_ITL_MS: f32 = 5.0;

/// What makes an outlier, and for how long it is left out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OutlierRules {
    /// How many times slower than its pool's median.
    pub factor: f32,
    /// Share of a pool that may be left out; one of three or more always may.
    pub max_share: f32,
    /// For how long the first time.
    pub first_pause_ms: u64,
    /// For how long at most: it doubles each time.
    pub max_pause_ms: u64,
    /// Requests that are tried at once before it is in again, and by which it is judged.
    pub trials: u32,
}

/// In what a worker is slow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Slow {
    /// Time to the first token, per 1,000 tokens of prompt to be computed.
    Ttft {
        /// Its median, in milliseconds.
        ms: f32,
        /// Its pool's.
        pool_ms: f32,
    },
    /// Time between tokens.
    Itl {
        /// Its median, in milliseconds.
        ms: f32,
        /// Its pool's.
        pool_ms: f32,
    },
}

impl std::fmt::Display for Slow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ttft { ms, pool_ms } => {
                write!(f, "its first tokens take {ms:.0} ms per 1,000 tokens of prompt, and those of its pool {pool_ms:.0} ms")
            }
            Self::Itl { ms, pool_ms } => write!(f, "its tokens take {ms:.1} ms each, and those of its pool {pool_ms:.1} ms"),
        }
    }
}

/// Latencies of a worker's last requests.
#[derive(Clone, Debug, Default)]
pub struct Latencies {
    ttft: Ring,
    itl: Ring,
}

#[derive(Clone, Debug, Default)]
struct Ring {
    values: [(f32, u64); SAMPLES],
    written: usize,
}

impl Ring {
    fn push(&mut self, value: f32, now_ms: u64) {
        self.values[self.written % SAMPLES] = (value, now_ms);
        self.written += 1;
    }

    fn median(&self, least: usize, now_ms: u64) -> Option<f32> {
        let written = &self.values[..self.written.min(SAMPLES)];
        let recent = written.iter().filter(|(_, at)| at + MAX_AGE_MS >= now_ms);
        let mut recent: Vec<f32> = recent.map(|(value, _)| *value).collect();
        (recent.len() >= least).then(|| median(&mut recent))?
    }
}

impl Latencies {
    /// A request came to its first token, after so many tokens had to be computed.
    pub fn first_token(&mut self, ttft_ms: f32, uncached_tokens: u32, now_ms: u64) {
        if ttft_ms.is_finite() {
            self.ttft.push(1000.0 * ttft_ms / (uncached_tokens as f32 + FIXED_TOKENS), now_ms);
        }
    }

    /// A request's tokens took so long each.
    pub fn tokens(&mut self, itl_ms: f32, now_ms: u64) {
        if itl_ms.is_finite() {
            self.itl.push(itl_ms, now_ms);
        }
    }

    /// Its medians, if there were enough requests lately.
    #[must_use]
    pub fn measure(&self, now_ms: u64) -> Measure {
        self.measure_of(LEAST_SAMPLES, now_ms)
    }

    fn measure_of(&self, least: usize, now_ms: u64) -> Measure {
        Measure { ttft: self.ttft.median(least, now_ms), itl: self.itl.median(least, now_ms) }
    }
}

/// A worker's medians.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measure {
    ttft: Option<f32>,
    itl: Option<f32>,
}

impl Measure {
    /// Whether there is one.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.ttft.is_some() || self.itl.is_some()
    }
}

/// Whether a worker is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// It is one of its pool.
    In,
    /// It is left out until then, in milliseconds of the host's clock.
    Out {
        /// When it is tried again.
        until_ms: u64,
    },
    /// It is tried.
    Trial,
}

/// One worker as an outlier, or none.
#[derive(Clone, Debug)]
pub struct Ejection {
    /// Its last requests.
    pub latencies: Latencies,
    place: Place,
    slow: Option<Slow>,
    level: u32,
    in_since_ms: u64,
}

impl Default for Ejection {
    fn default() -> Self {
        Self { latencies: Latencies::default(), place: Place::In, slow: None, level: 0, in_since_ms: 0 }
    }
}

impl Ejection {
    /// Where it is now.
    pub fn place(&mut self, now_ms: u64) -> Place {
        if let Place::Out { until_ms } = self.place
            && now_ms >= until_ms
        {
            self.place = Place::Trial;
            self.latencies = Latencies::default();
        }
        self.place
    }

    /// What it was last left out for.
    #[must_use]
    pub fn slow(&self) -> Option<Slow> {
        self.slow
    }

    /// Its medians as far as they count: on trial, few requests are enough.
    pub fn measure(&mut self, rules: &OutlierRules, now_ms: u64) -> Measure {
        match self.place(now_ms) {
            Place::In => self.latencies.measure(now_ms),
            Place::Out { .. } => Measure::default(),
            Place::Trial => self.latencies.measure_of((rules.trials as usize).clamp(1, LEAST_SAMPLES), now_ms),
        }
    }

    /// Leaves it out.
    pub fn eject(&mut self, slow: Slow, rules: &OutlierRules, now_ms: u64) {
        if self.place == Place::In && now_ms.saturating_sub(self.in_since_ms) >= rules.max_pause_ms {
            self.level = 0;
        }
        let doubled = rules.first_pause_ms.checked_shl(self.level).filter(|pause| pause >> self.level == rules.first_pause_ms);
        let pause = doubled.unwrap_or(u64::MAX).min(rules.max_pause_ms);
        self.level = (self.level + 1).min(u64::BITS - 1);
        self.slow = Some(slow);
        self.place = Place::Out { until_ms: now_ms.saturating_add(pause) };
    }

    /// It is one of its pool again.
    pub fn readmit(&mut self, now_ms: u64) {
        if self.place != Place::In {
            self.in_since_ms = now_ms;
            self.place = Place::In;
        }
    }

    /// The engine is another: what was measured says nothing of it.
    pub fn forget(&mut self, now_ms: u64) {
        self.readmit(now_ms);
        self.latencies = Latencies::default();
    }
}

/// One worker of a pool that is judged.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its medians.
    pub measure: Measure,
    /// Whether it serves now, on trial or not.
    pub is_serving: bool,
}

/// The workers that are to be left out, by their places in the pool.
#[must_use]
pub fn outliers(pool: &[Row], rules: &OutlierRules) -> Vec<(usize, Slow)> {
    let ttft = Spread::of(pool.iter().filter_map(|row| row.measure.ttft));
    let itl = Spread::of(pool.iter().filter_map(|row| row.measure.itl));
    let judge = |(at, row): (usize, &Row)| {
        let by_itl = slower(row.measure.itl, itl, LEAST_ITL_MS, rules);
        let by_ttft = slower(row.measure.ttft, ttft, LEAST_TTFT_MS, rules);
        let by_itl = by_itl.map(|(ms, pool_ms)| (ms / pool_ms, at, Slow::Itl { ms, pool_ms }));
        let by_ttft = by_ttft.map(|(ms, pool_ms)| (ms / pool_ms, at, Slow::Ttft { ms, pool_ms }));
        by_itl.into_iter().chain(by_ttft).max_by(|a, b| a.0.total_cmp(&b.0))
    };
    let mut slow: Vec<_> = pool.iter().enumerate().filter(|(_, row)| row.is_serving).filter_map(judge).collect();
    slow.sort_by(|a, b| b.0.total_cmp(&a.0));
    let serving = pool.iter().filter(|row| row.is_serving).count();
    let most = ((f64::from(rules.max_share) * pool.len() as f64).floor() as usize).max(usize::from(pool.len() >= LEAST_WORKERS));
    let room = most.saturating_sub(pool.len() - serving).min(serving.saturating_sub(1));
    slow.into_iter().take(room).map(|(_, at, slow)| (at, slow)).collect()
}

fn slower(value: Option<f32>, spread: Option<Spread>, least: f32, rules: &OutlierRules) -> Option<(f32, f32)> {
    let (value, Spread { median, deviation }) = (value?, spread?);
    let is_slow = value > rules.factor * median && value > median + DEVIATIONS * deviation && value - median > least;
    is_slow.then_some((value, median))
}

#[derive(Clone, Copy)]
struct Spread {
    median: f32,
    deviation: f32,
}

impl Spread {
    fn of(values: impl Iterator<Item = f32>) -> Option<Self> {
        let mut values: Vec<f32> = values.collect();
        if values.len() < LEAST_WORKERS {
            return None;
        }
        let middle = median(&mut values)?;
        values.iter_mut().for_each(|value| *value = (*value - middle).abs());
        let deviation = (MAD_TO_SIGMA * median(&mut values)?).max(LEAST_SPREAD * middle);
        Some(Self { median: middle, deviation })
    }
}

fn median(values: &mut [f32]) -> Option<f32> {
    if values.is_empty() {
        return None;
    }
    let middle = values.len() / 2;
    let (below, &mut upper, _) = values.select_nth_unstable_by(middle, f32::total_cmp);
    let lower = below.iter().copied().max_by(f32::total_cmp).filter(|_| values.len().is_multiple_of(2));
    Some(lower.map_or(upper, |lower| f32::midpoint(lower, upper)))
}

#[cfg(test)]
mod tests;
