//! The mock engine as an adapter: in this process, with replies as vLLM gives them.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use dynamo_engine_api::{
    ChatContinuation, Chunk, Continues, Endpoint, Engine, EngineError, GenerateRequest, KvUpdates, ModelCard, RankLoad, Reply,
    WholeReply,
};
use futures_core::{Stream, future::BoxFuture, ready};
use futures_util::stream;
use http::{HeaderMap, HeaderValue, StatusCode, header::CONTENT_TYPE};
use serde_json::json;
use tokio::sync::mpsc;
use xxhash_rust::xxh3::xxh3_64_with_seed;

pub use crate::driver::Stopped;
use crate::{
    driver::{Driver, Outputs},
    model::{EngineModel, Snapshot},
    options::{MockOptions, OptionsError},
    publishing::Once,
    service::{self, ApiError, Order, Rendering, Whole},
    tape::{Batch, Reading},
};

/// A modelled engine, driven in real time by a task of its own.
///
/// Dropping it ends the task; streams that are still open then end with [`EngineError::Broken`].
#[derive(Debug)]
pub struct MockEngine {
    options: MockOptions,
    driver: Driver,
    /// Seconds since 1970.
    started: u64,
    ids: RequestIds,
    publishing: Once,
}

impl MockEngine {
    /// Starts the engine that a URL describes: `mock://NAME?model=MODEL&block_size=16&…`; see [`MockOptions`].
    ///
    /// # Errors
    /// If the URL is not understood, or its values don't fit together.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn from_url(url: &str) -> Result<Self, OptionsError> {
        Self::start(MockOptions::from_url(url)?)
    }

    /// Starts an engine.
    ///
    /// # Errors
    /// If the options don't fit together.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn start(options: MockOptions) -> Result<Self, OptionsError> {
        let driver = Driver::start(EngineModel::new(options.profile.clone())?);
        Ok(Self { options, driver, started: now_seconds(), ids: RequestIds::new(), publishing: Once::new() })
    }

    /// What it was started with.
    #[must_use]
    pub fn options(&self) -> &MockOptions {
        &self.options
    }

    /// When it was started, in seconds since 1970.
    #[must_use]
    pub fn started(&self) -> u64 {
        self.started
    }

    /// Its gauges and totals.
    ///
    /// # Errors
    /// If its task is gone.
    pub async fn snapshot(&self) -> Result<Snapshot, Stopped> {
        self.driver.snapshot().await
    }

    /// Drops its prefix cache. Refused, with `false`, while it works.
    ///
    /// # Errors
    /// If its task is gone.
    pub async fn reset_prefix_cache(&self) -> Result<bool, Stopped> {
        self.driver.reset_prefix_cache().await
    }

    /// Changes of its prefix cache: those that are kept, then those that come.
    pub(crate) async fn tape(&self) -> Result<mpsc::Receiver<Batch>, Stopped> {
        self.driver.tape().await
    }

    pub(crate) fn publishing(&self) -> &Once {
        &self.publishing
    }

    /// A request id as engines make them for requests without one.
    pub(crate) fn new_request_id(&self) -> Arc<str> {
        self.ids.next().into()
    }

    async fn serve(&self, request: GenerateRequest) -> Result<Reply, EngineError> {
        let endpoint = request.endpoint;
        if endpoint == Endpoint::CountTokens {
            return Ok(Reply::Whole(self.count_tokens(&request.body)));
        }
        let mut order = match service::decode(request.endpoint, &request.body, &self.options) {
            Ok(order) => order,
            Err(error) => return Ok(Reply::Whole(json_reply(error.status, error.body_at(endpoint).into()))),
        };
        order.return_token_ids |= request.wants_token_ids && order.stream;
        let outputs = self.driver.submit(order.sequences()).await.map_err(|stopped| broken(&self.options.name, stopped))?;
        if order.stream {
            let rendering = self.rendering(order, &request.request_id);
            return Ok(Reply::Stream(Box::pin(Chunks { outputs, rendering, engine: self.options.name.clone(), ended: false })));
        }
        self.collect(outputs, Whole::new(self.rendering(order, &request.request_id))).await
    }

    fn count_tokens(&self, body: &[u8]) -> WholeReply {
        match service::count_tokens(body, &self.options) {
            Ok(count) => {
                let counted = json!({ "input_tokens": count, "context_management": { "original_input_tokens": count } });
                json_reply(StatusCode::OK, counted.to_string().into())
            }
            Err(error) => json_reply(error.status, error.body_at(Endpoint::CountTokens).into()),
        }
    }

    async fn collect(&self, mut outputs: Outputs, mut whole: Whole) -> Result<Reply, EngineError> {
        while let Some(output) = outputs.next().await.map_err(|stopped| broken(&self.options.name, stopped))? {
            whole.token(output);
        }
        Ok(Reply::Whole(json_reply(StatusCode::OK, whole.body())))
    }

    fn rendering(&self, order: Order, request_id: &str) -> Rendering {
        Rendering::new(order, request_id, &self.options.model, now_seconds())
    }
}

impl Engine for MockEngine {
    fn kind(&self) -> &'static str {
        "mock"
    }

    fn models(&self) -> BoxFuture<'_, Result<Vec<ModelCard>, EngineError>> {
        let max_model_len = Some(self.options.profile.max_model_len);
        let card = ModelCard { id: self.options.model.clone(), max_model_len, parent: None };
        Box::pin(async { Ok(vec![card]) })
    }

    fn probe(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(async { self.snapshot().await.map(drop).map_err(|stopped| broken(&self.options.name, stopped)) })
    }

    fn load(&self) -> BoxFuture<'_, Result<Vec<RankLoad>, EngineError>> {
        Box::pin(async {
            let now = self.snapshot().await.map_err(|stopped| broken(&self.options.name, stopped))?;
            let profile = &self.options.profile;
            let tokens = |blocks: u32| Some(blocks.saturating_mul(profile.block_size));
            Ok(vec![RankLoad {
                rank: 0,
                running: Some(now.running),
                queued: Some(now.waiting),
                max_running: Some(profile.max_num_seqs),
                max_batched_tokens: Some(profile.max_num_batched_tokens),
                kv_tokens_total: tokens(now.kv_blocks_total),
                kv_tokens_free: tokens(now.kv_blocks_total - now.kv_blocks_used),
                block_size: Some(profile.block_size),
                tokens_per_second: None,
            }])
        })
    }

    /// As they happen: nothing is published for that.
    fn kv_events(&self) -> Option<KvUpdates> {
        let reading = Reading::new(self.driver.tapes());
        Some(Box::pin(stream::unfold(reading, async |mut reading| reading.next().await.map(|update| (update, reading)))))
    }

    /// As vLLM does.
    fn continues(&self) -> Continues {
        Continues { gives_ids: true, takes_ids: true, chat: Some(ChatContinuation::FinalMessage) }
    }

    /// Of a batch, the first prompt.
    fn tokenize(&self, endpoint: Endpoint, body: Bytes) -> BoxFuture<'_, Result<Option<Vec<u32>>, EngineError>> {
        let order = service::decode(endpoint, &body, &self.options).ok();
        let prompt = order.and_then(|order| Some(order.choices.first()?.prompt.to_vec()));
        Box::pin(async { Ok(prompt) })
    }

    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Reply, EngineError>> {
        Box::pin(self.serve(request))
    }
}

/// A streamed reply: one chunk per token, then one with the usage, if asked for, and `[DONE]`.
struct Chunks {
    outputs: Outputs,
    rendering: Rendering,
    engine: String,
    ended: bool,
}

impl Stream for Chunks {
    type Item = Result<Chunk, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        Poll::Ready(Some(match ready!(self.outputs.poll_next(cx)) {
            Ok(Some(output)) => Ok(self.rendering.token(output)),
            Ok(None) => {
                self.ended = true;
                Ok(self.rendering.end())
            }
            Err(stopped) => {
                self.ended = true;
                Err(broken(&self.engine, stopped))
            }
        }))
    }
}

/// The reply to a request that cannot be served.
pub(crate) fn error_reply(error: &ApiError) -> WholeReply {
    json_reply(error.status, error.body().into())
}

fn json_reply(status: StatusCode, body: Bytes) -> WholeReply {
    let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/json"))]);
    WholeReply { status, headers, body }
}

fn broken(engine: &str, stopped: Stopped) -> EngineError {
    EngineError::Broken { engine: engine.to_owned(), reason: stopped.to_string() }
}

fn now_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Makes ids of 16 hexadecimal digits that differ within a run and, most likely, between runs.
#[derive(Debug)]
struct RequestIds {
    seed: u64,
    next: AtomicU64,
}

impl RequestIds {
    fn new() -> Self {
        let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
        Self { seed, next: AtomicU64::new(0) }
    }

    fn next(&self) -> String {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        format!("{:016x}", xxh3_64_with_seed(&number.to_le_bytes(), self.seed))
    }
}

#[cfg(test)]
mod tests;
