//! Power of two choices: the less loaded of two random workers.
//!
//! It is nearly as even as asking all of them (Mitzenmacher 2001), and unlike the least loaded of all it does not send every
//! host to the same worker when several hosts share a fleet and see its loads a moment late. Work is counted as
//! `least-loaded` does by default. Of the other workers some follow at random, for a request that has to go on.

use dynamo_policy_sdk::{
    Candidates, Decision, Request, Router, entropy,
    schemars::{self, JsonSchema},
    serde::{self, Deserialize},
};

/// Rows that a decision holds at most.
const MAX_RANKED: usize = 16;

/// What an operator can set.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
#[schemars(crate = "schemars")]
pub struct Settings {
    /// Random workers that are compared, from 1 (any worker at random) to 16.
    pub choices: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { choices: 2 }
    }
}

/// The policy.
pub struct PowerOfTwo {
    choices: usize,
}

impl Router for PowerOfTwo {
    type Settings = Settings;

    fn new(Settings { choices }: Settings) -> Result<Self, String> {
        if !(1..=16).contains(&choices) {
            return Err(format!("choices is {choices}; use a number from 1 to 16"));
        }
        Ok(Self { choices: choices as usize })
    }

    fn route(&self, _: &Request, candidates: &Candidates) -> Decision {
        let mut rows = draw(candidates.count());
        let compared = self.choices.min(rows.len());
        // A stable sort leaves equals in the order of the draw, which is random.
        rows[..compared].sort_by_key(|&row| work(candidates, row as usize));
        Decision::Place(rows)
    }
}

/// Work in flight, in tenths of a prompt token. Unknown is more than anything that is known.
fn work(candidates: &Candidates, row: usize) -> u64 {
    10 * u64::from(candidates.active_prefill_tokens()[row])
        + u64::from(candidates.active_decode_tokens()[row])
        + 640 * u64::from(candidates.active_requests()[row])
}

/// Up to 16 different rows in random order.
fn draw(count: u32) -> Vec<u32> {
    let wanted = MAX_RANKED.min(count as usize);
    let mut rows: Vec<u32> = Vec::with_capacity(wanted);
    // Floyd's sampling (Bentley 1987): as many draws as rows, whatever the size of the fleet.
    for last in count - wanted as u32..count {
        let row = below(last + 1);
        let at = below(rows.len() as u32 + 1) as usize;
        rows.insert(at, if rows.contains(&row) { last } else { row });
    }
    rows
}

/// A random number from 0 to `bound - 1`, by multiplication (Lemire 2019); at these sizes its bias is below one in a
/// billion.
fn below(bound: u32) -> u32 {
    ((u128::from(entropy::next()) * u128::from(bound)) >> 64) as u32
}

dynamo_policy_sdk::register!(PowerOfTwo);

#[cfg(test)]
mod tests {
    use super::*;

    fn fleet(requests: &[u32]) -> Candidates {
        let zeros = vec![0; requests.len()];
        Candidates::test(requests.len() as u32)
            .with_active_prefill_tokens(zeros.clone())
            .with_active_decode_tokens(zeros)
            .with_active_requests(requests)
    }

    fn route(policy: &PowerOfTwo, candidates: &Candidates) -> Vec<u32> {
        match policy.route(&Request::test(), candidates) {
            Decision::Place(rows) => rows,
            other => panic!("not placed: {other:?}"),
        }
    }

    fn policy(choices: u32) -> PowerOfTwo {
        PowerOfTwo::new(Settings { choices }).unwrap()
    }

    #[test]
    fn of_two_workers_the_less_loaded_is_always_first() {
        for _ in 0..100 {
            assert_eq!(route(&policy(2), &fleet(&[3, 1])), [1, 0]);
        }
    }

    #[test]
    fn the_most_loaded_is_never_first_and_each_other_sometimes_is() {
        let candidates = fleet(&[9, 1, 2, 3]);
        let mut firsts = [0; 4];
        for _ in 0..4000 {
            firsts[route(&policy(2), &candidates)[0] as usize] += 1;
        }
        assert_eq!(firsts[0], 0);
        // By the number of pairs in which a row is the lighter one: 3, 2 and 1 of 6.
        assert!(firsts[1] > firsts[2] && firsts[2] > firsts[3] && firsts[3] > 0, "{firsts:?}");
    }

    #[test]
    fn every_row_is_ranked_once_and_there_are_alternatives() {
        for count in [1, 2, 5, 16, 17, 1000] {
            let mut rows = route(&policy(2), &fleet(&vec![1; count]));
            assert_eq!(rows.len(), count.min(16));
            rows.sort_unstable();
            rows.dedup();
            assert_eq!(rows.len(), count.min(16), "of {count}");
            assert!(rows.iter().all(|&row| (row as usize) < count));
        }
    }

    #[test]
    fn draws_are_even_over_rows_and_places() {
        let mut firsts = [0u32; 40];
        for _ in 0..40_000 {
            firsts[draw(40)[0] as usize] += 1;
        }
        assert!(firsts.iter().all(|hits| (800..1200).contains(hits)), "{firsts:?}");
    }

    #[test]
    fn loads_become_far_more_even_than_by_chance() {
        // 4000 requests on 100 workers: by chance the fullest is some 20 above the mean, with two choices 3 or so.
        let fullest = |choices| {
            let mut requests = vec![0; 100];
            for _ in 0..4000 {
                let row = route(&policy(choices), &fleet(&requests))[0];
                requests[row as usize] += 1;
            }
            *requests.iter().max().unwrap()
        };
        assert!(fullest(2) <= 45 && fullest(1) > 48, "{} and {}", fullest(2), fullest(1));
    }

    #[test]
    fn an_unknown_load_is_not_taken_for_idle() {
        let unknown = fleet(&[5, 0]).with_active_requests([5, dynamo_policy_sdk::UNKNOWN]);
        assert_eq!(route(&policy(2), &unknown), [0, 1]);
    }

    #[test]
    fn a_number_of_choices_out_of_range_is_refused_by_name() {
        for choices in [0, 17] {
            assert!(PowerOfTwo::new(Settings { choices }).err().unwrap().starts_with(&format!("choices is {choices};")));
        }
    }
}
