//! Then and now: how a receipt's decision is put to a candidate policy, and how the two compare.

use dynamo_host_core::{Role, Stage, answer::Verdict};
use dynamo_host_policy::{PolicyFault, RouteCall};

use crate::receipts::{Choice, DecisionLine, Hex};

/// What the candidate policy is shown of a receipt's decision.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Shown {
    /// What who decided then was shown.
    AsThen,
    /// Where the request begins: it does not tell roles apart, and who decided then did.
    Beginning,
    /// Less than it would be in a host: it tells roles apart, and who decided then did not.
    Less,
}

impl Shown {
    /// To a policy that tells roles apart or does not.
    pub(super) fn of(line: &DecisionLine, tells_roles_apart: bool) -> Self {
        let stage = line.facts.stage.as_deref();
        let roles = line.roles();
        let has = |is: fn(Role) -> bool| roles.iter().any(|&role| is(role));
        let are_mixed = |of: Role| roles.contains(&of) && roles.iter().any(|&role| role != of);
        match tells_roles_apart {
            false if stage.is_none() && are_mixed(Role::Decode) => Self::Beginning,
            true if stage == Some(Stage::Prefill.label()) => Self::Less,
            // Who only prefills is a candidate where somebody decodes.
            true if stage.is_none() && are_mixed(Role::Prefill) && !has(Role::decodes) => Self::Less,
            _ => Self::AsThen,
        }
    }
}

/// How a decision compares with the recorded one.
pub(super) struct Comparison {
    /// How they differ, if they do.
    pub(super) cause: Option<&'static str>,
    pub(super) in_top: bool,
    pub(super) choices: Vec<Choice>,
}

/// Compares what was decided now with the first `top` choices of then.
pub(super) fn compare(line: &DecisionLine, call: &RouteCall, decided: Result<&Verdict, &PolicyFault>, top: u32) -> Comparison {
    let differs = |cause| Comparison { cause: Some(cause), in_top: false, choices: Vec::new() };
    let id = |row: u32| Hex(call.candidates.worker(row).id.0);
    let choices: Vec<Choice> = match decided {
        Err(_) => return differs("the candidate failed"),
        Ok(Verdict::Hold { .. }) => return differs("the candidate holds the request"),
        Ok(Verdict::Reject(_)) => return differs("the candidate rejects the request"),
        Ok(Verdict::PlacePairs(pairs)) => pairs.iter().map(|&(one, other)| Choice::Pair(id(one), id(other))).collect(),
        Ok(Verdict::Place(ranking)) => ranking.rows().iter().map(|&row| Choice::One(id(row))).collect(),
    };
    let recorded = line.choices();
    let in_top = recorded.iter().take(top as usize).any(|choice| *choice == choices[0]);
    let cause = (choices[0] != recorded[0]).then(|| difference(line, &recorded, choices[0]));
    Comparison { cause, in_top, choices }
}

/// How a first choice differs from the recorded one.
fn difference(line: &DecisionLine, recorded: &[Choice], now: Choice) -> &'static str {
    let score = |worker| line.score_of(worker).map(|(_, score)| score.to_bits());
    match (recorded[0], now) {
        (Choice::One(_), Choice::Pair(..)) => "prefill and decode fixed at once, not one worker",
        (Choice::Pair(..), Choice::One(_)) => "one worker, not prefill and decode fixed at once",
        (Choice::Pair(then, _), Choice::Pair(prefill, _)) if then == prefill => "another worker to decode",
        (Choice::Pair(_, then), Choice::Pair(_, decode)) if then == decode => "another worker to prefill",
        (Choice::Pair(..), Choice::Pair(..)) => "other workers to prefill and to decode",
        (Choice::One(then), Choice::One(now)) if score(now).is_some() && score(now) == score(then) => {
            "a worker of the same score"
        }
        _ if recorded.contains(&now) => "another worker of the recorded ranking",
        _ => "a worker that the recorded ranking has not",
    }
}

#[cfg(test)]
mod tests;
