//! When workers count as alive, well and fast enough: `[health]` of the configuration file.

use std::time::Duration;

use dynamo_host_flow::{BreakerRules, BudgetRules, OutlierRules};
use serde::Deserialize;

/// The longest time that makes sense here, in seconds: a day.
const MAX_SECONDS: u64 = 24 * 3600;

/// When workers count as alive, well and fast enough. All of it can change while the host runs.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct HealthConfig {
    /// How often an engine is probed of which nothing else is heard.
    pub(crate) probe_every_ms: u64,
    /// How long a probe may take.
    pub(crate) probe_timeout_ms: u64,
    /// Probes in a row without an answer after which an engine is dead.
    pub(crate) probe_tries: u32,
    /// How long requests wait for a worker while there is none, and one may come.
    pub(crate) hold_s: u64,
    /// How long a drained worker may go on with what it has before others continue it.
    pub(crate) drain_grace_s: u64,
    /// Models without which the host is not ready.
    pub(crate) required_models: Vec<String>,
    /// Which engines are asked for a token when nothing was heard of them for long.
    pub(crate) canary: Canary,
    /// For how long that is.
    pub(crate) canary_idle_s: u64,
    /// How long that token may take.
    pub(crate) canary_timeout_s: u64,
    /// Whether workers must be seen to hand KV over before they are given anybody's.
    pub(crate) check_handoffs: bool,
    pub(crate) breaker: BreakerConfig,
    pub(crate) outliers: OutlierConfig,
    pub(crate) retries: RetryConfig,
}

/// Which engines are asked for a token now and then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Canary {
    /// Those whose kind is known: behind another API a token may cost money.
    #[default]
    Auto,
    /// All.
    On,
    /// None.
    Off,
}

/// `[health.breaker]`
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct BreakerConfig {
    pub(crate) failures_in_a_row: u32,
    pub(crate) failure_share: f32,
    pub(crate) window_s: u64,
    pub(crate) min_requests: u32,
    pub(crate) pause_ms: u64,
    pub(crate) max_pause_s: u64,
    pub(crate) trials: u32,
}

/// `[health.outliers]`
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct OutlierConfig {
    pub(crate) enabled: bool,
    pub(crate) factor: f32,
    pub(crate) max_share: f32,
    pub(crate) pause_s: u64,
    pub(crate) max_pause_s: u64,
}

/// `[health.retries]`
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RetryConfig {
    pub(crate) share: f32,
    pub(crate) least_per_second: u32,
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self {
            probe_every_ms: 1000,
            probe_timeout_ms: 1000,
            probe_tries: 2,
            hold_s: 5,
            drain_grace_s: 60,
            required_models: Vec::new(),
            canary: Canary::Auto,
            canary_idle_s: 60,
            canary_timeout_s: 10,
            check_handoffs: true,
            breaker: BreakerConfig::default(),
            outliers: OutlierConfig::default(),
            retries: RetryConfig::default(),
        }
    }
}

impl Default for BreakerConfig {
    fn default() -> Self {
        Self {
            failures_in_a_row: 5,
            failure_share: 0.5,
            window_s: 30,
            min_requests: 20,
            pause_ms: 1000,
            max_pause_s: 30,
            trials: 3,
        }
    }
}

impl Default for OutlierConfig {
    fn default() -> Self {
        Self { enabled: true, factor: 3.0, max_share: 0.3, pause_s: 10, max_pause_s: 300 }
    }
}

impl Default for RetryConfig {
    fn default() -> Self {
        Self { share: 0.2, least_per_second: 10 }
    }
}

impl HealthConfig {
    pub(crate) fn probe_every(&self) -> Duration {
        Duration::from_millis(self.probe_every_ms)
    }

    pub(crate) fn probe_timeout(&self) -> Duration {
        Duration::from_millis(self.probe_timeout_ms)
    }

    pub(crate) fn hold(&self) -> Duration {
        Duration::from_secs(self.hold_s)
    }

    pub(crate) fn canary_idle(&self) -> Duration {
        Duration::from_secs(self.canary_idle_s)
    }

    pub(crate) fn canary_timeout(&self) -> Duration {
        Duration::from_secs(self.canary_timeout_s)
    }

    pub(crate) fn breaker_rules(&self) -> BreakerRules {
        let &BreakerConfig { failures_in_a_row, failure_share, window_s, min_requests, pause_ms, max_pause_s, trials } =
            &self.breaker;
        BreakerRules {
            in_a_row: failures_in_a_row,
            share: failure_share,
            window_ms: window_s * 1000,
            min_requests,
            first_pause_ms: pause_ms,
            max_pause_ms: max_pause_s * 1000,
            trials,
        }
    }

    pub(crate) fn outlier_rules(&self) -> OutlierRules {
        let &OutlierConfig { factor, max_share, pause_s, max_pause_s, .. } = &self.outliers;
        let trials = self.breaker.trials;
        OutlierRules { factor, max_share, first_pause_ms: pause_s * 1000, max_pause_ms: max_pause_s * 1000, trials }
    }

    pub(crate) fn budget_rules(&self) -> BudgetRules {
        BudgetRules { share: self.retries.share, least_per_second: self.retries.least_per_second }
    }

    /// Checks what is written.
    ///
    /// # Errors
    /// Names the key, its value and what is accepted.
    pub(crate) fn check(&self) -> Result<(), String> {
        let Self { breaker, outliers, retries, .. } = self;
        let wholes = [
            ("probe_every_ms", self.probe_every_ms, 100..=3_600_000),
            ("probe_timeout_ms", self.probe_timeout_ms, 50..=60_000),
            ("probe_tries", u64::from(self.probe_tries), 1..=100),
            ("hold_s", self.hold_s, 0..=MAX_SECONDS),
            ("drain_grace_s", self.drain_grace_s, 0..=365 * MAX_SECONDS),
            ("canary_idle_s", self.canary_idle_s, 1..=MAX_SECONDS),
            ("canary_timeout_s", self.canary_timeout_s, 1..=MAX_SECONDS),
            ("breaker.failures_in_a_row", u64::from(breaker.failures_in_a_row), 1..=1_000_000),
            ("breaker.window_s", breaker.window_s, 1..=MAX_SECONDS),
            ("breaker.min_requests", u64::from(breaker.min_requests), 1..=1_000_000),
            ("breaker.pause_ms", breaker.pause_ms, 1..=MAX_SECONDS * 1000),
            ("breaker.max_pause_s", breaker.max_pause_s, 1..=MAX_SECONDS),
            ("breaker.trials", u64::from(breaker.trials), 1..=1000),
            ("outliers.pause_s", outliers.pause_s, 1..=MAX_SECONDS),
            ("outliers.max_pause_s", outliers.max_pause_s, 1..=MAX_SECONDS),
            ("retries.least_per_second", u64::from(retries.least_per_second), 0..=1_000_000),
        ];
        if let Some((key, value, allowed)) = wholes.into_iter().find(|(_, value, allowed)| !allowed.contains(value)) {
            return Err(format!("health.{key} is {value}; use {} to {}", allowed.start(), allowed.end()));
        }
        let shares = [
            ("breaker.failure_share", breaker.failure_share, 0.01..=1.0),
            ("outliers.factor", outliers.factor, 1.1..=1000.0),
            ("outliers.max_share", outliers.max_share, 0.0..=0.9),
            ("retries.share", retries.share, 0.0..=10.0),
        ];
        // NaN is in no range.
        let wrong = shares.into_iter().find(|(_, value, allowed)| !allowed.contains(value));
        wrong.map_or(Ok(()), |(key, value, allowed)| {
            Err(format!("health.{key} is {value}; use {} to {}", allowed.start(), allowed.end()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<(), String> {
        toml::from_str::<HealthConfig>(text).map_err(|error| error.to_string())?.check()
    }

    #[test]
    fn defaults_are_within_bounds_and_what_is_not_is_named_with_its_bounds() {
        check("").unwrap();
        check("hold_s = 0\ncanary = 'off'\nrequired_models = ['m']\n[retries]\nshare = 0.0\nleast_per_second = 0").unwrap();
        for (text, says) in [
            ("probe_tries = 0", "health.probe_tries is 0; use 1 to 100"),
            ("canary = 'sometimes'", "auto"),
            ("[breaker]\nfailure_share = nan", "health.breaker.failure_share is NaN; use 0.01 to 1"),
            ("[outliers]\nmax_share = 1.0", "health.outliers.max_share is 1; use 0 to 0.9"),
            ("[retries]\nshare = -1.0", "health.retries.share is -1"),
            ("[breaker]\nmax_pause_s = 99999999", "use 1 to 86400"),
            ("probe = 1", "unknown field"),
        ] {
            let error = check(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
