//! Signs of life that orchestrators ask for, and metrics. They are open to everybody.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use dynamo_host_core::WorkerState;
use http::{HeaderValue, StatusCode, header::CONTENT_TYPE};
use serde_json::json;

use super::Door;

/// 200 while at least one worker can serve.
pub(super) async fn ready(State(door): State<Arc<Door>>) -> Response {
    let ready = healthy_workers(&door);
    let (status, word) = if ready > 0 { (StatusCode::OK, "ready") } else { (StatusCode::SERVICE_UNAVAILABLE, "not ready") };
    (status, Json(json!({ "status": word, "ready_workers": ready }))).into_response()
}

/// What is wrong, if anything is; 503 when nothing can be served.
pub(super) async fn health(State(door): State<Arc<Door>>) -> Response {
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

pub(super) async fn metrics(State(door): State<Arc<Door>>) -> Response {
    let text = [(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"))];
    (text, Body::from(door.prometheus.render())).into_response()
}
