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
use crate::error::{Dialect, RequestError};

/// The list.
pub(super) async fn list(State(door): State<Arc<Door>>, request: Request) -> Response {
    let headers = request.headers();
    let caller = match door.gate.admit(headers) {
        Ok(caller) => caller,
        Err(error) => return refuse(&door, headers, &error),
    };
    let snapshot = door.lane.roster.snapshot();
    let dialect = dialect(headers);
    let cards: Vec<_> = snapshot.fleet().models().iter().filter(|id| caller.may_use(id)).map(|id| card(dialect, id)).collect();
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
    if caller.may_use(&id) && door.lane.roster.snapshot().fleet().models().contains(&id) {
        return with_id(Json(card(dialect(headers), &id)).into_response(), headers);
    }
    refuse(&door, headers, &RequestError::ModelNotFound { model: id })
}

/// Both APIs have this path; Anthropic's clients always say which version of theirs they mean.
fn dialect(headers: &HeaderMap) -> Dialect {
    if headers.contains_key(ANTHROPIC_VERSION) { Dialect::Anthropic } else { Dialect::OpenAi }
}

fn card(dialect: Dialect, id: &str) -> Value {
    match dialect {
        Dialect::OpenAi => json!({ "id": id, "object": "model", "created": 0, "owned_by": "dynamo-host" }),
        Dialect::Anthropic => {
            json!({ "type": "model", "id": id, "display_name": id, "created_at": "1970-01-01T00:00:00Z" })
        }
    }
}

fn refuse(door: &Door, headers: &HeaderMap, error: &RequestError) -> Response {
    error.record();
    with_id(error.response(dialect(headers), door.lane.audience()), headers)
}
