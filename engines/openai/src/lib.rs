//! Adapter for OpenAI-compatible servers: vLLM, SGLang, TensorRT-LLM, llama.cpp, and any other. `docs/engines.md` is its manual.
//!
//! Contract: bodies go through untouched both ways, but for a field where a kind of server needs one (module `dialect`);
//! the engine sees the host's request id as `x-request-id`.
//! What ends a stream well or badly is decided in one place, the module `relay`, and a good stream always ends with
//! `[DONE]`, whether the engine sends it or not. Giving up is hanging up: dropping a reply closes its connection,
//! which engines take as a cancel, and a connection with an unread rest is never used again.
//!
//! Deliberately absent: retries of a request that was sent, since the engine may be working on it (the host
//! decides), and a bound on how long a stream may be silent, since only the host knows whether the engine is
//! healthy (vLLM and llama.cpp on SIGTERM go silent for ever with the connection open).

mod abort;
mod body;
mod client;
mod control;
mod dialect;
mod engine;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod handoff;
mod http1;
mod kind;
mod kv;
mod models;
mod options;
mod pool;
mod prometheus;
mod relay;
mod stream;
mod tls;
mod url;

pub use dynamo_engine_kv_events::{Endpoint as KvEndpoint, EndpointError as KvEndpointError};
pub use engine::{OpenAiEngine, SetupError};
pub use kind::{Kind, UnknownKind};
pub use options::{Bearer, KvEvents, OpenAiOptions};
pub use tls::TlsError;
pub use url::UrlError;
