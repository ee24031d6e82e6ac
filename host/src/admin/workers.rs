//! Workers in the admin API: who there is, and who gets no new requests.

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Json, Router,
    extract::{Path, Query, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Admin, audited::answer, refusal};
use crate::{
    audit::{Entry, Who},
    roster::{DrainError, Roster},
    text::plain,
};

pub(super) fn routes() -> Router<Admin> {
    Router::new()
        .route("/v1/workers", get(list))
        .route("/v1/workers/{name}/drain", post(|admin, who, name, grace| set_drained(admin, who, name, grace, true)))
        .route("/v1/workers/{name}/resume", post(|admin, who, name, grace| set_drained(admin, who, name, grace, false)))
}

async fn list(State(admin): State<Admin>) -> Response {
    Json(json!({
        "workers": admin.roster.report(),
        "problems": admin.roster.problems(),
        "disaggregation": admin.roster.report_disaggregation(),
        "links": admin.roster.report_links(),
    }))
    .into_response()
}

/// How long a drained worker may go on with what it has.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Grace {
    grace_s: Option<u64>,
}

async fn set_drained(
    State(admin): State<Admin>,
    Extension(who): Extension<Who>,
    Path(name): Path<String>,
    Query(Grace { grace_s }): Query<Grace>,
    drained: bool,
) -> Response {
    let _turn = admin.audit.turn.lock().await;
    let (roster, audit) = (Arc::clone(&admin.roster), admin.audit.clone());
    // Whoever asked may leave meanwhile: it is done, and written down, all the same.
    let done = tokio::task::spawn_blocking(move || {
        let mut entry = Entry::new(if drained { "worker drain" } else { "worker resume" }, who, Some(name.clone()));
        entry.from = standing(&roster, &name);
        let done = roster.set_drained(&name, drained, grace_s.map(Duration::from_secs));
        entry.to = standing(&roster, &name);
        entry.refused = done.as_ref().err().map(|error| plain(&error.to_string()));
        // Who waits for a worker to finish asks for it again and again.
        let is_news = entry.refused.is_some() || entry.from != entry.to;
        let not_audited = if is_news { audit.append_blocking(&entry) } else { None };
        done.map(|workers| answer(json!({ "workers": workers }), not_audited))
    });
    let (status, code, message) = match done.await {
        Ok(Ok(answer)) => return Json(answer).into_response(),
        Ok(Err(error @ DrainError::NoWorker { .. })) => (StatusCode::NOT_FOUND, "no-worker", error.to_string()),
        Ok(Err(error @ DrainError::Unkept(_))) => (StatusCode::SERVICE_UNAVAILABLE, "state", error.to_string()),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string()),
    };
    let message = plain(&message);
    tracing::warn!(code, "refused: {message}");
    refusal(status, code, &message)
}

fn standing(roster: &Roster, worker: &str) -> Value {
    json!({ "drained": roster.is_drained(worker) })
}
