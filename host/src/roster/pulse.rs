//! Pulse: whether an engine is alive, by its tokens and its answers to probes.
//!
//! Contract: no clock and no I/O. Tokens are the better sign: an engine whose tokens come is alive, whatever its probe does,
//! and is hardly probed. One that answers nothing several times, and makes no token, is dead: what it has is given to others.

use std::time::Duration;

/// How often an engine is probed whose tokens come: what it serves may change all the same.
const BUSY_EVERY_MS: u64 = 10_000;
/// How long after a probe that found nobody the next one is, and how long at most when nobody is found again and again.
const FIRST_RETRY_MS: u64 = 250;
const LAST_RETRY_MS: u64 = 700;
/// How long an engine must be silent, beside not answering, before what it has is given to others.
const SILENT_MS: u64 = 1000;

/// Signs of an engine's life.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    output_tokens: u64,
    /// When its tokens last came, and when it was last asked.
    moved_ms: u64,
    probed_ms: u64,
    /// Probes in a row that had no answer, or a bad one.
    failures: u32,
}

/// How a probe failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoSign {
    /// Nobody answered in time.
    Silence,
    /// There was nobody, or the connection broke.
    Nobody,
    /// It answered that it cannot serve.
    Refusal,
}

/// What a failed probe means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finding {
    /// Nothing: its tokens came meanwhile.
    Alive,
    /// It is to be asked again at once.
    Unsure,
    /// It is out of service; what it has is to be given to others if it is dead.
    Out { is_dead: bool },
}

impl Pulse {
    /// Takes down how many tokens it has made.
    pub(super) fn look(&mut self, output_tokens: u64, now_ms: u64) {
        if output_tokens != self.output_tokens {
            self.output_tokens = output_tokens;
            self.moved_ms = now_ms;
        }
    }

    /// Whether an engine that answered is to be probed now.
    pub(super) fn is_due(&self, every: Duration, now_ms: u64) -> bool {
        let is_busy = u128::from(now_ms.saturating_sub(self.moved_ms)) < every.as_millis();
        !is_busy || now_ms.saturating_sub(self.probed_ms) >= BUSY_EVERY_MS
    }

    /// Until when it is looked at again.
    pub(super) fn pause(&self, is_well: bool, every: Duration) -> Duration {
        if is_well {
            return every;
        }
        let retry = FIRST_RETRY_MS.saturating_mul(1 << self.failures.saturating_sub(1).min(8));
        Duration::from_millis(retry.min(LAST_RETRY_MS))
    }

    /// It answered well.
    pub(super) fn answered(&mut self, now_ms: u64) {
        self.failures = 0;
        self.probed_ms = now_ms;
    }

    /// A probe that began at `begun_ms` failed. `tries`: how many silences in a row make it dead.
    pub(super) fn failed(&mut self, sign: NoSign, tries: u32, begun_ms: u64, now_ms: u64) -> Finding {
        self.probed_ms = now_ms;
        if sign == NoSign::Silence && self.moved_ms > begun_ms {
            self.failures = 0;
            return Finding::Alive;
        }
        self.failures = self.failures.saturating_add(1);
        let is_sure = self.failures >= tries;
        if sign == NoSign::Silence && !is_sure {
            return Finding::Unsure;
        }
        let is_silent = now_ms.saturating_sub(self.moved_ms) >= SILENT_MS;
        Finding::Out { is_dead: sign != NoSign::Refusal && is_sure && is_silent }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_secs(1);

    #[test]
    fn an_engine_whose_tokens_come_is_hardly_probed_and_a_quiet_one_is() {
        let mut pulse = Pulse::default();
        pulse.look(5, 20_000);
        pulse.answered(20_000);
        assert!(!pulse.is_due(EVERY, 20_900) && pulse.is_due(EVERY, 21_000));
        for second in 21..30 {
            pulse.look(second, second * 1000);
            assert!(!pulse.is_due(EVERY, second * 1000 + 500));
        }
        pulse.look(99, 30_000);
        assert!(pulse.is_due(EVERY, 30_000), "the last probe is long ago");
    }

    #[test]
    fn silence_is_believed_after_some_tries_and_never_while_tokens_come() {
        let mut pulse = Pulse::default();
        pulse.look(1, 5000);
        assert_eq!(pulse.failed(NoSign::Silence, 2, 6000, 7000), Finding::Unsure);
        pulse.look(2, 7500);
        assert_eq!(pulse.failed(NoSign::Silence, 2, 7000, 8000), Finding::Alive);
        assert_eq!(pulse.failed(NoSign::Silence, 2, 8000, 9000), Finding::Unsure);
        assert_eq!(pulse.failed(NoSign::Silence, 2, 9000, 10_000), Finding::Out { is_dead: true });
        pulse.answered(10_500);
        assert_eq!(pulse.failed(NoSign::Silence, 2, 11_000, 12_000), Finding::Unsure);
    }

    #[test]
    fn nobody_is_out_at_once_and_dead_when_its_streams_are_silent() {
        let mut pulse = Pulse::default();
        pulse.look(1, 5000);
        assert_eq!(pulse.failed(NoSign::Nobody, 2, 5100, 5100), Finding::Out { is_dead: false });
        pulse.look(2, 5400);
        // A closed port while streams go on: it finishes what it has.
        assert_eq!(pulse.failed(NoSign::Nobody, 2, 5500, 5500), Finding::Out { is_dead: false });
        assert_eq!(pulse.failed(NoSign::Nobody, 2, 6400, 6400), Finding::Out { is_dead: true });
        assert_eq!(pulse.failed(NoSign::Refusal, 2, 9000, 9000), Finding::Out { is_dead: false }, "it answers");
    }

    #[test]
    fn who_is_away_is_asked_often_enough_to_be_back_within_a_second() {
        let mut pulse = Pulse::default();
        let mut pauses = Vec::new();
        for _ in 0..5 {
            let _ = pulse.failed(NoSign::Nobody, 2, 0, 0);
            pauses.push(pulse.pause(false, EVERY).as_millis());
        }
        assert_eq!(pauses, [250, 500, 700, 700, 700]);
        assert_eq!(pulse.pause(true, EVERY), EVERY);
    }
}
