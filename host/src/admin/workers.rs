//! Workers in the admin API: who there is, and who gets no new requests.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, State},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http::StatusCode;
use serde_json::json;

use super::{Admin, refusal};
use crate::{roster::DrainError, text::plain};

pub(super) fn routes() -> Router<Admin> {
    Router::new()
        .route("/v1/workers", get(list))
        .route("/v1/workers/{name}/drain", post(|admin, name| set_drained(admin, name, true)))
        .route("/v1/workers/{name}/resume", post(|admin, name| set_drained(admin, name, false)))
}

async fn list(State(admin): State<Admin>) -> Response {
    Json(json!({ "workers": admin.roster.report(), "problems": admin.roster.problems() })).into_response()
}

async fn set_drained(State(admin): State<Admin>, Path(name): Path<String>, drained: bool) -> Response {
    let roster = Arc::clone(&admin.roster);
    let done = tokio::task::spawn_blocking(move || roster.set_drained(&name, drained)).await;
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
