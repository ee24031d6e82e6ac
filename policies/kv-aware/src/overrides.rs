//! Overrides: settings that a request brings along, as Dynamo's `RouterConfigOverride`.
//!
//! What cannot be read is ignored, whole, and counted: a client's typing error must not cost its request.

use dynamo_policy_sdk::{Request, telemetry};

use crate::Settings;

/// Counts requests whose override was ignored.
const INVALID: &str = "invalid_overrides";

impl Settings {
    /// The settings for this request, if it overrides any.
    pub(crate) fn overridden(&self, request: &Request) -> Option<Self> {
        let text = request.attribute(self.override_attribute.as_deref()?)?;
        let overridden = self.with(&text);
        if overridden.is_none() {
            telemetry::counter_add(INVALID, 1);
        }
        overridden
    }

    /// With what `key=value,key=value` says.
    fn with(&self, text: &str) -> Option<Self> {
        let mut settings = self.clone();
        for (key, value) in text.split(',').map(|part| part.split_once('=')).collect::<Option<Vec<_>>>()? {
            let value = value.trim();
            let number = match key.trim() {
                "overlap_score_credit" => &mut settings.overlap_score_credit,
                "prefill_load_scale" => &mut settings.prefill_load_scale,
                "router_temperature" => &mut settings.router_temperature,
                "shared_cache_multiplier" => &mut settings.shared_cache_multiplier,
                "track_prefill_tokens" | "router_track_prefill_tokens" => {
                    settings.router_track_prefill_tokens = value.parse().ok()?;
                    continue;
                }
                // Of the index, which is the host's: it changes no cost.
                "assume_kv_reuse" | "router_assume_kv_reuse" => {
                    value.parse::<bool>().ok()?;
                    continue;
                }
                _ => return None,
            };
            *number = value.parse().ok()?;
        }
        settings.check().ok()?;
        Some(settings)
    }
}
