//! Hand-off: one mock engine's part in what another one computes or goes on from, as vLLM's NIXL connector speaks of it.
//!
//! A prefill that is asked for with `kv_transfer_params {"do_remote_decode": true}` keeps its blocks and says in its answer where
//! they are. Whoever is asked with those parameters fetches them over HTTP from there (`POST /mock/kv`), where a real engine reads
//! memory, and frees them by that; it takes the time that the modelled bytes take through both engines' ports. Nobody comes for them: they
//! are freed when the lease ends.
//!
//! Stricter than vLLM, so that a wrong router is seen: whoever fetches says which prompt it is for, and one that is not the
//! prompt that was computed is a fault that the engine dies of, as a real one of some, or answers with an error. An engine that only
//! decodes refuses to prefill for others, and the other way round.
//!
//! Deliberately absent: heartbeats, pushing, groups of blocks, several ranks.

mod fetch;
mod leases;
mod options;
mod params;
mod port;

use std::{
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use tokio::{task::JoinSet, time::Instant};

pub use self::options::HandoffOptions;
pub(crate) use self::options::KEYS;
pub(crate) use self::{
    fetch::{PATH, Parcel, RefusedFetch, Wanted},
    leases::{Lease, Leases},
    params::{Remote, Transfer, digest},
};
use self::{params::Kept, port::Port};
use crate::{
    driver::{Courier, Driver, Ticket},
    faults::Switches,
    model::Profile,
    options::MockOptions,
};

/// One engine's part.
#[derive(Debug)]
pub(crate) struct Handoff {
    /// Which run of which engine it is.
    engine_id: String,
    options: HandoffOptions,
    profile: Profile,
    /// Where others find it, once it is served.
    address: OnceLock<SocketAddr>,
    leases: Arc<Leases>,
    /// What goes out, and what comes in.
    out: Port,
    into: Port,
    courier: Courier,
    /// Fetches that brought nothing.
    failed: AtomicU64,
    switches: Arc<Switches>,
    _expiry: JoinSet<()>,
}

impl Handoff {
    /// # Panics
    /// Outside of a tokio runtime.
    pub(crate) fn start(engine_id: String, options: &MockOptions, driver: &Driver, switches: Arc<Switches>) -> Self {
        let (profile, handoff) = (options.profile.clone(), options.handoff.clone());
        let speedup = profile.speedup;
        let courier = driver.courier();
        let leases = Arc::new(Leases::new(handoff.lease));
        let mut expiry = JoinSet::new();
        expiry.spawn(leases::expire(Arc::clone(&leases), courier.clone()));
        let port = || Port::new(handoff.bytes_per_second as f64 * speedup, handoff.latency.div_f64(speedup));
        let (out, into, address, failed) = (port(), port(), OnceLock::new(), AtomicU64::new(0));
        let options = handoff;
        Self { engine_id, options, profile, address, leases, out, into, courier, failed, switches, _expiry: expiry }
    }

    /// It is served there.
    pub(crate) fn is_at(&self, address: SocketAddr) {
        let _ = self.address.set(address);
    }

    /// Leases that ended before anybody came.
    pub(crate) fn expired(&self) -> u64 {
        self.leases.expired()
    }

    /// Fetches that brought nothing.
    pub(crate) fn failed(&self) -> u64 {
        self.failed.load(Relaxed)
    }

    /// Takes a lease of what a request holds since it finished, and says what whoever decodes is to be told. Nothing, if it
    /// holds nothing.
    pub(crate) async fn keep(&self, keep: Keep, request_id: &str, prompt: &[u32], salt: u64, cached: u32) -> Option<Kept<'_>> {
        let ticket = keep.ticket;
        let blocks = self.courier.held(ticket).await.ok()??;
        let request_id = format!("{request_id}-{ticket:08x}");
        let lease = Lease { ticket, tokens: prompt.len() as u32, digest: digest(prompt, salt) };
        self.leases.take(Instant::now(), request_id.clone(), lease);
        keep.leased();
        let address = self.address.get().copied();
        Some(Kept::new(&self.engine_id, request_id, blocks, address, prompt.len() as u32, cached))
    }

    /// A request's KV is to be kept; until there is a lease, it goes with the request.
    pub(crate) fn to_keep(&self, ticket: Ticket) -> Keep {
        Keep { ticket, courier: Some(self.courier.clone()) }
    }

    pub(crate) fn options(&self) -> &HandoffOptions {
        &self.options
    }
}

/// What a request holds, or will: released when it is dropped, unless there is a lease.
#[derive(Debug)]
pub(crate) struct Keep {
    ticket: Ticket,
    courier: Option<Courier>,
}

impl Keep {
    fn leased(mut self) {
        self.courier = None;
    }
}

impl Drop for Keep {
    fn drop(&mut self) {
        if let Some(courier) = &self.courier {
            courier.release(self.ticket);
        }
    }
}
