//! Server: a mock engine behind vLLM's HTTP surface.
//!
//! Contract: a client that hangs up cancels its request at once, streamed or not: its connection's task drops the
//! reply. Every error has vLLM's JSON body. Connections are HTTP/1.1 with keep-alive and without Nagle's delay.
//!
//! Deliberately absent: TLS, API keys, stored responses, and every path of vLLM that the host does not use.

mod metrics;

use std::{future::Future, io, sync::Arc};

use axum::{
    Router,
    body::Body,
    extract::{DefaultBodyLimit, Request, State},
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::ListenerExt,
};
use dynamo_engine_api::{Endpoint, Engine, EngineError, GenerateRequest, Reply, WholeReply};
use futures_util::StreamExt;
use http::{HeaderMap, HeaderValue, StatusCode, header::CONTENT_TYPE};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::{
    engine::{self, MockEngine, Stopped},
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
        .layer(DefaultBodyLimit::disable())
        .with_state(engine)
}

/// Serves `engine` until `shutdown` completes, and then what is still open to its end.
///
/// # Errors
/// If the listener fails.
pub async fn serve(
    listener: TcpListener,
    engine: Arc<MockEngine>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    // Best effort: a connection that closes at once may refuse the option.
    let listener = listener.tap_io(|connection| drop(connection.set_nodelay(true)));
    axum::serve(listener, router(engine)).with_graceful_shutdown(shutdown).await
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

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        whole_response(engine::error_reply(&self.0))
    }
}

async fn health(State(engine): State<Arc<MockEngine>>) -> Result<(), Failure> {
    engine.probe().await.map_err(Failure::from)
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
    let text = metrics::render(&engine.snapshot().await?, engine.options());
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

async fn generate(engine: &MockEngine, endpoint: Endpoint, request: Request) -> Result<Response, Failure> {
    let (head, body) = request.into_parts();
    let body = read_body(body).await?;
    let given_id = head.headers.get(REQUEST_ID).filter(|id| id.to_str().is_ok_and(|id| !id.is_empty()));
    let request_id = given_id.and_then(|id| id.to_str().ok()).map_or_else(|| engine.new_request_id(), Arc::from);
    // Whether a stream is wanted is read from the body, as the engine does it.
    let request = GenerateRequest::new(endpoint, body, false, request_id);
    let mut response = match engine.generate(request).await? {
        Reply::Whole(reply) => whole_response(reply),
        Reply::Stream(chunks) => {
            let frames = chunks.map(|chunk| chunk.map(|chunk| chunk.bytes));
            ([(CONTENT_TYPE, "text/event-stream; charset=utf-8")], Body::from_stream(frames)).into_response()
        }
    };
    if let Some(id) = given_id {
        response.headers_mut().insert(REQUEST_ID, id.clone());
    }
    Ok(response)
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
