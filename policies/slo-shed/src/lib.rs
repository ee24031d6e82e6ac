//! SLO shed: lets in only what can still meet its target for the time to first token.
//!
//! What a request has to expect is the wait that the host predicts for one of its standing, and the time to first token that
//! others had lately once they were sent. By that over its target, its *pressure*, a class is shed: from `shed_at` on, until it is below
//! `resume_at`, so that it does not flap. Classes lower in the list are shed at a lower pressure, by `headroom` each, and
//! always where a more important one is: the lowest goes first and comes back last. Which classes are shed is kept in the host's
//! `state`, so that all instances, and the next version, go on from there.
//!
//! A request without a target, or of a pool of which nothing is known yet, is let in.

use std::{collections::BTreeMap, time::Duration};

use dynamo_policy_sdk::{
    Admission, Pools, Request, Verdict,
    classes::{Class, Classes},
    schemars::{self, JsonSchema},
    serde::{self, Deserialize},
    state, telemetry,
};

/// The longest target: an hour.
const MAX_TARGET_MS: f32 = 3_600_000.0;
/// The least pressure at which a class is shed, however low it is.
const LEAST_PRESSURE: f32 = 0.1;
/// How long it is remembered that a class is shed when nobody of it comes: the lower ones are shed for as long.
const REMEMBERED: Duration = Duration::from_secs(5);
/// What is kept of a class that is shed.
const SHED: &[u8] = &[1];
/// When a client is told to come back.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What an operator can set.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
#[schemars(crate = "schemars")]
pub struct Settings {
    /// Target for the time to first token, in milliseconds, of requests that have none; without it they are let in.
    pub ttft_ms: Option<f32>,
    /// Targets by class, in milliseconds, instead of the requests' own.
    pub class_ttft_ms: BTreeMap<String, f32>,
    /// Percentile of recent times to first token that a request has to expect once it is sent, 0 to 100.
    pub percentile: f32,
    /// Share of the target that is expected to pass from which on the most important class is shed.
    pub shed_at: f32,
    /// Share of `shed_at` below which a class that is shed is let in again.
    pub resume_at: f32,
    /// By how much earlier each further class of the list is shed.
    pub headroom: f32,
    /// Classes, the most important first.
    pub classes: Vec<Class>,
    /// Attribute by which requests name their class, such as an allowed header.
    pub class_attribute: Option<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            ttft_ms: None,
            class_ttft_ms: BTreeMap::new(),
            percentile: 50.0,
            shed_at: 1.0,
            resume_at: 0.7,
            headroom: 0.1,
            classes: Vec::new(),
            class_attribute: None,
        }
    }
}

/// The policy.
pub struct SloShed {
    settings: Settings,
    classes: Classes,
}

impl Admission for SloShed {
    type Settings = Settings;

    fn new(settings: Settings) -> Result<Self, String> {
        let check = |key: &str, value: f32, least: f32, most: f32| {
            if (least..=most).contains(&value) { Ok(()) } else { Err(format!("{key} is {value}; use {least} to {most}")) }
        };
        check("percentile", settings.percentile, 0.0, 100.0)?;
        check("shed_at", settings.shed_at, LEAST_PRESSURE, 100.0)?;
        check("resume_at", settings.resume_at, 0.0, 1.0)?;
        check("headroom", settings.headroom, 0.0, 1.0)?;
        if let Some(target) = settings.ttft_ms {
            check("ttft_ms", target, 1.0, MAX_TARGET_MS)?;
        }
        for (class, &target) in &settings.class_ttft_ms {
            check(&format!("class_ttft_ms.{class}"), target, 1.0, MAX_TARGET_MS)?;
            if settings.classes.iter().all(|known| known.name != *class) {
                return Err(format!("class_ttft_ms.{class} is of no class; name it in classes"));
            }
        }
        let classes = Classes::new(settings.classes.clone(), settings.class_attribute.clone())?;
        Ok(Self { settings, classes })
    }

    fn admit(&self, request: &Request, pools: &Pools) -> Verdict {
        let class = self.classes.of(request);
        let admitted = || match class {
            Some(class) => self.classes.list()[class].admit(Verdict::admit()).into(),
            None => Verdict::admit().into(),
        };
        let Some(expected_ms) = self.expected_ms(pools) else { return admitted() };
        // Of no class is after all classes.
        let rank = class.unwrap_or(self.classes.list().len());
        if !self.is_shed(pools.pool_key()[0], request, rank, expected_ms) {
            return admitted();
        }
        let target_ms = self.target_ms(request, rank).unwrap_or(expected_ms);
        let until_ms = (expected_ms - target_ms * self.threshold(rank) * self.settings.resume_at).max(0.0);
        let retry_after = Duration::from_secs_f32(until_ms / 1000.0).clamp(RETRY_AFTER.0, RETRY_AFTER.1);
        telemetry::counter_add(class.map_or("shed", |class| &self.classes.list()[class].name), 1);
        Verdict::shed(503, "the first token cannot be expected within its target now").retry_after(retry_after).into()
    }
}

impl SloShed {
    /// Time to first token that a request has to expect; `None` if it is not known, or nobody could be waited for.
    fn expected_ms(&self, pools: &Pools) -> Option<f32> {
        let wait_ms = Some(pools.predicted_wait_ms()[0]).filter(|ms| ms.is_finite())?;
        if pools.ready_workers()[0] == 0 {
            return None;
        }
        let served_ms = pools.recent_ttft_ms(self.settings.percentile)[0];
        Some(wait_ms + if served_ms.is_finite() { served_ms } else { 0.0 })
    }

    /// The target of a request: its class's, else its own.
    fn target_ms(&self, request: &Request, rank: usize) -> Option<f32> {
        let of_class = self.classes.list().get(rank).and_then(|class| self.settings.class_ttft_ms.get(&class.name));
        let of_request = || Some(request.slo_ttft_ms()).filter(|ms| *ms > 0.0);
        of_class.copied().or_else(of_request).or(self.settings.ttft_ms)
    }

    /// The pressure from which on a class is shed.
    fn threshold(&self, rank: usize) -> f32 {
        (self.settings.shed_at * (1.0 - self.settings.headroom * rank as f32)).max(LEAST_PRESSURE)
    }

    /// Whether a class is shed now: for its own pressure, or since a more important one is.
    fn is_shed(&self, pool: u64, request: &Request, rank: usize, expected_ms: f32) -> bool {
        let key = |rank: usize| format!("shed.{pool:016x}.{rank}");
        let is_set = |rank| state::get(&key(rank)).is_some_and(|kept| kept == SHED);
        let was = is_set(rank);
        let is = self.target_ms(request, rank).is_some_and(|target_ms| {
            let (pressure, threshold) = (expected_ms / target_ms, self.threshold(rank));
            if was { pressure >= threshold * self.settings.resume_at } else { pressure > threshold }
        });
        if is || was {
            // Where it cannot be kept it is found anew each time, and may flap.
            let _ = state::set(&key(rank), if is { SHED } else { &[] }, REMEMBERED);
        }
        is || (0..rank).any(is_set)
    }
}

dynamo_policy_sdk::register!(SloShed as Admission);

#[cfg(test)]
mod tests;
