//! Any other server with OpenAI's API: nothing is asked of it but that and where it publishes KV
//! events, and nothing is said to it but the request.

use dynamo_engine_api::EngineError;
use futures_core::future::BoxFuture;

use super::{Dialect, succeeds};
use crate::{
    control::Control,
    kv::{self, KvSources},
};

#[derive(Debug)]
pub(super) struct Plain;

impl Dialect for Plain {
    fn probe<'a>(&'a self, control: &'a Control) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(succeeds(control, "/health"))
    }

    /// A server may be vLLM, or like it, under another name.
    fn kv_sources<'a>(&'a self, control: &'a Control) -> BoxFuture<'a, Result<KvSources, EngineError>> {
        Box::pin(kv::vllm_sources(control))
    }
}
