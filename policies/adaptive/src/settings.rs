//! Settings: what an operator can weigh.

use dynamo_policy_sdk::{
    schemars::{self, JsonSchema},
    serde::{self, Deserialize},
};

use crate::Profile;

/// Milliseconds of prefill below which a prompt does not give way.
pub(crate) const SHORT_MS: f32 = 30.0;

/// What an operator can set. The defaults hold for all that was measured in `docs/adaptive.md`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
#[schemars(crate = "schemars")]
pub struct Settings {
    /// What a millisecond of decoding counts, of this request and of those that it slows down, against one before a first
    /// token.
    pub decode_weight: f32,
    /// What a millisecond counts by which this prompt's prefill stalls a request that runs on the same worker.
    pub interference: f32,
    /// What it costs, as a share of the time that a token takes to compute, to put it into a cache where it pushes another out.
    pub cache_price: f32,
    /// Share of its own prefill time for which a prompt waits, so that shorter ones that come at the same moment go first; 0:
    /// none waits. Whole milliseconds.
    pub give_way: f32,
    /// Prompts of more passes than that do not wait.
    pub give_way_passes: f32,
    /// Output tokens of a request of which nobody knows how many it will have.
    pub expected_output_tokens: f32,
    /// What a token in a slower tier saves, as a share of the time that it takes to compute.
    pub tier_credit: TierCredit,
    /// The speed of a worker of which no profile is known.
    pub profile: Profile,
}

/// What a token in a slower tier saves: 1 all of its computing, 0 nothing.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
#[schemars(crate = "schemars")]
pub struct TierCredit {
    /// In host memory.
    pub host: f32,
    /// On disk.
    pub disk: f32,
    /// In a remote store or peer.
    pub remote: f32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            decode_weight: 0.1,
            interference: 0.03,
            cache_price: 0.1,
            give_way: 0.01,
            give_way_passes: 3.0,
            expected_output_tokens: 256.0,
            tier_credit: TierCredit::default(),
            profile: Profile::default(),
        }
    }
}

impl Default for TierCredit {
    fn default() -> Self {
        Self { host: 0.75, disk: 0.25, remote: 0.25 }
    }
}

impl Settings {
    /// # Errors
    /// Names the first setting that makes no sense, and what is accepted.
    pub(crate) fn check(&self) -> Result<(), String> {
        let amounts = [
            ("decode_weight", self.decode_weight),
            ("interference", self.interference),
            ("cache_price", self.cache_price),
            ("give_way_passes", self.give_way_passes),
            ("expected_output_tokens", self.expected_output_tokens),
        ];
        for (name, value) in amounts.into_iter().chain(self.profile.times()) {
            if !(value.is_finite() && value >= 0.0) {
                return Err(format!("{name} is {value}; use a number of at least 0"));
            }
        }
        let TierCredit { host, disk, remote } = self.tier_credit;
        let shares =
            [("give_way", self.give_way), ("tier_credit.host", host), ("tier_credit.disk", disk), ("tier_credit.remote", remote)];
        for (name, value) in shares {
            if !(0.0..=1.0).contains(&value) {
                return Err(format!("{name} is {value}; use a number from 0 to 1"));
            }
        }
        let batched = self.profile.max_batched_tokens;
        if !(batched.is_finite() && batched >= 1.0) {
            return Err(format!("profile.max_batched_tokens is {batched}; use a number of at least 1"));
        }
        Ok(())
    }
}
