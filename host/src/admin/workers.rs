//! Workers in the admin API: who there is, and who gets no new requests.

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    extract::{Path, Query, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http::StatusCode;
use serde::Deserialize;
use serde_json::json;

use super::{Admin, refusal};
use crate::{roster::DrainError, text::plain};

pub(super) fn routes() -> Router<Admin> {
    Router::new()
        .route("/v1/workers", get(list))
        .route("/v1/workers/{name}/drain", post(|admin, name, grace| set_drained(admin, name, grace, true)))
        .route("/v1/workers/{name}/resume", post(|admin, name, grace| set_drained(admin, name, grace, false)))
}

async fn list(State(admin): State<Admin>) -> Response {
    Json(json!({ "workers": admin.roster.report(), "problems": admin.roster.problems() })).into_response()
}

/// How long a drained worker may go on with what it has.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Grace {
    grace_s: Option<u64>,
}

async fn set_drained(
    State(admin): State<Admin>,
    Path(name): Path<String>,
    Query(Grace { grace_s }): Query<Grace>,
    drained: bool,
) -> Response {
    let roster = Arc::clone(&admin.roster);
    let grace = grace_s.map(Duration::from_secs);
    let done = tokio::task::spawn_blocking(move || roster.set_drained(&name, drained, grace)).await;
    let (status, code, message) = match done {
        Ok(Ok(workers)) => return Json(json!({ "workers": workers })).into_response(),
        Ok(Err(error @ DrainError::NoWorker { .. })) => (StatusCode::NOT_FOUND, "no-worker", error.to_string()),
        Ok(Err(error @ DrainError::Unkept(_))) => (StatusCode::SERVICE_UNAVAILABLE, "state", error.to_string()),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string()),
    };
    let message = plain(&message);
    tracing::warn!(code, "refused: {message}");
    refusal(status, code, &message)
}
