//! `candidates`: the columns, computed when they are asked for.

use std::{mem::size_of_val, sync::Arc};

use dynamo_host_core::{
    Candidates, Tier,
    column::{F32Column, U32Column, U64Column},
};
use wasmtime::component::{ComponentNamedList, ComponentType, Lift, Lower};

use super::{Bytes, Interface, define};
use crate::call::Guest;

pub(super) fn link(interface: &mut Interface<'_>) -> wasmtime::Result<()> {
    define(interface, "count", |guest: &mut Guest, (): ()| Ok((guest.route("count")?.candidates.count(), 0)))?;
    for &(name, column) in U64Column::ALL {
        define_column(interface, name, move |candidates, _, ()| (candidates.u64_column(column), 0))?;
    }
    for &(name, column) in U32Column::ALL {
        define_column(interface, name, move |candidates, now_ms, ()| (candidates.u32_column(column, now_ms), 0))?;
    }
    for (name, tier) in Tier::COLUMNS {
        define(interface, name, move |guest: &mut Guest, (): ()| {
            let call = guest.route(name)?;
            let column = call.candidates.cached_column(tier, call.overlap.as_deref());
            let bytes = size_of_val(&*column);
            Ok((column, bytes))
        })?;
    }
    for &(name, column) in F32Column::ALL {
        define_column(interface, name, move |candidates, _, ()| (candidates.f32_column(column), 0))?;
    }
    define_column(interface, "topology", |candidates, _, (level,): (u32,)| (candidates.topology_column(level), 0))?;
    define_column(interface, "label", |candidates, _, (key,): (String,)| (candidates.label_column(&key), key.len()))?;
    define(interface, "label-code", |guest: &mut Guest, (key, value): (String, String)| {
        Ok((guest.route("label-code")?.candidates.label_code(&key, &value), key.len() + value.len()))
    })?;
    define(interface, "signal", |guest: &mut Guest, (name,): (String,)| {
        let column = guest.route("signal")?.candidates.signal_column(&name);
        let bytes = name.len() + column.as_deref().map_or(0, size_of_val);
        Ok((column, bytes))
    })
}

/// Defines a column, given with the bytes of what it was asked with.
fn define_column<P, T>(
    interface: &mut Interface<'_>,
    name: &'static str,
    read: impl Fn(&Candidates, u64, P) -> (Arc<[T]>, Bytes) + Send + Sync + 'static,
) -> wasmtime::Result<()>
where
    P: ComponentNamedList + Lift + 'static,
    T: Lower + ComponentType + Send + Sync + 'static,
{
    define(interface, name, move |guest: &mut Guest, params: P| {
        let call = guest.route(name)?;
        let (column, asked) = read(&call.candidates, call.now_ms, params);
        let bytes = size_of_val(&*column) + asked;
        Ok((column, bytes))
    })
}
