//! `state`, `clock`, `entropy`, `telemetry`.

use wasmtime::component::{ComponentType, Lift};

use super::{Interface, define, define_void};
use crate::call::Guest;

pub(super) fn link_state(interface: &mut Interface<'_>) -> wasmtime::Result<()> {
    define(interface, "get", |guest: &mut Guest, (key,): (String,)| {
        let value = guest.state.get(&key, guest.now_ms);
        guest.charge(key.len() + value.as_ref().map_or(0, Vec::len))?;
        Ok(value)
    })?;
    define(interface, "set", |guest: &mut Guest, (key, value, ttl_ms): (String, Vec<u8>, u32)| {
        guest.charge(key.len() + value.len())?;
        Ok(guest.state.set(&key, value, ttl_ms, guest.now_ms).map_err(super::super::state::StateError::code))
    })?;
    define(interface, "add", |guest: &mut Guest, (key, delta, ttl_ms): (String, i64, u32)| {
        guest.charge(key.len())?;
        Ok(guest.state.add(&key, delta, ttl_ms, guest.now_ms).map_err(super::super::state::StateError::code))
    })?;
    define(interface, "take", |guest: &mut Guest, (key, amount, per_second, burst): (String, f64, f64, f64)| {
        guest.charge(key.len())?;
        Ok(guest.state.take(&key, amount, per_second, burst, guest.now_ms))
    })
}

pub(super) fn link_clock(interface: &mut Interface<'_>) -> wasmtime::Result<()> {
    define(interface, "monotonic-ms", |guest: &mut Guest, (): ()| Ok(guest.now_ms))?;
    define(interface, "unix-ms", |guest: &mut Guest, (): ()| Ok(guest.unix_ms))
}

pub(super) fn link_entropy(interface: &mut Interface<'_>) -> wasmtime::Result<()> {
    define(interface, "next", |guest: &mut Guest, (): ()| Ok(guest.next_random()))
}

#[derive(Clone, Copy, ComponentType, Lift)]
#[component(enum)]
#[repr(u8)]
#[expect(dead_code, reason = "made by the derived Lift alone")]
enum Level {
    #[component(name = "debug")]
    Debug,
    #[component(name = "info")]
    Info,
    #[component(name = "warn")]
    Warn,
    #[component(name = "error")]
    Error,
}

pub(super) fn link_telemetry(interface: &mut Interface<'_>) -> wasmtime::Result<()> {
    define_void(interface, "log", |guest: &mut Guest, (level, message): (Level, String)| {
        guest.charge(message.len())?;
        let Some(line) = guest.log_line(&message) else { return dropped(guest, "log") };
        let policy = &*guest.label;
        match level {
            Level::Debug => tracing::debug!(target: "policy", policy, "{line}"),
            Level::Info => tracing::info!(target: "policy", policy, "{line}"),
            Level::Warn => tracing::warn!(target: "policy", policy, "{line}"),
            Level::Error => {
                tracing::warn!(target: "policy", policy, "error: {line}");
                guest.said = Some(line.to_owned());
            }
        }
        Ok(())
    })?;
    define_void(interface, "counter-add", |guest: &mut Guest, (name, by): (String, f64)| {
        guest.charge(name.len())?;
        if !(guest.metric_update() && by.is_finite() && by >= 0.0) {
            return dropped(guest, "counter");
        }
        match guest.state.metric_name(&name) {
            Some(metric) => {
                metrics::counter!("dynamo_host_policy_counter_total", "policy" => guest.label.to_string(), "name" => metric)
                    .increment(by as u64);
            }
            None => return dropped(guest, "counter"),
        }
        Ok(())
    })?;
    define_void(interface, "gauge-set", |guest: &mut Guest, (name, value): (String, f64)| {
        guest.charge(name.len())?;
        if !guest.metric_update() {
            return dropped(guest, "gauge");
        }
        match guest.state.metric_name(&name) {
            Some(metric) => {
                metrics::gauge!("dynamo_host_policy_gauge", "policy" => guest.label.to_string(), "name" => metric).set(value);
            }
            None => return dropped(guest, "gauge"),
        }
        Ok(())
    })
}

/// Counts what was over a quota.
fn dropped(guest: &Guest, what: &'static str) -> wasmtime::Result<()> {
    metrics::counter!("dynamo_host_policy_telemetry_dropped_total", "policy" => guest.label.to_string(), "what" => what)
        .increment(1);
    Ok(())
}
