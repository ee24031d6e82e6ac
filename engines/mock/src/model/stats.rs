//! Stats: what an engine counts about itself, in vLLM's terms and buckets.

use std::time::Duration;

use super::sequence::FinishReason;

/// A histogram of times with fixed bounds.
#[derive(Clone, Debug)]
pub struct Histogram {
    bounds: &'static [f64],
    counts: Vec<u64>,
    sum_seconds: f64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len() + 1], sum_seconds: 0.0 }
    }

    pub(super) fn observe(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        self.counts[self.bounds.partition_point(|&bound| bound < seconds)] += 1;
        self.sum_seconds += seconds;
    }

    /// Upper bounds in seconds with the number of observations at or below each; the last bound is infinite.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        bounds.zip(self.counts.iter().scan(0, |total, count| {
            *total += count;
            Some(*total)
        }))
    }

    /// Number of observations.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Sum of the observations in seconds.
    #[must_use]
    pub fn sum_seconds(&self) -> f64 {
        self.sum_seconds
    }
}

const TTFT_SECONDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
    2560.0,
];
const ITL_SECONDS: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const REQUEST_SECONDS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
];

/// Totals since the engine started.
#[derive(Clone, Debug)]
pub struct Stats {
    /// Prompt tokens of sequences that have run, cached and fetched ones included.
    pub prompt_tokens: u64,
    /// Output tokens.
    pub generation_tokens: u64,
    /// Tokens that were looked up in the prefix cache at first admission.
    pub prefix_queries_tokens: u64,
    /// Tokens of those that were found.
    pub prefix_hits_tokens: u64,
    /// Prompt tokens whose KV came from another engine.
    pub prompt_tokens_fetched: u64,
    /// Fetches that brought nothing.
    pub fetches_failed: u64,
    /// Sequences thrown out of the KV cache, to be computed again.
    pub preemptions: u64,
    /// Sequences that ended with `stop`.
    pub finished_stop: u64,
    /// Sequences that ended with `length`.
    pub finished_length: u64,
    /// Sequences that were cancelled.
    pub cancelled: u64,
    /// Steps.
    pub steps: u64,
    /// From submission to the first token.
    pub time_to_first_token: Histogram,
    /// From one token to the next.
    pub inter_token_latency: Histogram,
    /// From submission to the last token.
    pub e2e_latency: Histogram,
    /// From submission to the first place among those that run.
    pub queue_time: Histogram,
    /// From asking for another engine's KV to having it.
    pub fetch_time: Histogram,
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            prompt_tokens: 0,
            generation_tokens: 0,
            prefix_queries_tokens: 0,
            prefix_hits_tokens: 0,
            prompt_tokens_fetched: 0,
            fetches_failed: 0,
            preemptions: 0,
            finished_stop: 0,
            finished_length: 0,
            cancelled: 0,
            steps: 0,
            time_to_first_token: Histogram::new(TTFT_SECONDS),
            inter_token_latency: Histogram::new(ITL_SECONDS),
            e2e_latency: Histogram::new(REQUEST_SECONDS),
            queue_time: Histogram::new(REQUEST_SECONDS),
            fetch_time: Histogram::new(TTFT_SECONDS),
        }
    }
}

impl Stats {
    /// Prompt tokens that were computed here; those of preempted sequences count once.
    #[must_use]
    pub fn prompt_tokens_computed(&self) -> u64 {
        self.prompt_tokens - self.prefix_hits_tokens - self.prompt_tokens_fetched
    }

    pub(super) fn finished(&mut self, reason: FinishReason) {
        match reason {
            FinishReason::Stop => self.finished_stop += 1,
            FinishReason::Length => self.finished_length += 1,
        }
    }
}

/// An engine's state at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Sequences that run.
    pub running: u32,
    /// Sequences that wait, those that fetch included.
    pub waiting: u32,
    /// Sequences whose KV is on its way from another engine.
    pub fetching: u32,
    /// Sequences that have finished and hold their KV for another engine.
    pub held: u32,
    /// KV blocks of those.
    pub kv_blocks_held: u32,
    /// KV blocks in use, those included.
    pub kv_blocks_used: u32,
    /// KV blocks that exist.
    pub kv_blocks_total: u32,
    /// Totals.
    pub stats: Stats,
}

impl Snapshot {
    /// Share of the KV blocks in use, 0 to 1.
    #[must_use]
    pub fn kv_usage(&self) -> f64 {
        f64::from(self.kv_blocks_used) / f64::from(self.kv_blocks_total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cumulative_and_bounds_inclusive() {
        let mut histogram = Histogram::new(&[0.1, 1.0]);
        for ms in [50, 100, 500, 5000] {
            histogram.observe(Duration::from_millis(ms));
        }
        assert_eq!(histogram.cumulative().collect::<Vec<_>>(), [(0.1, 2), (1.0, 3), (f64::INFINITY, 4)]);
        assert_eq!((histogram.count(), histogram.sum_seconds()), (4, 5.65));
    }
}
