//! The one table that turns an error into status, error JSON in the client's dialect, metric label and log level.
//!
//! The log says all; a client is told which engine it was only where the operator exposes workers.

use std::time::Duration;

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use dynamo_engine_api::{Endpoint, EngineError};
use dynamo_host_core::Rejection;
use dynamo_host_flow::Refusal;
use http::{
    HeaderValue, StatusCode,
    header::{RETRY_AFTER, WWW_AUTHENTICATE},
};
use serde_json::{Value, json};

use crate::{retry_after, text::plain};

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
    #[error(
        "the workers of model {model:?} only prefill or decode for each other, which they do for chats and completions alone; ask one of \
         those, or have the operator add a worker of role aggregated"
    )]
    OnlyPairs { model: String },
    #[error("the models of some workers are not known yet, and {model:?} may be among them; try again, or see GET /health")]
    ModelsUnknown { model: String },
    #[error(
        "the request was not done within {seconds} s; ask for fewer tokens, give it more time if x-request-timeout-ms is set, \
         or have the operator raise limits.request_timeout_s"
    )]
    Deadline { seconds: f64 },
    #[error("this host is shutting down; send the request again, and it goes to another one")]
    ShuttingDown,
    #[error("there is no {path} here; GET /v1/models, or POST {}", posts())]
    NotFound { path: String },
    #[error("{path} does not take {method}; use {allowed}")]
    MethodNotAllowed { path: String, method: String, allowed: &'static str },
    #[error("an API key is needed; send it as `authorization: Bearer …` or `x-api-key: …`")]
    MissingKey,
    #[error("the API key is not known here; check that it is whole, or ask the operator for one")]
    InvalidKey,
    #[error("the API key has expired; ask the operator for another")]
    ExpiredKey,
    #[error("this API key may not use model {model:?}; GET /v1/models lists what it may")]
    ModelNotAllowed { model: String },
    #[error("`{field}` needs what one engine has stored, and requests may go to any of several; {instead}")]
    Stateful { field: &'static str, instead: &'static str },
    #[error(
        "there is no {path} here: a stored response lives in one engine, and requests may go to any of several; \
         keep what POST /v1/responses answers"
    )]
    NothingStored { path: String },
    #[error("{}; try again later", full(*refusal))]
    QueueFull {
        /// `None`: it had a place, and another with a better claim has it now.
        refusal: Option<Refusal>,
        retry_after_ms: u32,
    },
    #[error("the request could not be started in time: it waited {waited_ms} ms; give it more time, or try again later")]
    QueueTimeout { waited_ms: u64 },
    #[error("header {name} is {found:?}; write a whole number of milliseconds, or leave it out")]
    Header { name: &'static str, found: String },
    #[error("{}", .0.reason)]
    Rejected(Rejection),
    /// By the admission policy.
    #[error("{}", .0.reason)]
    Shed(Rejection),
    /// The slot's `on-error` is `closed`.
    #[error("{}", .0.reason)]
    PolicyFailed(Rejection),
    #[error("the stream broke off ({failure}), and no other worker can go on with it: {reason}")]
    MigrationUnsound { failure: EngineError, reason: &'static str },
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

/// Whose API a client speaks: the shape in which it reads errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    OpenAi,
    Anthropic,
}

impl Dialect {
    pub(crate) fn of(endpoint: Endpoint) -> Self {
        match endpoint {
            Endpoint::Messages | Endpoint::CountTokens => Self::Anthropic,
            _ => Self::OpenAi,
        }
    }

    /// Of a path, be it one of ours or not.
    pub(crate) fn of_path(path: &str) -> Self {
        if path.starts_with(Endpoint::Messages.path()) { Self::Anthropic } else { Self::OpenAi }
    }
}

/// Anthropic's `error.type` for a status.
fn anthropic_kind(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
        StatusCode::GATEWAY_TIMEOUT => "timeout_error",
        status if status.is_client_error() => "invalid_request_error",
        _ => "api_error",
    }
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
            Self::OnlyPairs { .. } => row(StatusCode::SERVICE_UNAVAILABLE, SERVER, "no_worker"),
            Self::MissingKey => row(StatusCode::UNAUTHORIZED, INVALID, "missing_api_key"),
            Self::InvalidKey => row(StatusCode::UNAUTHORIZED, INVALID, "invalid_api_key"),
            Self::ExpiredKey => row(StatusCode::UNAUTHORIZED, INVALID, "expired_api_key"),
            Self::ModelNotAllowed { .. } => row(StatusCode::FORBIDDEN, INVALID, "model_not_allowed"),
            Self::Stateful { .. } => row(StatusCode::BAD_REQUEST, INVALID, "stateful_responses"),
            Self::NothingStored { .. } => row(StatusCode::NOT_FOUND, INVALID, "stateful_responses"),
            Self::ShuttingDown => row(StatusCode::SERVICE_UNAVAILABLE, SERVER, "shutting_down"),
            Self::Deadline { .. } => row(StatusCode::GATEWAY_TIMEOUT, SERVER, "request_timeout"),
            Self::QueueFull { .. } => row(StatusCode::SERVICE_UNAVAILABLE, SERVER, "queue_full"),
            Self::QueueTimeout { .. } => row(StatusCode::GATEWAY_TIMEOUT, SERVER, "queue_timeout"),
            Self::Header { .. } => row(StatusCode::BAD_REQUEST, INVALID, "invalid_header"),
            Self::Rejected(rejection) | Self::Shed(rejection) => {
                let status = StatusCode::from_u16(rejection.status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
                let kind = match status {
                    StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
                    _ if status.is_client_error() => INVALID,
                    _ => SERVER,
                };
                let code = match self {
                    Self::Shed(_) if status == StatusCode::TOO_MANY_REQUESTS => "rate_limit_exceeded",
                    Self::Shed(_) => "admission_shed",
                    _ => "policy_rejected",
                };
                row(status, kind, code)
            }
            Self::MigrationUnsound { .. } => row(StatusCode::BAD_GATEWAY, SERVER, "migration_unsound"),
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

    /// The body.
    pub(crate) fn body(&self, dialect: Dialect, to: Audience) -> Value {
        let Row { status, kind, code } = self.row();
        let message = self.text(to);
        match dialect {
            Dialect::OpenAi => json!({ "error": { "message": message, "type": kind, "param": self.param(), "code": code } }),
            Dialect::Anthropic => json!({ "type": "error", "error": { "type": anthropic_kind(status), "message": message } }),
        }
    }

    /// The event that ends a stream which had begun.
    pub(crate) fn event(&self, endpoint: Endpoint, to: Audience) -> Bytes {
        let mut body = self.body(Dialect::of(endpoint), to);
        let name = match endpoint {
            Endpoint::Messages | Endpoint::CountTokens => "event: error\n",
            Endpoint::Responses => {
                // Documented is the flat form; official clients raise an exception at an `error` member only.
                let Row { code, .. } = self.row();
                let flat = json!({ "type": "error", "code": code, "message": self.text(to), "param": self.param() });
                body.as_object_mut().expect("a body is an object").extend(flat.as_object().expect("this is one").clone());
                "event: error\n"
            }
            _ => "",
        };
        Bytes::from(format!("{name}data: {body}\n\n"))
    }

    /// The answer to the request.
    pub(crate) fn response(&self, dialect: Dialect, to: Audience) -> Response {
        let mut response = (self.status(), Json(self.body(dialect, to))).into_response();
        let retry_after_ms = match self {
            Self::Rejected(rejection) | Self::Shed(rejection) | Self::PolicyFailed(rejection) => rejection.retry_after_ms,
            Self::NoWorker { .. } | Self::ModelsUnknown { .. } | Self::ShuttingDown => Some(1000),
            Self::QueueFull { retry_after_ms, .. } => Some(*retry_after_ms),
            _ => None,
        };
        if let Some(ms) = retry_after_ms {
            response.headers_mut().insert(RETRY_AFTER, retry_after::value(Duration::from_millis(ms.into())));
        }
        if response.status() == StatusCode::UNAUTHORIZED {
            let given = if matches!(self, Self::MissingKey) { "" } else { ", error=\"invalid_token\"" };
            let challenge = HeaderValue::try_from(format!("Bearer realm=\"dynamo-host\"{given}"));
            response.headers_mut().insert(WWW_AUTHENTICATE, challenge.expect("it is ASCII"));
        }
        response
    }

    /// OpenAI's `param`.
    fn param(&self) -> Option<&'static str> {
        match self {
            Self::MissingField { field, .. } | Self::InvalidField { field, .. } | Self::Stateful { field, .. } => Some(field),
            Self::ModelNotFound { .. } | Self::ModelNotAllowed { .. } => Some("model"),
            _ => None,
        }
    }

    fn text(&self, to: Audience) -> String {
        match (self, to) {
            (Self::Engine(error), Audience::Client) => plain(&unnamed(error).to_string()),
            (Self::MigrationUnsound { failure, reason }, Audience::Client) => {
                plain(&Self::MigrationUnsound { failure: unnamed(failure), reason }.to_string())
            }
            (Self::Engine(_) | Self::MigrationUnsound { .. } | Self::Rejected(_) | Self::Shed(_), _) => plain(&self.to_string()),
            _ => self.to_string(),
        }
    }
}

/// Why there is no place in the queue, and what an operator can raise.
fn full(refusal: Option<Refusal>) -> String {
    let key = match refusal {
        Some(Refusal::Tokens { .. }) => "queue.max_tokens",
        _ => "queue.max_requests",
    };
    let reason = refusal.map_or_else(
        || "the queue is full, and requests with a better claim have come".to_owned(),
        |refusal| format!("{refusal}, and there is no room for more"),
    );
    format!("{reason}; the operator can raise {key}")
}

/// What can be posted, for people.
fn posts() -> String {
    Endpoint::ALL.map(Endpoint::path).join(", ")
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
        assert_eq!(error.body(Dialect::OpenAi, Audience::Client)["error"]["message"], "cannot connect to the engine: no way");
        assert_eq!(
            error.body(Dialect::OpenAi, Audience::Operator)["error"]["message"],
            "cannot connect to http://10.0.0.7:1: no way"
        );
    }

    #[test]
    fn a_rejection_has_the_type_of_its_status_and_one_short_line() {
        for (status, kind) in
            [(400, "invalid_request_error"), (403, "invalid_request_error"), (429, "rate_limit_error"), (503, "server_error")]
        {
            let rejection = Rejection { status, retry_after_ms: Some(1), reason: "no\r\n".to_owned() + &"x".repeat(5000) };
            let error = RequestError::Rejected(rejection);
            let body = error.body(Dialect::OpenAi, Audience::Client);
            assert_eq!((error.status().as_u16(), &body["error"]["type"]), (status, &json!(kind)));
            let message = body["error"]["message"].as_str().unwrap();
            assert!(message.len() < 1100 && message.starts_with("no  x"), "{message}");
        }
    }

    #[test]
    fn each_dialect_has_its_shape_whole_and_in_a_stream() {
        let error = RequestError::ModelNotFound { model: "x".to_owned() };
        let body = error.body(Dialect::Anthropic, Audience::Client);
        assert_eq!((&body["type"], &body["error"]["type"]), (&json!("error"), &json!("not_found_error")));
        let event = |endpoint| String::from_utf8(error.event(endpoint, Audience::Client).to_vec()).unwrap();
        assert_eq!(event(Endpoint::Messages), format!("event: error\ndata: {body}\n\n"));
        assert!(event(Endpoint::ChatCompletions).starts_with("data: {\"error\":{\"code\":\"model_not_found\""));
        let flat: Value = serde_json::from_str(event(Endpoint::Responses).strip_prefix("event: error\ndata: ").unwrap()).unwrap();
        assert_eq!((&flat["type"], &flat["code"], &flat["param"]), (&json!("error"), &json!("model_not_found"), &json!("model")));
        assert!(flat["error"]["message"].is_string());
    }

    #[test]
    fn a_challenge_says_how_to_authenticate() {
        let response = RequestError::InvalidKey.response(Dialect::Anthropic, Audience::Client);
        assert_eq!(response.status(), 401);
        assert_eq!(response.headers()[WWW_AUTHENTICATE], "Bearer realm=\"dynamo-host\", error=\"invalid_token\"");
    }
}
