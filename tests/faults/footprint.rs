//! Footprint: what a host holds, so that what it leaks shows.

use std::{fmt, fs};

use crate::harness::{eventually, host::Host};

/// What a host holds when it has nothing to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Footprint {
    pub(crate) resident_mib: u64,
    pub(crate) threads: u64,
    /// Sockets of clients, engines and listeners.
    pub(crate) sockets: usize,
    /// Requests that it thinks it has.
    pub(crate) in_flight: f64,
}

impl Footprint {
    /// Looks now.
    pub(crate) async fn of(host: &Host) -> Self {
        let id = host.process.id();
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap();
        let number = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            let digits = line.unwrap_or_else(|| panic!("no {key} in {status}")).trim().trim_end_matches(" kB");
            digits.parse::<u64>().unwrap()
        };
        let is_socket =
            |entry: &fs::DirEntry| fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"));
        let sockets = fs::read_dir(format!("/proc/{id}/fd")).unwrap().flatten().filter(is_socket).count();
        let in_flight = host.http.metric("dynamo_host_requests_in_flight", &[]).await;
        Self { resident_mib: number("VmRSS:") / 1024, threads: number("Threads:"), sockets, in_flight }
    }

    /// Looks until no request is left and there are not more sockets than before and some; a leak of them never ends so.
    pub(crate) async fn settled(host: &Host, before: Self) -> Self {
        let room = before.sockets + SOCKETS_OF_PROBES;
        eventually("the host holds no request, and no more sockets than before", async || {
            let now = Self::of(host).await;
            (now.in_flight == 0.0 && now.sockets <= room).then_some(now)
        })
        .await
    }
}

/// Connections that are kept to engines for the next request or probe, and the looker's own.
const SOCKETS_OF_PROBES: usize = 16;

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { resident_mib, threads, sockets, in_flight } = self;
        write!(f, "{resident_mib} MiB resident, {threads} threads, {sockets} sockets, {in_flight} requests in flight")
    }
}
