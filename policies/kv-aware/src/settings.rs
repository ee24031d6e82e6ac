//! Settings: Dynamo's router configuration, as far as it is about the cost.

use dynamo_policy_sdk::{
    schemars::{self, JsonSchema},
    serde::{self, Deserialize},
};

/// What an operator can set. Names and defaults are Dynamo's.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
#[schemars(crate = "schemars")]
pub struct Settings {
    /// What a block counts that the worker holds in device memory, from 0 (cache is ignored) on; 1 is a block computed.
    pub overlap_score_credit: f32,
    /// How fast that falls with the worker's prefill beyond the least loaded worker's, in lengths of the prompt; 0: not at all.
    pub overlap_score_credit_decay: f32,
    /// What a further block counts that the worker can load from host memory.
    pub host_cache_hit_weight: f32,
    /// What a further block counts that the worker can load from disk.
    pub disk_cache_hit_weight: f32,
    /// What a further block counts that the worker can load from a shared or remote store.
    pub shared_cache_multiplier: f32,
    /// What a block of prefill counts against a block of context.
    pub prefill_load_scale: f32,
    /// What a request in flight counts, in blocks.
    pub decode_active_request_weight: f32,
    /// 0 takes the lowest cost; above, workers are drawn by the softmax of costs, normalised to their range, over this.
    pub router_temperature: f32,
    /// Whether prefill counts, this request's and what the worker has to do before.
    pub router_track_prefill_tokens: bool,
    /// Whether the context of requests in flight counts.
    pub router_track_active_blocks: bool,
    /// Attribute of a request that overrides settings for it, such as `overlap_score_credit=0.5,router_temperature=0.2`:
    /// a header that the operator allows. Without it there is no override.
    pub override_attribute: Option<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            overlap_score_credit: 1.0,
            overlap_score_credit_decay: 0.0,
            host_cache_hit_weight: 0.75,
            disk_cache_hit_weight: 0.25,
            shared_cache_multiplier: 0.0,
            prefill_load_scale: 1.0,
            decode_active_request_weight: 0.0,
            router_temperature: 0.0,
            router_track_prefill_tokens: true,
            router_track_active_blocks: true,
            override_attribute: None,
        }
    }
}

impl Settings {
    /// # Errors
    /// Names the first setting that makes no sense, and what is accepted.
    pub(crate) fn check(&self) -> Result<(), String> {
        let weights = [
            ("overlap_score_credit", self.overlap_score_credit),
            ("overlap_score_credit_decay", self.overlap_score_credit_decay),
            ("host_cache_hit_weight", self.host_cache_hit_weight),
            ("disk_cache_hit_weight", self.disk_cache_hit_weight),
            ("shared_cache_multiplier", self.shared_cache_multiplier),
            ("prefill_load_scale", self.prefill_load_scale),
            ("decode_active_request_weight", self.decode_active_request_weight),
            ("router_temperature", self.router_temperature),
        ];
        for (name, weight) in weights {
            if !(weight.is_finite() && weight >= 0.0) {
                return Err(format!("{name} is {weight}; use a number of at least 0"));
            }
        }
        if self.override_attribute.as_deref() == Some("") {
            return Err("override_attribute is empty; name a request attribute, or leave it out".to_owned());
        }
        Ok(())
    }
}
