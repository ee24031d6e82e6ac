//! Adaptive: the worker on which a request costs the least time, its own and that of those that it delays.
//!
//! Costs are milliseconds, predicted by the engine's profile from what the host knows at once: prompts that wait to be
//! computed, for how long the worker has been at it, what it holds of this prompt, what it decodes. The terms are in
//! [`cost`]; the manual is `docs/adaptive.md`. Where prefill and decode can be apart it chooses per request, by predicted time
//! too, whether they are: [`handoff`].
//!
//! A request may give way: a prompt of some length waits for a hundredth of the time that it takes to compute, so that
//! shorter ones that came at the same moment go first, and it then sees where they went.
//!
//! Invariants: the policy keeps nothing; the same request, candidates and seed get the same answer. Whatever is
//! unknown has a default, so that there always is an answer.

mod cost;
mod handoff;
mod links;
mod profile;
mod settings;

use std::time::Duration;

use dynamo_policy_sdk::{Candidates, Decision, Request, Router, rank, stage};

use self::{cost::Costs, handoff::Handoff, profile::Profiles};
pub use self::{
    profile::Profile,
    settings::{HandoffSettings, LinkSpeed, Settings, TierCredit},
};

/// The policy.
pub struct Adaptive {
    settings: Settings,
}

impl Router for Adaptive {
    type Settings = Settings;

    fn new(settings: Settings) -> Result<Self, String> {
        settings.check()?;
        Ok(Self { settings })
    }

    fn route(&self, request: &Request, candidates: &Candidates) -> Decision {
        let profiles = Profiles::read(candidates, &self.settings.profile);
        let costs = Costs::of(&self.settings, request, candidates);
        if let Some(pause) = self.gives_way(request, candidates, &costs, &profiles) {
            return Decision::Hold(pause);
        }
        costs.explain(&profiles);
        match Handoff::of(&self.settings, request, candidates, &profiles, &costs) {
            Some(handoff) if request.stage() == stage::DECODE => handoff.decode(),
            Some(handoff) => handoff.place(),
            None => rank::lowest(costs.total(&profiles)),
        }
    }
}

impl Adaptive {
    /// For how long the request waits so that shorter ones go first. Once, and only where there is a choice.
    fn gives_way(&self, request: &Request, candidates: &Candidates, costs: &Costs, profiles: &Profiles) -> Option<Duration> {
        let Settings { give_way, give_way_passes, .. } = self.settings;
        let has_begun = request.holds() > 0 || request.attempt() > 0 || request.stage() == stage::DECODE;
        if give_way == 0.0 || has_begun || candidates.count() < 2 {
            return None;
        }
        let (fewest, speed) = (costs.fewest_uncached(), profiles.first());
        let prefill_ms = speed.prefill_ms(fewest);
        // A short prompt has nobody to let pass, and the longest would come last to workers that all have begun something.
        let is_long = fewest > give_way_passes * speed.profile.max_batched_tokens;
        if prefill_ms < settings::SHORT_MS || is_long {
            return None;
        }
        Some(Duration::from_micros((prefill_ms * give_way * 1000.0) as u64))
    }
}

dynamo_policy_sdk::register!(Adaptive);

#[cfg(test)]
mod tests;
