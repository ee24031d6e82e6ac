//! Server: a mock engine behind vLLM's HTTP surface.
//!
//! Contract: a client that hangs up cancels its request at once, streamed or not: its connection's task drops the
//! reply. Every error has vLLM's JSON body. Connections are HTTP/1.1 with keep-alive and without Nagle's delay.
//!
//! `POST /mock/kv` is how an engine with a part in hand-offs gives KV to another one ([`crate::HandoffOptions`]).
//! `POST /mock/faults` sets what it does wrong from then on, `{}` nothing; `GET` tells it.
//!
//! Deliberately absent: TLS, API keys, stored responses, and every path of vLLM that the host does not use.

mod metrics;
mod wire;

use std::{future::Future, io, sync::Arc};

use axum::{
    Router,
    body::Body,
    extract::{ConnectInfo, DefaultBodyLimit, Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use dynamo_engine_api::{Endpoint, Engine, EngineError, GenerateRequest, WholeReply};
use futures_util::{StreamExt, stream};
use http::{HeaderMap, HeaderValue, StatusCode, header::CONTENT_TYPE};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use self::wire::{Lever, Wires};
use crate::{
    engine::{self, MockEngine, Piece, Pieces, Served, Stopped},
    faults::{self, FaultError, Faults},
    handoff::{self, Parcel, RefusedFetch},
    service::{self, ApiError},
};

/// Longest request body.
pub const MAX_BODY_BYTES: usize = 32 << 20;

const REQUEST_ID: &str = "x-request-id";

/// vLLM's paths, served by `engine`.
pub fn router(engine: Arc<MockEngine>) -> Router {
    let mut router = Router::new();
    for endpoint in Endpoint::ALL {
        let handler =
            async move |State(engine): State<Arc<MockEngine>>, request: Request| generate(&engine, endpoint, request).await;
        router = router.route(endpoint.path(), post(handler));
    }
    router
        .route("/health", get(health))
        .route("/kv_event_sources", get(kv_event_sources))
        .route("/version", get(version))
        .route("/load", get(load))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models))
        .route("/tokenize", post(tokenize))
        .route("/reset_prefix_cache", post(reset_prefix_cache))
        .route(handoff::PATH, post(send_kv))
        .layer(middleware::from_fn_with_state(Arc::clone(&engine), unless_hung))
        .route("/mock/faults", get(tell_faults).post(set_faults))
        .layer(DefaultBodyLimit::disable())
        .with_state(engine)
}

/// Serves `engine` until `shutdown` completes, and then what is still open to its end; which does not come if it was told to
/// stall then.
///
/// # Errors
/// If the listener fails.
pub async fn serve(
    listener: TcpListener,
    engine: Arc<MockEngine>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let switches = Arc::clone(engine.switches());
    engine.handoff().is_at(listener.local_addr()?);
    let shutdown = async move {
        shutdown.await;
        switches.stopping();
    };
    let service = router(engine).into_make_service_with_connect_info::<Lever>();
    axum::serve(Wires(listener), service).with_graceful_shutdown(shutdown).await
}

/// Nothing is answered while the engine hangs.
async fn unless_hung(State(engine): State<Arc<MockEngine>>, request: Request, next: Next) -> Response {
    engine.switches().awake().await;
    next.run(request).await
}

async fn tell_faults(State(engine): State<Arc<MockEngine>>) -> Response {
    let switches = engine.switches();
    json_response(json!({ "faults": switches.faults().to_json(), "struck": switches.struck() }))
}

async fn set_faults(State(engine): State<Arc<MockEngine>>, request: Request) -> Result<Response, Failure> {
    let body = read_body(request.into_body()).await?;
    engine.switches().set(Faults::from_json(&body)?);
    Ok(tell_faults(State(engine)).await)
}

/// An error on its way to the client.
struct Failure(ApiError);

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl From<Stopped> for Failure {
    fn from(stopped: Stopped) -> Self {
        Self(ApiError::unavailable(stopped.to_string()))
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        Self(ApiError::unavailable(error.to_string()))
    }
}

impl From<FaultError> for Failure {
    fn from(error: FaultError) -> Self {
        Self(ApiError::bad_request(None, error.to_string()))
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        whole_response(engine::error_reply(&self.0))
    }
}

async fn health(State(engine): State<Arc<MockEngine>>) -> Result<Response, Failure> {
    if engine.switches().faults().unhealthy {
        return Ok(StatusCode::SERVICE_UNAVAILABLE.into_response());
    }
    engine.probe().await.map_err(Failure::from)?;
    Ok(StatusCode::OK.into_response())
}

async fn version() -> Response {
    json_response(json!({"version": env!("CARGO_PKG_VERSION")}))
}

async fn load(State(engine): State<Arc<MockEngine>>) -> Result<Response, Failure> {
    let snapshot = engine.snapshot().await?;
    Ok(json_response(json!({"server_load": snapshot.running + snapshot.waiting})))
}

async fn kv_event_sources(State(engine): State<Arc<MockEngine>>) -> Response {
    json_response(engine.kv_event_sources())
}

async fn metrics(State(engine): State<Arc<MockEngine>>) -> Result<Response, Failure> {
    let text = metrics::render(&engine.snapshot().await?, engine.options(), engine.handoff());
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}

async fn models(State(engine): State<Arc<MockEngine>>) -> Response {
    let options = engine.options();
    json_response(json!({"object": "list", "data": [{
        "id": options.model,
        "object": "model",
        "created": engine.started(),
        "owned_by": "dynamo-mock",
        "root": options.model,
        "parent": null,
        "max_model_len": options.profile.max_model_len,
        "permission": [],
    }]}))
}

async fn tokenize(State(engine): State<Arc<MockEngine>>, request: Request) -> Result<Response, Failure> {
    let body = read_body(request.into_body()).await?;
    let ids = service::decode_tokenize(&body, engine.options())?;
    let max_model_len = engine.options().profile.max_model_len;
    Ok(json_response(json!({"count": ids.len(), "max_model_len": max_model_len, "tokens": ids, "token_strs": null})))
}

async fn reset_prefix_cache(State(engine): State<Arc<MockEngine>>) -> Result<(), Failure> {
    if engine.reset_prefix_cache().await? {
        return Ok(());
    }
    Err(Failure(ApiError::unavailable("The prefix cache is in use; wait until no request runs.")))
}

/// KV for another engine: an answer that ends when all of it was moved.
async fn send_kv(State(engine): State<Arc<MockEngine>>, request: Request) -> Result<Response, Failure> {
    let body = read_body(request.into_body()).await?;
    let parcel: Parcel =
        serde_json::from_slice(&body).map_err(|error| ApiError::bad_request(None, format!("not a fetch of KV: {error}")))?;
    let sending = engine.handoff().send(&parcel).map_err(|refused| match refused {
        RefusedFetch::NotKept => ApiError::gone("No KV is kept for this request, or not any more."),
        RefusedFetch::Mismatch => ApiError::conflict("The KV that is kept is of another prompt."),
    })?;
    Ok(Body::from_stream(stream::once(sending)).into_response())
}

async fn generate(engine: &MockEngine, endpoint: Endpoint, request: Request) -> Result<Response, Failure> {
    let (head, body) = request.into_parts();
    let body = read_body(body).await?;
    let given_id = head.headers.get(REQUEST_ID).filter(|id| id.to_str().is_ok_and(|id| !id.is_empty()));
    let request_id = given_id.and_then(|id| id.to_str().ok()).map_or_else(|| engine.new_request_id(), Arc::from);
    // Whether a stream is wanted is read from the body, as the engine does it.
    let request = GenerateRequest::new(endpoint, body, false, request_id);
    let lever = head.extensions.get::<ConnectInfo<Lever>>().map(|ConnectInfo(lever)| lever.clone()).unwrap_or_default();
    let mut response = match engine.serve(request).await? {
        Served::Whole(reply, tear) => {
            if let Some(tear) = tear {
                lever.cut(reply.body.clone(), tear);
            }
            whole_response(reply)
        }
        Served::EndlessHeaders => {
            lever.endless_headers();
            StatusCode::OK.into_response()
        }
        Served::Stream(pieces) => {
            ([(CONTENT_TYPE, "text/event-stream; charset=utf-8")], Body::from_stream(frames(*pieces, lever))).into_response()
        }
    };
    if let Some(id) = given_id {
        response.headers_mut().insert(REQUEST_ID, id.clone());
    }
    Ok(response)
}

/// A stream's body.
fn frames(pieces: Pieces, lever: Lever) -> impl stream::Stream<Item = Result<Bytes, Stopped>> {
    pieces.flat_map(move |piece| {
        let (frame, is_silent) = match piece {
            Piece::Chunk(chunk) => (Some(Ok(chunk.bytes)), false),
            Piece::ErrorEvent => (Some(Ok(faults::error_event().into())), false),
            Piece::Stopped => (Some(Err(Stopped)), false),
            Piece::End => (None, false),
            Piece::Torn(chunk, tear) => {
                lever.cut(chunk.bytes.clone(), tear);
                // The connection ends within these bytes: nothing may be said after them.
                (Some(Ok(chunk.bytes)), true)
            }
        };
        let silence = if is_silent { stream::pending().left_stream() } else { stream::empty().right_stream() };
        stream::iter(frame).chain(silence)
    })
}

async fn read_body(body: Body) -> Result<bytes::Bytes, ApiError> {
    axum::body::to_bytes(body, MAX_BODY_BYTES).await.map_err(|_| ApiError::too_large(MAX_BODY_BYTES))
}

fn whole_response(reply: WholeReply) -> Response {
    (reply.status, reply.headers, reply.body).into_response()
}

fn json_response(value: Value) -> Response {
    let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/json"))]);
    (StatusCode::OK, headers, value.to_string()).into_response()
}
