//! Session affinity: what belongs together stays on one worker, so that its cache is used, but never at the price of an
//! overloaded worker.
//!
//! A request's key, its session or the beginning of its prompt, belongs to one worker by rendezvous hashing: all hosts
//! agree on it without a word, and when workers come and go only the keys of those move. Load is bounded (Mirrokni et al.
//! 2018): a worker with more than `1 + slack` times the mean work in flight is passed over for the key's next choice, so
//! that a hot key spills over to a second worker, a third, and so on, always in the same order.
//!
//! Requests without a key go where the least work is.

use dynamo_policy_sdk::{
    Candidates, Decision, Request, Router, UNKNOWN,
    compose::scorers::rendezvous,
    entropy, rank,
    schemars::{self, JsonSchema},
    serde::{self, Deserialize, Serialize},
};

/// Work of a request as such, in prompt tokens; a token of context that decodes is a tenth of one.
const REQUEST_WORK: f32 = 64.0;

/// By what requests belong together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(crate = "serde", rename_all = "kebab-case")]
#[schemars(crate = "schemars")]
pub enum Key {
    /// The client's session; requests without one by the beginning of their prompt.
    #[default]
    SessionOrPrefix,
    /// The client's session only.
    Session,
    /// The beginning of the prompt only.
    Prefix,
}

/// What an operator can set.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
#[schemars(crate = "schemars")]
pub struct Settings {
    /// By what requests belong together.
    pub key: Key,
    /// How much more than the mean work a worker may have before it is passed over: 0.25 is a quarter more.
    pub slack: f32,
    /// Work in prompt tokens up to which no worker is passed over: a nearly idle fleet need not be balanced.
    pub free_work: f32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { key: Key::default(), slack: 0.25, free_work: 2048.0 }
    }
}

/// The policy.
pub struct SessionAffinity {
    settings: Settings,
}

impl Router for SessionAffinity {
    type Settings = Settings;

    fn new(settings: Settings) -> Result<Self, String> {
        for (name, value) in [("slack", settings.slack), ("free_work", settings.free_work)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(format!("{name} is {value}; use a number of at least 0"));
            }
        }
        Ok(Self { settings })
    }

    fn route(&self, request: &Request, candidates: &Candidates) -> Decision {
        let work = work(candidates);
        match self.key(request) {
            Some(key) => Decision::Place(self.by_key(key, request.prompt_tokens(), &work, candidates)),
            None => Decision::Place(rank::lowest_rows(work, entropy::next())),
        }
    }
}

impl SessionAffinity {
    fn key(&self, request: &Request) -> Option<u64> {
        // The largest value stands for "unknown".
        let prefix = || Some(request.prefix_key()).filter(|&key| key != u64::MAX);
        match self.settings.key {
            Key::Session => request.session_key(),
            Key::Prefix => prefix(),
            Key::SessionOrPrefix => request.session_key().or_else(prefix),
        }
    }

    /// The key's own order over those within the bound, then the others by their work.
    fn by_key(&self, key: u64, prompt_tokens: u32, work: &[f32], candidates: &Candidates) -> Vec<u32> {
        let new = REQUEST_WORK + if prompt_tokens == UNKNOWN { 0.0 } else { prompt_tokens as f32 };
        let bound = self.bound(work, new);
        let costs = candidates.worker_id().iter().zip(work).map(|(&worker, &work)| {
            // 24 bits, which a float holds exactly: below 1, the most preferred the lowest.
            let preference = 1.0 - ((rendezvous(key, worker) >> 40) as u32 as f32 + 1.0) / (1u32 << 24) as f32;
            if work > bound { 1.0 + work } else { preference }
        });
        // Equals by the key as well: it has one order, not several.
        rank::lowest_rows(costs, key)
    }

    /// The most work that a worker may have to be given more. The mean is that with the new request included, so that
    /// somebody is always below it. Of whom nothing is known is not counted.
    fn bound(&self, work: &[f32], new: f32) -> f32 {
        // Integers, since their sums become SIMD; the cast makes 0 of NaN.
        let (sum, count) = work
            .iter()
            .fold((0u64, 0u32), |(sum, count), &work| (sum + u64::from(work as u32), count + u32::from(!work.is_nan())));
        let mean = (sum as f32 + new) / count.max(1) as f32;
        ((1.0 + self.settings.slack) * mean).max(self.settings.free_work)
    }
}

/// Work in flight in prompt tokens, NaN where it is unknown.
fn work(candidates: &Candidates) -> Vec<f32> {
    let columns =
        candidates.active_prefill_tokens().iter().zip(candidates.active_decode_tokens()).zip(candidates.active_requests());
    columns
        .map(|((&prefill, &decode), &requests)| {
            let is_unknown = prefill == UNKNOWN || decode == UNKNOWN || requests == UNKNOWN;
            let work = prefill as f32 + 0.1 * decode as f32 + REQUEST_WORK * requests as f32;
            if is_unknown { f32::NAN } else { work }
        })
        .collect()
}

dynamo_policy_sdk::register!(SessionAffinity);

#[cfg(test)]
mod tests;
