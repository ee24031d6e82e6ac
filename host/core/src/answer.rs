//! Answers: what a routing policy said, and whether it may be done.

use std::time::Duration;

/// Rows that a ranking holds at most.
pub const MAX_RANKED: usize = 16;

/// How often a policy may hold one request.
pub const MAX_HOLDS: u32 = 8;

/// For how long at a time.
pub const MAX_HOLD: Duration = Duration::from_secs(2);

/// What a policy said, as it said it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Rows, best first.
    Place(Vec<u32>),
    /// Pairs of rows (prefill, decode), best first.
    PlaceDisaggregated(Vec<(u32, u32)>),
    /// Ask again later.
    Hold {
        /// After this time at the latest.
        at_most_ms: u32,
    },
    /// An error for the client.
    Reject(Rejection),
}

/// An answer that was checked against the candidates: it can be carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Send it to the first of these that takes it.
    Place(Ranking),
    /// Ask again later.
    Hold {
        /// After this time at the latest.
        at_most_ms: u32,
    },
    /// An error for the client.
    Reject(Rejection),
}

/// 1 to [`MAX_RANKED`] different rows of a candidate set, best first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranking(Vec<u32>);

impl Ranking {
    /// Checks rows against a set of `count` candidates.
    ///
    /// # Errors
    /// Says what is wrong with the first wrong row.
    pub fn new(rows: Vec<u32>, count: u32) -> Result<Self, AnswerFault> {
        if rows.is_empty() {
            return Err(AnswerFault::Empty);
        }
        if rows.len() > MAX_RANKED {
            return Err(AnswerFault::TooMany { rows: rows.len() });
        }
        for (i, &row) in rows.iter().enumerate() {
            if row >= count {
                return Err(AnswerFault::OutOfRange { row, count });
            }
            if rows[..i].contains(&row) {
                return Err(AnswerFault::Duplicate { row });
            }
        }
        Ok(Self(rows))
    }

    /// The rows, best first.
    #[must_use]
    pub fn rows(&self) -> &[u32] {
        &self.0
    }
}

/// An error that a policy wants the client to get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// HTTP status, 400 to 599.
    pub status: u16,
    /// When to try again.
    pub retry_after_ms: Option<u32>,
    /// For the client, in the error's message.
    pub reason: String,
}

/// An answer that cannot be carried out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnswerFault {
    /// The policy returned without an answer.
    #[error("it returned without an answer; call place, hold or reject before returning")]
    NoAnswer,
    /// It placed on no row.
    #[error("it placed the request on an empty list of rows; name at least one row, or use hold or reject")]
    Empty,
    /// It ranked too many rows.
    #[error("it ranked {rows} rows; at most {MAX_RANKED} are accepted")]
    TooMany {
        /// How many.
        rows: usize,
    },
    /// It named a row that does not exist.
    #[error("it placed the request on row {row}, but there are {count} candidates (rows 0 to {last})", last = count - 1)]
    OutOfRange {
        /// The row.
        row: u32,
        /// Rows that exist.
        count: u32,
    },
    /// It named a row twice.
    #[error("it ranked row {row} twice")]
    Duplicate {
        /// The row.
        row: u32,
    },
    /// It rejected with a status that is not an error.
    #[error("it rejected the request with status {status}; a rejection takes 400 to 599")]
    Status {
        /// The status.
        status: u16,
    },
    /// It answered with what this host or stage cannot do.
    #[error("it used place-disaggregated, which this host does not carry out yet; use place")]
    Unsupported,
}

impl AnswerFault {
    /// Metric label of the cause.
    #[must_use]
    pub fn cause(&self) -> &'static str {
        match self {
            Self::NoAnswer => "no-answer",
            Self::Empty => "answer-empty",
            Self::TooMany { .. } => "answer-too-many",
            Self::OutOfRange { .. } => "answer-out-of-range",
            Self::Duplicate { .. } => "answer-duplicate",
            Self::Status { .. } => "answer-status",
            Self::Unsupported => "answer-unsupported",
        }
    }
}

/// Checks an answer against `count` candidates.
///
/// # Errors
/// Says what is wrong with it.
pub fn validate(answer: Option<Answer>, count: u32) -> Result<Verdict, AnswerFault> {
    match answer.ok_or(AnswerFault::NoAnswer)? {
        Answer::Place(rows) => Ranking::new(rows, count).map(Verdict::Place),
        Answer::PlaceDisaggregated(_) => Err(AnswerFault::Unsupported),
        Answer::Hold { at_most_ms } => Ok(Verdict::Hold { at_most_ms }),
        Answer::Reject(rejection) if (400..600).contains(&rejection.status) => Ok(Verdict::Reject(rejection)),
        Answer::Reject(rejection) => Err(AnswerFault::Status { status: rejection.status }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(rows: &[u32], count: u32, expected: Result<(), &str>) {
        let result = validate(Some(Answer::Place(rows.to_vec())), count);
        assert_eq!(result.as_ref().map(|_| ()).map_err(AnswerFault::cause), expected);
    }

    #[test]
    fn a_placing_is_one_to_sixteen_different_rows_that_exist() {
        check(&[0], 1, Ok(()));
        check(&[3, 1, 2], 4, Ok(()));
        check(&(0..16).collect::<Vec<_>>(), 16, Ok(()));
        check(&[], 4, Err("answer-empty"));
        check(&[4], 4, Err("answer-out-of-range"));
        check(&[u32::MAX], 4, Err("answer-out-of-range"));
        check(&[1, 2, 1], 4, Err("answer-duplicate"));
        check(&(0..17).collect::<Vec<_>>(), 32, Err("answer-too-many"));
    }

    #[test]
    fn a_rejection_must_be_an_error_status() {
        let reject =
            |status| validate(Some(Answer::Reject(Rejection { status, retry_after_ms: None, reason: String::new() })), 1);
        assert!(reject(429).is_ok());
        assert_eq!(reject(200), Err(AnswerFault::Status { status: 200 }));
        assert_eq!(validate(None, 1), Err(AnswerFault::NoAnswer));
    }
}
