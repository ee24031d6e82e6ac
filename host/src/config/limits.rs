//! Bounds on what clients and operators may ask for: `[limits]` of the configuration file.

use std::time::Duration;

use serde::Deserialize;

use super::ConfigError;

/// The longest time that makes sense, and that any clock can count: a year.
const MAX_SECONDS: u64 = 365 * 24 * 3600;

/// Bounds on what clients and operators may ask for.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Limits {
    /// Connections at once, of each listener.
    pub(crate) max_connections: u32,
    /// Connections at once of one client's address; 0 for no bound of its own.
    pub(crate) max_connections_per_client: u32,
    /// Headers of a request.
    pub(crate) max_headers: u32,
    /// Bytes of a request's head.
    pub(crate) max_header_bytes: u32,
    /// How long a connection may take to say what it wants, and be idle between two requests.
    pub(crate) header_timeout_s: u64,
    /// Largest request body.
    pub(crate) max_body_bytes: usize,
    /// How long a body may take to arrive.
    pub(crate) body_timeout_s: u64,
    /// How long a request may take altogether.
    pub(crate) request_timeout_s: u64,
    /// How long an engine's stream may be silent.
    pub(crate) stream_idle_s: u64,
    /// How long a client may read next to nothing of what is there for it.
    pub(crate) write_stall_s: u64,
    /// Bytes that the system keeps for one client that has not read them yet; what it grants may be less.
    pub(crate) client_buffer_bytes: u32,
    /// How long all is served on after a stop signal, for balancers that have to see first that the host is not ready.
    pub(crate) stop_delay_s: u64,
    /// How long running requests may go on then.
    pub(crate) drain_s: u64,
    /// Largest `max_tokens`.
    pub(crate) max_output_tokens: u64,
    /// Largest `n`.
    pub(crate) max_choices: u64,
    /// Most workers.
    pub(crate) max_workers: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 10_000,
            max_connections_per_client: 0,
            max_headers: 100,
            max_header_bytes: 64 << 10,
            header_timeout_s: 30,
            max_body_bytes: 32 << 20,
            body_timeout_s: 60,
            request_timeout_s: 3600,
            stream_idle_s: 300,
            write_stall_s: 60,
            client_buffer_bytes: 256 << 10,
            stop_delay_s: 0,
            drain_s: 30,
            max_output_tokens: 1_000_000,
            max_choices: 128,
            max_workers: 16_384,
        }
    }
}

impl Limits {
    pub(crate) fn stream_idle(&self) -> Duration {
        Duration::from_secs(self.stream_idle_s)
    }

    pub(crate) fn request_timeout(&self) -> Duration {
        Duration::from_secs(self.request_timeout_s)
    }

    /// These limits where a running host can take them over, and its own where it cannot.
    pub(crate) fn with_fixed_of(&self, running: &Self) -> Self {
        let &Self { max_connections, max_connections_per_client, max_headers, max_header_bytes, .. } = running;
        let &Self { header_timeout_s, write_stall_s, client_buffer_bytes, stop_delay_s, drain_s, max_workers, .. } = running;
        Self {
            max_connections,
            max_connections_per_client,
            max_headers,
            max_header_bytes,
            header_timeout_s,
            write_stall_s,
            client_buffer_bytes,
            stop_delay_s,
            drain_s,
            max_workers,
            ..self.clone()
        }
    }

    /// Keys that differ from a running host's and that it cannot change: the listeners' own, and what was made to measure.
    pub(super) fn fixed_that_differ(&self, running: &Self) -> impl Iterator<Item = &'static str> {
        [
            ("limits.max_connections", self.max_connections != running.max_connections),
            ("limits.max_connections_per_client", self.max_connections_per_client != running.max_connections_per_client),
            ("limits.max_headers", self.max_headers != running.max_headers),
            ("limits.max_header_bytes", self.max_header_bytes != running.max_header_bytes),
            ("limits.header_timeout_s", self.header_timeout_s != running.header_timeout_s),
            ("limits.write_stall_s", self.write_stall_s != running.write_stall_s),
            ("limits.client_buffer_bytes", self.client_buffer_bytes != running.client_buffer_bytes),
            ("limits.stop_delay_s", self.stop_delay_s != running.stop_delay_s),
            ("limits.drain_s", self.drain_s != running.drain_s),
            ("limits.max_workers", self.max_workers != running.max_workers),
        ]
        .into_iter()
        .filter_map(|(key, differs)| differs.then_some(key))
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let seconds = 1..=MAX_SECONDS;
        let bounds = [
            ("max_connections", u64::from(self.max_connections), 1..=1_000_000),
            ("max_connections_per_client", u64::from(self.max_connections_per_client), 0..=1_000_000),
            ("max_headers", u64::from(self.max_headers), 10..=10_000),
            // hyper reads into a buffer of this size.
            ("max_header_bytes", u64::from(self.max_header_bytes), 8192..=16 << 20),
            ("header_timeout_s", self.header_timeout_s, seconds.clone()),
            ("max_body_bytes", self.max_body_bytes as u64, 1..=1 << 40),
            ("body_timeout_s", self.body_timeout_s, seconds.clone()),
            ("request_timeout_s", self.request_timeout_s, seconds.clone()),
            ("stream_idle_s", self.stream_idle_s, seconds.clone()),
            ("write_stall_s", self.write_stall_s, seconds),
            ("client_buffer_bytes", u64::from(self.client_buffer_bytes), 4096..=1 << 30),
            ("stop_delay_s", self.stop_delay_s, 0..=3600),
            ("drain_s", self.drain_s, 0..=MAX_SECONDS),
            // What policies see of these two has 32 bits.
            ("max_output_tokens", self.max_output_tokens, 1..=u64::from(u32::MAX)),
            ("max_choices", self.max_choices, 1..=u64::from(u32::MAX)),
            // The load board is made for all of them at once.
            ("max_workers", u64::from(self.max_workers), 1..=100_000),
        ];
        let wrong = bounds.into_iter().find(|(_, value, allowed)| !allowed.contains(value));
        wrong.map_or(Ok(()), |(key, value, allowed)| Err(ConfigError::Limit { key, value, allowed }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_within_bounds_and_what_is_not_is_named_with_its_bounds() {
        Limits::default().check().unwrap();
        let refused = |limits: Limits| limits.check().unwrap_err().to_string();
        let says = refused(Limits { max_output_tokens: 1 << 32, ..Limits::default() });
        assert_eq!(says, "limits.max_output_tokens is 4294967296; use 1 to 4294967295");
        assert!(refused(Limits { max_workers: 100_001, ..Limits::default() }).contains("use 1 to 100000"));
        assert!(refused(Limits { header_timeout_s: 0, ..Limits::default() }).contains("limits.header_timeout_s is 0"));
    }

    #[test]
    fn each_limit_is_either_taken_over_or_named_as_one_that_is_not() {
        let running = Limits::default();
        // Each key with a value of its own.
        let now: Limits = toml::from_str(
            "max_connections = 9\nmax_connections_per_client = 8\nmax_headers = 99\nmax_header_bytes = 9999\nheader_timeout_s = 7\n\
             max_body_bytes = 6\nbody_timeout_s = 5\nrequest_timeout_s = 4\nstream_idle_s = 3\nwrite_stall_s = 2\nclient_buffer_bytes = 4097\nstop_delay_s = 14\ndrain_s = 1\n\
             max_output_tokens = 11\nmax_choices = 12\nmax_workers = 13\n",
        )
        .unwrap();
        let named: Vec<_> = now.fixed_that_differ(&running).collect();
        let keys = [
            "max_connections",
            "max_connections_per_client",
            "max_headers",
            "max_header_bytes",
            "header_timeout_s",
            "write_stall_s",
            "client_buffer_bytes",
            "stop_delay_s",
            "drain_s",
            "max_workers",
        ];
        assert_eq!(named, keys.map(|key| format!("limits.{key}")));
        let taken = now.with_fixed_of(&running);
        assert_eq!(taken.fixed_that_differ(&running).count(), 0);
        let others = Limits {
            max_body_bytes: 6,
            body_timeout_s: 5,
            request_timeout_s: 4,
            stream_idle_s: 3,
            max_output_tokens: 11,
            max_choices: 12,
            ..running
        };
        assert_eq!(taken, others);
    }
}
