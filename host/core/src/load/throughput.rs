//! Output throughput of a worker as a host sees it, from samples of its total: for engines that do not say it themselves.
//!
//! Time without work does not count. Time with work and without tokens does, with the tokens that end it: an answer that
//! comes whole, after seconds, is not a burst.

/// Samples of one worker.
#[derive(Clone, Copy, Debug)]
pub struct Throughput {
    since_ms: u64,
    tokens: u64,
}

impl Throughput {
    /// Begins to sample a worker that has made so many tokens.
    #[must_use]
    pub fn new(tokens: u64, now_ms: u64) -> Self {
        Self { since_ms: now_ms, tokens }
    }

    /// Tokens per second since the last sample that had some; `None` if this one has none.
    pub fn sample(&mut self, tokens: u64, is_busy: bool, now_ms: u64) -> Option<f32> {
        let made = tokens.saturating_sub(self.tokens);
        let elapsed_ms = now_ms.saturating_sub(self.since_ms);
        if made > 0 && elapsed_ms > 0 {
            *self = Self::new(tokens, now_ms);
            return Some((made as f64 * 1000.0 / elapsed_ms as f64) as f32);
        }
        if made == 0 && !is_busy {
            self.since_ms = now_ms;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_does_not_count_and_waiting_time_does() {
        let mut worker = Throughput::new(0, 0);
        assert_eq!(worker.sample(0, false, 10_000), None);
        assert_eq!(worker.sample(50, true, 11_000), Some(50.0));
        // A whole answer: four seconds of work, then all tokens at once.
        for now_ms in [12_000, 13_000, 14_000] {
            assert_eq!(worker.sample(50, true, now_ms), None);
        }
        assert_eq!(worker.sample(450, false, 15_000), Some(100.0));
    }

    #[test]
    fn two_samples_at_once_are_no_infinite_speed() {
        let mut worker = Throughput::new(0, 5);
        assert_eq!(worker.sample(10, true, 5), None);
        assert_eq!(worker.sample(10, true, 15), Some(1000.0));
    }
}
