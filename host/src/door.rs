//! The front door: OpenAI's and Anthropic's paths, and the signs of life that orchestrators ask for.

mod cors;
mod health;
mod models;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Request, State},
    response::Response,
    routing::{MethodRouter, any, get, post},
};
use dynamo_engine_api::Endpoint;
use dynamo_host_core::id;
use http::{HeaderMap, HeaderName, HeaderValue, header::ALLOW, request::Parts};
use opentelemetry::trace::TraceContextExt as _;
use serde_json::json;
use tracing::{Instrument, Span};

use crate::{
    account::count_request,
    auth::Gate,
    config::Cors,
    error::{Audience, Dialect, RequestError},
    exposition::Exposition,
    listener::TakenBy,
    relay::{POLICY, REQUEST_ID},
    request::{self, Arrival, Lane, Notes},
    stop,
    text::plain,
    trace::{self, Parent, Traces},
};

/// What an answer may be late, so that a client that keeps pace can read that it is.
const LATE: Duration = Duration::from_secs(1);

/// How long a client gives its request altogether, in milliseconds.
const TIMEOUT: &str = "x-request-timeout-ms";
/// How long a request waited for its turn, in milliseconds.
pub(crate) const QUEUE_MS: HeaderName = HeaderName::from_static("x-dynamo-queue-ms");

/// Longest request id that is taken from a client.
const MAX_ID_BYTES: usize = 128;

/// What Anthropic's clients say of the API they mean; engines that speak it are told.
const ANTHROPIC_VERSION: HeaderName = HeaderName::from_static("anthropic-version");
const ANTHROPIC_BETA: HeaderName = HeaderName::from_static("anthropic-beta");
/// Where they look for the request's id.
const ANTHROPIC_REQUEST_ID: HeaderName = HeaderName::from_static("request-id");

/// What the front door is made of.
pub(crate) struct Door {
    pub(crate) lane: Arc<Lane>,
    pub(crate) gate: Gate,
    pub(crate) metrics: Exposition,
    /// Where spans are exported, if they are.
    pub(crate) traces: Option<Arc<Traces>>,
}

/// The front door's paths.
pub(crate) fn router(door: Door, cors: Option<&Cors>) -> Router {
    let read = |handler: MethodRouter<Arc<Door>>| handler.fallback(|request: Request| method_not_allowed(request, "GET"));
    let mut router = Router::new();
    for endpoint in Endpoint::ALL {
        let handler = post(move |State(door): State<Arc<Door>>, request: Request| generate(door, endpoint, request));
        router = router.route(endpoint.path(), handler.fallback(|request: Request| method_not_allowed(request, "POST")));
    }
    let router = router
        .route("/v1/responses/{*rest}", any(nothing_stored))
        .route("/v1/models", read(get(models::list)))
        .route("/v1/models/{*id}", read(get(models::one)))
        .route("/live", read(get(|| async { Json(json!({ "status": "live" })) })))
        .route("/ready", read(get(health::ready)))
        .route("/health", read(get(health::health)))
        .route("/metrics", read(get(health::metrics)))
        .fallback(not_found)
        // The body's bound is the request's own, with an error of our shape.
        .layer(DefaultBodyLimit::disable())
        .with_state(Arc::new(door));
    match cors {
        Some(cors) => router.layer(cors::layer(cors)),
        None => router,
    }
}

async fn generate(door: Arc<Door>, endpoint: Endpoint, request: Request) -> Response {
    let at = Instant::now();
    let (parts, body) = request.into_parts();
    let id = request_id(&parts.headers);
    let (span, headers) = open(&door, endpoint, &id, &parts);
    let mut notes = Notes::default();
    let mut patience = door.lane.limits().request_timeout();
    let entered = door.lane.stopping.enter().and_then(|running| {
        let caller = door.gate.admit(&parts.headers)?;
        Ok((running, caller, timeout(&parts.headers)?))
    });
    let served = match entered {
        Ok((running, caller, timeout)) => {
            patience = timeout.map_or(patience, |timeout| timeout.min(patience));
            let session_key = parts.headers.get("x-session-id").map(|session| id::key(session.as_bytes()));
            let arrival = Arrival { endpoint, id: id.clone(), session_key, timeout, caller, headers, body, at };
            let serving = request::serve(&door.lane, arrival, &mut notes).instrument(span.clone());
            let served = door.lane.stopping.unless_over(serving).await;
            served.map(|answer| stop::with_last_words(answer, running, endpoint, door.lane.audience()))
        }
        Err(error) => Err(error),
    };
    let dialect = Dialect::of(endpoint);
    let mut response = served.unwrap_or_else(|error| {
        span.in_scope(|| error.record());
        // A name that no worker serves must not become a label.
        count_request(endpoint.label(), notes.model.as_deref().unwrap_or("none"), error.status());
        let response = with_header(error.response(dialect, door.lane.audience()), REQUEST_ID, &id);
        match &notes.policy {
            Some(policy) => with_header(response, POLICY, policy),
            None => response,
        }
    });
    response.extensions_mut().insert(TakenBy(at + patience + LATE));
    let status = response.status().as_u16();
    tracing::debug!(parent: &span, model = notes.model, policy = notes.policy, status, "answer began");
    let response = match notes.queued {
        Some(queued) => with_header(response, QUEUE_MS, &format!("{:.3}", queued.as_secs_f64() * 1000.0)),
        None => response,
    };
    match dialect {
        Dialect::OpenAi => response,
        Dialect::Anthropic => with_header(response, ANTHROPIC_REQUEST_ID, &id),
    }
}

/// The request's span in the log, and the headers that go with it to an engine.
fn open(door: &Door, endpoint: Endpoint, id: &str, parts: &Parts) -> (Span, HeaderMap) {
    let mut headers = HeaderMap::new();
    if Dialect::of(endpoint) == Dialect::Anthropic {
        for name in [ANTHROPIC_VERSION, ANTHROPIC_BETA] {
            for value in parts.headers.get_all(&name) {
                headers.append(&name, value.clone());
            }
        }
    }
    let request_span = |trace_id: Option<&str>| tracing::info_span!("request", id, endpoint = endpoint.label(), trace_id);
    let parent = Parent::of(&parts.headers);
    let Some(traces) = &door.traces else {
        parent.iter().for_each(|parent| parent.pass(&mut headers));
        return (request_span(parent.as_ref().map(Parent::trace_id)), headers);
    };
    let context = traces.begin(endpoint, parent.as_ref());
    let ours = context.span().span_context().clone();
    trace::pass_ours(&ours, parent.as_ref(), &mut headers);
    let span = request_span(Some(&ours.trace_id().to_string()));
    trace::attach(&span, context);
    (span, headers)
}

/// How long the client gives its request. No time at all is no mistake: it is over.
fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, RequestError> {
    let Some(value) = headers.get(TIMEOUT) else { return Ok(None) };
    let text = value.to_str().map(str::trim).unwrap_or_default();
    match text.parse::<i64>() {
        Ok(ms) => Ok(Some(Duration::from_millis(u64::try_from(ms).unwrap_or(0)))),
        Err(_) => Err(RequestError::Header { name: TIMEOUT, found: plain(&text.chars().take(40).collect::<String>()) }),
    }
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

/// The same answer under the id of the request that these headers came with.
fn with_id(response: Response, headers: &HeaderMap) -> Response {
    with_header(response, REQUEST_ID, &request_id(headers))
}

fn with_header(mut response: Response, name: HeaderName, value: &str) -> Response {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
    response
}

async fn not_found(request: Request) -> Response {
    misdirected(&request, RequestError::NotFound { path: request.uri().path().to_owned() })
}

async fn nothing_stored(request: Request) -> Response {
    let path = request.uri().path().to_owned();
    misdirected(&request, RequestError::NothingStored { path })
}

async fn method_not_allowed(request: Request, allowed: &'static str) -> Response {
    let (path, method) = (request.uri().path().to_owned(), request.method().to_string());
    let response = misdirected(&request, RequestError::MethodNotAllowed { path, method, allowed });
    with_header(response, ALLOW, allowed)
}

/// A request that is for nothing here.
fn misdirected(request: &Request, error: RequestError) -> Response {
    error.record();
    with_id(error.response(Dialect::of_path(request.uri().path()), Audience::Client), request.headers())
}
