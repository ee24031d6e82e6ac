//! Two-tier: cache while loads are even, load while they are not; the rule of SGLang's cache-aware router.
//!
//! Loads are uneven when the busiest worker has both `balance_abs_threshold` requests and `balance_rel_threshold` times
//! more than the idlest: then the shortest queue is first. While they are even, the worker with the longest prefix is
//! first if it holds more than `cache_threshold` of the prompt, else the one with the most room for it: the least
//! context under way.
//!
//! Where it differs from SGLang: overlap is what engines hold, not a guess from text that was sent to them.

use dynamo_policy_sdk::{
    Candidates, Decision, Request, Router, UNKNOWN, explain, rank,
    schemars::{self, JsonSchema},
    serde::{self, Deserialize},
};

/// What an operator can set. Names are SGLang's, and so are the defaults.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
#[schemars(crate = "schemars")]
pub struct Settings {
    /// Share of the prompt, from 0 to 1, above which a worker's prefix decides.
    pub cache_threshold: f32,
    /// Requests by which the busiest worker has to be ahead of the idlest before load decides.
    pub balance_abs_threshold: u32,
    /// Times the idlest worker's requests that the busiest has to have before load decides, at least 1.
    pub balance_rel_threshold: f32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { cache_threshold: 0.3, balance_abs_threshold: 64, balance_rel_threshold: 1.5 }
    }
}

/// The policy.
pub struct TwoTier {
    settings: Settings,
}

impl Router for TwoTier {
    type Settings = Settings;

    fn new(settings: Settings) -> Result<Self, String> {
        let Settings { cache_threshold, balance_rel_threshold, .. } = settings;
        if !(0.0..=1.0).contains(&cache_threshold) {
            return Err(format!("cache_threshold is {cache_threshold}; use a number from 0 to 1"));
        }
        if !(balance_rel_threshold.is_finite() && balance_rel_threshold >= 1.0) {
            return Err(format!("balance_rel_threshold is {balance_rel_threshold}; use a number of at least 1"));
        }
        Ok(Self { settings })
    }

    fn route(&self, request: &Request, candidates: &Candidates) -> Decision {
        let requests = candidates.active_requests();
        explain("requests", || requests.iter().map(|&requests| requests as f32).collect());
        if self.is_uneven(requests) {
            return rank::lowest(requests.iter().map(|&requests| requests as f32));
        }
        let cached = candidates.cached_device_tokens();
        explain("cached_tokens", || cached.iter().map(|&tokens| known(tokens) as f32).collect());
        let longest = cached.iter().map(|&tokens| known(tokens)).max().unwrap_or(0);
        if longest as f32 > self.settings.cache_threshold * known(request.prompt_tokens()) as f32 {
            return by_prefix(cached, requests);
        }
        rank::lowest(context(candidates))
    }
}

impl TwoTier {
    fn is_uneven(&self, requests: &[u32]) -> bool {
        let (least, most) =
            requests.iter().fold((u32::MAX, 0), |(least, most), &requests| (requests.min(least), requests.max(most)));
        most.saturating_sub(least) > self.settings.balance_abs_threshold
            && most as f32 > least as f32 * self.settings.balance_rel_threshold
    }
}

/// The longest prefix first; of equals, the shortest queue.
fn by_prefix(cached: &[u32], requests: &[u32]) -> Decision {
    // Less than a token of difference in all: requests order equals only.
    let busiest = requests.iter().copied().max().unwrap_or(0) as f32 + 1.0;
    let order = |(&cached, &requests): (&u32, &u32)| requests as f32 / busiest - known(cached) as f32;
    rank::lowest(cached.iter().zip(requests).map(order))
}

/// Tokens of context under way on each worker: what its cache cannot be used for.
fn context(candidates: &Candidates) -> impl Iterator<Item = f32> {
    let prefill = candidates.active_prefill_tokens();
    candidates.active_decode_tokens().iter().zip(prefill).map(|(&decode, &prefill)| decode as f32 + prefill as f32)
}

/// 0 for what is unknown: an overlap that nobody knows of is none.
fn known(tokens: u32) -> u32 {
    if tokens == UNKNOWN { 0 } else { tokens }
}

dynamo_policy_sdk::register!(TwoTier);

#[cfg(test)]
mod tests {
    use super::*;

    fn fleet(requests: &[u32], cached: &[u32], decode: &[u32]) -> Candidates {
        Candidates::test(requests.len() as u32)
            .with_active_requests(requests)
            .with_cached_device_tokens(cached)
            .with_active_decode_tokens(decode)
            .with_active_prefill_tokens(vec![0; requests.len()])
    }

    fn first(candidates: &Candidates) -> u32 {
        let policy = TwoTier::new(Settings::default()).unwrap();
        match policy.route(&Request::test().with_prompt_tokens(1000), candidates) {
            Decision::Place(rows) => rows[0],
            other => panic!("not placed: {other:?}"),
        }
    }

    #[test]
    fn the_longest_prefix_is_first_while_loads_are_even() {
        assert_eq!(first(&fleet(&[0, 60, 20], &[0, 900, 500], &[0; 3])), 1);
        assert_eq!(first(&fleet(&[9, 60, 20], &[0, 900, 900], &[0; 3])), 2, "of equals, the shorter queue");
    }

    #[test]
    fn a_short_prefix_does_not_count_but_room_does() {
        assert_eq!(first(&fleet(&[3, 2, 1], &[0, 300, 0], &[10, 20, 30])), 0);
    }

    #[test]
    fn uneven_loads_go_to_the_shortest_queue() {
        assert_eq!(first(&fleet(&[100, 30, 31], &[900, 0, 0], &[0; 3])), 1);
        assert_eq!(first(&fleet(&[200, 140, 150], &[900, 0, 0], &[0; 3])), 0, "ahead by 60 requests, but not by half");
    }

    #[test]
    fn nothing_known_is_still_an_answer() {
        let policy = TwoTier::new(Settings::default()).unwrap();
        let Decision::Place(rows) = policy.route(&Request::test(), &Candidates::test(20)) else { panic!("not placed") };
        assert_eq!(rows.len(), 16);
    }

    #[test]
    fn a_setting_that_makes_no_sense_is_refused_by_name() {
        let error = |settings| TwoTier::new(settings).err().unwrap();
        let threshold = Settings { cache_threshold: 1.5, ..Settings::default() };
        assert_eq!(error(threshold), "cache_threshold is 1.5; use a number from 0 to 1");
        let balance = Settings { balance_rel_threshold: 0.9, ..Settings::default() };
        assert_eq!(error(balance), "balance_rel_threshold is 0.9; use a number of at least 1");
    }
}
