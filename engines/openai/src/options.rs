//! What an operator may set about the connections to an engine.

use std::time::Duration;

/// Bounds on time, connections and memory. `Default` states each default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenAiOptions {
    /// Longest wait for a TCP connection to be made, name resolution apart. Default: 2 s.
    pub connect_timeout: Duration,
    /// Longest wait for the head of a stream, or for all of a whole answer. Generous, since a whole answer's
    /// head comes when its last token is made, and a stream's head may wait in the engine's queue. Default: 600 s.
    pub head_timeout: Duration,
    /// Longest wait for a probe or a list of models. Default: 2 s.
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

impl Default for OpenAiOptions {
    fn default() -> Self {
        Self {
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
