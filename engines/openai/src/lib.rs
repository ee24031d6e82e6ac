//! Adapter for OpenAI-compatible servers: vLLM, llama.cpp, SGLang, `transformers serve`, ….
//!
//! Contract: bodies go through untouched both ways; the engine sees the host's request id as `x-request-id`.
//! What ends a stream well or badly is decided in one place, the module `relay`, and a good stream always ends with
//! `[DONE]`, whether the engine sends it or not. Giving up is hanging up: dropping a reply closes its connection,
//! which engines take as a cancel, and a connection with an unread rest is never used again.
//!
//! Deliberately absent: retries of a request that was sent, since the engine may be working on it (the host
//! decides), and a bound on how long a stream may be silent, since only the host knows whether the engine is
//! healthy (vLLM and llama.cpp on SIGTERM go silent for ever with the connection open).

mod client;
mod engine;
mod http1;
mod models;
mod options;
mod pool;
mod relay;
mod stream;
mod url;

pub use engine::OpenAiEngine;
pub use options::OpenAiOptions;
pub use url::UrlError;
