//! `candidates`: the columns, computed when they are asked for.

use std::{mem::size_of_val, sync::Arc};

use dynamo_host_core::{
    Candidates, Column, Tier,
    column::{F32Column, U32Column, U64Column, topology_label},
};
use wasmtime::component::{ComponentType, Lower};

use super::{Bytes, Interface, define};
use crate::call::{Guest, Reading};

pub(super) fn link(interface: &mut Interface<'_>) -> wasmtime::Result<()> {
    define(interface, "count", |guest: &mut Guest, (): ()| Ok((guest.route("count")?.candidates.count(), 0)))?;
    for &(name, column) in U64Column::ALL {
        define_column(interface, name, move |candidates, _| candidates.u64_column(column))?;
    }
    for &(name, column) in U32Column::ALL {
        define_column(interface, name, move |candidates, now_ms| candidates.u32_column(column, now_ms))?;
    }
    for (name, tier) in Tier::COLUMNS {
        define(interface, name, move |guest: &mut Guest, (): ()| {
            let call = guest.route(name)?;
            let column = call.candidates.cached_column(tier, call.overlap.as_deref());
            Ok(noted(guest, name, column))
        })?;
    }
    for &(name, column) in F32Column::ALL {
        define_column(interface, name, move |candidates, _| candidates.f32_column(column))?;
    }
    define(interface, "topology", |guest: &mut Guest, (level,): (u32,)| {
        let column = guest.route("topology")?.candidates.topology_column(level);
        if let Some(label) = topology_label(level) {
            guest.note(|| Reading::Label(label.to_owned()));
        }
        let bytes = size_of_val(&*column);
        Ok((column, bytes))
    })?;
    define(interface, "label", |guest: &mut Guest, (key,): (String,)| {
        let column = guest.route("label")?.candidates.label_column(&key);
        let bytes = size_of_val(&*column) + key.len();
        guest.note(|| Reading::Label(key));
        Ok((column, bytes))
    })?;
    define(interface, "label-code", |guest: &mut Guest, (key, value): (String, String)| {
        let code = guest.route("label-code")?.candidates.label_code(&key, &value);
        let bytes = key.len() + value.len();
        guest.note(|| Reading::Label(key));
        Ok((code, bytes))
    })?;
    define(interface, "signal", |guest: &mut Guest, (name,): (String,)| {
        let column = guest.route("signal")?.candidates.signal_column(&name);
        let bytes = name.len() + column.as_deref().map_or(0, size_of_val);
        guest.note(|| Reading::Label(name));
        Ok((column, bytes))
    })
}

/// Defines a column.
fn define_column<T>(
    interface: &mut Interface<'_>,
    name: &'static str,
    read: impl Fn(&Candidates, u64) -> Arc<[T]> + Send + Sync + 'static,
) -> wasmtime::Result<()>
where
    T: Lower + ComponentType + Send + Sync + 'static,
    Column: From<Arc<[T]>>,
{
    define(interface, name, move |guest: &mut Guest, (): ()| {
        let call = guest.route(name)?;
        let column = read(&call.candidates, call.now_ms);
        Ok(noted(guest, name, column))
    })
}

/// A column as it is handed over, with its bytes.
fn noted<T>(guest: &mut Guest, name: &'static str, column: Arc<[T]>) -> (Arc<[T]>, Bytes)
where
    Column: From<Arc<[T]>>,
{
    guest.note(|| Reading::Column(name, Arc::clone(&column).into()));
    let bytes = size_of_val(&*column);
    (column, bytes)
}
