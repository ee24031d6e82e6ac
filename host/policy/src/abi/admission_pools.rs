//! `admission-pools`: the state of the pools, as columns.

use dynamo_host_core::PoolState;
use wasmtime::component::{ComponentType, Lower};

use super::{Interface, define};
use crate::call::Guest;

pub(super) fn link(interface: &mut Interface<'_>) -> wasmtime::Result<()> {
    define(interface, "count", |guest: &mut Guest, (): ()| Ok((guest.admit("count")?.pools.len() as u32, 0)))?;
    column(interface, "pool-key", |pool| pool.key)?;
    column(interface, "role", |pool| pool.role.code())?;
    column(interface, "ready-workers", |pool| pool.ready_workers)?;
    column(interface, "running-requests", |pool| pool.running_requests)?;
    column(interface, "free-requests", |pool| pool.free_requests)?;
    column(interface, "queued-requests", |pool| pool.queued_requests)?;
    column(interface, "queued-tokens", |pool| pool.queued_tokens)?;
    column(interface, "oldest-age-ms", |pool| pool.oldest_age_ms)?;
    column(interface, "predicted-wait-ms", |pool| pool.predicted_wait_ms)?;
    column(interface, "shed-rate", |pool| pool.shed_rate)?;
    quantile(interface, "recent-ttft-ms", |pool, percentile| pool.ttft.at(percentile))?;
    quantile(interface, "recent-itl-ms", |pool, percentile| pool.itl.at(percentile))
}

fn column<T>(interface: &mut Interface<'_>, name: &'static str, read: fn(&PoolState) -> T) -> wasmtime::Result<()>
where
    T: Lower + ComponentType + 'static,
{
    define(interface, name, move |guest: &mut Guest, (): ()| {
        let values: Vec<T> = guest.admit(name)?.pools.iter().map(read).collect();
        let bytes = size_of_val(&*values);
        Ok((values, bytes))
    })
}

fn quantile(interface: &mut Interface<'_>, name: &'static str, read: fn(&PoolState, f32) -> f32) -> wasmtime::Result<()> {
    define(interface, name, move |guest: &mut Guest, (percentile,): (f32,)| {
        let values: Vec<f32> = guest.admit(name)?.pools.iter().map(|pool| read(pool, percentile)).collect();
        let bytes = size_of_val(&*values);
        Ok((values, bytes))
    })
}
