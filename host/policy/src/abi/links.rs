//! `links`: what is known of the ways between candidates.

use std::{mem::size_of_val, sync::Arc};

use dynamo_host_core::{Worker, WorkerId, links::Link};

use super::{Interface, define};
use crate::{call::Guest, question::RouteCall};

pub(super) fn link(interface: &mut Interface<'_>) -> wasmtime::Result<()> {
    define(interface, "prefilled-by", |guest: &mut Guest, (): ()| {
        Ok((guest.route("prefilled-by")?.request.prefilled_by.map(|WorkerId(id)| id), 0))
    })?;
    define(interface, "reachable", |guest: &mut Guest, (from,): (Option<u32>,)| {
        let call = guest.route("reachable")?;
        let column: Arc<[u32]> = column(call, from, 0, |from, to, link| u32::from(reaches(from, to, link, call.now_ms)));
        let bytes = size_of_val(&*column);
        Ok((column, bytes))
    })?;
    let measures: [(&'static str, fn(Link) -> f32); 3] = [
        ("tokens-per-second", |link| link.tokens_per_second()),
        ("handoff-ms", |link| link.handoff_ms()),
        ("error-rate", |link| link.error_rate()),
    ];
    for (name, measure) in measures {
        define(interface, name, move |guest: &mut Guest, (from,): (Option<u32>,)| {
            let call = guest.route(name)?;
            let column: Arc<[f32]> = column(call, from, f32::NAN, |_, _, link| link.map_or(f32::NAN, measure));
            let bytes = size_of_val(&*column);
            Ok((column, bytes))
        })?;
    }
    Ok(())
}

/// Whether KV can go from one worker to another.
fn reaches(from: &Worker, to: &Worker, link: Option<Link>, now_ms: u64) -> bool {
    from.spec.role.prefills()
        && to.spec.role.decodes()
        && from.id != to.id
        && from.handoff.group.is_some()
        && from.handoff.group == to.handoff.group
        && !link.is_some_and(|link| link.is_avoided(now_ms))
}

/// A value for each candidate, of the way to it; `none` if nothing is known of where it begins.
fn column<T: Clone>(
    call: &RouteCall,
    from_row: Option<u32>,
    none: T,
    value: impl Fn(&Worker, &Worker, Option<Link>) -> T,
) -> Arc<[T]> {
    let candidates = &call.candidates;
    let from = match from_row {
        Some(row) => (row < candidates.count()).then(|| candidates.worker(row)),
        None => call.request.prefilled_by.and_then(|id| candidates.find(id)),
    };
    let Some(from) = from else { return candidates.iter().map(|_| none.clone()).collect() };
    let known = |to: &Worker| call.links.as_ref().and_then(|links| links.get(from.load.index(), to.load.index()));
    candidates.iter().map(|to| value(from, to, known(to))).collect()
}
