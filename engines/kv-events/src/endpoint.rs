//! Where an engine publishes: as the engine or an operator says it, and as it can be reached.

use std::{fmt, net::IpAddr, str::FromStr};

/// A ZeroMQ endpoint over TCP.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// A name, an IPv4 address, or an IPv6 address without brackets; empty for any (`*`).
    host: String,
    port: u16,
}

/// What is no endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no ZeroMQ endpoint that can be reached from here; write tcp://HOST:PORT")]
pub struct EndpointError {
    /// What was given.
    pub text: String,
}

impl Endpoint {
    /// The same for the publisher of another rank: engines count ports up from rank 0's.
    #[must_use]
    pub fn of_rank(&self, rank: u32) -> Self {
        Self { host: self.host.clone(), port: self.port.saturating_add(u16::try_from(rank).unwrap_or(u16::MAX)) }
    }

    /// How it is reached from another machine: where it is no one machine's address, or only its own, it is `engine_host`'s.
    #[must_use]
    pub fn seen_from_outside(&self, engine_host: &str) -> Self {
        if self.is_any() || self.is_loopback() {
            return Self { host: engine_host.trim_matches(['[', ']']).to_owned(), port: self.port };
        }
        self.clone()
    }

    /// Its port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    fn address(&self) -> Option<IpAddr> {
        // vLLM binds to loopback by `[::ffff:127.0.0.1]`.
        self.host.parse().ok().map(|address: IpAddr| address.to_canonical())
    }

    fn is_any(&self) -> bool {
        self.host.is_empty() || self.address().is_some_and(|address| address.is_unspecified())
    }

    fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.address().is_some_and(|address| address.is_loopback())
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let parsed = || {
            let (host, port) = text.strip_prefix("tcp://")?.rsplit_once(':')?;
            let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
            let is_host = !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_graphic() && !b"/,[]".contains(&byte));
            let host = if host == "*" { "" } else { host };
            is_host.then_some(Self { host: host.to_owned(), port: port.parse().ok()? })
        };
        parsed().ok_or_else(|| EndpointError { text: text.to_owned() })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address() {
            Some(IpAddr::V6(address)) => write!(f, "tcp://[{address}]:{}", self.port),
            Some(address) => write!(f, "tcp://{address}:{}", self.port),
            None if self.host.is_empty() => write!(f, "tcp://0.0.0.0:{}", self.port),
            None => write!(f, "tcp://{}:{}", self.host, self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, from_outside: &str) {
        let endpoint: Endpoint = text.parse().unwrap();
        assert_eq!(endpoint.seen_from_outside("10.0.0.7").to_string(), from_outside, "{text}");
    }

    #[test]
    fn what_is_bound_is_reached_at_the_engines_host() {
        check("tcp://*:5557", "tcp://10.0.0.7:5557");
        check("tcp://0.0.0.0:5557", "tcp://10.0.0.7:5557");
        check("tcp://[::]:5557", "tcp://10.0.0.7:5557");
        check("tcp://[::ffff:127.0.0.1]:5557", "tcp://10.0.0.7:5557");
        check("tcp://127.0.0.1:5557", "tcp://10.0.0.7:5557");
        check("tcp://10.1.1.1:5557", "tcp://10.1.1.1:5557");
        check("tcp://engine-3.svc:5557", "tcp://engine-3.svc:5557");
        check("tcp://[fd00::1]:5557", "tcp://[fd00::1]:5557");
        let endpoint: Endpoint = "tcp://*:5557".parse().unwrap();
        assert_eq!(endpoint.seen_from_outside("[::1]").of_rank(2).to_string(), "tcp://[::1]:5559");
    }

    #[test]
    fn what_is_no_endpoint_says_how_to_write_one() {
        for text in
            ["", "5557", "tcp://host", "tcp://:5557", "tcp://h:99999", "ipc:///tmp/x", "inproc://x", "http://h:1", "tcp://a/b:1"]
        {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains("write tcp://HOST:PORT"), "{text}: {error}");
        }
    }
}
