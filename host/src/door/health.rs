//! Signs of life that orchestrators ask for, and metrics. They are open to everybody.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use dynamo_host_core::{Fleet, WorkerState};
use http::{HeaderValue, StatusCode, header::CONTENT_TYPE};
use serde_json::json;

use super::Door;
use crate::{error::Audience, roster::WorkerReport, stop::Phase};

/// 200 while at least one worker can serve, and the host goes on.
pub(super) async fn ready(State(door): State<Arc<Door>>) -> Response {
    let ready = ready_workers(door.lane.roster.snapshot().fleet());
    let (status, word) = match ready {
        _ if door.lane.stopping.has_reached(Phase::Leaving) => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
        0 => (StatusCode::SERVICE_UNAVAILABLE, "not ready"),
        _ => (StatusCode::OK, "ready"),
    };
    (status, Json(json!({ "status": word, "ready_workers": ready }))).into_response()
}

/// What is wrong, if anything is; 503 when nothing can be served. Which worker it is and what it said is for those only who
/// may know workers: anybody may ask here.
pub(super) async fn health(State(door): State<Arc<Door>>) -> Response {
    let snapshot = door.lane.roster.snapshot();
    // Both of one snapshot: in another there may be more that are ready.
    let ready = ready_workers(snapshot.fleet());
    let others = snapshot.fleet().workers().len() - ready;
    let (status, word) = match (ready, others) {
        _ if door.lane.stopping.has_reached(Phase::Leaving) => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
        (0, _) => (StatusCode::SERVICE_UNAVAILABLE, "down"),
        (_, 0) => (StatusCode::OK, "healthy"),
        _ => (StatusCode::OK, "degraded"),
    };
    let mut body = json!({ "status": word, "ready_workers": ready, "other_workers": others });
    if door.lane.audience() == Audience::Operator {
        let troubles = door.lane.roster.report().into_iter().filter(|worker| worker.state != WorkerState::Healthy);
        let trouble = |worker: WorkerReport| json!({ "worker": worker.name, "state": worker.state, "reason": worker.trouble });
        body["troubles"] = troubles.map(trouble).collect();
    }
    (status, Json(body)).into_response()
}

fn ready_workers(fleet: &Fleet) -> usize {
    fleet.workers().iter().filter(|worker| worker.state.is_eligible()).count()
}

pub(super) async fn metrics(State(door): State<Arc<Door>>) -> Response {
    let text = [(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"))];
    (text, Body::from(door.prometheus.render())).into_response()
}
