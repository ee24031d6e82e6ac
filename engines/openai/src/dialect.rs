//! What differs between the servers that speak OpenAI's API: one dialect a kind, one adapter for all.
//!
//! Contract: which dialect is spoken is told, or found out by `GET /v1/models` alone, where each server names itself in
//! `owned_by`: that is cheap and has no side effect on any of them (SGLang's `/health` would generate a token, reading
//! TensorRT-LLM's `/metrics` takes what is read from others). Once found, it stays until the server was unreachable; then
//! another may be behind the port, and it is looked at again before anything else is asked. Bodies get a field only where
//! a dialect needs it, and none where a server refuses what it does not know.

mod llamacpp;
mod plain;
mod rate;
mod sglang;
mod trtllm;
mod trtllm_kv;
mod vllm;

use std::{
    fmt::Debug,
    sync::atomic::{AtomicBool, AtomicU8, Ordering},
};

use bytes::Bytes;
use dynamo_engine_api::{Continues, Endpoint, EngineError, GenerateRequest, KvUpdate, RankLoad, WholeReply};
use futures_core::future::BoxFuture;
use http::{HeaderName, HeaderValue, StatusCode};

use crate::{abort::Abort, body::Fields, control::Control, kind::Kind, kv::KvSources};

/// One kind of server.
pub(crate) trait Dialect: Debug + Send + Sync {
    /// Asks for its cheapest sign of life that means something.
    fn probe<'a>(&'a self, control: &'a Control) -> BoxFuture<'a, Result<(), EngineError>>;

    /// Asks for its load.
    fn load<'a>(&'a self, _control: &'a Control) -> BoxFuture<'a, Result<Vec<RankLoad>, EngineError>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    /// Asks where it tells of its KV.
    fn kv_sources<'a>(&'a self, _control: &'a Control) -> BoxFuture<'a, Result<KvSources, EngineError>> {
        Box::pin(async { Ok(KvSources::None("servers of this kind do not tell of their KV".to_owned())) })
    }

    /// Asks for changes of its KV since it was asked last, where that is how it tells.
    fn poll_kv<'a>(&'a self, _control: &'a Control) -> BoxFuture<'a, Result<Vec<KvUpdate>, EngineError>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    /// Asks for the tokens of a request's prompt.
    fn tokenize<'a>(
        &'a self,
        _control: &'a Control,
        _endpoint: Endpoint,
        _body: Bytes,
    ) -> BoxFuture<'a, Result<Option<Vec<u32>>, EngineError>> {
        Box::pin(async { Ok(None) })
    }

    /// Why it can have no part in hand-offs, if it says so.
    fn no_part<'a>(&'a self, _control: &'a Control) -> BoxFuture<'a, Option<String>> {
        Box::pin(async { None })
    }

    /// What is said with a request. `wish.id` is asked for only where the dialect cancels by it.
    fn additions(&self, _wish: &Wish<'_>) -> Additions {
        Additions::default()
    }

    /// How such a server goes on with an answer that another one began.
    fn continues(&self) -> Continues {
        Continues::default()
    }

    /// Forgets what it learnt of a server that may have been replaced.
    fn forget(&self) {}
}

/// What the host wants of a request's way through the engine.
pub(crate) struct Wish<'a> {
    pub(crate) endpoint: Endpoint,
    pub(crate) rank: Option<u32>,
    /// Higher is sooner; none if it is normal, or shall not be said.
    pub(crate) priority: Option<i32>,
    /// Makes an id for this request.
    pub(crate) id: &'a dyn Fn() -> String,
}

impl<'a> Wish<'a> {
    pub(crate) fn of(request: &GenerateRequest, forward_priority: bool, id: &'a dyn Fn() -> String) -> Self {
        let priority = Some(request.priority).filter(|&priority| forward_priority && priority != 0);
        Self { endpoint: request.endpoint, rank: request.rank, priority, id }
    }
}

/// What a dialect says with a request.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Additions {
    pub(crate) header: Option<(HeaderName, HeaderValue)>,
    pub(crate) fields: Fields,
    /// What cancels the request, where hanging up is slow.
    pub(crate) abort: Option<Abort>,
}

/// All dialects, and which one the server speaks.
#[derive(Debug)]
pub(crate) struct Dialects {
    vllm: vllm::Vllm,
    sglang: sglang::Sglang,
    trtllm: trtllm::Trtllm,
    llamacpp: llamacpp::Llamacpp,
    plain: plain::Plain,
    told: bool,
    /// Whether the server is our mock engine, which is asked as any server and goes on with answers as vLLM does.
    is_mock: AtomicBool,
    spoken: AtomicU8,
    /// Whether the server has to be looked at before its next probe.
    unsure: AtomicBool,
}

impl Dialects {
    pub(crate) fn new(told: Option<Kind>) -> Self {
        Self {
            vllm: vllm::Vllm::default(),
            sglang: sglang::Sglang::default(),
            trtllm: trtllm::Trtllm::default(),
            llamacpp: llamacpp::Llamacpp::default(),
            plain: plain::Plain,
            told: told.is_some(),
            is_mock: AtomicBool::new(false),
            spoken: AtomicU8::new(told.unwrap_or(Kind::Openai) as u8),
            unsure: AtomicBool::new(told.is_none()),
        }
    }

    /// The kind as far as it is known.
    pub(crate) fn kind(&self) -> Kind {
        let spoken = self.spoken.load(Ordering::Relaxed);
        Kind::ALL.into_iter().find(|&kind| kind as u8 == spoken).unwrap_or(Kind::Openai)
    }

    /// The dialect of that kind.
    pub(crate) fn spoken(&self) -> &dyn Dialect {
        match self.kind() {
            Kind::Vllm => &self.vllm,
            Kind::Sglang => &self.sglang,
            Kind::Trtllm => &self.trtllm,
            Kind::Llamacpp => &self.llamacpp,
            Kind::Openai => &self.plain,
        }
    }

    /// How the server goes on with an answer that another one began.
    pub(crate) fn continues(&self) -> Continues {
        if self.is_mock() { self.vllm.continues() } else { self.spoken().continues() }
    }

    /// Whether the server is our mock engine, as far as is known.
    pub(crate) fn is_mock(&self) -> bool {
        self.is_mock.load(Ordering::Relaxed)
    }

    /// Whether the server is our mock engine.
    pub(crate) fn found_mock(&self, is_mock: bool) {
        self.is_mock.store(is_mock, Ordering::Relaxed);
    }

    /// Whether the server has to be looked at.
    pub(crate) fn is_unsure(&self) -> bool {
        self.unsure.load(Ordering::Relaxed)
    }

    /// The server is this.
    pub(crate) fn found(&self, kind: Kind) {
        if self.told {
            return;
        }
        self.spoken.store(kind as u8, Ordering::Relaxed);
        if self.unsure.swap(false, Ordering::Relaxed) {
            self.spoken().forget();
        }
    }

    /// Something went wrong; was it the server that was not there?
    pub(crate) fn failed(&self, error: &EngineError) {
        if matches!(error, EngineError::Connect { .. } | EngineError::Timeout { .. } | EngineError::Broken { .. }) {
            if self.told {
                self.spoken().forget();
            } else {
                self.unsure.store(true, Ordering::Relaxed);
            }
        }
    }
}

/// The server that calls itself so in its list of models.
pub(crate) fn recognise(owned_by: &str) -> Kind {
    let names = [
        (vllm::OWNED_BY, Kind::Vllm),
        (sglang::OWNED_BY, Kind::Sglang),
        (trtllm::OWNED_BY, Kind::Trtllm),
        (llamacpp::OWNED_BY, Kind::Llamacpp),
    ];
    names.into_iter().find(|(name, _)| *name == owned_by).map_or(Kind::Openai, |(_, kind)| kind)
}

/// A probe that is one path's success. Behind a gateway that hides the path, the list of models stands in for it.
async fn succeeds(control: &Control, path: &'static str) -> Result<(), EngineError> {
    let reply = control.get(path).await?;
    judged(control, path, reply).await
}

async fn judged(control: &Control, mut path: &'static str, mut reply: WholeReply) -> Result<(), EngineError> {
    if reply.status == StatusCode::NOT_FOUND {
        path = "/v1/models";
        reply = control.get(path).await?;
    }
    if reply.status.is_success() { Ok(()) } else { Err(control.unhealthy(path, &reply)) }
}

#[cfg(test)]
mod tests;
