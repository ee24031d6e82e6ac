//! The admin API, on a listener of its own: slots, their policies, and the host's status.
//!
//! Whoever reaches it controls the host: it listens on loopback only, or demands a bearer token. A web page that the
//! operator has open reaches loopback, too: what a browser sends for a page, it marks with `origin`, and that is refused.

mod audited;
mod workers;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Extension, Json, Router,
    body::Body,
    extract::{DefaultBodyLimit, Path, Query, Request, State, rejection::QueryRejection},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use dynamo_host_core::{
    OnError, SlotName,
    slot::{OnErrorError, SlotNameError},
};
use dynamo_host_policy::LoadError;
use futures_util::StreamExt;
use http::{
    StatusCode,
    header::{AUTHORIZATION, ORIGIN},
};
use serde::Deserialize;
use serde_json::json;

use self::audited::Of;
pub(crate) use self::audited::{audit_quarantines, standings};
use crate::{
    admit::Queue,
    audit::{Audit, Who},
    exposition::Exposition,
    listener::Peer,
    policies::{ChangeError, Policies},
    reload::ConfigStatus,
    roster::Roster,
    text::plain,
};

/// Bytes of a body, except a component's, which has a bound of its own.
const MAX_BODY_BYTES: usize = 64 << 20;
/// Bytes of a component that is too large that are read, and not kept: a client that is cut off while it sends may never
/// see the answer.
const MAX_DRAINED_BYTES: usize = 1 << 30;
/// How long a request may take, its body's arrival included. Compiling a large policy takes seconds.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Clone)]
pub(crate) struct Admin {
    pub(crate) policies: Arc<Policies>,
    pub(crate) roster: Arc<Roster>,
    pub(crate) audit: Audit,
    pub(crate) queue: Arc<Queue>,
    pub(crate) config: ConfigStatus,
    pub(crate) started: Instant,
    pub(crate) token: Option<Arc<str>>,
    pub(crate) metrics: Exposition,
}

/// The admin API's paths.
pub(crate) fn router(admin: Admin) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/queue", get(|State(admin): State<Admin>| async move { Json(admin.queue.report()) }))
        .route("/v1/slots", get(slots))
        .route("/v1/slots/{slot}/policy", put(activate).delete(activate_native))
        .route("/v1/slots/{slot}/rollback", post(rollback))
        .route("/v1/slots/{slot}/bypass", put(bypass).delete(end_bypass))
        .route("/v1/slots/{slot}/on-error", put(set_on_error))
        .route("/v1/audit", get(audited::list))
        .merge(workers::routes())
        .route("/metrics", get(|State(admin): State<Admin>| async move { admin.metrics.render() }))
        .fallback(nothing_here)
        .method_not_allowed_fallback(nothing_here)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(middleware::from_fn_with_state(admin.clone(), authorize))
        .layer(middleware::from_fn(bounded))
        .with_state(admin)
}

async fn authorize(State(admin): State<Admin>, mut request: Request, next: Next) -> Response {
    if request.headers().contains_key(ORIGIN) {
        let message = "the admin API takes no requests of web pages, and this one has an `origin` header; use dynamo-host policy, or send it without";
        return refusal(StatusCode::FORBIDDEN, "origin", message);
    }
    let who = |request: &Request, token| {
        let Peer { address, certificate } = request.extensions().get().cloned().unwrap_or_default();
        Who::Client { peer: address, token, certificate }
    };
    let Some(token) = &admin.token else {
        let who = who(&request, false);
        request.extensions_mut().insert(who);
        return next.run(request).await;
    };
    let given = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    if given.is_some_and(|given| is_same(given.as_bytes(), token.as_bytes())) {
        let who = who(&request, true);
        request.extensions_mut().insert(who);
        return next.run(request).await;
    }
    refusal(StatusCode::UNAUTHORIZED, "unauthorized", "send the admin token as `authorization: Bearer …` (--token)")
}

async fn bounded(request: Request, next: Next) -> Response {
    let late = |_| {
        let message = "it was not done in time; a change that had begun is made all the same, see dynamo-host policy list";
        refusal(StatusCode::REQUEST_TIMEOUT, "timeout", message)
    };
    tokio::time::timeout(PATIENCE, next.run(request)).await.unwrap_or_else(late)
}

async fn nothing_here(request: Request) -> Response {
    let message = format!("there is no {} {} here; see dynamo-host --help", request.method(), request.uri().path());
    refusal(StatusCode::NOT_FOUND, "not-found", &message)
}

/// Compares in time that does not depend on where the two differ.
fn is_same(one: &[u8], other: &[u8]) -> bool {
    one.len() == other.len() && one.iter().zip(other).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

async fn status(State(admin): State<Admin>) -> Response {
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "uptime_s": admin.started.elapsed().as_secs(),
        "config": admin.config.report(),
        "workers": admin.roster.report(),
        "problems": admin.roster.problems(),
        "disaggregation": admin.roster.report_disaggregation(),
        "queue": admin.queue.report(),
        "slots": admin.policies.reports(),
    }))
    .into_response()
}

async fn slots(State(admin): State<Admin>) -> Response {
    Json(json!({ "slots": admin.policies.reports() })).into_response()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ActivateQuery {
    #[serde(default)]
    settings: Option<String>,
}

async fn activate(
    State(admin): State<Admin>,
    Extension(who): Extension<Who>,
    Path(slot): Path<String>,
    query: Result<Query<ActivateQuery>, QueryRejection>,
    body: Body,
) -> Result<Response, AdminError> {
    // A body that is not read closes its connection, under whatever the client asks next.
    let bytes = component(body, admin.policies.max_component_bytes()).await?;
    let Query(query) = query?;
    let slot = slot.parse()?;
    let settings = query.settings.unwrap_or_else(|| "{}".to_owned());
    let of = Of { what: "policy activate", who, slot: &slot, takes_turn: true };
    let make = move |admin: Admin, slot| async move { admin.policies.activate(&slot, Some((bytes, settings))).await };
    audited::change(&admin, of, make).await
}

/// Reads a component, and no more of it into memory than one may have.
async fn component(body: Body, max_bytes: usize) -> Result<Vec<u8>, AdminError> {
    let mut chunks = body.into_data_stream();
    let (mut bytes, mut read) = (Vec::new(), 0);
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| AdminError::Body(error.to_string()))?;
        read += chunk.len();
        if read <= max_bytes {
            bytes.extend_from_slice(&chunk);
        } else {
            bytes = Vec::new();
        }
        if read > MAX_DRAINED_BYTES {
            break;
        }
    }
    if read <= max_bytes {
        return Ok(bytes);
    }
    let error = LoadError::TooLarge { bytes: read, max_bytes };
    metrics::counter!("dynamo_host_policy_load_failures_total", "cause" => error.cause()).increment(1);
    Err(ChangeError::from(error).into())
}

type Asked = (State<Admin>, Extension<Who>, Path<String>);

async fn activate_native((State(admin), Extension(who), Path(slot)): Asked) -> Result<Response, AdminError> {
    let of = Of { what: "policy activate", who, slot: &slot.parse()?, takes_turn: true };
    audited::change(&admin, of, |admin, slot| async move { admin.policies.activate(&slot, None).await }).await
}

async fn rollback((State(admin), Extension(who), Path(slot)): Asked) -> Result<Response, AdminError> {
    let of = Of { what: "policy rollback", who, slot: &slot.parse()?, takes_turn: true };
    audited::change(&admin, of, |admin, slot| async move { admin.policies.rollback(&slot).await }).await
}

async fn bypass(asked: Asked) -> Result<Response, AdminError> {
    set_bypass(asked, true).await
}

async fn end_bypass(asked: Asked) -> Result<Response, AdminError> {
    set_bypass(asked, false).await
}

/// The kill switch waits for no change under way.
async fn set_bypass((State(admin), Extension(who), Path(slot)): Asked, is_on: bool) -> Result<Response, AdminError> {
    let of = Of { what: "policy bypass", who, slot: &slot.parse()?, takes_turn: false };
    audited::change(&admin, of, move |admin, slot| async move { admin.policies.set_bypass(&slot, is_on).await }).await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OnErrorQuery {
    mode: String,
}

async fn set_on_error(
    State(admin): State<Admin>,
    Extension(who): Extension<Who>,
    Path(slot): Path<String>,
    query: Result<Query<OnErrorQuery>, QueryRejection>,
) -> Result<Response, AdminError> {
    let slot: SlotName = slot.parse()?;
    let mode: OnError = query.map_err(AdminError::OnErrorQuery)?.0.mode.parse()?;
    let of = Of { what: "policy on-error", who, slot: &slot, takes_turn: true };
    audited::change(&admin, of, move |admin, slot| async move { admin.policies.set_on_error(&slot, mode).await }).await
}

/// What the admin API refuses.
#[derive(Debug, thiserror::Error)]
enum AdminError {
    #[error(transparent)]
    Slot(#[from] SlotNameError),
    #[error(transparent)]
    Change(#[from] ChangeError),
    #[error("{}; the query takes settings=JSON", .0.body_text())]
    Query(#[from] QueryRejection),
    #[error("{}; the query takes mode=fallback, mode=last-good or mode=closed", .0.body_text())]
    OnErrorQuery(QueryRejection),
    #[error(transparent)]
    OnError(#[from] OnErrorError),
    #[error("the component did not arrive: {0}; send it again")]
    Body(String),
}

impl IntoResponse for AdminError {
    fn into_response(self) -> Response {
        let (status, code) = match &self {
            Self::Slot(_) | Self::Change(ChangeError::NoSlot { .. }) => (StatusCode::NOT_FOUND, "no-slot"),
            Self::Change(ChangeError::Load(error)) => (StatusCode::UNPROCESSABLE_ENTITY, error.cause()),
            Self::Change(ChangeError::NoHistory(_)) => (StatusCode::CONFLICT, "no-history"),
            Self::Change(ChangeError::Store(_) | ChangeError::StateBroken { .. }) => (StatusCode::SERVICE_UNAVAILABLE, "state"),
            Self::Query(_) | Self::OnErrorQuery(_) | Self::OnError(_) => (StatusCode::BAD_REQUEST, "query"),
            Self::Body(_) => (StatusCode::BAD_REQUEST, "body"),
            Self::Change(ChangeError::Panicked(_)) => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
        };
        // A policy's words may be among these.
        let message = plain(&self.to_string());
        tracing::warn!(code, "refused: {message}");
        refusal(status, code, &message)
    }
}

fn refusal(status: StatusCode, code: &str, message: &str) -> Response {
    (status, Json(json!({ "error": { "code": code, "message": message } }))).into_response()
}
