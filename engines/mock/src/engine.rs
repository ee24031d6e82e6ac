//! The mock engine as an adapter: in this process, with replies as vLLM gives them.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use dynamo_engine_api::{
    ChatContinuation, Chunk, Continues, Endpoint, Engine, EngineError, GenerateRequest, KvUpdates, Leg, ModelCard, RankLoad,
    Reply, Role, WholeReply,
};
use futures_core::{Stream, future::BoxFuture, ready};
use futures_util::{StreamExt, stream};
use http::{HeaderMap, HeaderValue, StatusCode, header::CONTENT_TYPE};
use serde_json::{json, value::to_raw_value};
use tokio::sync::mpsc;
use xxhash_rust::xxh3::xxh3_64_with_seed;

pub use crate::driver::Stopped;
use crate::{
    driver::{Driver, Outputs},
    faults::{self, DEAD_CORE, Faults, Step, Steps, Strike, Switches, Target, Tear},
    handoff::{Handoff, Keep, Remote, Transfer, Wanted, digest},
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
    switches: Arc<Switches>,
    driver: Driver,
    handoff: Arc<Handoff>,
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
        let switches = Arc::new(Switches::new(options.faults.clone()));
        let driver = Driver::start(EngineModel::new(options.profile.clone())?, switches.pace());
        let ids = RequestIds::new();
        let handoff = Arc::new(Handoff::start(ids.uuid(), &options, &driver, Arc::clone(&switches)));
        Ok(Self { options, switches, driver, handoff, started: now_seconds(), ids, publishing: Once::new() })
    }

    /// What it was started with.
    #[must_use]
    pub fn options(&self) -> &MockOptions {
        &self.options
    }

    /// What it does wrong.
    #[must_use]
    pub fn switches(&self) -> &Arc<Switches> {
        &self.switches
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

    /// Its part in hand-offs.
    pub(crate) fn handoff(&self) -> &Arc<Handoff> {
        &self.handoff
    }

    /// A request id as engines make them for requests without one.
    pub(crate) fn new_request_id(&self) -> Arc<str> {
        self.ids.next().into()
    }

    /// Serves a request, faults and all.
    pub(crate) async fn serve(&self, request: GenerateRequest) -> Result<Served, Stopped> {
        let endpoint = request.endpoint;
        if endpoint == Endpoint::CountTokens {
            return Ok(Served::Whole(self.count_tokens(&request.body), None));
        }
        let strike = self.switches.strike(Target::Request);
        if let Some(faults) = strike.faults() {
            if faults.endless_headers {
                return Ok(Served::EndlessHeaders);
            }
            if let Some(content_type) = &faults.content_type {
                return Ok(Served::Whole(page(content_type), None));
            }
            if let Some(refusal) = faults.refuse {
                return Ok(Served::Whole(error_reply_at(&refusal.error(), endpoint), None));
            }
        }
        let mut order = match service::decode(request.endpoint, &request.body, &self.options) {
            Ok(order) => order,
            Err(error) => return Ok(Served::Whole(error_reply_at(&error, endpoint), None)),
        };
        order.return_token_ids |= request.wants_token_ids && order.stream;
        if let Err(error) = self.check_transfer(&mut order) {
            return Ok(Served::Whole(error_reply_at(&error, endpoint), None));
        }
        let of_prefill = match order.transfer {
            Transfer::Keep => self.switches.strike(Target::Prefill),
            _ => Strike::default(),
        };
        if let Some(Faults { prefill_refuse: Some(refusal), .. }) = of_prefill.faults() {
            return Ok(Served::Whole(error_reply_at(&refusal.error(), endpoint), None));
        }
        if of_prefill.faults().is_some_and(|faults| faults.prefill_silent) {
            order.transfer = Transfer::None;
        }
        let outputs = self.driver.submit(order.sequences()).await?;
        let keep = (order.transfer == Transfer::Keep).then(|| self.handoff.to_keep(outputs.ticket()));
        let steps = self.steps(outputs, &order, strike);
        if order.stream {
            let rendering = self.rendering(order, &request.request_id);
            return Ok(Served::Stream(Box::new(Pieces { steps, rendering, is_over: false })));
        }
        let served = self.collect(endpoint, steps, Whole::new(self.rendering(order, &request.request_id)), keep).await;
        if let Some(Faults { prefill_delay_ms: Some(ms), .. }) = of_prefill.faults() {
            tokio::time::sleep(Duration::from_millis(u64::from(*ms))).await;
        }
        served
    }

    /// Checks what a request says of its KV; an engine without a part in hand-offs does not hear of it.
    fn check_transfer(&self, order: &mut Order) -> Result<(), ApiError> {
        let role = self.handoff.options().role;
        let refused = |why: &str| {
            let message = format!("This engine was started with role={role}: {why}.");
            Err(ApiError::bad_request(Some("kv_transfer_params"), message))
        };
        match &order.transfer {
            _ if role == Role::Aggregated => order.transfer = Transfer::None,
            Transfer::None => {}
            _ if order.choices.len() != 1 => return refused("it hands over one choice of one prompt"),
            Transfer::Keep if !role.prefills() => return refused("it computes no prompts for others"),
            Transfer::Keep if order.stream => return refused("what it keeps for others is not streamed"),
            Transfer::Keep => {}
            Transfer::Fetch(_) if !role.decodes() => return refused("it does not go on from prompts of others"),
            Transfer::Fetch(remote) if remote.tokens as usize != order.choices[0].prompt.len() => {
                self.handoff.mismatch();
                return Err(faults::dead_core());
            }
            Transfer::Fetch(_) => {}
        }
        Ok(())
    }

    fn steps(&self, mut outputs: Outputs, order: &Order, strike: Strike) -> Steps {
        let (ticket, told) = (outputs.ticket(), outputs.take_fetch());
        let steps = Steps::new(outputs, strike, Arc::clone(&self.switches));
        let (Transfer::Fetch(remote), Some(told)) = (&order.transfer, told) else { return steps };
        let prompt = &order.choices[0].prompt;
        let (prompt_tokens, digest) = (prompt.len() as u32, digest(prompt, order.salt));
        let wanted = Wanted { ticket, remote: Remote::clone(remote), prompt_tokens, digest, told };
        steps.after(Arc::clone(&self.handoff).fetch(wanted))
    }

    fn count_tokens(&self, body: &[u8]) -> WholeReply {
        match service::count_tokens(body, &self.options) {
            Ok(count) => {
                let counted = json!({ "input_tokens": count, "context_management": { "original_input_tokens": count } });
                json_reply(StatusCode::OK, counted.to_string().into())
            }
            Err(error) => error_reply_at(&error, Endpoint::CountTokens),
        }
    }

    async fn collect(
        &self,
        endpoint: Endpoint,
        mut steps: Steps,
        mut whole: Whole,
        keep: Option<Keep>,
    ) -> Result<Served, Stopped> {
        let tear = loop {
            match steps.next().await {
                Step::Token(output, None) => whole.token(output),
                Step::Token(output, tear) => {
                    whole.token(output);
                    break tear;
                }
                Step::Done(tear) => break tear,
                // There is no end without a word where a length was announced.
                Step::End => break Some(Tear::Middle),
                Step::ErrorEvent => return Ok(Served::Whole(error_reply_at(&faults::dead_core(), endpoint), None)),
                Step::Stopped => return Err(Stopped),
            }
        };
        if let Some(keep) = keep {
            let (id, prompt, salt, cached) = whole.prompt();
            if let Some(kept) = self.handoff.keep(keep, id, &prompt, salt, cached).await {
                whole.kept(to_raw_value(&kept).expect("numbers and strings serialize"));
            }
        }
        Ok(Served::Whole(json_reply(StatusCode::OK, whole.body()), tear))
    }

    fn broken(&self, reason: &str) -> EngineError {
        EngineError::Broken { engine: self.options.name.clone(), reason: reason.to_owned() }
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
        Box::pin(async {
            self.switches.awake().await;
            Ok(vec![card])
        })
    }

    fn probe(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(async {
            self.switches.awake().await;
            if self.switches.faults().unhealthy {
                let reason = "it was told to be".to_owned();
                return Err(EngineError::Unhealthy { engine: self.options.name.clone(), reason });
            }
            self.snapshot().await.map(drop).map_err(|stopped| self.broken(&stopped.to_string()))
        })
    }

    fn load(&self) -> BoxFuture<'_, Result<Vec<RankLoad>, EngineError>> {
        Box::pin(async {
            self.switches.awake().await;
            let now = self.snapshot().await.map_err(|stopped| self.broken(&stopped.to_string()))?;
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
                fetched_tokens: None,
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

    /// Faults of the wire become the errors that an adapter makes of them.
    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Reply, EngineError>> {
        Box::pin(async {
            self.switches.awake().await;
            let engine = self.options.name.clone();
            if !matches!(request.leg, Leg::Whole) {
                let reason = "in this process it takes no part in hand-offs".to_owned();
                return Err(EngineError::Protocol { engine, reason });
            }
            match self.serve(request).await.map_err(|stopped| self.broken(&stopped.to_string()))? {
                Served::Whole(reply, None) => Ok(Reply::Whole(reply)),
                Served::Whole(_, Some(_)) => Err(self.broken(CUT)),
                Served::EndlessHeaders => Err(EngineError::Protocol { engine, reason: "its head does not end".to_owned() }),
                Served::Stream(pieces) => Ok(Reply::Stream(Box::pin(pieces.map(move |piece| piece.told(&engine))))),
            }
        })
    }
}

/// What a cut connection says.
const CUT: &str = "the connection was cut";

/// A request's answer, with what is done to its connection.
pub(crate) enum Served {
    Whole(WholeReply, Option<Tear>),
    EndlessHeaders,
    Stream(Box<Pieces>),
}

/// A piece of a stream.
pub(crate) enum Piece {
    Chunk(Chunk),
    /// Of this one only a part comes.
    Torn(Chunk, Tear),
    ErrorEvent,
    /// The end, without a finish reason.
    End,
    Stopped,
}

impl Piece {
    /// As an adapter tells it.
    fn told(self, engine: &str) -> Result<Chunk, EngineError> {
        let engine = engine.to_owned();
        match self {
            Self::Chunk(chunk) => Ok(chunk),
            Self::Torn(..) => Err(EngineError::Broken { engine, reason: CUT.to_owned() }),
            Self::ErrorEvent => Err(EngineError::InStream { engine, message: DEAD_CORE.to_owned(), refused: false }),
            Self::End => Err(EngineError::Incomplete { engine }),
            Self::Stopped => Err(EngineError::Broken { engine, reason: Stopped.to_string() }),
        }
    }
}

/// A streamed reply: one chunk per token, then one with the usage, if asked for, and `[DONE]`; unless something is wrong.
pub(crate) struct Pieces {
    steps: Steps,
    rendering: Rendering,
    is_over: bool,
}

impl Stream for Pieces {
    type Item = Piece;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let pieces = &mut *self;
        if pieces.is_over {
            return Poll::Ready(None);
        }
        let step = ready!(pieces.steps.poll_next(cx));
        pieces.is_over = !matches!(step, Step::Token(_, None));
        let or_torn = |chunk, tear: Option<Tear>| match tear {
            None => Piece::Chunk(chunk),
            Some(tear) => Piece::Torn(chunk, tear),
        };
        Poll::Ready(Some(match step {
            Step::Token(output, tear) => or_torn(pieces.rendering.token(output), tear),
            Step::Done(tear) => or_torn(pieces.rendering.end(), tear),
            Step::ErrorEvent => Piece::ErrorEvent,
            Step::End => Piece::End,
            Step::Stopped => Piece::Stopped,
        }))
    }
}

/// The reply to a request that cannot be served.
pub(crate) fn error_reply(error: &ApiError) -> WholeReply {
    json_reply(error.status, error.body().into())
}

fn error_reply_at(error: &ApiError, endpoint: Endpoint) -> WholeReply {
    json_reply(error.status, error.body_at(endpoint).into())
}

/// What something else than an engine answers with.
fn page(content_type: &str) -> WholeReply {
    let content_type = HeaderValue::from_str(content_type).unwrap_or(HeaderValue::from_static("text/html"));
    let headers = HeaderMap::from_iter([(CONTENT_TYPE, content_type)]);
    WholeReply { status: StatusCode::OK, headers, body: "<html><body><h1>It works!</h1></body></html>\n".into() }
}

fn json_reply(status: StatusCode, body: Bytes) -> WholeReply {
    let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/json"))]);
    WholeReply { status, headers, body }
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

    /// An id as vLLM's engines have one.
    fn uuid(&self) -> String {
        let all = self.next() + &self.next();
        let [a, b, c, d, e] = [0..8, 8..12, 12..16, 16..20, 20..32].map(|part| &all[part]);
        format!("{a}-{b}-{c}-{d}-{e}")
    }

    fn next(&self) -> String {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        format!("{:016x}", xxh3_64_with_seed(&number.to_le_bytes(), self.seed))
    }
}

#[cfg(test)]
mod tests;
