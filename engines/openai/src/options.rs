//! What an operator may set about an engine: what it is, how it is trusted, and the bounds on its connections.

use std::{fmt, path::PathBuf, time::Duration};

use dynamo_engine_api::Protocol;
use dynamo_engine_kv_events::Endpoint as KvEndpoint;
use http::HeaderValue;

use crate::{engine::SetupError, kind::Kind};

/// An engine's kind, credentials, and bounds on time, connections and memory. `Default` states each default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenAiOptions {
    /// What the server is. Default: none, it is detected.
    pub kind: Option<Kind>,
    /// Sent with each request as `authorization: Bearer …`. Default: none.
    pub bearer: Option<Bearer>,
    /// PEM file of the certificate authorities that an `https://` server's certificate is checked against, instead of
    /// the system's. Default: none.
    pub ca_file: Option<PathBuf>,
    /// Whether a request's priority is said to the engine, where its kind has a word for it. Off by default: vLLM
    /// without `--scheduling-policy priority` may refuse a request that has one.
    pub forward_priority: bool,
    /// How its KV events are found. Default: by asking the server.
    pub kv_events: KvEvents,
    /// Where it replays them, if `kv_events` is an endpoint. Default: nowhere.
    pub kv_replay: Option<KvEndpoint>,
    /// The beginning of their topics, if `kv_events` is an endpoint. Default: any.
    pub kv_topic: String,
    /// Its data-parallel ranks, each with a publisher, if `kv_events` is an endpoint. Default: 1.
    pub ranks: u32,
    /// How it hands KV over. Default: as its kind does, NIXL for vLLM and our mock engine, its own way for SGLang and
    /// TensorRT-LLM, not at all for the others.
    pub handoff: Option<Protocol>,
    /// Where others find it for a hand-off by `bootstrap` or `mooncake`, if that is not the host of its URL: a name or an
    /// address, IPv6 in brackets. Default: the host of its URL.
    pub bootstrap_host: Option<String>,
    /// The port of its bootstrap server: SGLang's `--disaggregation-bootstrap-port`, vLLM's
    /// `VLLM_MOONCAKE_BOOTSTRAP_PORT`. Default: 8998, as theirs.
    pub bootstrap_port: u16,
    /// Longest wait for a connection to be made, its TLS handshake included, name resolution apart. Default: 2 s.
    pub connect_timeout: Duration,
    /// Longest wait for the head of a stream, or for all of a whole answer. Generous, since a whole answer's
    /// head comes when its last token is made, and a stream's head may wait in the engine's queue. Default: 600 s.
    pub head_timeout: Duration,
    /// Longest wait for a probe, a list of models, or a report of load; SGLang's `/health` and TensorRT-LLM's
    /// `/metrics` get longer, since those take seconds. Default: 2 s.
    pub probe_timeout: Duration,
    /// How long an unused connection is kept. It must be shorter than what the server keeps one: a request that
    /// meets a closing connection fails. vLLM (uvicorn) and llama.cpp (cpp-httplib) keep 5 s. Default: 4 s.
    pub idle_timeout: Duration,
    /// Unused connections kept. Default: 256.
    pub max_idle_connections: usize,
    /// After how much silence the system asks whether the other machine still lives (TCP keep-alive). Default: 15 s.
    pub tcp_keepalive: Duration,
    /// Largest whole answer in bytes. Default: 64 MiB.
    pub max_whole_body_bytes: usize,
}

/// How a server's KV events are found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum KvEvents {
    /// The server is asked.
    #[default]
    Asked,
    /// Not at all.
    Off,
    /// Rank 0 publishes there, each further rank one port higher.
    At(KvEndpoint),
    /// Its ranks connect to us there.
    ConnectHere(KvEndpoint),
}

impl Default for OpenAiOptions {
    fn default() -> Self {
        Self {
            kind: None,
            bearer: None,
            ca_file: None,
            forward_priority: false,
            kv_events: KvEvents::default(),
            kv_replay: None,
            kv_topic: String::new(),
            ranks: 1,
            handoff: None,
            bootstrap_host: None,
            bootstrap_port: 8998,
            connect_timeout: Duration::from_secs(2),
            head_timeout: Duration::from_secs(600),
            probe_timeout: Duration::from_secs(2),
            idle_timeout: Duration::from_secs(4),
            max_idle_connections: 256,
            tcp_keepalive: Duration::from_secs(15),
            max_whole_body_bytes: 64 << 20,
        }
    }
}

/// A bearer token. It is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Bearer(HeaderValue);

impl Bearer {
    /// A token as the engine's `--api-key` has it, without the word `Bearer`.
    ///
    /// # Errors
    /// If it is empty, or has characters that no header can carry.
    pub fn new(token: &str) -> Result<Self, SetupError> {
        let visible = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
        let mut value = visible
            .then(|| HeaderValue::try_from(format!("Bearer {token}")).ok())
            .flatten()
            .ok_or(SetupError::Bearer { chars: token.chars().count() })?;
        value.set_sensitive(true);
        Ok(Self(value))
    }

    /// The value of the header `authorization`.
    pub(crate) fn authorization(&self) -> HeaderValue {
        self.0.clone()
    }
}

impl fmt::Debug for Bearer {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Bearer(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_sent_and_never_shown() {
        let options = OpenAiOptions { bearer: Some(Bearer::new("sk-secret").unwrap()), ..Default::default() };
        assert!(!format!("{options:?}").contains("secret"));
        let authorization = options.bearer.unwrap().authorization();
        assert_eq!(authorization, "Bearer sk-secret");
        assert!(authorization.is_sensitive());
    }

    #[test]
    fn what_no_header_can_carry_is_refused_and_not_repeated() {
        for token in ["", "two words", "line\nbreak", "größe"] {
            let error = Bearer::new(token).unwrap_err().to_string();
            assert!(error.contains("bearer token"), "{error}");
            assert!(token.is_empty() || !error.contains(token), "{error}");
        }
    }
}
