//! Signs of life that orchestrators ask for, and metrics. They are open to everybody.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Json,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use dynamo_host_core::WorkerState;
use http::{HeaderValue, StatusCode, header::CONTENT_TYPE};
use serde::Serialize;
use serde_json::{Value, json};

use super::Door;
use crate::{
    error::Audience,
    roster::{Roster, WorkerReport},
    stop::Phase,
};

/// How many workers of a model there are, by how they stand.
#[derive(Default, Serialize)]
struct Pool {
    total: usize,
    /// Those that take requests.
    ready: usize,
    /// Of those, the ones that failed lately or were too slow, and are tried.
    suspect: usize,
    starting: usize,
    /// Their breakers are open.
    tripped: usize,
    /// They are left out for being slow.
    ejected: usize,
    unreachable: usize,
    draining: usize,
}

impl Pool {
    fn add(&mut self, state: WorkerState) {
        self.total += 1;
        self.ready += usize::from(state.is_eligible());
        match state {
            WorkerState::Healthy => {}
            WorkerState::Suspect => self.suspect += 1,
            WorkerState::Starting => self.starting += 1,
            WorkerState::Tripped => self.tripped += 1,
            WorkerState::Ejected => self.ejected += 1,
            WorkerState::Unreachable => self.unreachable += 1,
            WorkerState::Draining => self.draining += 1,
        }
    }
}

/// The workers of one snapshot: in another there may be more that are ready.
struct Standing {
    models: BTreeMap<String, Pool>,
    ready: usize,
    others: usize,
    /// Models that are demanded and that nobody serves.
    missing: Vec<String>,
    is_stopping: bool,
}

impl Standing {
    fn of(door: &Door) -> Self {
        let roster: &Roster = &door.lane.roster;
        let snapshot = roster.latest();
        let mut models: BTreeMap<String, Pool> = BTreeMap::new();
        for worker in snapshot.fleet().workers() {
            models.entry(worker.spec.model.clone()).or_default().add(worker.state);
        }
        let ready = models.values().map(|pool| pool.ready).sum();
        let others = snapshot.fleet().workers().len() - ready;
        let required = &roster.health().required_models;
        let missing = required.iter().filter(|model| !snapshot.is_served(model)).cloned().collect();
        Self { models, ready, others, missing, is_stopping: door.lane.stopping.has_reached(Phase::Leaving) }
    }

    fn is_ready(&self) -> bool {
        self.ready > 0 && self.missing.is_empty() && !self.is_stopping
    }

    /// Why it is not ready for requests.
    fn reason(&self) -> Option<String> {
        if self.is_stopping {
            return Some("the host is stopping".to_owned());
        }
        if self.ready == 0 {
            return Some("no worker is ready".to_owned());
        }
        (!self.missing.is_empty()).then(|| format!("no worker is ready for {}", self.missing.join(", ")))
    }
}

/// 200 while at least one worker can serve, and one for each model that is required.
pub(super) async fn ready(State(door): State<Arc<Door>>) -> Response {
    let standing = Standing::of(&door);
    let (status, word) =
        if standing.is_ready() { (StatusCode::OK, "ready") } else { (StatusCode::SERVICE_UNAVAILABLE, "not ready") };
    (status, Json(json!({ "status": word, "ready_workers": standing.ready, "reason": standing.reason() }))).into_response()
}

/// What is wrong, if anything is; 503 when nothing can be served. Which worker it is and what it said is for those only who
/// may know workers: anybody may ask here.
pub(super) async fn health(State(door): State<Arc<Door>>) -> Response {
    let standing = Standing::of(&door);
    let is_well = standing.others == 0 && standing.models.values().all(|pool| pool.suspect == 0) && standing.is_ready();
    let (status, word) = match standing.ready {
        _ if standing.is_stopping => (StatusCode::SERVICE_UNAVAILABLE, "stopping"),
        0 => (StatusCode::SERVICE_UNAVAILABLE, "down"),
        _ if is_well => (StatusCode::OK, "healthy"),
        _ => (StatusCode::OK, "degraded"),
    };
    let mut body = json!({
        "status": word,
        "reason": standing.reason(),
        "ready_workers": standing.ready,
        "other_workers": standing.others,
        "models": standing.models,
    });
    if door.lane.audience() == Audience::Operator {
        body["troubles"] = troubles(door.lane.roster.report());
    }
    (status, Json(body)).into_response()
}

/// What is wrong with each worker that is not well.
fn troubles(workers: Vec<WorkerReport>) -> Value {
    let unwell = workers.into_iter().filter(|worker| worker.state != WorkerState::Healthy);
    unwell.map(|worker| json!({ "worker": worker.name, "state": worker.state, "reason": worker.trouble })).collect()
}

pub(super) async fn metrics(State(door): State<Arc<Door>>) -> Response {
    let text = [(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"))];
    (text, Body::from(door.metrics.render())).into_response()
}
