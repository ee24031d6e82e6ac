//! Round-robin: every worker in turn, whatever it has to do.
//!
//! The turn is kept in the host's state, so that all instances of the policy, and a later version of it, continue the
//! same sequence.

use std::time::Duration;

use dynamo_policy_sdk::{Candidates, Decision, NoSettings, Request, Router, entropy, state};

/// Rows that are ranked: the next in turn, and those after it should it not answer.
const RANKED: u32 = 16;

/// The policy.
pub struct RoundRobin;

impl Router for RoundRobin {
    type Settings = NoSettings;

    fn new(_: NoSettings) -> Result<Self, String> {
        Ok(Self)
    }

    fn route(&self, _: &Request, candidates: &Candidates) -> Decision {
        // Without state the turn is unknown: a random worker spreads as evenly as can be.
        let turn = state::add("turn", 1, Duration::ZERO).map_or_else(|_| entropy::next(), |turn| turn as u64);
        Decision::Place(from_turn(turn, candidates.count()))
    }
}

/// The row whose turn it is, and those that follow.
fn from_turn(turn: u64, count: u32) -> Vec<u32> {
    let first = (turn % u64::from(count)) as u32;
    (0..count.min(RANKED)).map(|step| (first + step) % count).collect()
}

dynamo_policy_sdk::register!(RoundRobin);

#[cfg(test)]
mod tests {
    use super::*;
    use dynamo_policy_sdk::{state::StateError, testing};

    #[test]
    fn every_worker_has_its_turn() {
        testing::reset();
        let policy = RoundRobin::new(NoSettings {}).unwrap();
        let mut hits = [0; 5];
        for _ in 0..50 {
            let Decision::Place(rows) = policy.route(&Request::test(), &Candidates::test(5)) else { panic!("not placed") };
            hits[rows[0] as usize] += 1;
        }
        assert_eq!(hits, [10; 5]);
    }

    #[test]
    fn without_state_the_load_is_spread_at_random() {
        testing::reset();
        testing::set_state_error(Some(StateError::QUOTA));
        let mut hits = [0; 4];
        for _ in 0..400 {
            let Decision::Place(rows) = RoundRobin.route(&Request::test(), &Candidates::test(4)) else { panic!("not placed") };
            hits[rows[0] as usize] += 1;
        }
        assert!(hits.iter().all(|hits| (50..150).contains(hits)), "{hits:?}");
    }

    #[test]
    fn the_ranking_goes_on_with_the_next_in_turn() {
        assert_eq!(from_turn(7, 3), [1, 2, 0]);
        assert_eq!(from_turn(u64::MAX, 1), [0]);
        assert_eq!(from_turn(99, 100)[..3], [99, 0, 1]);
        assert_eq!(from_turn(99, 100).len(), 16);
    }
}
