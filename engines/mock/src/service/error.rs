//! Errors as vLLM words them.

use dynamo_engine_api::Endpoint;
use http::StatusCode;
use serde_json::json;

/// What a request is that is not well-formed.
const INVALID: &str = "Bad Request";

/// A request that is answered with an error body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    kind: &'static str,
    param: Option<String>,
    message: String,
}

impl ApiError {
    /// The request is well-formed, but asks for something impossible.
    pub(crate) fn bad_request(param: Option<&str>, message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            kind: "BadRequestError",
            param: param.map(str::to_owned),
            message: message.into(),
        }
    }

    /// As [`bad_request`](Self::bad_request), with the value at fault at the message's end.
    pub(crate) fn bad_value(param: &str, value: impl std::fmt::Display, message: &str) -> Self {
        Self::bad_request(Some(param), format!("{message} (parameter={param}, value={value})"))
    }

    /// The request is not well-formed: `errors` in Pydantic's words, `param` the place of the first.
    pub(crate) fn invalid(param: String, errors: &[String]) -> Self {
        let plural = if errors.len() == 1 { "" } else { "s" };
        let message = format!("{} validation error{plural}:\n  {}", errors.len(), errors.join("\n  "));
        Self { status: StatusCode::BAD_REQUEST, kind: INVALID, param: Some(param), message }
    }

    /// There is no such model.
    pub(crate) fn unknown_model(asked: &str, served: &str) -> Self {
        let message = format!("The model `{asked}` does not exist. Valid aliases: {served}.");
        Self { status: StatusCode::NOT_FOUND, kind: "NotFoundError", param: Some("model".to_owned()), message }
    }

    /// The body is over the limit.
    pub(crate) fn too_large(limit_bytes: usize) -> Self {
        let message = format!("The request body is over {limit_bytes} bytes, or broke off.");
        Self { status: StatusCode::PAYLOAD_TOO_LARGE, kind: "Payload Too Large", param: None, message }
    }

    /// Something broke.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        let (status, kind) = (StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError");
        Self { status, kind, param: None, message: message.into() }
    }

    /// It is not there any more.
    pub(crate) fn gone(message: &str) -> Self {
        Self { status: StatusCode::NOT_FOUND, kind: "NotFoundError", param: None, message: message.to_owned() }
    }

    /// It is something else than what was asked for.
    pub(crate) fn conflict(message: &str) -> Self {
        Self { status: StatusCode::CONFLICT, kind: "Conflict", param: None, message: message.to_owned() }
    }

    /// The engine cannot do it now.
    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self { status: StatusCode::SERVICE_UNAVAILABLE, kind: "Service Unavailable", param: None, message: message.into() }
    }

    /// The JSON body at an endpoint: Anthropic's have their own shape, unless the request is not even well-formed.
    pub(crate) fn body_at(&self, endpoint: Endpoint) -> Vec<u8> {
        let is_anthropic = matches!(endpoint, Endpoint::Messages | Endpoint::CountTokens);
        if !is_anthropic || self.kind == INVALID {
            return self.body();
        }
        let [message, kind] = [json!(self.message), json!(self.kind)];
        format!(r#"{{"type":"error","error":{{"type":{kind},"message":{message}}}}}"#).into_bytes()
    }

    /// The JSON body.
    pub(crate) fn body(&self) -> Vec<u8> {
        let Self { status, kind, param, message } = self;
        let [message, kind, param] = [json!(message), json!(kind), json!(param)];
        format!(r#"{{"error":{{"message":{message},"type":{kind},"param":{param},"code":{}}}}}"#, status.as_u16()).into_bytes()
    }
}
