//! Options: an engine's part in hand-offs, as it is told.

use std::time::Duration;

use dynamo_engine_api::{Role, handoff::LEASE};

/// Longest lease and latency that are understood as such.
const LONGEST_SECONDS: f64 = 86_400.0;

/// An engine's part in hand-offs.
#[derive(Clone, Debug, PartialEq)]
pub struct HandoffOptions {
    /// Which part of requests it takes.
    pub role: Role,
    /// How long it keeps KV that nobody fetches.
    pub lease: Duration,
    /// Whether it computes a prompt whose KV it cannot fetch, as vLLM with `kv_load_failure_policy` `recompute`; else the
    /// request fails.
    pub recomputes: bool,
    /// Whether it dies of KV that is of another prompt; else the request fails.
    pub dies_of_mismatch: bool,
    /// Bytes of KV per second that its port moves, in each direction.
    pub bytes_per_second: u64,
    /// What each fetch takes besides its bytes.
    pub latency: Duration,
}

/// Parameters that there are.
pub(crate) const KEYS: [&str; 6] =
    ["role", "kv_lease_seconds", "kv_load_failure", "kv_mismatch", "kv_bytes_per_second", "kv_latency_ms"];

impl Default for HandoffOptions {
    /// 64 GB/s, about what a card's network of 4 × 128 Gbit/s does.
    fn default() -> Self {
        Self {
            role: Role::default(),
            lease: LEASE,
            recomputes: false,
            dies_of_mismatch: false,
            bytes_per_second: 64_000_000_000,
            latency: Duration::from_millis(1),
        }
    }
}

impl HandoffOptions {
    /// Sets one of [`KEYS`] from text; returns what is accepted if this is not.
    pub(crate) fn set(&mut self, key: &str, value: &str) -> Result<(), &'static str> {
        let seconds = |unit: f64| {
            let seconds = value.parse().ok().map(|number: f64| number * unit);
            seconds.filter(|seconds| (0.0..=LONGEST_SECONDS).contains(seconds)).map(Duration::from_secs_f64)
        };
        match (key, value) {
            ("role", _) => self.role = value.parse().map_err(|_: String| "aggregated, prefill, decode or both")?,
            ("kv_lease_seconds", _) => self.lease = seconds(1.0).ok_or("seconds from 0 to 86400")?,
            ("kv_load_failure", "fail") => self.recomputes = false,
            ("kv_load_failure", "recompute") => self.recomputes = true,
            ("kv_load_failure", _) => return Err("fail or recompute"),
            ("kv_mismatch", "fail") => self.dies_of_mismatch = false,
            ("kv_mismatch", "die") => self.dies_of_mismatch = true,
            ("kv_mismatch", _) => return Err("fail or die"),
            ("kv_bytes_per_second", _) => {
                let rate = value.parse().ok().filter(|rate| (1.0..1e18).contains(rate)).map(|rate: f64| rate as u64);
                self.bytes_per_second = rate.ok_or("bytes per second from 1, such as 64e9")?;
            }
            _ => self.latency = seconds(0.001).ok_or("milliseconds from 0 to 86400000")?,
        }
        Ok(())
    }
}
