//! Least-loaded: the worker with the least work in flight, in tokens.
//!
//! Work is what the host knows at once, without asking an engine: prompt tokens still to compute, context tokens that
//! decode, and a fixed cost per request. Ties are broken at random, so that equal workers share.

use dynamo_policy_sdk::{
    Candidates, Decision, Request, Router, rank,
    schemars::{self, JsonSchema},
    serde::{self, Deserialize},
};

/// What an operator can set.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
#[schemars(crate = "schemars")]
pub struct Settings {
    /// Cost of a prompt token that is still to be computed.
    pub prefill_token: f64,
    /// Cost of a context token of a request that decodes.
    pub decode_token: f64,
    /// Cost of a request as such.
    pub request: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { prefill_token: 1.0, decode_token: 0.1, request: 64.0 }
    }
}

/// The policy.
pub struct LeastLoaded {
    settings: Settings,
}

impl Router for LeastLoaded {
    type Settings = Settings;

    fn new(settings: Settings) -> Result<Self, String> {
        let weights =
            [("prefill_token", settings.prefill_token), ("decode_token", settings.decode_token), ("request", settings.request)];
        for (name, weight) in weights {
            if !(weight.is_finite() && weight >= 0.0) {
                return Err(format!("{name} is {weight}; use a number of at least 0"));
            }
        }
        Ok(Self { settings })
    }

    fn route(&self, _: &Request, candidates: &Candidates) -> Decision {
        let [prefill_token, decode_token, request] =
            [self.settings.prefill_token, self.settings.decode_token, self.settings.request].map(|weight| weight as f32);
        let prefill = candidates.active_prefill_tokens();
        let decode = candidates.active_decode_tokens();
        let requests = candidates.active_requests();
        rank::lowest(prefill.iter().zip(decode).zip(requests).map(|((&prefill, &decode), &requests)| {
            prefill as f32 * prefill_token + decode as f32 * decode_token + requests as f32 * request
        }))
    }
}

dynamo_policy_sdk::register!(LeastLoaded);

#[cfg(test)]
mod tests {
    use super::*;

    fn idle(count: u32) -> Candidates {
        let zeros = vec![0; count as usize];
        Candidates::test(count)
            .with_active_prefill_tokens(zeros.clone())
            .with_active_decode_tokens(zeros.clone())
            .with_active_requests(zeros)
    }

    fn route(candidates: &Candidates) -> Decision {
        LeastLoaded::new(Settings::default()).unwrap().route(&Request::test(), candidates)
    }

    #[test]
    fn the_worker_with_the_least_work_is_first() {
        let busy = idle(3).with_active_requests([2, 1, 1]).with_active_prefill_tokens([0, 0, 500]);
        assert_eq!(route(&busy), Decision::Place(vec![1, 0, 2]));
    }

    #[test]
    fn a_long_prefill_outweighs_some_short_requests() {
        let busy = idle(2).with_active_requests([1, 3]).with_active_prefill_tokens([8000, 0]);
        assert_eq!(route(&busy), Decision::Place(vec![1, 0]));
    }

    #[test]
    fn equal_workers_are_not_always_taken_in_the_same_order() {
        let idle = idle(8);
        let first = route(&idle);
        assert!((0..20).any(|_| route(&idle) != first));
    }

    #[test]
    fn a_negative_weight_is_refused_by_name() {
        let error = LeastLoaded::new(Settings { request: -1.0, ..Settings::default() }).err().unwrap();
        assert_eq!(error, "request is -1; use a number of at least 0");
    }
}
