//! Admission: what a policy sees of the pools that could serve a request, and what it may say.

use std::sync::Arc;

use crate::{Rejection, RequestFacts, Role, UNKNOWN};

/// Longest name of a class, in bytes: it becomes a metric label.
pub const MAX_CLASS_BYTES: usize = 64;

/// Longest time after which a client that was shed is told to try again: a day.
pub const MAX_RETRY_AFTER_MS: u32 = 24 * 60 * 60 * 1000;

/// Tiers that there are: 0 to this less one, 0 served first.
pub const TIERS: u32 = 16;

/// Least and largest weight of a class or tenant.
pub const WEIGHTS: std::ops::RangeInclusive<f32> = 0.001..=1000.0;

/// One pool at one moment: the workers of one model and role, and what waits for them.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolState {
    /// Key of model and role, equal on every host.
    pub key: u64,
    /// What its workers do.
    pub role: Role,
    /// Workers that accept requests.
    pub ready_workers: u32,
    /// Requests that run.
    pub running_requests: u32,
    /// Requests that could be started at once; [`UNKNOWN`] where nothing limits them.
    pub free_requests: u32,
    /// Requests that wait in the host's queue.
    pub queued_requests: u32,
    /// Prompt tokens that wait in the host's queue.
    pub queued_tokens: u32,
    /// Age of the oldest waiting request in milliseconds; 0 if none waits.
    pub oldest_age_ms: u32,
    /// What the host predicts that the request would wait, in milliseconds; NaN if it cannot say.
    pub predicted_wait_ms: f32,
    /// Share of recent requests that were shed or refused, 0 to 1.
    pub shed_rate: f32,
    /// Recent times to first token.
    pub ttft: Quantiles,
    /// Recent times between tokens.
    pub itl: Quantiles,
}

/// Recent latencies: values at evenly spaced percentiles, from 0 to 100. Empty: nothing is known.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Quantiles(pub Arc<[f32]>);

impl Quantiles {
    /// The value at a percentile from 0 to 100, interpolated; NaN if nothing is known, or for what is no percentile.
    #[must_use]
    pub fn at(&self, percentile: f32) -> f32 {
        let Some(last) = self.0.len().checked_sub(1) else { return f32::NAN };
        if !(0.0..=100.0).contains(&percentile) {
            return f32::NAN;
        }
        let place = percentile / 100.0 * last as f32;
        let (low, high) = (self.0[place.floor() as usize], self.0[place.ceil() as usize]);
        low + (high - low) * place.fract()
    }
}

/// How a request was let in: its place in the queue's order.
#[derive(Clone, Debug, PartialEq)]
pub struct Admitted {
    /// Class, for fair sharing within a tier and as a metric label.
    pub class: Option<Arc<str>>,
    /// Strict tier: lower is served first.
    pub tier: u32,
    /// Share of service of its class among the classes of a tier.
    pub class_weight: f32,
    /// Share of service of its tenant among the tenants of a class.
    pub tenant_weight: f32,
    /// Within the tenant: higher is sooner.
    pub priority: f32,
    /// Milliseconds from now after which it must not wait any more; `None`: the host's bound.
    pub deadline_ms: Option<u32>,
}

impl Admitted {
    /// How a request is let in of which nothing else is said: by its own priority.
    #[must_use]
    pub fn of(request: &RequestFacts) -> Self {
        Self { priority: request.priority as f32, ..Self::default() }
    }
}

impl Default for Admitted {
    fn default() -> Self {
        Self { class: None, tier: 0, class_weight: 1.0, tenant_weight: 1.0, priority: 0.0, deadline_ms: None }
    }
}

/// An answer of an admission policy that was checked.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Let it in.
    Admit(Admitted),
    /// An error for the client.
    Shed(Rejection),
}

/// What a policy said, as it said it.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// Let it in.
    Admit,
    /// An error for the client.
    Shed(Rejection),
}

/// An answer that cannot be carried out.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum AnswerFault {
    /// The policy returned without an answer.
    #[error("it returned without an answer; call admit or shed before returning")]
    NoAnswer,
    /// It named a class that cannot be a metric label.
    #[error("it named the class {class:?}; a class has 1 to {MAX_CLASS_BYTES} letters, digits, `.`, `_` or `-`")]
    Class {
        /// The class, cut.
        class: String,
    },
    /// It named a tier that does not exist.
    #[error("it chose tier {tier}; there are 0 to {last}, 0 served first", last = TIERS - 1)]
    Tier {
        /// The tier.
        tier: u32,
    },
    /// It gave a weight that is out of bounds or no number.
    #[error("it gave the {of} a weight of {weight}; a weight is from {} to {}", WEIGHTS.start(), WEIGHTS.end())]
    Weight {
        /// Class or tenant.
        of: &'static str,
        /// The weight.
        weight: f32,
    },
    /// It gave a priority that is no number.
    #[error("it gave a priority of {priority}; a priority is a finite number")]
    Priority {
        /// The priority.
        priority: f32,
    },
    /// It gave a deadline that has passed.
    #[error("it gave a deadline of 0 ms from now; give at least 1, or shed the request")]
    Deadline,
    /// It shed with a status that is not an error.
    #[error("it shed the request with status {status}; that takes 400 to 599")]
    Status {
        /// The status.
        status: u16,
    },
}

impl AnswerFault {
    /// Metric label of the cause.
    #[must_use]
    pub fn cause(&self) -> &'static str {
        match self {
            Self::NoAnswer => "no-answer",
            Self::Class { .. } => "answer-class",
            Self::Tier { .. } => "answer-tier",
            Self::Weight { .. } => "answer-weight",
            Self::Priority { .. } => "answer-priority",
            Self::Deadline => "answer-deadline",
            Self::Status { .. } => "answer-status",
        }
    }
}

/// Checks an answer; `admitted` is where the request stands if it is let in. A longer [`Rejection::retry_after_ms`] than
/// [`MAX_RETRY_AFTER_MS`] is left to the caller.
///
/// # Errors
/// Says what is wrong with it.
pub fn validate(answer: Option<Answer>, admitted: Admitted) -> Result<Verdict, AnswerFault> {
    match answer.ok_or(AnswerFault::NoAnswer)? {
        Answer::Admit => admitted.check().map(Verdict::Admit),
        Answer::Shed(rejection) if (400..600).contains(&rejection.status) => Ok(Verdict::Shed(rejection)),
        Answer::Shed(rejection) => Err(AnswerFault::Status { status: rejection.status }),
    }
}

impl Admitted {
    fn check(self) -> Result<Self, AnswerFault> {
        if let Some(class) = self.class.as_deref().filter(|class| !is_class(class)) {
            let cut = class.floor_char_boundary(MAX_CLASS_BYTES);
            return Err(AnswerFault::Class { class: class[..cut].to_owned() });
        }
        if self.tier >= TIERS {
            return Err(AnswerFault::Tier { tier: self.tier });
        }
        for (of, weight) in [("class", self.class_weight), ("tenant", self.tenant_weight)] {
            if !is_weight(weight) {
                return Err(AnswerFault::Weight { of, weight });
            }
        }
        if !self.priority.is_finite() {
            return Err(AnswerFault::Priority { priority: self.priority });
        }
        if self.deadline_ms == Some(0) {
            return Err(AnswerFault::Deadline);
        }
        Ok(self)
    }
}

/// Whether a class may be used: a name that is safe as a metric label.
#[must_use]
pub fn is_class(class: &str) -> bool {
    let is_safe = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=MAX_CLASS_BYTES).contains(&class.len()) && class.bytes().all(is_safe)
}

/// Whether a weight may be used. NaN may not.
#[must_use]
pub fn is_weight(weight: f32) -> bool {
    WEIGHTS.contains(&weight)
}

/// A free amount, as the contract has it.
#[must_use]
pub fn free(amount: Option<u32>) -> u32 {
    amount.map_or(UNKNOWN, |amount| amount.min(UNKNOWN - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_lies_between_its_neighbours_and_nothing_is_known_of_nothing() {
        let quantiles = Quantiles([0.0, 10.0, 20.0, 30.0, 1000.0].into());
        assert_eq!([0.0, 50.0, 62.5, 100.0].map(|at| quantiles.at(at)), [0.0, 20.0, 25.0, 1000.0]);
        for nothing in [quantiles.at(-1.0), quantiles.at(f32::NAN), quantiles.at(101.0), Quantiles::default().at(50.0)] {
            assert!(nothing.is_nan());
        }
    }

    #[track_caller]
    fn check(admitted: Admitted, expected: Result<(), &str>) {
        let checked = validate(Some(Answer::Admit), admitted);
        assert_eq!(checked.as_ref().map(|_| ()).map_err(AnswerFault::cause), expected);
    }

    #[test]
    fn whoever_is_let_in_has_a_class_a_tier_and_weights_that_a_queue_can_work_with() {
        let plain = Admitted::default;
        check(plain(), Ok(()));
        for class in ["batch", "team-7_b.x", &"x".repeat(64)] {
            check(Admitted { class: Some(class.into()), ..plain() }, Ok(()));
        }
        for class in ["", "a b", "a\"b", "\n", "é", &"x".repeat(65), &"é".repeat(1000)] {
            check(Admitted { class: Some(class.into()), ..plain() }, Err("answer-class"));
        }
        check(Admitted { tier: 15, ..plain() }, Ok(()));
        check(Admitted { tier: 16, ..plain() }, Err("answer-tier"));
        for weight in [0.0, -1.0, 1001.0, f32::INFINITY, f32::NAN] {
            check(Admitted { class_weight: weight, ..plain() }, Err("answer-weight"));
            check(Admitted { tenant_weight: weight, ..plain() }, Err("answer-weight"));
        }
        check(Admitted { priority: f32::NAN, ..plain() }, Err("answer-priority"));
        check(Admitted { deadline_ms: Some(0), ..plain() }, Err("answer-deadline"));
        check(Admitted { class_weight: 1000.0, tenant_weight: 0.001, priority: -3.5, deadline_ms: Some(1), ..plain() }, Ok(()));
    }

    #[test]
    fn whoever_is_shed_gets_an_error_wherever_it_would_have_stood() {
        let shed = |status| Some(Answer::Shed(Rejection { status, retry_after_ms: None, reason: String::new() }));
        let nonsense = Admitted { tier: 99, ..Admitted::default() };
        assert!(matches!(validate(shed(429), nonsense.clone()), Ok(Verdict::Shed(Rejection { status: 429, .. }))));
        for status in [0, 200, 399, 600] {
            assert_eq!(validate(shed(status), nonsense.clone()), Err(AnswerFault::Status { status }));
        }
        assert_eq!(validate(None, nonsense), Err(AnswerFault::NoAnswer));
    }
}
