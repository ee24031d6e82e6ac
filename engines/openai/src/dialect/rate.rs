//! Tokens per second out of counters that only grow.

use std::{collections::BTreeMap, time::Instant};

/// What each rank had counted when it was last looked at.
#[derive(Debug, Default)]
pub(super) struct Rates {
    last: BTreeMap<u32, (f64, Instant)>,
}

impl Rates {
    /// Tokens per second since the last look. Nothing at the first look, nor if the counter began anew.
    pub(super) fn rate(&mut self, rank: u32, total: f64, now: Instant) -> Option<f32> {
        let (before, then) = self.last.insert(rank, (total, now))?;
        let seconds = now.saturating_duration_since(then).as_secs_f64();
        (seconds > 0.0 && total >= before).then_some(((total - before) / seconds) as f32)
    }

    /// Keeps only ranks that the engine still has.
    pub(super) fn keep(&mut self, ranks: impl Fn(u32) -> bool) {
        self.last.retain(|&rank, _| ranks(rank));
    }

    pub(super) fn forget(&mut self) {
        self.last.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_rate_is_what_came_since_the_last_look() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut rates = Rates::default();
        assert_eq!(rates.rate(0, 1000.0, at(0)), None);
        assert_eq!(rates.rate(1, 5.0, at(0)), None);
        assert_eq!(rates.rate(0, 1100.0, at(2)), Some(50.0));
        assert_eq!(rates.rate(0, 1100.0, at(4)), Some(0.0));
        assert_eq!(rates.rate(0, 7.0, at(5)), None, "a restarted engine counts from 0");
        assert_eq!(rates.rate(0, 17.0, at(6)), Some(10.0));
        assert_eq!(rates.rate(0, 27.0, at(6)), None, "no time passed");
        rates.keep(|rank| rank == 1);
        assert_eq!(rates.rate(0, 27.0, at(7)), None);
        assert_eq!(rates.rate(1, 12.0, at(7)), Some(1.0));
    }
}
