//! Answers: what a routing policy said, and whether it may be done.

use std::time::Duration;

use crate::{request::Stage, worker::Role};

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
    /// Prefill and decode on the first of these pairs (prefill, decode) that takes it: 1 to [`MAX_RANKED`] different ones.
    PlacePairs(Vec<(u32, u32)>),
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
    /// It placed a pair where one worker is asked for.
    #[error("it used place-disaggregated in the stage {}, where one worker is asked for; use place", stage.label())]
    NoPairs {
        /// The stage.
        stage: Stage,
    },
    /// It gave a worker of a pair what that does not do.
    #[error("it gave {part} to row {row}, whose role is {role}; see candidates.role")]
    Role {
        /// `prefill` or `decode`.
        part: &'static str,
        /// The row.
        row: u32,
        /// What it does.
        role: Role,
    },
    /// It gave both parts to one worker.
    #[error("it gave prefill and decode to the same row {row}; use place for whole requests")]
    Same {
        /// The row.
        row: u32,
    },
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
            Self::NoPairs { .. } => "answer-no-pairs",
            Self::Role { .. } => "answer-role",
            Self::Same { .. } => "answer-same-row",
        }
    }
}

/// Checks an answer against `count` candidates of these roles, in a stage.
///
/// # Errors
/// Says what is wrong with it.
pub fn validate(answer: Option<Answer>, stage: Stage, count: u32, role: impl Fn(u32) -> Role) -> Result<Verdict, AnswerFault> {
    match answer.ok_or(AnswerFault::NoAnswer)? {
        Answer::Place(rows) => Ranking::new(rows, count).map(Verdict::Place),
        Answer::PlaceDisaggregated(_) if stage != Stage::Whole => Err(AnswerFault::NoPairs { stage }),
        Answer::PlaceDisaggregated(pairs) => check_pairs(&pairs, count, role).map(|()| Verdict::PlacePairs(pairs)),
        Answer::Hold { at_most_ms } => Ok(Verdict::Hold { at_most_ms }),
        Answer::Reject(rejection) if (400..600).contains(&rejection.status) => Ok(Verdict::Reject(rejection)),
        Answer::Reject(rejection) => Err(AnswerFault::Status { status: rejection.status }),
    }
}

fn check_pairs(pairs: &[(u32, u32)], count: u32, role: impl Fn(u32) -> Role) -> Result<(), AnswerFault> {
    if pairs.is_empty() {
        return Err(AnswerFault::Empty);
    }
    if pairs.len() > MAX_RANKED {
        return Err(AnswerFault::TooMany { rows: pairs.len() });
    }
    for (i, &(prefill, decode)) in pairs.iter().enumerate() {
        if let Some(row) = [prefill, decode].into_iter().find(|&row| row >= count) {
            return Err(AnswerFault::OutOfRange { row, count });
        }
        if prefill == decode {
            return Err(AnswerFault::Same { row: prefill });
        }
        for (part, row, does) in [("prefill", prefill, role(prefill).prefills()), ("decode", decode, role(decode).decodes())] {
            if !does {
                return Err(AnswerFault::Role { part, row, role: role(row) });
            }
        }
        if pairs[..i].contains(&(prefill, decode)) {
            return Err(AnswerFault::Duplicate { row: prefill });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of_stage(answer: Option<Answer>, stage: Stage, count: u32) -> Result<Verdict, AnswerFault> {
        const ROLES: [Role; 4] = [Role::Prefill, Role::Decode, Role::Both, Role::Aggregated];
        super::validate(answer, stage, count, |row| ROLES[row as usize % 4])
    }

    fn validate(answer: Option<Answer>, count: u32) -> Result<Verdict, AnswerFault> {
        of_stage(answer, Stage::Whole, count)
    }

    #[test]
    fn a_pair_is_two_workers_that_do_their_parts_and_is_placed_for_whole_requests() {
        let place =
            |pairs: &[(u32, u32)]| validate(Some(Answer::PlaceDisaggregated(pairs.to_vec())), 4).map_err(|fault| fault.cause());
        for pairs in [&[(0, 1)][..], &[(0, 2), (2, 1), (0, 1)]] {
            assert_eq!(place(pairs), Ok(Verdict::PlacePairs(pairs.to_vec())));
        }
        assert_eq!(place(&[]), Err("answer-empty"));
        assert_eq!(place(&[(0, 4)]), Err("answer-out-of-range"));
        assert_eq!(place(&[(2, 2)]), Err("answer-same-row"));
        assert_eq!(place(&[(1, 2)]), Err("answer-role"));
        assert_eq!(place(&[(0, 3)]), Err("answer-role"));
        assert_eq!(place(&[(0, 1), (0, 1)]), Err("answer-duplicate"));
        let decode = of_stage(Some(Answer::PlaceDisaggregated(vec![(0, 1)])), Stage::Decode, 4);
        assert_eq!(decode, Err(AnswerFault::NoPairs { stage: Stage::Decode }));
    }

    proptest! {
        /// Whatever a policy says: what passes can be carried out, as it was said.
        #[test]
        fn what_passes_can_be_carried_out(
            pairs in proptest::collection::vec((0..8u32, 0..8u32), 0..20),
            rows in proptest::collection::vec(0..8u32, 0..20),
            roles in proptest::collection::vec(0..4usize, 1..8),
            stage in 0..3usize,
        ) {
            let count = roles.len() as u32;
            let role = |row: u32| Role::ALL[roles[row as usize]];
            let stage = Stage::ALL[stage];
            match super::validate(Some(Answer::PlaceDisaggregated(pairs.clone())), stage, count, role) {
                Ok(Verdict::PlacePairs(passed)) => {
                    prop_assert_eq!(&passed, &pairs);
                    prop_assert!(stage == Stage::Whole && (1..=MAX_RANKED).contains(&passed.len()));
                    for (i, &(prefill, decode)) in passed.iter().enumerate() {
                        prop_assert!(prefill < count && decode < count && prefill != decode);
                        prop_assert!(role(prefill).prefills() && role(decode).decodes());
                        prop_assert!(!passed[..i].contains(&(prefill, decode)));
                    }
                }
                Ok(other) => prop_assert!(false, "pairs became {other:?}"),
                Err(fault) => prop_assert!(fault.cause().starts_with("answer-")),
            }
            match super::validate(Some(Answer::Place(rows.clone())), stage, count, role) {
                Ok(Verdict::Place(ranking)) => {
                    prop_assert_eq!(ranking.rows(), &rows);
                    prop_assert!((1..=MAX_RANKED).contains(&rows.len()) && rows.iter().all(|&row| row < count));
                    prop_assert!(rows.iter().enumerate().all(|(i, row)| !rows[..i].contains(row)));
                }
                Ok(other) => prop_assert!(false, "a ranking became {other:?}"),
                Err(fault) => prop_assert!(fault.cause().starts_with("answer-")),
            }
        }
    }

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
