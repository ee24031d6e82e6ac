//! `outcomes`: columns over ended requests.

use super::{Interface, define};
use crate::call::{Guest, OutcomeRow};

pub(super) fn link(interface: &mut Interface<'_>) -> wasmtime::Result<()> {
    define(interface, "count", |guest: &mut Guest, (): ()| Ok((guest.outcomes("count")?.len() as u32, 0)))?;
    column(interface, "decision-id", |row| row.decision_id)?;
    column(interface, "worker-id", |row| row.worker_id)?;
    column(interface, "ttft-ms", |row| row.ttft_ms)?;
    column(interface, "itl-ms", |row| row.itl_ms)?;
    column(interface, "queue-ms", |row| row.queue_ms)?;
    column(interface, "output-tokens", |row| row.output_tokens)?;
    column(interface, "end", |row| row.end)
}

fn column<T>(interface: &mut Interface<'_>, name: &'static str, read: fn(&OutcomeRow) -> T) -> wasmtime::Result<()>
where
    T: wasmtime::component::Lower + wasmtime::component::ComponentType + 'static,
{
    define(interface, name, move |guest: &mut Guest, (): ()| {
        let values: Vec<T> = guest.outcomes(name)?.iter().map(read).collect();
        let bytes = size_of_val(&*values);
        Ok((values, bytes))
    })
}
