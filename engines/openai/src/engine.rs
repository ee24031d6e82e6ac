//! The engine itself: which request goes where, and what its answer is.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use dynamo_engine_api::{
    Continues, Endpoint, Engine, EngineError, GenerateRequest, KvUpdates, Leg, ModelCard, Prefilled, Protocol, RankLoad, Reply,
    Ticket, WholeReply,
};
use futures_core::future::BoxFuture;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE},
};

use crate::{
    abort::Aborts,
    client::Client,
    control::Control,
    dialect::{Dialects, Wish, recognise},
    handoff::Handoff,
    kind::Kind,
    kv, models,
    options::{Bearer, OpenAiOptions},
    stream,
    tls::{self, TlsError},
    url::{EngineUrl, UrlError},
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const JSON: HeaderValue = HeaderValue::from_static("application/json");
const EVENT_STREAM: HeaderValue = HeaderValue::from_static("text/event-stream");
const MODELS: &str = "/v1/models";
/// Longest time that giving up KV may take; after it, hanging up is all that is done.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);
/// What the mock engine calls itself.
const MOCK: &str = "dynamo-mock";

/// Why an engine cannot be set up as an operator wrote it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// Its URL.
    #[error(transparent)]
    Url(#[from] UrlError),
    /// Whom to trust.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Its bearer token, which the message does not repeat.
    #[error("the bearer token of {chars} characters cannot be sent; it should be of visible ASCII characters, without spaces")]
    Bearer {
        /// How long it is.
        chars: usize,
    },
}

/// A server that speaks OpenAI's API over HTTP/1.1, with or without TLS.
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
    control: Arc<Control>,
    dialects: Arc<Dialects>,
    aborts: Aborts,
    handoff: Handoff,
    authorization: Option<HeaderValue>,
    options: OpenAiOptions,
}

impl OpenAiEngine {
    /// An engine at `http://HOST[:PORT]` or `https://HOST[:PORT]`, with or without `/v1`. Nothing is sent yet; the file of
    /// certificate authorities is read.
    ///
    /// # Errors
    /// If `url` is anything else, or nobody could be trusted.
    pub fn new(url: &str, options: OpenAiOptions) -> Result<Self, SetupError> {
        let url = EngineUrl::parse(url)?;
        let tls = match (&options.ca_file, url.is_https()) {
            (ca_file, true) => Some(tls::config(ca_file.clone())?),
            (Some(path), false) => return Err(TlsError::NotEncrypted { path: path.clone(), url: url.name }.into()),
            (None, false) => None,
        };
        let name: Arc<str> = url.name.as_str().into();
        let control = Arc::new(Control::new(name.clone(), url.clone(), &options, tls.clone()));
        Ok(Self {
            client: Client::new(name.clone(), &url.at("/"), &options, tls),
            dialects: Arc::new(Dialects::new(options.kind)),
            aborts: Aborts::new(control.clone()),
            handoff: Handoff::new(name.clone(), &url, &options)?,
            authorization: options.bearer.as_ref().map(Bearer::authorization),
            control,
            name,
            url,
            options,
        })
    }

    /// Looks which server it is. One that fails to list its models is not known yet, but is no less alive for that.
    async fn recognise(&self) -> Result<(), EngineError> {
        let reply = self.control.get(MODELS).await?;
        if !reply.status.is_server_error() {
            let owner = models::owner(&reply.body);
            self.dialects.found_mock(owner.as_deref() == Some(MOCK));
            self.dialects.found(owner.map_or(Kind::Openai, |owner| recognise(&owner)));
        }
        Ok(())
    }

    async fn look(&self) -> Result<(), EngineError> {
        // Probes come all the time, requests do not: what is left of a busy hour must not stay open.
        self.client.tidy();
        if self.dialects.is_unsure() {
            self.recognise().await?;
        }
        self.dialects.spoken().probe(&self.control).await?;
        if self.dialects.is_unsure() {
            // Alive, and no list of models: `transformers serve` without a network.
            self.dialects.found(Kind::Openai);
        }
        Ok(())
    }

    async fn ask(&self, asked: GenerateRequest) -> Result<Reply, EngineError> {
        let make_id = || self.aborts.request_id();
        let mut additions = self.dialects.spoken().additions(&Wish::of(&asked, self.options.forward_priority, &make_id));
        let may_stream = self.handoff.leg(self.handoff(), &asked.leg, asked.endpoint, &mut additions.fields)?;
        let stream = asked.stream && may_stream;
        let has_ids = matches!(asked.endpoint, Endpoint::ChatCompletions | Endpoint::Completions);
        if asked.wants_token_ids && stream && has_ids && self.dialects.continues().gives_ids {
            additions.fields.flag("return_token_ids", true);
        }
        let mut request = Request::new(additions.fields.into_body(asked.body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.url.of(asked.endpoint).clone();
        *request.headers_mut() = asked.headers;
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, JSON);
        headers.insert(ACCEPT, if stream { EVENT_STREAM } else { JSON });
        // An id that no header can carry stays here: it is for the engine's log only.
        headers.extend(HeaderValue::from_str(&asked.request_id).ok().map(|id| (REQUEST_ID, id)));
        headers.extend(self.authorization.clone().map(|value| (AUTHORIZATION, value)));
        headers.extend(additions.header);

        let mut guard = additions.abort.map(|abort| self.aborts.unless_ended(abort));
        let reply = async {
            let response = self.client.send(&request).await?;
            if response.status().is_success() && is_event_stream(response.headers()) {
                if !may_stream {
                    return Err(self.handoff.refused("it answered with a stream to a prefill, which asks for none"));
                }
                return Ok(Reply::Stream(stream::chunks(self.name.clone(), asked.endpoint, response.into_body())));
            }
            if response.status().is_success() && !is_json(response.headers()) {
                return Err(self.no_engine(response.headers()));
            }
            self.client.whole(response).await.map(Reply::Whole)
        };
        let reply = self.client.within(self.options.head_timeout, reply).await;
        match (reply, guard.take()) {
            (Ok(Reply::Stream(chunks)), Some(guard)) => Ok(Reply::Stream(guard.over(chunks))),
            (reply, Some(mut guard)) => {
                if matches!(reply, Ok(Reply::Whole(_)) | Err(EngineError::Connect { .. })) {
                    guard.ended();
                }
                reply
            }
            (reply, None) => reply,
        }
    }

    /// Decodes one token of what is given up, which frees it on both sides: whoever only asked and left would be forgotten
    /// before the other engine is told.
    async fn give_up(&self, mut request: GenerateRequest) {
        let (Leg::Decode(_), Some(fields)) = (&request.leg, Handoff::release(self.handoff(), request.endpoint)) else { return };
        request.body = fields.into_body(request.body);
        request.stream = false;
        // What it answers makes no difference: the lease does what is left to do.
        drop(self.client.within(RELEASE_TIMEOUT, self.ask(request)).await);
    }

    /// Something else is there, such as a proxy that has lost its engine.
    fn no_engine(&self, headers: &HeaderMap) -> EngineError {
        let kind = headers.get(CONTENT_TYPE).map(|kind| String::from_utf8_lossy(kind.as_bytes())).unwrap_or_default();
        EngineError::Unhealthy { engine: self.name.to_string(), reason: format!("it answered with {kind:?} instead of JSON") }
    }

    /// Keeps what an error tells of the server.
    fn heard<T>(&self, result: Result<T, EngineError>) -> Result<T, EngineError> {
        result.inspect_err(|error| self.dialects.failed(error))
    }
}

impl Engine for OpenAiEngine {
    /// The kind that was told or found; `openai` until then.
    fn kind(&self) -> &'static str {
        self.dialects.kind().name()
    }

    fn models(&self) -> BoxFuture<'_, Result<Vec<ModelCard>, EngineError>> {
        Box::pin(async {
            let reply = self.heard(self.control.get(MODELS).await)?;
            if !reply.status.is_success() {
                return Err(self.control.unhealthy(MODELS, &reply));
            }
            models::parse(&reply.body).map_err(|error| {
                let reason = format!("GET {MODELS} is not a list of models: {error}");
                EngineError::Protocol { engine: self.name.to_string(), reason }
            })
        })
    }

    fn probe(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(async { self.heard(self.look().await) })
    }

    fn load(&self) -> BoxFuture<'_, Result<Vec<RankLoad>, EngineError>> {
        self.dialects.spoken().load(&self.control)
    }

    fn kv_events(&self) -> Option<KvUpdates> {
        kv::events(&self.control, &self.dialects, &self.options)
    }

    fn continues(&self) -> Continues {
        self.dialects.continues()
    }

    /// As it was told, or as servers of its kind do once that is known.
    fn handoff(&self) -> Option<Protocol> {
        self.handoff.protocol(self.dialects.kind(), self.dialects.is_mock())
    }

    fn no_part(&self) -> BoxFuture<'_, Option<String>> {
        self.dialects.spoken().no_part(&self.control)
    }

    fn ticket(&self, rank: Option<u32>) -> BoxFuture<'_, Result<Ticket, EngineError>> {
        Box::pin(self.handoff.ticket(self.handoff(), rank))
    }

    fn prefilled(&self, reply: &WholeReply) -> Result<Prefilled, EngineError> {
        self.handoff.prefilled(self.handoff(), reply)
    }

    fn release(&self, request: GenerateRequest) -> BoxFuture<'_, ()> {
        Box::pin(self.give_up(request))
    }

    fn tokenize(&self, endpoint: Endpoint, body: Bytes) -> BoxFuture<'_, Result<Option<Vec<u32>>, EngineError>> {
        self.dialects.spoken().tokenize(&self.control, endpoint, body)
    }

    fn generate(&self, asked: GenerateRequest) -> BoxFuture<'_, Result<Reply, EngineError>> {
        Box::pin(async move {
            self.ask(asked).await.inspect_err(|error| {
                // A slow or broken answer may be the request's; a closed port is the server's.
                if matches!(error, EngineError::Connect { .. }) {
                    self.dialects.failed(error);
                }
            })
        })
    }
}

/// Whoever says nothing of the kind may be as good as JSON.
fn is_json(headers: &HeaderMap) -> bool {
    headers.get(CONTENT_TYPE).is_none_or(|kind| kind.to_str().is_ok_and(|kind| kind.to_ascii_lowercase().contains("json")))
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("text/event-stream"))
}
