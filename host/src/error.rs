//! The one table that turns an error into status, OpenAI error JSON, metric label and log level.
//!
//! The log says all; a client is told which engine it was only where the operator exposes workers.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use dynamo_engine_api::EngineError;
use dynamo_host_core::Rejection;
use http::{HeaderValue, StatusCode, header::RETRY_AFTER};
use serde_json::json;

use crate::text::plain;

/// Why a request is not answered by an engine.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("the body is not valid JSON: {reason}")]
    InvalidJson { reason: String },
    #[error("the body is not valid UTF-8 at byte {at}; send JSON in UTF-8")]
    InvalidUtf8 { at: usize },
    #[error("`{field}` is missing; send {expected}")]
    MissingField { field: &'static str, expected: &'static str },
    #[error("`{field}` is {found}; {expected}")]
    InvalidField { field: &'static str, found: String, expected: String },
    #[error("the body has more than {max} fields at its top level; send fewer")]
    TooManyFields { max: usize },
    #[error("the body is larger than {max_bytes} bytes; send less, or have the operator raise limits.max_body_bytes")]
    BodyTooLarge { max_bytes: usize },
    #[error("the body did not arrive: {reason}")]
    BodyUnread { reason: String },
    #[error("the body did not arrive within {seconds} s")]
    BodySlow { seconds: u64 },
    #[error("model {model:?} is not served here; GET /v1/models lists what is")]
    ModelNotFound { model: String },
    #[error("no worker of model {model:?} is ready; try again, or see GET /health")]
    NoWorker { model: String },
    #[error("the models of some workers are not known yet, and {model:?} may be among them; try again, or see GET /health")]
    ModelsUnknown { model: String },
    #[error(
        "the request was not done within {seconds} s; ask for fewer tokens, or have the operator raise limits.request_timeout_s"
    )]
    Deadline { seconds: u64 },
    #[error("there is no {path} here; POST /v1/chat/completions or /v1/completions, GET /v1/models")]
    NotFound { path: String },
    #[error("{path} does not take {method}; use {allowed}")]
    MethodNotAllowed { path: String, method: String, allowed: &'static str },
    #[error("{}", .0.reason)]
    Rejected(Rejection),
    /// The slot's `on-error` is `closed`.
    #[error("{}", .0.reason)]
    PolicyFailed(Rejection),
    #[error(transparent)]
    Engine(#[from] EngineError),
}

struct Row {
    status: StatusCode,
    /// OpenAI's `type`.
    kind: &'static str,
    /// OpenAI's `code`, and the metric label.
    code: &'static str,
}

impl RequestError {
    fn row(&self) -> Row {
        const INVALID: &str = "invalid_request_error";
        const SERVER: &str = "server_error";
        let row = |status, kind, code| Row { status, kind, code };
        match self {
            Self::InvalidJson { .. } => row(StatusCode::BAD_REQUEST, INVALID, "invalid_json"),
            Self::InvalidUtf8 { .. } => row(StatusCode::BAD_REQUEST, INVALID, "invalid_utf8"),
            Self::MissingField { .. } => row(StatusCode::BAD_REQUEST, INVALID, "missing_field"),
            Self::InvalidField { .. } => row(StatusCode::BAD_REQUEST, INVALID, "invalid_field"),
            Self::TooManyFields { .. } => row(StatusCode::BAD_REQUEST, INVALID, "too_many_fields"),
            Self::BodyTooLarge { .. } => row(StatusCode::PAYLOAD_TOO_LARGE, INVALID, "body_too_large"),
            Self::BodyUnread { .. } => row(StatusCode::BAD_REQUEST, INVALID, "body_unread"),
            Self::BodySlow { .. } => row(StatusCode::REQUEST_TIMEOUT, INVALID, "body_slow"),
            Self::ModelNotFound { .. } => row(StatusCode::NOT_FOUND, INVALID, "model_not_found"),
            Self::NotFound { .. } => row(StatusCode::NOT_FOUND, INVALID, "not_found"),
            Self::MethodNotAllowed { .. } => row(StatusCode::METHOD_NOT_ALLOWED, INVALID, "method_not_allowed"),
            Self::NoWorker { .. } | Self::ModelsUnknown { .. } => row(StatusCode::SERVICE_UNAVAILABLE, SERVER, "no_worker"),
            Self::Deadline { .. } => row(StatusCode::GATEWAY_TIMEOUT, SERVER, "request_timeout"),
            Self::Rejected(rejection) => {
                let status = StatusCode::from_u16(rejection.status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
                let kind = match status {
                    StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
                    _ if status.is_client_error() => INVALID,
                    _ => SERVER,
                };
                row(status, kind, "policy_rejected")
            }
            Self::PolicyFailed(_) => row(StatusCode::SERVICE_UNAVAILABLE, SERVER, "policy_failed"),
            Self::Engine(error @ EngineError::Timeout { .. }) => row(StatusCode::GATEWAY_TIMEOUT, SERVER, error.label()),
            Self::Engine(error) => row(StatusCode::BAD_GATEWAY, SERVER, error.label()),
        }
    }

    /// Status of the response.
    pub(crate) fn status(&self) -> StatusCode {
        self.row().status
    }

    /// Counts and logs it. A client's mistake is not worth a warning.
    pub(crate) fn record(&self) {
        let row = self.row();
        metrics::counter!("dynamo_host_errors_total", "kind" => row.code).increment(1);
        let text = self.text(Audience::Operator);
        if row.status.is_server_error() {
            tracing::warn!(code = row.code, "{text}");
        } else {
            tracing::debug!(code = row.code, "{text}");
        }
    }

    /// The body, in OpenAI's shape.
    pub(crate) fn body(&self, to: Audience) -> serde_json::Value {
        let row = self.row();
        let param = match self {
            Self::MissingField { field, .. } | Self::InvalidField { field, .. } => Some(*field),
            Self::ModelNotFound { .. } => Some("model"),
            _ => None,
        };
        json!({ "error": { "message": self.text(to), "type": row.kind, "param": param, "code": row.code } })
    }

    /// The answer to the request.
    pub(crate) fn response(&self, to: Audience) -> Response {
        let mut response = (self.status(), Json(self.body(to))).into_response();
        let retry_after_ms = match self {
            Self::Rejected(rejection) | Self::PolicyFailed(rejection) => rejection.retry_after_ms,
            Self::NoWorker { .. } | Self::ModelsUnknown { .. } => Some(1000),
            _ => None,
        };
        if let Some(ms) = retry_after_ms {
            // The header knows whole seconds: later rather than too early.
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(u64::from(ms).div_ceil(1000)));
        }
        response
    }

    fn text(&self, to: Audience) -> String {
        match (self, to) {
            (Self::Engine(error), Audience::Client) => plain(&unnamed(error).to_string()),
            (Self::Engine(_) | Self::Rejected(_), _) => plain(&self.to_string()),
            _ => self.to_string(),
        }
    }
}

/// Who reads an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Audience {
    /// Whoever runs the host, or whom they show its workers.
    Operator,
    /// Anybody.
    Client,
}

/// The same error, not saying which engine it was.
fn unnamed(error: &EngineError) -> EngineError {
    let mut error = error.clone();
    let (EngineError::Connect { engine, .. }
    | EngineError::Timeout { engine, .. }
    | EngineError::Broken { engine, .. }
    | EngineError::Incomplete { engine }
    | EngineError::InStream { engine, .. }
    | EngineError::Unhealthy { engine, .. }
    | EngineError::Protocol { engine, .. }) = &mut error;
    "the engine".clone_into(engine);
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_not_told_which_engine_failed_and_an_operator_is() {
        let error =
            RequestError::from(EngineError::Connect { engine: "http://10.0.0.7:1".to_owned(), reason: "no\nway".to_owned() });
        assert_eq!(error.body(Audience::Client)["error"]["message"], "cannot connect to the engine: no way");
        assert_eq!(error.body(Audience::Operator)["error"]["message"], "cannot connect to http://10.0.0.7:1: no way");
    }

    #[test]
    fn a_rejection_has_the_type_of_its_status_and_one_short_line() {
        for (status, kind) in
            [(400, "invalid_request_error"), (403, "invalid_request_error"), (429, "rate_limit_error"), (503, "server_error")]
        {
            let rejection = Rejection { status, retry_after_ms: Some(1), reason: "no\r\n".to_owned() + &"x".repeat(5000) };
            let error = RequestError::Rejected(rejection);
            let body = error.body(Audience::Client);
            assert_eq!((error.status().as_u16(), &body["error"]["type"]), (status, &json!(kind)));
            let message = body["error"]["message"].as_str().unwrap();
            assert!(message.len() < 1100 && message.starts_with("no  x"), "{message}");
        }
    }
}
