//! The models that are served, as OpenAI's and Anthropic's clients read them; with keys, those that the key may use.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, Request, State},
    response::{IntoResponse, Response},
};
use http::HeaderMap;
use serde_json::{Value, json};

use super::{ANTHROPIC_VERSION, Door, with_id};
use crate::{
    error::{Dialect, RequestError},
    models::ListedModel,
};

/// The list.
pub(super) async fn list(State(door): State<Arc<Door>>, request: Request) -> Response {
    let headers = request.headers();
    let caller = match door.gate.admit(headers) {
        Ok(caller) => caller,
        Err(error) => return refuse(&door, headers, &error),
    };
    let snapshot = door.lane.roster.snapshot();
    let dialect = dialect(headers);
    let listed = snapshot.listed_models().into_iter().filter(|model| caller.may_use(&model.id));
    let cards: Vec<_> = listed.map(|model| card(dialect, &model)).collect();
    let ends = |at: Option<&Value>| at.map_or(Value::Null, |card| card["id"].clone());
    let list = match dialect {
        Dialect::OpenAi => json!({ "object": "list", "data": cards }),
        Dialect::Anthropic => {
            json!({ "first_id": ends(cards.first()), "last_id": ends(cards.last()), "has_more": false, "data": cards })
        }
    };
    with_id(Json(list).into_response(), headers)
}

/// One of them. Its name may have slashes.
pub(super) async fn one(State(door): State<Arc<Door>>, Path(id): Path<String>, request: Request) -> Response {
    let headers = request.headers();
    let caller = match door.gate.admit(headers) {
        Ok(caller) => caller,
        Err(error) => return refuse(&door, headers, &error),
    };
    let found = door.lane.roster.snapshot().listed_models().into_iter().find(|model| model.id == id);
    if let Some(model) = found.filter(|_| caller.may_use(&id)) {
        return with_id(Json(card(dialect(headers), &model)).into_response(), headers);
    }
    refuse(&door, headers, &RequestError::ModelNotFound { model: id })
}

/// Both APIs have this path; Anthropic's clients always say which version of theirs they mean.
fn dialect(headers: &HeaderMap) -> Dialect {
    if headers.contains_key(ANTHROPIC_VERSION) { Dialect::Anthropic } else { Dialect::OpenAi }
}

fn card(dialect: Dialect, model: &ListedModel) -> Value {
    let ListedModel { id, root, parent, max_model_len } = model;
    match dialect {
        Dialect::OpenAi => json!({
            "id": id, "object": "model", "created": 0, "owned_by": "dynamo-host",
            "root": root.as_ref().unwrap_or(id), "parent": parent, "max_model_len": max_model_len,
        }),
        Dialect::Anthropic => {
            json!({ "type": "model", "id": id, "display_name": id, "created_at": "1970-01-01T00:00:00Z" })
        }
    }
}

fn refuse(door: &Door, headers: &HeaderMap, error: &RequestError) -> Response {
    error.record();
    with_id(error.response(dialect(headers), door.lane.audience()), headers)
}
