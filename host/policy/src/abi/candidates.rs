//! `candidates`: the columns, computed when they are asked for.

use std::{mem::size_of_val, sync::Arc};

use dynamo_host_core::column::{F32Column, U32Column};

use super::{Interface, define};
use crate::call::{Guest, RouteCall};

pub(super) fn link(interface: &mut Interface<'_>) -> wasmtime::Result<()> {
    define(interface, "count", |guest: &mut Guest, (): ()| Ok(guest.route("count")?.candidates.count()))?;
    define(interface, "worker-id", |guest: &mut Guest, (): ()| {
        hand_out(guest, "worker-id", |call| call.candidates.worker_ids())
    })?;
    for &(name, column) in U32Column::ALL {
        define(interface, name, move |guest: &mut Guest, (): ()| {
            hand_out(guest, name, |call| call.candidates.u32_column(column, call.now_ms))
        })?;
    }
    for &(name, column) in F32Column::ALL {
        define(interface, name, move |guest: &mut Guest, (): ()| {
            hand_out(guest, name, |call| call.candidates.f32_column(column))
        })?;
    }
    define(interface, "topology", |guest: &mut Guest, (level,): (u32,)| {
        hand_out(guest, "topology", |call| call.candidates.topology_column(level))
    })?;
    define(interface, "label", |guest: &mut Guest, (key,): (String,)| {
        hand_out(guest, "label", |call| call.candidates.label_column(&key))
    })?;
    define(interface, "label-code", |guest: &mut Guest, (key, value): (String, String)| {
        Ok(guest.route("label-code")?.candidates.label_code(&key, &value))
    })?;
    define(interface, "signal", |guest: &mut Guest, (name,): (String,)| {
        let column = guest.route("signal")?.candidates.signal_column(&name);
        guest.charge(column.as_deref().map_or(0, size_of_val))?;
        Ok(column)
    })
}

/// A column, charged by its size.
fn hand_out<T>(guest: &mut Guest, name: &'static str, read: impl Fn(&RouteCall) -> Arc<[T]>) -> wasmtime::Result<Arc<[T]>> {
    let column = read(guest.route(name)?);
    guest.charge(size_of_val(&*column))?;
    Ok(column)
}
