//! Dynamo's default routing cost over four pulled columns: what the sandbox is measured with against Dynamo's own native
//! selection. The rule is that of dynamo-kv-router 1.6.1 with its default settings, in tokens instead of blocks:
//! prefill still to compute (this prompt's uncached part included) plus context tokens that decode, lowest wins.

use dynamo_policy_sdk::{Candidates, Decision, NoSettings, Request, Router, UNKNOWN, rank};

/// The policy.
pub struct KvCost;

impl Router for KvCost {
    type Settings = NoSettings;

    fn new(_: NoSettings) -> Result<Self, String> {
        Ok(Self)
    }

    fn route(&self, request: &Request, candidates: &Candidates) -> Decision {
        let prompt = request.prompt_tokens();
        let columns = candidates
            .cached_device_tokens()
            .iter()
            .zip(candidates.active_prefill_tokens())
            .zip(candidates.active_decode_tokens())
            .zip(candidates.active_requests());
        rank::lowest(columns.map(|(((&cached, &prefill), &decode), &requests)| {
            let cached = if cached == UNKNOWN { 0 } else { cached };
            (prefill + prompt).saturating_sub(cached) as f32 + decode as f32 + requests as f32
        }))
    }
}

dynamo_policy_sdk::register!(KvCost);
