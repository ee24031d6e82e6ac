//! A composition of the whole library, by its settings.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Composition, Picker, scorers};

/// Weights of all scorers of the library, and the picker: what the policy `composed` takes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Weight of each scorer; 0 leaves it out. Only their proportions matter.
    pub weights: Weights,
    /// Labels that workers should have.
    pub labels: Vec<LabelWeight>,
    /// Numeric columns of the operator's.
    pub signals: Vec<SignalWeight>,
    /// How to pick by the totals: `"best"`, `{"softmax": {"temperature": 0.1}}` or `{"top_k": {"k": 3}}`.
    pub picker: Picker,
}

/// Weights of the scorers without parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Weights {
    /// Few prompt tokens that are still to be computed.
    pub active_prefill: f32,
    /// Few context tokens that decode.
    pub active_decode: f32,
    /// Few requests in flight.
    pub active_requests: f32,
    /// Few requests that wait inside the engine.
    pub queue: f32,
    /// Much of the KV capacity free.
    pub kv_free: f32,
    /// Much of the prompt cached.
    pub cached_prefix: f32,
    /// Few of the recent requests failed.
    pub error_rate: f32,
    /// A short recent time to first token.
    pub recent_ttft: f32,
    /// A short recent time between tokens.
    pub recent_itl: f32,
    /// The session's worker.
    pub session_affinity: f32,
    /// The worker for prompts that begin alike.
    pub prefix_affinity: f32,
    /// The request's adapter is loaded.
    pub adapter: f32,
    /// The operator's preference.
    pub preference: f32,
}

impl Default for Weights {
    /// Load by what it costs, what is cached twice as much, and away from what fails.
    fn default() -> Self {
        Self {
            active_prefill: 1.0,
            active_decode: 0.5,
            active_requests: 0.5,
            queue: 0.5,
            kv_free: 0.5,
            cached_prefix: 2.0,
            error_rate: 1.0,
            recent_ttft: 0.0,
            recent_itl: 0.0,
            session_affinity: 0.0,
            prefix_affinity: 0.0,
            adapter: 1.0,
            preference: 0.0,
        }
    }
}

/// Weight of a [`scorers::LabelMatch`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LabelWeight {
    /// Name of the label.
    pub key: String,
    /// The value that it should have.
    pub value: String,
    /// Its weight.
    pub weight: f32,
}

/// Weight of a [`scorers::Signal`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SignalWeight {
    /// Name of the column.
    pub name: String,
    /// Its weight.
    pub weight: f32,
    /// Which end of it is better.
    pub prefer: Preferred,
}

/// Which end of a numeric column is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Preferred {
    /// The low one: a price, a latency.
    Low,
    /// The high one: a capacity.
    High,
}

impl Settings {
    /// Makes the composition.
    ///
    /// # Errors
    /// Which setting is wrong and what is accepted.
    pub fn compose(self) -> Result<Composition, String> {
        self.validate()?;
        let Self { weights, labels, signals, picker } = self;
        let mut composition = Composition::new(picker)
            .with(weights.active_prefill, scorers::ActivePrefill)
            .with(weights.active_decode, scorers::ActiveDecode)
            .with(weights.active_requests, scorers::ActiveRequests)
            .with(weights.queue, scorers::Queue)
            .with(weights.kv_free, scorers::KvFree)
            .with(weights.cached_prefix, scorers::CachedPrefix::default())
            .with(weights.error_rate, scorers::ErrorRate)
            .with(weights.recent_ttft, scorers::RecentTtft)
            .with(weights.recent_itl, scorers::RecentItl)
            .with(weights.session_affinity, scorers::SessionAffinity)
            .with(weights.prefix_affinity, scorers::PrefixAffinity)
            .with(weights.adapter, scorers::Adapter)
            .with(weights.preference, scorers::Preference);
        for LabelWeight { key, value, weight } in labels {
            composition = composition.with(weight, scorers::LabelMatch { key, value });
        }
        for SignalWeight { name, weight, prefer } in signals {
            composition = composition.with(weight, scorers::Signal { name, more_is_better: prefer == Preferred::High });
        }
        Ok(composition)
    }

    fn validate(&self) -> Result<(), String> {
        let weights = &self.weights;
        let named = [
            ("active_prefill", weights.active_prefill),
            ("active_decode", weights.active_decode),
            ("active_requests", weights.active_requests),
            ("queue", weights.queue),
            ("kv_free", weights.kv_free),
            ("cached_prefix", weights.cached_prefix),
            ("error_rate", weights.error_rate),
            ("recent_ttft", weights.recent_ttft),
            ("recent_itl", weights.recent_itl),
            ("session_affinity", weights.session_affinity),
            ("prefix_affinity", weights.prefix_affinity),
            ("adapter", weights.adapter),
            ("preference", weights.preference),
        ];
        let named = named.iter().map(|(name, weight)| (format!("weights.{name}"), *weight));
        let labels = self.labels.iter().map(|label| (format!("the weight of label {:?}", label.key), label.weight));
        let signals = self.signals.iter().map(|signal| (format!("the weight of signal {:?}", signal.name), signal.weight));
        for (name, weight) in named.chain(labels).chain(signals) {
            if !(weight.is_finite() && weight >= 0.0) {
                return Err(format!("{name} is {weight}; use a number of at least 0"));
            }
        }
        self.picker.validate()
    }
}
