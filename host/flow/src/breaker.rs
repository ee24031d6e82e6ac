//! Breaker: whether one worker is given requests, by what became of those that it had.
//!
//! Contract: no clock. It is closed until too many requests fail, in a row or as a share of a window with enough of them;
//! then it is open for a pause that doubles each time, and half-open after it: a bounded number of requests is tried at once,
//! and closed again when as many in a row have come to a token. What began before it last changed says nothing any more.

use std::fmt;

/// Parts of a window: what is older than the window is forgotten a part at a time.
const PARTS: u64 = 10;

/// What a worker failed a request with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Failure {
    /// No connection: it opens the breaker at once, whoever asks finds nobody.
    Connect,
    /// No answer in time.
    Timeout,
    /// The connection broke, or the stream ended before its finish reason.
    Broken,
    /// An error within the stream.
    InStream,
    /// It answered that it cannot: 5xx.
    Unhealthy,
    /// It answered with something that is not its protocol.
    Protocol,
    /// The stream went silent.
    Stall,
}

impl Failure {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Connect, Self::Timeout, Self::Broken, Self::InStream, Self::Unhealthy, Self::Protocol, Self::Stall];

    /// Metric label.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Timeout => "timeout",
            Self::Broken => "broken",
            Self::InStream => "in_stream",
            Self::Unhealthy => "unhealthy",
            Self::Protocol => "protocol",
            Self::Stall => "stall",
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "no connection",
            Self::Timeout => "no answer in time",
            Self::Broken => "broken answers",
            Self::InStream => "errors within streams",
            Self::Unhealthy => "answers that it cannot (5xx)",
            Self::Protocol => "answers that are not its protocol",
            Self::Stall => "streams that went silent",
        })
    }
}

/// When a breaker opens, and for how long.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BreakerRules {
    /// Failures in a row that open it.
    pub in_a_row: u32,
    /// Share of failures within the window that opens it, more than 0 and at most 1.
    pub share: f32,
    /// The window.
    pub window_ms: u64,
    /// Requests within the window before their share counts.
    pub min_requests: u32,
    /// For how long it is open the first time.
    pub first_pause_ms: u64,
    /// For how long at most. One that stayed closed for as long begins with the first pause again.
    pub max_pause_ms: u64,
    /// Requests that are tried at once while it is half-open, and that must do well to close it.
    pub trials: u32,
}

/// How a breaker stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stand {
    /// Requests pass.
    Closed,
    /// None passes until then, in milliseconds of the host's clock.
    Open {
        /// When it will be half-open.
        until_ms: u64,
    },
    /// A few pass.
    HalfOpen,
}

/// A request that a worker was given, on the breaker's account until [`Breaker::end`].
#[derive(Debug)]
#[must_use]
pub struct Attempt {
    epoch: u64,
    is_trial: bool,
    /// Whether a trial takes one of the places of those that are tried at once.
    takes_place: bool,
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Well: also an engine's own refusal of a request.
    Well,
    /// The worker failed it.
    Failed(Failure),
    /// By nobody's fault, or its client's.
    Untold,
}

/// One worker's breaker.
#[derive(Clone, Debug)]
pub struct Breaker {
    stand: Stand,
    /// Counts changes of its stand.
    epoch: u64,
    failures_in_a_row: u32,
    parts: [Part; PARTS as usize],
    /// How often it opened without having been closed for long in between.
    level: u32,
    closed_ms: u64,
    running_trials: u32,
    good_trials: u32,
    last: Option<Failure>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Part {
    at: u64,
    ended: u32,
    failed: u32,
}

impl Default for Breaker {
    fn default() -> Self {
        Self {
            stand: Stand::Closed,
            epoch: 0,
            failures_in_a_row: 0,
            parts: Default::default(),
            level: 0,
            closed_ms: 0,
            running_trials: 0,
            good_trials: 0,
            last: None,
        }
    }
}

impl Breaker {
    /// How it stands now.
    pub fn stand(&mut self, now_ms: u64) -> Stand {
        if let Stand::Open { until_ms } = self.stand
            && now_ms >= until_ms
        {
            self.turn(Stand::HalfOpen);
        }
        self.stand
    }

    /// What it last opened for.
    #[must_use]
    pub fn cause(&self) -> Option<Failure> {
        self.last
    }

    /// Whether a request passes.
    #[must_use]
    pub fn has_room(&mut self, rules: &BreakerRules, now_ms: u64) -> bool {
        match self.stand(now_ms) {
            Stand::Closed => true,
            Stand::Open { .. } => false,
            Stand::HalfOpen => self.running_trials < rules.trials,
        }
    }

    /// The worker is given a request; whoever asked whether one passes may have found no better one.
    pub fn begin(&mut self, now_ms: u64) -> Attempt {
        let is_trial = self.stand(now_ms) == Stand::HalfOpen;
        self.running_trials += u32::from(is_trial);
        Attempt { epoch: self.epoch, is_trial, takes_place: true }
    }

    /// The worker is asked for something that is nobody's request: it tells as much as one, and keeps none from being tried.
    pub fn begin_beside(&mut self, now_ms: u64) -> Attempt {
        let is_trial = self.stand(now_ms) == Stand::HalfOpen;
        Attempt { epoch: self.epoch, is_trial, takes_place: false }
    }

    /// It came to a token: a trial has been passed, though the request may take long still.
    pub fn progress(&mut self, attempt: &mut Attempt, rules: &BreakerRules, now_ms: u64) {
        if self.leave_trial(attempt) {
            self.pass_trial(rules, now_ms);
        }
    }

    /// It ended.
    pub fn end(&mut self, mut attempt: Attempt, ended: Ended, rules: &BreakerRules, now_ms: u64) {
        let stand = self.stand(now_ms);
        let was_trial = self.leave_trial(&mut attempt);
        if attempt.epoch != self.epoch {
            return;
        }
        match (stand, ended) {
            (_, Ended::Untold) => {}
            (Stand::Closed, Ended::Well) => {
                self.failures_in_a_row = 0;
                self.part(rules, now_ms).ended += 1;
            }
            (Stand::Closed, Ended::Failed(failure)) => self.fail(failure, rules, now_ms),
            (Stand::HalfOpen, Ended::Well) if was_trial => self.pass_trial(rules, now_ms),
            (Stand::HalfOpen, Ended::Failed(failure)) => self.trip(failure, rules, now_ms),
            // It was tried since there was nobody else, and is better than thought.
            (Stand::Open { .. }, Ended::Well) => self.turn(Stand::HalfOpen),
            (Stand::HalfOpen, Ended::Well) | (Stand::Open { .. }, Ended::Failed(_)) => {}
        }
    }

    /// Opens it, whatever was counted.
    pub fn trip(&mut self, failure: Failure, rules: &BreakerRules, now_ms: u64) {
        if matches!(self.stand, Stand::Open { .. }) {
            return;
        }
        let was_closed_for = now_ms.saturating_sub(self.closed_ms);
        if self.stand == Stand::Closed && was_closed_for >= rules.max_pause_ms {
            self.level = 0;
        }
        let doubled = rules.first_pause_ms.checked_shl(self.level).filter(|pause| pause >> self.level == rules.first_pause_ms);
        let pause = doubled.unwrap_or(u64::MAX).min(rules.max_pause_ms);
        self.level = (self.level + 1).min(u64::BITS - 1);
        self.last = Some(failure);
        self.turn(Stand::Open { until_ms: now_ms.saturating_add(pause) });
    }

    /// The engine is another, or back from where nobody reached it: what was counted says nothing of it, but how often it
    /// failed before is kept.
    pub fn recover(&mut self, now_ms: u64) {
        if self.stand != Stand::Closed {
            self.close(now_ms);
        }
        self.failures_in_a_row = 0;
        self.parts = Default::default();
    }

    fn fail(&mut self, failure: Failure, rules: &BreakerRules, now_ms: u64) {
        self.failures_in_a_row += 1;
        let part = self.part(rules, now_ms);
        part.ended += 1;
        part.failed += 1;
        let oldest = now_ms / part_ms(rules);
        let recent = self.parts.iter().filter(|part| part.at + PARTS > oldest);
        let (ended, failed) = recent.fold((0, 0), |(ended, failed), part| (ended + part.ended, failed + part.failed));
        let is_share = ended >= rules.min_requests && failed as f32 >= rules.share * ended as f32;
        if failure == Failure::Connect || self.failures_in_a_row >= rules.in_a_row || is_share {
            self.trip(failure, rules, now_ms);
        }
    }

    /// Takes an attempt out of the trials; returns whether it was one of those that run now.
    fn leave_trial(&mut self, attempt: &mut Attempt) -> bool {
        let is_running = std::mem::take(&mut attempt.is_trial) && attempt.epoch == self.epoch;
        self.running_trials -= u32::from(is_running && attempt.takes_place);
        is_running
    }

    fn pass_trial(&mut self, rules: &BreakerRules, now_ms: u64) {
        self.good_trials += 1;
        if self.good_trials >= rules.trials {
            self.close(now_ms);
        }
    }

    fn close(&mut self, now_ms: u64) {
        self.closed_ms = now_ms;
        self.turn(Stand::Closed);
    }

    fn turn(&mut self, stand: Stand) {
        self.stand = stand;
        self.epoch += 1;
        self.failures_in_a_row = 0;
        self.parts = Default::default();
        self.running_trials = 0;
        self.good_trials = 0;
    }

    fn part(&mut self, rules: &BreakerRules, now_ms: u64) -> &mut Part {
        let at = now_ms / part_ms(rules);
        let part = &mut self.parts[(at % PARTS) as usize];
        if part.at != at {
            *part = Part { at, ..Part::default() };
        }
        part
    }
}

fn part_ms(rules: &BreakerRules) -> u64 {
    (rules.window_ms / PARTS).max(1)
}

#[cfg(test)]
mod tests;
