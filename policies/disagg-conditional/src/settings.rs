//! Settings: the rules' thresholds, and what of the cost can be weighed.

use dynamo_policy_sdk::{
    schemars::{self, JsonSchema},
    serde::{self, Deserialize},
};

/// When the worker that decodes computes the prompt itself, unless it is busy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(crate = "serde", rename_all = "snake_case")]
#[schemars(crate = "schemars")]
pub enum Rule {
    /// Where little of the prompt is left to compute there: less than `local_below_tokens`, and less than `local_below_ratio` of it.
    #[default]
    IslBounding,
    /// Where the prefill worker is busy: it has more than `prefill_busy_above_tokens` to compute.
    PrefillLoad,
    /// Where either holds.
    IslOrLoad,
}

/// What an operator can set. The names of rules and of weights are Dynamo's.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
#[schemars(crate = "schemars")]
pub struct Settings {
    /// When the worker that decodes computes the prompt itself, unless it is busy.
    pub rule: Rule,
    /// Tokens of the prompt, without those that the decode worker holds, below which it may compute them itself.
    pub local_below_tokens: u32,
    /// Their share of the prompt, 0 to 1, below which it may; 1: whatever their share.
    pub local_below_ratio: f32,
    /// Tokens that a prefill worker has to compute, above which it is busy.
    pub prefill_busy_above_tokens: u32,
    /// Share of a decode worker's KV capacity in use, 0 to 1, above which it is busy.
    pub decode_busy_above_kv_ratio: f32,
    /// Tokens of context in flight above which it is busy, too; none: no such bound.
    pub decode_busy_above_tokens: Option<u32>,
    /// What a token counts that the worker holds, from 0 (cache is ignored) on; 1 is a token computed.
    pub overlap_score_credit: f32,
    /// What a further token counts that the worker can load from host memory.
    pub host_cache_hit_weight: f32,
    /// What a further token counts that the worker can load from disk.
    pub disk_cache_hit_weight: f32,
    /// What a further token counts that the worker can load from a shared or remote store.
    pub shared_cache_multiplier: f32,
    /// What a token of prefill counts against a token of context.
    pub prefill_load_scale: f32,
    /// What a request in flight counts, in tokens of context.
    pub active_request_weight_tokens: f32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            rule: Rule::IslBounding,
            local_below_tokens: 2048,
            local_below_ratio: 0.7,
            prefill_busy_above_tokens: 8192,
            decode_busy_above_kv_ratio: 0.9,
            decode_busy_above_tokens: None,
            overlap_score_credit: 1.0,
            host_cache_hit_weight: 0.75,
            disk_cache_hit_weight: 0.25,
            shared_cache_multiplier: 0.0,
            prefill_load_scale: 1.0,
            active_request_weight_tokens: 0.0,
        }
    }
}

impl Settings {
    /// # Errors
    /// Names the first setting that makes no sense, and what is accepted.
    pub(crate) fn check(&self) -> Result<(), String> {
        let weights = [
            ("overlap_score_credit", self.overlap_score_credit),
            ("host_cache_hit_weight", self.host_cache_hit_weight),
            ("disk_cache_hit_weight", self.disk_cache_hit_weight),
            ("shared_cache_multiplier", self.shared_cache_multiplier),
            ("prefill_load_scale", self.prefill_load_scale),
            ("active_request_weight_tokens", self.active_request_weight_tokens),
        ];
        for (name, weight) in weights {
            if !(weight.is_finite() && weight >= 0.0) {
                return Err(format!("{name} is {weight}; use a number of at least 0"));
            }
        }
        for (name, share) in
            [("local_below_ratio", self.local_below_ratio), ("decode_busy_above_kv_ratio", self.decode_busy_above_kv_ratio)]
        {
            if !(0.0..=1.0).contains(&share) {
                return Err(format!("{name} is {share}; use a share from 0 to 1"));
            }
        }
        Ok(())
    }
}
