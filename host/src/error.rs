//! The one table that turns an error into status, OpenAI error JSON, metric label and log level.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use dynamo_engine_api::EngineError;
use dynamo_host_core::Rejection;
use http::{HeaderValue, StatusCode, header::RETRY_AFTER};
use serde_json::json;

/// Why a request is not answered by an engine.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("the body is not valid JSON: {reason}")]
    InvalidJson { reason: String },
    #[error("the body is not valid UTF-8 at byte {at}; send JSON in UTF-8")]
    InvalidUtf8 { at: usize },
    #[error("`{field}` is missing; {expected}")]
    MissingField { field: &'static str, expected: &'static str },
    #[error("`{field}` is {found}; {expected}")]
    InvalidField { field: &'static str, found: String, expected: String },
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
    #[error("there is no {path} here; POST /v1/chat/completions or /v1/completions, GET /v1/models")]
    NotFound { path: String },
    #[error("{path} does not take {method}; use {allowed}")]
    MethodNotAllowed { path: String, method: String, allowed: &'static str },
    #[error("{}", .0.reason)]
    Rejected(Rejection),
    #[error("{0}")]
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
            Self::BodyTooLarge { .. } => row(StatusCode::PAYLOAD_TOO_LARGE, INVALID, "body_too_large"),
            Self::BodyUnread { .. } => row(StatusCode::BAD_REQUEST, INVALID, "body_unread"),
            Self::BodySlow { .. } => row(StatusCode::REQUEST_TIMEOUT, INVALID, "body_slow"),
            Self::ModelNotFound { .. } => row(StatusCode::NOT_FOUND, INVALID, "model_not_found"),
            Self::NotFound { .. } => row(StatusCode::NOT_FOUND, INVALID, "not_found"),
            Self::MethodNotAllowed { .. } => row(StatusCode::METHOD_NOT_ALLOWED, INVALID, "method_not_allowed"),
            Self::NoWorker { .. } => row(StatusCode::SERVICE_UNAVAILABLE, SERVER, "no_worker"),
            Self::Rejected(rejection) => {
                let status = StatusCode::from_u16(rejection.status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
                let kind = if status == StatusCode::TOO_MANY_REQUESTS { "rate_limit_error" } else { SERVER };
                row(status, kind, "policy_rejected")
            }
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
        if row.status.is_server_error() {
            tracing::warn!(code = row.code, "{self}");
        } else {
            tracing::debug!(code = row.code, "{self}");
        }
    }

    /// The body, in OpenAI's shape.
    pub(crate) fn body(&self) -> serde_json::Value {
        let row = self.row();
        let param = match self {
            Self::MissingField { field, .. } | Self::InvalidField { field, .. } => Some(*field),
            Self::ModelNotFound { .. } => Some("model"),
            _ => None,
        };
        json!({ "error": { "message": self.to_string(), "type": row.kind, "param": param, "code": row.code } })
    }
}

impl IntoResponse for RequestError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(self.body())).into_response();
        let retry_after_ms = match &self {
            Self::Rejected(rejection) => rejection.retry_after_ms,
            Self::NoWorker { .. } => Some(1000),
            _ => None,
        };
        if let Some(ms) = retry_after_ms {
            // The header knows whole seconds: later rather than too early.
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(u64::from(ms).div_ceil(1000)));
        }
        response
    }
}
