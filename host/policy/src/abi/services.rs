//! `state`, `clock`, `entropy`, `telemetry`.

use wasmtime::component::{ComponentType, Lift};

use super::{Bytes, Interface, define, define_void};
use crate::{call::Guest, state::StateError};

pub(super) fn link_state(interface: &mut Interface<'_>) -> wasmtime::Result<()> {
    define(interface, "get", |guest: &mut Guest, (key,): (String,)| {
        let value = guest.state.get(&key, guest.now.monotonic_ms);
        let bytes = key.len() + value.as_ref().map_or(0, Vec::len);
        Ok((value, bytes))
    })?;
    define(interface, "set", |guest: &mut Guest, (key, value, ttl_ms): (String, Vec<u8>, u32)| {
        let bytes = key.len() + value.len();
        Ok((guest.state.set(&key, value, ttl_ms, guest.now.monotonic_ms).map_err(StateError::code), bytes))
    })?;
    define(interface, "add", |guest: &mut Guest, (key, delta, ttl_ms): (String, i64, u32)| {
        Ok((guest.state.add(&key, delta, ttl_ms, guest.now.monotonic_ms).map_err(StateError::code), key.len()))
    })?;
    define(interface, "take", |guest: &mut Guest, (key, amount, per_second, burst): (String, f64, f64, f64)| {
        let taken = guest.state.take(&key, amount, per_second, burst, guest.now.monotonic_ms);
        Ok((taken.map_err(StateError::code), key.len()))
    })
}

pub(super) fn link_clock(interface: &mut Interface<'_>) -> wasmtime::Result<()> {
    define(interface, "monotonic-ms", |guest: &mut Guest, (): ()| Ok((guest.now.monotonic_ms, 0)))?;
    define(interface, "unix-ms", |guest: &mut Guest, (): ()| Ok((guest.now.unix_ms, 0)))
}

pub(super) fn link_entropy(interface: &mut Interface<'_>) -> wasmtime::Result<()> {
    define(interface, "next", |guest: &mut Guest, (): ()| Ok((guest.next_random(), 0)))
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
        let line = guest.printable(&message);
        if matches!(level, Level::Error) {
            // Kept whatever the quota says: a panic's text is all that the operator gets to see of it.
            guest.said = Some(line.clone());
        }
        if guest.is_muted {
            return Ok(message.len());
        }
        if !guest.may_log() {
            return dropped(guest, "log", message.len());
        }
        let policy = &*guest.label;
        match level {
            Level::Debug => tracing::debug!(target: "policy", policy, "{line}"),
            Level::Info => tracing::info!(target: "policy", policy, "{line}"),
            Level::Warn => tracing::warn!(target: "policy", policy, "{line}"),
            Level::Error => tracing::warn!(target: "policy", policy, "error: {line}"),
        }
        Ok(message.len())
    })?;
    define_void(interface, "counter-add", |guest: &mut Guest, (name, by): (String, u64)| {
        let Some(metric) = exported(guest, &name) else { return dropped(guest, "counter", name.len()) };
        if !guest.is_muted {
            metrics::counter!("dynamo_host_policy_counter_total", "slot" => guest.slot(), "policy" => guest.label.to_string(), "name" => metric)
                .increment(by);
        }
        Ok(name.len())
    })?;
    define_void(interface, "gauge-set", |guest: &mut Guest, (name, value): (String, f64)| {
        // What is no number would spoil every sum and rule over the metric.
        let metric = if value.is_finite() { exported(guest, &name) } else { None };
        let Some(metric) = metric else { return dropped(guest, "gauge", name.len()) };
        if !guest.is_muted {
            metrics::gauge!("dynamo_host_policy_gauge", "slot" => guest.slot(), "policy" => guest.label.to_string(), "name" => metric).set(value);
        }
        Ok(name.len())
    })
}

/// The name under which a policy's metric is exported, if the call and the slot may export one more.
fn exported(guest: &mut Guest, name: &str) -> Option<String> {
    if guest.metric_update() { guest.state.metric_name(name) } else { None }
}

/// Counts what was over a quota.
fn dropped(guest: &Guest, what: &'static str, bytes: Bytes) -> wasmtime::Result<Bytes> {
    if !guest.is_muted {
        metrics::counter!("dynamo_host_policy_telemetry_dropped_total", "slot" => guest.slot(), "policy" => guest.label.to_string(), "what" => what)
            .increment(1);
    }
    Ok(bytes)
}
