//! What the host and an engine adapter say to each other.
//!
//! Contract: an adapter forwards bodies, it does not re-model them; streams are relayed as they come, never
//! collected; dropping a reply cancels the engine's work at once; a stream that ends without its finish
//! reason is an error, whatever the HTTP status was. An engine never sees a policy.

pub mod handoff;
pub mod sse;

#[cfg(feature = "conformance")]
pub mod conformance;

use std::{pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
pub use dynamo_host_core::{Endpoint, EngineHash, KvEvent, Role, StoredBlocks, Tier};
use futures_core::{Stream, future::BoxFuture};
pub use handoff::{Leg, Prefilled, Protocol, Ticket};
use http::{HeaderMap, StatusCode};
pub use sse::{Chunk, Summary, Usage};

/// An inference server process that makes tokens.
pub trait Engine: Send + Sync + 'static {
    /// The adapter's kind, for logs and metrics: `openai`, `mock`, …
    fn kind(&self) -> &'static str;

    /// Models that the engine serves now.
    fn models(&self) -> BoxFuture<'_, Result<Vec<ModelCard>, EngineError>>;

    /// The engine's own cheap sign of life.
    fn probe(&self) -> BoxFuture<'_, Result<(), EngineError>>;

    /// What the engine itself says of its load, rank by rank; nothing if it does not say.
    fn load(&self) -> BoxFuture<'_, Result<Vec<RankLoad>, EngineError>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    /// What its ranks hold of KV, as it changes; `None` if the engine does not tell. There is one reader: an engine may hand
    /// out each event once only.
    fn kv_events(&self) -> Option<KvUpdates> {
        None
    }

    /// How it goes on with an answer that another engine began, as far as is known.
    fn continues(&self) -> Continues {
        Continues::default()
    }

    /// How it hands KV over, as far as is known; `None`: it does not.
    fn handoff(&self) -> Option<Protocol> {
        None
    }

    /// Why it can have no part in hand-offs, if it says how it was started and that is for none. One that computes the prompt itself
    /// where it should fetch it answers as if nothing were wrong.
    fn no_part(&self) -> BoxFuture<'_, Option<String>> {
        Box::pin(async { None })
    }

    /// Makes the ticket of a hand-off whose prefill this engine is to compute, on one of its data-parallel ranks where it has
    /// several. Of concurrent protocols only.
    fn ticket(&self, _rank: Option<u32>) -> BoxFuture<'_, Result<Ticket, EngineError>> {
        Box::pin(async { Err(EngineError::no_handoff(self.kind())) })
    }

    /// Reads this engine's successful answer to a prefill leg. Of sequential protocols only.
    ///
    /// # Errors
    /// If it says nothing by which somebody could go on: it was not set up to hand KV over.
    fn prefilled(&self, _reply: &WholeReply) -> Result<Prefilled, EngineError> {
        Err(EngineError::no_handoff(self.kind()))
    }

    /// Gives up KV that this engine, which was to decode, has not fetched, so that nobody keeps it longer than needed. Best effort.
    fn release(&self, _request: GenerateRequest) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    /// Token ids of a request's prompt as the engine would compute them; `None` if it cannot say.
    fn tokenize(&self, _endpoint: Endpoint, _body: Bytes) -> BoxFuture<'_, Result<Option<Vec<u32>>, EngineError>> {
        Box::pin(async { Ok(None) })
    }

    /// Sends a request and waits for the beginning of its answer: a whole body, or the head of a stream.
    ///
    /// # Cancel safety
    /// Dropping the future, or the reply that it returned, ends the engine's work on the request.
    fn generate(&self, request: GenerateRequest) -> BoxFuture<'_, Result<Reply, EngineError>>;
}

/// How an engine goes on with an answer that another one began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Continues {
    /// It gives the ids of a stream's prompt and output where it is asked ([`GenerateRequest::wants_token_ids`]).
    pub gives_ids: bool,
    /// It takes a prompt of token ids at `/v1/completions`.
    pub takes_ids: bool,
    /// How it takes a chat whose last message is the beginning of its answer.
    pub chat: Option<ChatContinuation>,
}

/// How an engine is told to go on with a chat's last message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChatContinuation {
    /// By `continue_final_message` (vLLM). Its chat template may cut white space at the end of the message.
    FinalMessage,
    /// By an assistant's message at the end alone (llama.cpp), which is taken as it is.
    Prefill,
}

/// What an engine tells of its KV, in order. It does not end by itself: the adapter connects again for as long as it is
/// polled, and says so by [`KvUpdate::Reset`]. Dropping it closes the connection.
pub type KvUpdates = Pin<Box<dyn Stream<Item = KvUpdate> + Send>>;

/// A piece of what an engine tells of its KV.
#[derive(Clone, Debug, PartialEq)]
pub enum KvUpdate {
    /// Changes of one rank, in order.
    Events {
        /// The rank.
        rank: u32,
        /// The model, if the engine names it.
        model: Option<Arc<str>>,
        /// The changes.
        events: Vec<KvEvent>,
        /// How old they were when they came, by the engine's clock and ours; `None` if the engine does not say.
        lag: Option<Duration>,
    },
    /// Nothing that was told before is known to be so any more: the engine started anew, or some of its events are lost for
    /// good. What follows builds upon nothing.
    Reset {
        /// The rank; `None`: all of them.
        rank: Option<u32>,
        /// Why, for logs and metrics: `restart`, `gap`, `disconnected`, `unreadable`.
        cause: &'static str,
    },
    /// How it is told, which changes nothing of what is known.
    Note {
        /// The rank; `None`: all of them.
        rank: Option<u32>,
        /// What is to be known.
        note: KvNote,
    },
}

/// What became of the way by which an engine tells of its KV.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvNote {
    /// All that it told is here.
    Current,
    /// It is not heard now; it is tried again.
    Interrupted {
        /// Why.
        reason: String,
    },
    /// It does not tell; it is asked again now and then.
    Silent {
        /// Why, and how it would.
        reason: String,
    },
    /// What was missed, or was told before, was told again.
    Replayed {
        /// How many batches of it.
        batches: u64,
    },
    /// A replay failed.
    ReplayFailed {
        /// Why.
        reason: String,
    },
    /// Events that are not understood, or no prompt could be matched with.
    LeftOut {
        /// Why, for metrics.
        cause: &'static str,
        /// How many.
        events: u32,
    },
}

/// A model as an engine describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelCard {
    /// Name that requests use.
    pub id: String,
    /// Longest context in tokens, if stated.
    pub max_model_len: Option<u32>,
    /// Of a LoRA adapter: its base model.
    pub parent: Option<String>,
}

/// Load of one data-parallel rank of an engine, as the engine reports it. What it does not report is `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RankLoad {
    /// The rank.
    pub rank: u32,
    /// Requests that it works on.
    pub running: Option<u32>,
    /// Requests that wait inside it.
    pub queued: Option<u32>,
    /// Requests that it runs at once at most.
    pub max_running: Option<u32>,
    /// Tokens that it computes in one step at most.
    pub max_batched_tokens: Option<u32>,
    /// KV capacity in tokens.
    pub kv_tokens_total: Option<u32>,
    /// KV capacity in tokens that is free or holds only reusable cache.
    pub kv_tokens_free: Option<u32>,
    /// Tokens per KV block.
    pub block_size: Option<u32>,
    /// Output tokens per second, lately.
    pub tokens_per_second: Option<f32>,
    /// Prompt tokens whose KV it has fetched from other engines, ever.
    pub fetched_tokens: Option<u64>,
}

/// A request as it is sent to an engine.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// What is asked.
    pub endpoint: Endpoint,
    /// The client's JSON body without what belongs to the host.
    pub body: Bytes,
    /// Whether the body asks for a stream.
    pub stream: bool,
    /// The id under which the engine should log it (`x-request-id`).
    pub request_id: Arc<str>,
    /// Headers that go with it: trace context, the API version of the client's dialect.
    pub headers: HeaderMap,
    /// The data-parallel rank that shall serve it, where an engine has several.
    pub rank: Option<u32>,
    /// How soon the engine shall take it up: higher is sooner, 0 is normal. Adapters turn it into their engine's sense.
    pub priority: i32,
    /// Whether the ids of tokens are wanted, from an engine that can give them. What the body says of it wins.
    pub wants_token_ids: bool,
    /// Which part of it is asked for.
    pub leg: Leg,
}

impl GenerateRequest {
    /// A plain request: all of it, no headers, any rank, normal priority, no token ids.
    #[must_use]
    pub fn new(endpoint: Endpoint, body: Bytes, stream: bool, request_id: Arc<str>) -> Self {
        Self {
            endpoint,
            body,
            stream,
            request_id,
            headers: HeaderMap::new(),
            rank: None,
            priority: 0,
            wants_token_ids: false,
            leg: Leg::Whole,
        }
    }
}

/// An engine's answer.
pub enum Reply {
    /// A whole body; an engine's own error is one too.
    Whole(WholeReply),
    /// A stream of chunks. Its last item is the chunk that says `done`, or an error.
    Stream(ChunkStream),
}

/// A whole answer.
#[derive(Clone, Debug)]
pub struct WholeReply {
    /// The engine's status.
    pub status: StatusCode,
    /// Headers that the client should see (`content-type`, `retry-after`).
    pub headers: HeaderMap,
    /// The body as the engine sent it.
    pub body: Bytes,
}

/// Chunks of a streamed answer, in order. Poll it to `None`, not to its last item only: an adapter may then keep the
/// connection for the next request. Dropping it earlier cancels.
pub type ChunkStream = Pin<Box<dyn Stream<Item = Result<Chunk, EngineError>> + Send>>;

/// What went wrong between host and engine. An error that the engine itself answered is a [`WholeReply`].
#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    /// No connection: nothing was sent.
    #[error("cannot connect to {engine}: {reason}")]
    Connect {
        /// Which engine.
        engine: String,
        /// What the system said.
        reason: String,
    },
    /// No answer in time.
    #[error("{engine} did not answer within {} ms", after.as_millis())]
    Timeout {
        /// Which engine.
        engine: String,
        /// How long was waited.
        after: Duration,
    },
    /// The connection broke.
    #[error("connection to {engine} broke: {reason}")]
    Broken {
        /// Which engine.
        engine: String,
        /// What the system said.
        reason: String,
    },
    /// The stream ended before its finish reason.
    #[error("{engine} ended the stream before a finish reason")]
    Incomplete {
        /// Which engine.
        engine: String,
    },
    /// The engine reported an error inside the stream.
    #[error("{engine} failed within the stream: {message}")]
    InStream {
        /// Which engine.
        engine: String,
        /// The engine's words.
        message: String,
        /// Whether it said that the request is at fault (a code from 400 to 499).
        refused: bool,
    },
    /// The engine answered, but not that it can serve (vLLM: 503 with a dead core; llama.cpp: 503 while it loads).
    #[error("{engine} is not healthy: {reason}")]
    Unhealthy {
        /// Which engine.
        engine: String,
        /// What was asked and what it said.
        reason: String,
    },
    /// The engine answered with something that is not its protocol.
    #[error("{engine} answered with what is not its protocol: {reason}")]
    Protocol {
        /// Which engine.
        engine: String,
        /// What was seen and what was expected.
        reason: String,
    },
}

impl EngineError {
    /// An engine of this kind was asked for its part in a hand-off.
    fn no_handoff(kind: &str) -> Self {
        Self::Protocol { engine: kind.to_owned(), reason: "it hands no KV over, as far as is known".to_owned() }
    }

    /// Metric label.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Connect { .. } => "engine_connect",
            Self::Timeout { .. } => "engine_timeout",
            Self::Broken { .. } => "engine_broken",
            Self::Incomplete { .. } => "engine_incomplete",
            Self::InStream { .. } => "engine_in_stream",
            Self::Unhealthy { .. } => "engine_unhealthy",
            Self::Protocol { .. } => "engine_protocol",
        }
    }
}
