//! The host's side of `dynamo:policy`: every import function, a module per interface.
//!
//! Functions are wired by hand, not generated: columns are a table (`core::column`), and each function costs fuel in one
//! way. A test links a component that imports the whole world, so that a function
//! that is missing or has another type cannot be released.

mod admission_answer;
mod admission_pools;
mod candidates;
mod links;
mod outcomes;
mod request;
mod routing_answer;
mod services;
#[cfg(test)]
mod tests;

use wasmtime::{
    StoreContextMut, Trap,
    component::{ComponentNamedList, ComponentType, Lift, Linker, LinkerInstance, Lower},
};

use crate::{call::Guest, limits::Limits};

/// Package and version of the contract that this host speaks. Older 0.1 guests link against it, since the host
/// only ever adds imports.
pub(crate) const VERSION: &str = "0.1.3";

/// The full name of an interface.
pub(crate) fn interface(name: &str) -> String {
    format!("dynamo:policy/{name}@{VERSION}")
}

/// All that policies may import, of whatever world: which of it is allowed to one is checked before it is compiled, and a
/// function that is called out of its place refuses to work.
pub(crate) fn link(linker: &mut Linker<Guest>) -> wasmtime::Result<()> {
    request::link(&mut linker.instance(&interface("request"))?)?;
    candidates::link(&mut linker.instance(&interface("candidates"))?)?;
    links::link(&mut linker.instance(&interface("links"))?)?;
    routing_answer::link(&mut linker.instance(&interface("routing-answer"))?)?;
    admission_pools::link(&mut linker.instance(&interface("admission-pools"))?)?;
    admission_answer::link(&mut linker.instance(&interface("admission-answer"))?)?;
    outcomes::link(&mut linker.instance(&interface("outcomes"))?)?;
    services::link_state(&mut linker.instance(&interface("state"))?)?;
    services::link_clock(&mut linker.instance(&interface("clock"))?)?;
    services::link_entropy(&mut linker.instance(&interface("entropy"))?)?;
    services::link_telemetry(&mut linker.instance(&interface("telemetry"))?)
}

type Interface<'a> = LinkerInstance<'a, Guest>;

/// What crosses the boundary beyond a few bytes, in bytes: fuel is charged by it.
type Bytes = usize;

/// Defines a function. It gives its result and the bytes that were moved in and out for it.
fn define<P, R>(
    interface: &mut Interface<'_>,
    name: &'static str,
    body: impl Fn(&mut Guest, P) -> wasmtime::Result<(R, Bytes)> + Send + Sync + 'static,
) -> wasmtime::Result<()>
where
    P: ComponentNamedList + Lift + 'static,
    R: Lower + ComponentType + 'static,
{
    interface.func_wrap(name, move |mut store: StoreContextMut<'_, Guest>, params: P| {
        let (result, bytes) = body(store.data_mut(), params)?;
        charge(&mut store, bytes)?;
        Ok((result,))
    })
}

/// Defines a function without a result. It gives the bytes that were moved in.
fn define_void<P>(
    interface: &mut Interface<'_>,
    name: &'static str,
    body: impl Fn(&mut Guest, P) -> wasmtime::Result<Bytes> + Send + Sync + 'static,
) -> wasmtime::Result<()>
where
    P: ComponentNamedList + Lift + 'static,
{
    interface.func_wrap(name, move |mut store: StoreContextMut<'_, Guest>, params: P| {
        let bytes = body(store.data_mut(), params)?;
        charge(&mut store, bytes)
    })
}

/// Takes fuel for a call: neither fuel nor epochs interrupt host calls, so that they are bounded by what they cost.
fn charge(store: &mut StoreContextMut<'_, Guest>, bytes: Bytes) -> wasmtime::Result<()> {
    let cost = Limits::HOST_CALL_FUEL + (bytes / Limits::BYTES_PER_FUEL) as u64;
    let left = store.get_fuel()?.checked_sub(cost).ok_or(Trap::OutOfFuel)?;
    store.set_fuel(left)
}
