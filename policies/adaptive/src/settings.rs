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
    /// Where prefill and decode can be apart: when, and how long it takes.
    pub handoff: HandoffSettings,
    /// The speed of a worker of which no profile is known.
    pub profile: Profile,
}

/// Handing a request from a worker that prefills to one that decodes.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
#[schemars(crate = "schemars")]
pub struct HandoffSettings {
    /// What a millisecond counts by which a prefill stalls a request that decodes on the same worker, under full pressure.
    pub stall: f32,
    /// Share of the gaps between tokens that a prefill would stall if nobody handed over, as predicted, up to which stalls
    /// count as on an aggregated fleet.
    pub stalls_from: f32,
    /// The share from which on they count in full: full pressure.
    pub stalls_to: f32,
    /// What decoding costs on a worker that is to prefill, in full prefill passes, under full pressure.
    pub keep_free: f32,
    /// Workers to be kept free beyond those that prefill keeps busy, times the square root of these.
    pub spare: f32,
    /// Milliseconds to the first token that count double, where the request has no target of its own: what is late counts more.
    pub late_ms: f32,
    /// Milliseconds of a hand-off, however short.
    pub base_ms: f32,
    /// Tokens of prompt whose KV comes over in a second, before it was measured.
    pub tokens_per_second: LinkSpeed,
}

/// Tokens of prompt whose KV comes over in a second, by the closest domain that both workers share.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
#[schemars(crate = "schemars")]
pub struct LinkSpeed {
    /// On one host.
    pub host: f32,
    /// In one rack.
    pub rack: f32,
    /// In one zone.
    pub zone: f32,
    /// In different zones.
    pub elsewhere: f32,
    /// Where nobody knows.
    pub unknown: f32,
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
            handoff: HandoffSettings::default(),
            profile: Profile::default(),
        }
    }
}

impl Default for HandoffSettings {
    fn default() -> Self {
        Self {
            stall: 0.4,
            // A p99 does not see one gap in a hundred. What exceeds that is priced in proportion, up to where nearly every prompt is
            // handed over: with a step the fleet changes its ways at a load where little is to be gained.
            stalls_from: 0.01,
            stalls_to: 0.1,
            keep_free: 9.0,
            spare: 1.0,
            late_ms: 1250.0,
            base_ms: 8.0,
            tokens_per_second: LinkSpeed::default(),
        }
    }
}

impl Default for LinkSpeed {
    /// Of an 8-billion-parameter model with 128 KiB of KV per token: 128, 64, 12.5 and 1.25 GB/s.
    fn default() -> Self {
        Self { host: 1e6, rack: 5e5, zone: 1e5, elsewhere: 1e4, unknown: 5e5 }
    }
}

impl HandoffSettings {
    /// Milliseconds of a hand-off of which nothing is known but its prompt.
    pub(crate) fn expected_ms(&self, prompt: f32) -> f32 {
        self.base_ms + prompt * 1000.0 / self.tokens_per_second.unknown
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
            ("handoff.stall", self.handoff.stall),
            ("handoff.stalls_from", self.handoff.stalls_from),
            ("handoff.stalls_to", self.handoff.stalls_to),
            ("handoff.keep_free", self.handoff.keep_free),
            ("handoff.spare", self.handoff.spare),
            ("handoff.base_ms", self.handoff.base_ms),
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
        let LinkSpeed { host, rack, zone, elsewhere, unknown } = self.handoff.tokens_per_second;
        let above = [
            ("handoff.late_ms", self.handoff.late_ms),
            ("handoff.tokens_per_second.host", host),
            ("handoff.tokens_per_second.rack", rack),
            ("handoff.tokens_per_second.zone", zone),
            ("handoff.tokens_per_second.elsewhere", elsewhere),
            ("handoff.tokens_per_second.unknown", unknown),
        ];
        for (name, value) in above {
            if !(value.is_finite() && value > 0.0) {
                return Err(format!("{name} is {value}; use a number above 0"));
            }
        }
        let batched = self.profile.max_batched_tokens;
        if !(batched.is_finite() && batched >= 1.0) {
            return Err(format!("profile.max_batched_tokens is {batched}; use a number of at least 1"));
        }
        Ok(())
    }
}
