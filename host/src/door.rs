//! The front door: OpenAI's paths, and the signs of life that orchestrators ask for.

use std::{sync::Arc, time::Instant};

use axum::{
    Json, Router,
    body::Body,
    extract::{DefaultBodyLimit, Request, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use dynamo_engine_api::Endpoint;
use dynamo_host_core::{WorkerState, id};
use http::{
    HeaderMap, HeaderName, HeaderValue, StatusCode,
    header::{ALLOW, CONTENT_TYPE},
};
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::json;
use tracing::Instrument;

use crate::{
    account::count_request,
    error::{Audience, RequestError},
    models::ListedModel,
    relay::{POLICY, REQUEST_ID},
    request::{self, Arrival, Lane, Notes},
};

/// Longest request id that is taken from a client.
const MAX_ID_BYTES: usize = 128;

#[derive(Clone)]
struct Door {
    lane: Arc<Lane>,
    prometheus: PrometheusHandle,
}

/// The front door's paths.
pub(crate) fn router(lane: Arc<Lane>, prometheus: PrometheusHandle) -> Router {
    let generate = |endpoint: Endpoint| {
        post(move |State(door): State<Door>, request: Request| generate(door.lane, endpoint, request))
            .fallback(|request: Request| method_not_allowed(request, "POST"))
    };
    let read =
        |handler: axum::routing::MethodRouter<Door>| handler.fallback(|request: Request| method_not_allowed(request, "GET"));
    Router::new()
        .route(Endpoint::ChatCompletions.path(), generate(Endpoint::ChatCompletions))
        .route(Endpoint::Completions.path(), generate(Endpoint::Completions))
        .route("/v1/models", read(get(models)))
        .route("/live", read(get(|| async { Json(json!({ "status": "live" })) })))
        .route("/ready", read(get(ready)))
        .route("/health", read(get(health)))
        .route("/metrics", read(get(metrics)))
        .fallback(not_found)
        // The body's bound is the request's own, with an error of our shape.
        .layer(DefaultBodyLimit::disable())
        .with_state(Door { lane, prometheus })
}

async fn generate(lane: Arc<Lane>, endpoint: Endpoint, request: Request) -> Response {
    let at = Instant::now();
    let (parts, body) = request.into_parts();
    let id = request_id(&parts.headers);
    let span = tracing::info_span!("request", id, endpoint = endpoint.label());
    let session_key = parts.headers.get("x-session-id").map(|session| id::key(session.as_bytes()));
    let arrival = Arrival { endpoint, id: id.clone(), session_key, body, at };
    let mut notes = Notes::default();
    let served = request::serve(&lane, arrival, &mut notes).instrument(span.clone()).await;
    served.unwrap_or_else(|error| {
        span.in_scope(|| error.record());
        // A name that no worker serves must not become a label.
        count_request(endpoint.label(), notes.model.as_deref().unwrap_or("none"), error.status());
        let mut response = with_header(error.response(lane.audience()), REQUEST_ID, &id);
        if let Some(policy) = notes.policy {
            response = with_header(response, POLICY, &policy);
        }
        response
    })
}

/// The client's id if it can be used in logs and headers, else one of ours.
fn request_id(headers: &HeaderMap) -> String {
    let given =
        headers.get(REQUEST_ID).and_then(|value| value.to_str().ok()).filter(|id| !id.is_empty() && id.len() <= MAX_ID_BYTES);
    given.map_or_else(new_id, str::to_owned)
}

fn new_id() -> String {
    use std::hash::{BuildHasher, RandomState};
    // Two hashes under keys from the system's randomness, which std draws for every map.
    let half = || RandomState::new().hash_one(0u8);
    format!("{:016x}{:016x}", half(), half())
}

fn with_header(mut response: Response, name: HeaderName, value: &str) -> Response {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
    response
}

async fn models(State(door): State<Door>) -> Response {
    let card = |model: ListedModel| {
        let ListedModel { id, root, parent, max_model_len } = model;
        let root = root.as_ref().unwrap_or(&id);
        json!({
            "id": id, "object": "model", "created": 0, "owned_by": "dynamo-host",
            "root": root, "parent": parent, "max_model_len": max_model_len,
        })
    };
    let cards: Vec<_> = door.lane.roster.snapshot().listed_models().into_iter().map(card).collect();
    Json(json!({ "object": "list", "data": cards })).into_response()
}

/// 200 while at least one worker can serve.
async fn ready(State(door): State<Door>) -> Response {
    let ready = healthy_workers(&door);
    let (status, word) = if ready > 0 { (StatusCode::OK, "ready") } else { (StatusCode::SERVICE_UNAVAILABLE, "not ready") };
    (status, Json(json!({ "status": word, "ready_workers": ready }))).into_response()
}

/// What is wrong, if anything is; 503 when nothing can be served.
async fn health(State(door): State<Door>) -> Response {
    let workers = door.lane.roster.report();
    let ready = healthy_workers(&door);
    let troubles: Vec<_> = workers
        .iter()
        .filter(|worker| worker.state != WorkerState::Healthy)
        .map(|worker| json!({ "worker": worker.name, "model": worker.model, "state": worker.state, "reason": worker.trouble }))
        .collect();
    let (status, word) = match (ready, troubles.is_empty()) {
        (0, _) => (StatusCode::SERVICE_UNAVAILABLE, "down"),
        (_, true) => (StatusCode::OK, "healthy"),
        (_, false) => (StatusCode::OK, "degraded"),
    };
    (status, Json(json!({ "status": word, "ready_workers": ready, "troubles": troubles }))).into_response()
}

fn healthy_workers(door: &Door) -> usize {
    door.lane.roster.snapshot().fleet().workers().iter().filter(|worker| worker.state.is_eligible()).count()
}

async fn metrics(State(door): State<Door>) -> Response {
    let text = [(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"))];
    (text, Body::from(door.prometheus.render())).into_response()
}

async fn not_found(request: Request) -> Response {
    misdirected(&request, RequestError::NotFound { path: request.uri().path().to_owned() })
}

async fn method_not_allowed(request: Request, allowed: &'static str) -> Response {
    let (path, method) = (request.uri().path().to_owned(), request.method().to_string());
    let response = misdirected(&request, RequestError::MethodNotAllowed { path, method, allowed });
    with_header(response, ALLOW, allowed)
}

/// A request that is for nothing here.
fn misdirected(request: &Request, error: RequestError) -> Response {
    error.record();
    with_header(error.response(Audience::Client), REQUEST_ID, &request_id(request.headers()))
}
