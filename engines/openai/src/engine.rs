//! The engine itself: which request goes where, and what its answer is.

use std::sync::Arc;

use bytes::Bytes;
use dynamo_engine_api::{Engine, EngineError, GenerateRequest, ModelCard, Reply, WholeReply, sse::error_message};
use futures_core::future::BoxFuture;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri,
    header::{ACCEPT, CONTENT_TYPE},
};

use crate::{
    client::Client,
    models,
    options::OpenAiOptions,
    stream,
    url::{EngineUrl, UrlError},
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const JSON: HeaderValue = HeaderValue::from_static("application/json");
const EVENT_STREAM: HeaderValue = HeaderValue::from_static("text/event-stream");

/// A server that speaks OpenAI's API over HTTP/1.1.
///
/// What an answer is, the answer decides: 2xx with `text/event-stream` is a stream, anything else is whole. So a
/// request for a stream gets a whole reply from a server that refuses it, or that knows no streams.
///
/// Needs a tokio runtime; connections live on the one that made them.
#[derive(Debug)]
pub struct OpenAiEngine {
    name: Arc<str>,
    url: EngineUrl,
    client: Client,
    options: OpenAiOptions,
}

impl OpenAiEngine {
    /// An engine at `http://HOST[:PORT]`, with or without `/v1`. Nothing is sent yet.
    ///
    /// # Errors
    /// If `url` is anything else.
    pub fn new(url: &str, options: OpenAiOptions) -> Result<Self, UrlError> {
        let url = EngineUrl::parse(url)?;
        let name: Arc<str> = url.name.as_str().into();
        Ok(Self { client: Client::new(name.clone(), &url.health, &options), name, url, options })
    }

    async fn get(&self, uri: &Uri) -> Result<WholeReply, EngineError> {
        let request = request(Method::GET, uri, Bytes::new());
        let reply = async { self.client.whole(self.client.send(&request).await?).await };
        self.client.within(self.options.probe_timeout, reply).await
    }

    fn unhealthy(&self, asked: &Uri, reply: &WholeReply) -> EngineError {
        let mut reason = format!("GET {} answered {}", asked.path(), reply.status);
        let said = said(&reply.body);
        if !said.is_empty() {
            reason = format!("{reason}: {said}");
        }
        EngineError::Unhealthy { engine: self.name.to_string(), reason }
    }
}

impl Engine for OpenAiEngine {
    fn kind(&self) -> &'static str {
        "openai"
    }

    fn models(&self) -> BoxFuture<'_, Result<Vec<ModelCard>, EngineError>> {
        Box::pin(async {
            let reply = self.get(&self.url.models).await?;
            if !reply.status.is_success() {
                return Err(self.unhealthy(&self.url.models, &reply));
            }
            models::parse(&reply.body).map_err(|error| {
                let reason = format!("GET {} is not a list of models: {error}", self.url.models.path());
                EngineError::Protocol { engine: self.name.to_string(), reason }
            })
        })
    }

    fn probe(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(async {
            let mut asked = &self.url.health;
            let mut reply = self.get(asked).await?;
            // Not every server has /health; the list of models is part of OpenAI's API.
            if reply.status == StatusCode::NOT_FOUND {
                asked = &self.url.models;
                reply = self.get(asked).await?;
            }
            if reply.status.is_success() { Ok(()) } else { Err(self.unhealthy(asked, &reply)) }
        })
    }

    fn generate(&self, asked: GenerateRequest) -> BoxFuture<'_, Result<Reply, EngineError>> {
        Box::pin(async move {
            let mut request = request(Method::POST, self.url.of(asked.endpoint), asked.body);
            *request.headers_mut() = asked.headers;
            let headers = request.headers_mut();
            headers.insert(CONTENT_TYPE, JSON);
            headers.insert(ACCEPT, if asked.stream { EVENT_STREAM } else { JSON });
            // An id that no header can carry stays here: it is for the engine's log only.
            headers.extend(HeaderValue::from_str(&asked.request_id).ok().map(|id| (REQUEST_ID, id)));
            let reply = async {
                let response = self.client.send(&request).await?;
                if response.status().is_success() && is_event_stream(response.headers()) {
                    return Ok(Reply::Stream(stream::chunks(self.name.clone(), asked.endpoint, response.into_body())));
                }
                self.client.whole(response).await.map(Reply::Whole)
            };
            self.client.within(self.options.head_timeout, reply).await
        })
    }
}

fn request(method: Method, uri: &Uri, body: Bytes) -> Request<Bytes> {
    let mut request = Request::new(body);
    *request.method_mut() = method;
    *request.uri_mut() = uri.clone();
    request
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("text/event-stream"))
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
    words.trim().chars().take(MAX_CHARS).collect()
}
