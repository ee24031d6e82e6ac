//! What is asked of an engine apart from requests: signs of life, models, load, cancellation.
//!
//! Contract: each question is bounded in time and its answer in size. It has connections of its own, so that neither
//! long streams nor a bound meant for whole answers get in its way.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use dynamo_engine_api::{EngineError, WholeReply, sse::error_message};
use http::{
    HeaderValue, Method, Request, StatusCode,
    header::{AUTHORIZATION, CONTENT_TYPE},
};
use rustls::ClientConfig;
use serde::de::DeserializeOwned;

use crate::{
    client::Client,
    options::{Bearer, OpenAiOptions},
    url::EngineUrl,
};

/// Largest answer. vLLM's metrics are some 100 kB; llama.cpp lists every slot with its sampling settings.
const MAX_BYTES: usize = 8 << 20;
const MAX_IDLE_CONNECTIONS: usize = 2;

/// A way to ask one engine.
#[derive(Debug)]
pub(crate) struct Control {
    engine: Arc<str>,
    url: EngineUrl,
    client: Client,
    authorization: Option<HeaderValue>,
    /// How long a question waits, unless it is known to take longer.
    pub(crate) timeout: Duration,
}

impl Control {
    pub(crate) fn new(engine: Arc<str>, url: EngineUrl, options: &OpenAiOptions, tls: Option<Arc<ClientConfig>>) -> Self {
        let bounds = OpenAiOptions {
            max_whole_body_bytes: MAX_BYTES,
            max_idle_connections: MAX_IDLE_CONNECTIONS.min(options.max_idle_connections),
            ..options.clone()
        };
        let client = Client::new(engine.clone(), &url.at("/"), &bounds, tls);
        let authorization = options.bearer.as_ref().map(Bearer::authorization);
        Self { engine, url, client, authorization, timeout: options.probe_timeout }
    }

    /// The engine's host.
    pub(crate) fn host(&self) -> &str {
        self.url.host()
    }

    /// Asks, and takes any answer.
    pub(crate) async fn get(&self, path: &'static str) -> Result<WholeReply, EngineError> {
        self.get_within(self.timeout, path).await
    }

    /// The same for what takes its time.
    pub(crate) async fn get_within(&self, after: Duration, path: &'static str) -> Result<WholeReply, EngineError> {
        self.send(after, Method::GET, path, Bytes::new()).await
    }

    /// Tells something.
    pub(crate) async fn post(&self, path: &'static str, body: impl Into<Bytes>) -> Result<WholeReply, EngineError> {
        self.send(self.timeout, Method::POST, path, body.into()).await
    }

    /// Asks what it may refuse, and what it may not offer: then there is no answer.
    pub(crate) async fn asked(&self, path: &'static str, body: impl Into<Bytes>) -> Result<Option<Bytes>, EngineError> {
        let reply = self.post(path, body).await?;
        if reply.status.is_client_error() { Ok(None) } else { self.offered(path, reply) }
    }

    async fn send(&self, after: Duration, method: Method, path: &'static str, body: Bytes) -> Result<WholeReply, EngineError> {
        let mut request = Request::new(body);
        if method == Method::POST {
            request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        *request.method_mut() = method;
        *request.uri_mut() = self.url.at(path);
        request.headers_mut().extend(self.authorization.clone().map(|value| (AUTHORIZATION, value)));
        let reply = async { self.client.whole(self.client.send(&request).await?).await };
        self.client.within(after, reply).await
    }

    /// Asks for load. Nothing if the engine does not offer it there: 404, or 501 as llama.cpp says it.
    pub(crate) async fn report(&self, path: &'static str) -> Result<Option<Bytes>, EngineError> {
        let reply = self.get(path).await?;
        self.offered(path, reply)
    }

    /// An answer's body; nothing if it says that there is no such thing.
    pub(crate) fn offered(&self, path: &str, reply: WholeReply) -> Result<Option<Bytes>, EngineError> {
        match reply.status {
            StatusCode::NOT_FOUND | StatusCode::NOT_IMPLEMENTED => Ok(None),
            status if status.is_success() => Ok(Some(reply.body)),
            _ => Err(self.unhealthy(path, &reply)),
        }
    }

    /// Reads an answer's JSON.
    pub(crate) fn json<T: DeserializeOwned>(&self, path: &str, body: &[u8]) -> Result<T, EngineError> {
        serde_json::from_slice(body).map_err(|error| self.protocol(path, error))
    }

    /// The answer is not what it should be.
    pub(crate) fn protocol(&self, path: &str, error: impl std::fmt::Display) -> EngineError {
        EngineError::Protocol { engine: self.engine.to_string(), reason: format!("GET {path} cannot be read: {error}") }
    }

    /// The answer is a refusal.
    pub(crate) fn unhealthy(&self, path: &str, reply: &WholeReply) -> EngineError {
        let mut reason = format!("GET {path} answered {}", reply.status);
        let said = said(&reply.body);
        if !said.is_empty() {
            reason = format!("{reason}: {said}");
        }
        if reply.status == StatusCode::UNAUTHORIZED {
            let mend = if self.authorization.is_some() { "is its bearer token right?" } else { "set its bearer token" };
            reason = format!("{reason} ({mend})");
        }
        EngineError::Unhealthy { engine: self.engine.to_string(), reason }
    }
}

/// A refusal's words, short enough for a log line: the message of an OpenAI error object, or the text's beginning.
fn said(body: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Refusal<'a> {
        #[serde(borrow)]
        error: &'a serde_json::value::RawValue,
    }
    const MAX_CHARS: usize = 200;
    let words = match serde_json::from_slice::<Refusal<'_>>(body) {
        Ok(refusal) => error_message(refusal.error.get()),
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    // vLLM says `{"error":"Unauthorized"}`.
    words.trim().trim_matches('"').chars().take(MAX_CHARS).collect()
}
