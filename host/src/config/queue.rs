//! Who waits, for how long, and in what order: `[queue]` and `[slo]` of the configuration file.

use std::{collections::BTreeMap, time::Duration};

use dynamo_host_core::{
    Slo,
    admission::{MAX_CLASS_BYTES, TIERS, WEIGHTS, is_class, is_weight},
};
use serde::Deserialize;

use super::{ConfigError, Limits};

/// How long a request may wait unless something is said.
const TIMEOUT_S: u64 = 300;
/// Most classes, so that they can be labels of metrics.
pub(crate) const MAX_CLASSES: usize = 32;
/// Most tenants that are given a standing of their own.
const MAX_TENANTS: usize = 100_000;
/// Longest target for a latency: an hour.
const MAX_TARGET_MS: f32 = 3_600_000.0;

/// The queue as it is written.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct QueueConfig {
    /// Requests that wait at most.
    pub(crate) max_requests: u32,
    /// Tokens of prompts that wait at most.
    pub(crate) max_tokens: u64,
    /// How long one may wait; by default five minutes, or as long as a request may take if that is less.
    timeout_s: Option<u64>,
    /// Requests that a worker runs at once whose engine does not say.
    pub(crate) max_running: u32,
    /// Steps' worth of prompts that wait for their prefill on each worker at most; 0: no bound.
    pub(crate) prefill_steps: u32,
    /// What requests are by default, by the name of their class.
    pub(crate) classes: BTreeMap<String, ClassConfig>,
    /// What requests are by default, by the name of their tenant.
    pub(crate) tenants: BTreeMap<String, TenantConfig>,
}

/// A class's standing, unless an admission policy says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ClassConfig {
    /// Strict: lower is served first.
    pub(crate) tier: u32,
    /// Its share among the classes of its tier.
    pub(crate) weight: f32,
}

/// A tenant's standing, unless an admission policy says otherwise.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TenantConfig {
    /// Its share among the tenants of its class.
    pub(crate) weight: f32,
    /// Its class, where its key names none.
    pub(crate) class: Option<String>,
}

/// Targets for latencies as they are written.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct SloConfig {
    ttft_ms: Option<f32>,
    itl_ms: Option<f32>,
    /// Those of a model, instead.
    models: BTreeMap<String, TargetsConfig>,
    /// Those of a class, instead of either.
    classes: BTreeMap<String, TargetsConfig>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct TargetsConfig {
    ttft_ms: Option<f32>,
    itl_ms: Option<f32>,
}

impl Default for QueueConfig {
    fn default() -> Self {
        Self {
            max_requests: 4096,
            max_tokens: 20_000_000,
            timeout_s: None,
            max_running: 1024,
            prefill_steps: 4,
            classes: BTreeMap::new(),
            tenants: BTreeMap::new(),
        }
    }
}

impl Default for ClassConfig {
    fn default() -> Self {
        Self { tier: 0, weight: 1.0 }
    }
}

impl Default for TenantConfig {
    fn default() -> Self {
        Self { weight: 1.0, class: None }
    }
}

impl QueueConfig {
    /// How long a request may wait.
    pub(crate) fn timeout(&self, limits: &Limits) -> Duration {
        Duration::from_secs(self.timeout_s.unwrap_or(TIMEOUT_S).min(limits.request_timeout_s))
    }

    pub(super) fn check(&self, limits: &Limits) -> Result<(), ConfigError> {
        let wrong = |key: &str, found: &dyn std::fmt::Display, expected: String| {
            Err(ConfigError::Queue(format!("queue.{key} is {found}; use {expected}")))
        };
        for (key, value, allowed) in [
            ("max_requests", u64::from(self.max_requests), 1..=1_000_000),
            ("max_tokens", self.max_tokens, 1..=1 << 40),
            ("max_running", u64::from(self.max_running), 1..=1_000_000),
            ("prefill_steps", u64::from(self.prefill_steps), 0..=10_000),
        ] {
            if !allowed.contains(&value) {
                return wrong(key, &value, format!("{} to {}", allowed.start(), allowed.end()));
            }
        }
        let most = limits.request_timeout_s;
        if let Some(timeout) = self.timeout_s
            && !(1..=most).contains(&timeout)
        {
            return wrong("timeout_s", &timeout, format!("1 to {most}, which is limits.request_timeout_s"));
        }
        if self.classes.len() > MAX_CLASSES {
            return wrong("classes", &format!("a table of {}", self.classes.len()), format!("at most {MAX_CLASSES}"));
        }
        if self.tenants.len() > MAX_TENANTS {
            return wrong("tenants", &format!("a table of {}", self.tenants.len()), format!("at most {MAX_TENANTS}"));
        }
        let weights = || format!("{} to {}", WEIGHTS.start(), WEIGHTS.end());
        for (name, class) in &self.classes {
            check_class("queue.classes", name)?;
            if class.tier >= TIERS {
                return wrong(&format!("classes.{name}.tier"), &class.tier, format!("0 to {}", TIERS - 1));
            }
            if !is_weight(class.weight) {
                return wrong(&format!("classes.{name}.weight"), &class.weight, weights());
            }
        }
        for (name, tenant) in &self.tenants {
            if !is_weight(tenant.weight) {
                return wrong(&format!("tenants.{name}.weight"), &tenant.weight, weights());
            }
            if let Some(class) = tenant.class.as_deref().filter(|&class| !self.classes.contains_key(class)) {
                let expected = format!("one of [queue.classes], or add [queue.classes.{class}]");
                return wrong(&format!("tenants.{name}.class"), &format!("{class:?}"), expected);
            }
        }
        Ok(())
    }
}

/// Whether a text can be the name of a class: it becomes a metric label.
fn check_class(key: &str, name: &str) -> Result<(), ConfigError> {
    if is_class(name) {
        return Ok(());
    }
    let reason = format!("{key} has {name:?}; use names of 1 to {MAX_CLASS_BYTES} letters, digits, `.`, `_` or `-`");
    Err(ConfigError::Queue(reason))
}

impl SloConfig {
    /// Targets of a request for a model, of a class if it has one.
    pub(crate) fn of(&self, model: &str, class: Option<&str>) -> Slo {
        let base = TargetsConfig { ttft_ms: self.ttft_ms, itl_ms: self.itl_ms };
        let of_model = self.models.get(model).copied().unwrap_or_default();
        let of_class = class.and_then(|class| self.classes.get(class)).copied().unwrap_or_default();
        Slo {
            ttft_ms: of_class.ttft_ms.or(of_model.ttft_ms).or(base.ttft_ms),
            itl_ms: of_class.itl_ms.or(of_model.itl_ms).or(base.itl_ms),
        }
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let base = TargetsConfig { ttft_ms: self.ttft_ms, itl_ms: self.itl_ms };
        let named = |table: &'static str, of: &BTreeMap<String, TargetsConfig>| {
            of.iter().map(|(name, targets)| (format!("slo.{table}.{name}"), *targets)).collect::<Vec<_>>()
        };
        let all =
            [(String::from("slo"), base)].into_iter().chain(named("models", &self.models)).chain(named("classes", &self.classes));
        for (place, targets) in all {
            for (key, value) in [("ttft_ms", targets.ttft_ms), ("itl_ms", targets.itl_ms)] {
                if let Some(value) = value.filter(|value| !(*value > 0.0 && *value <= MAX_TARGET_MS)) {
                    let reason = format!("{place}.{key} is {value}; use more than 0, and at most {MAX_TARGET_MS} milliseconds");
                    return Err(ConfigError::Queue(reason));
                }
            }
        }
        self.classes.keys().try_for_each(|name| check_class("slo.classes", name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        let config: QueueConfig = toml::from_str(text).unwrap();
        config.check(&Limits { request_timeout_s: 100, ..Limits::default() }).unwrap_err().to_string()
    }

    #[test]
    fn what_no_queue_can_be_is_named_with_what_it_could() {
        for (text, says) in [
            ("max_requests = 0", "queue.max_requests is 0; use 1 to 1000000"),
            ("max_tokens = 0", "queue.max_tokens is 0; use 1 to"),
            ("max_running = 0", "queue.max_running is 0"),
            ("timeout_s = 0", "queue.timeout_s is 0; use 1 to 100, which is limits.request_timeout_s"),
            ("timeout_s = 101", "queue.timeout_s is 101"),
            ("[classes.a]\ntier = 16", "queue.classes.a.tier is 16; use 0 to 15"),
            ("[classes.a]\nweight = 0.0", "queue.classes.a.weight is 0; use 0.001 to 1000"),
            ("[classes.\"\"]", "queue.classes has \"\""),
            ("[tenants.t]\nweight = -1.0", "queue.tenants.t.weight is -1"),
            ("[tenants.t]\nclass = 'a'", "queue.tenants.t.class is \"a\"; use one of [queue.classes], or add [queue.classes.a]"),
        ] {
            let error = refused(text);
            assert!(error.contains(says), "{text}: {error}");
        }
        QueueConfig::default().check(&Limits::default()).unwrap();
    }

    #[test]
    fn nothing_waits_for_longer_than_a_request_may_take() {
        let limits = Limits { request_timeout_s: 2, ..Limits::default() };
        let config = QueueConfig::default();
        config.check(&limits).unwrap();
        assert_eq!(config.timeout(&limits), Duration::from_secs(2));
        assert_eq!(config.timeout(&Limits::default()).as_secs(), 300);
    }

    #[test]
    fn the_nearest_target_counts() {
        let config: SloConfig = toml::from_str(
            "ttft_ms = 1000\n[models.m]\nttft_ms = 500\nitl_ms = 50\n[classes.fast]\nttft_ms = 200\n[classes.slow]\nitl_ms = 90",
        )
        .unwrap();
        config.check().unwrap();
        let of = |model, class| {
            let Slo { ttft_ms, itl_ms } = config.of(model, class);
            (ttft_ms.unwrap_or(-1.0), itl_ms.unwrap_or(-1.0))
        };
        assert_eq!([of("x", None), of("m", None)], [(1000.0, -1.0), (500.0, 50.0)]);
        assert_eq!([of("m", Some("fast")), of("m", Some("slow"))], [(200.0, 50.0), (500.0, 90.0)]);
        for wrong in ["ttft_ms = 0", "[models.m]\nitl_ms = -1", "[classes.a]\nttft_ms = nan", "itl_ms = inf"] {
            let config: SloConfig = toml::from_str(wrong).unwrap();
            assert!(config.check().unwrap_err().to_string().starts_with("slo."), "{wrong}");
        }
    }
}
