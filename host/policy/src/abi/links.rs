//! `links`: what is known of the ways between candidates.

use std::{mem::size_of_val, sync::Arc};

use dynamo_host_core::{
    Column, WorkerId,
    column::{LinkColumn, REACHABLE},
    fleet::Ways,
};
use wasmtime::component::{ComponentType, Lower};

use super::{Interface, define};
use crate::{
    call::{Guest, Reading},
    question::RouteCall,
};

pub(super) fn link(interface: &mut Interface<'_>) -> wasmtime::Result<()> {
    define(interface, "prefilled-by", |guest: &mut Guest, (): ()| {
        Ok((guest.route("prefilled-by")?.request.prefilled_by.map(|WorkerId(id)| id), 0))
    })?;
    define_column(interface, REACHABLE, |call, from| call.candidates.reachable_column(ways(call, from), call.now_ms))?;
    for &(name, column) in LinkColumn::ALL {
        define_column(interface, name, move |call, from| call.candidates.link_column(column, ways(call, from)))?;
    }
    Ok(())
}

fn ways(call: &RouteCall, from: Option<u32>) -> Ways<'_> {
    Ways { from, prefilled_by: call.request.prefilled_by, links: call.links.as_deref() }
}

/// Defines a column of the ways from a row.
fn define_column<T>(
    interface: &mut Interface<'_>,
    name: &'static str,
    read: impl Fn(&RouteCall, Option<u32>) -> Arc<[T]> + Send + Sync + 'static,
) -> wasmtime::Result<()>
where
    T: Lower + ComponentType + Send + Sync + 'static,
    Column: From<Arc<[T]>>,
{
    define(interface, name, move |guest: &mut Guest, (from,): (Option<u32>,)| {
        let column = read(guest.route(name)?, from);
        guest.note(|| Reading::Link(name, from, Arc::clone(&column).into()));
        let bytes = size_of_val(&*column);
        Ok((column, bytes))
    })
}
