//! HTTP/1.1 to one engine: requests, whole answers, and what goes wrong with them.
//!
//! Invariant: a request is sent again only while no byte of an answer has come, and only because its connection was
//! closed under it: engines close kept connections whenever they like (llama.cpp after every streamed answer, without
//! saying so), and then the request was most likely never read. What breaks later is [`EngineError::Broken`].

use std::{error::Error, io, sync::Arc, time::Duration};

use bytes::Bytes;
use dynamo_engine_api::{EngineError, WholeReply};
use http::{
    HeaderMap, Request, Response,
    header::{CONTENT_TYPE, RETRY_AFTER},
};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use rustls::ClientConfig;
use tokio::time::timeout;

use crate::{connector::Connector, options::OpenAiOptions};

/// How often a request is sent again whose connection was closed under it. Once: it may be what the engine dies of.
const RESENDS: usize = 1;

/// Connections to one engine.
#[derive(Debug)]
pub(crate) struct Client {
    engine: Arc<str>,
    pool: legacy::Client<Connector, Full<Bytes>>,
    connect_timeout: Duration,
    max_whole_body_bytes: usize,
}

impl Client {
    pub(crate) fn new(engine: Arc<str>, options: &OpenAiOptions, tls: Option<Arc<ClientConfig>>) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(options.connect_timeout));
        connector.set_keepalive(Some(options.tcp_keepalive));
        let pool = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(options.idle_timeout)
            .pool_max_idle_per_host(options.max_idle_connections)
            .build(Connector::new(connector, tls, options.connect_timeout));
        Self { engine, pool, connect_timeout: options.connect_timeout, max_whole_body_bytes: options.max_whole_body_bytes }
    }

    /// Sends a request and waits for the head of its answer. Dropping the future closes the connection.
    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, EngineError> {
        let mut resends = 0;
        loop {
            match self.pool.request(request.clone()).await {
                Err(error) if was_closed(&error) && resends < RESENDS => resends += 1,
                answer => return answer.map_err(|error| self.send_error(&error)),
            }
        }
    }

    /// Waits for the rest of an answer.
    pub(crate) async fn whole(&self, response: Response<Incoming>) -> Result<WholeReply, EngineError> {
        let (head, body) = response.into_parts();
        let body = Limited::new(body, self.max_whole_body_bytes).collect().await.map_err(|error| self.body_error(&*error))?;
        let mut headers = HeaderMap::new();
        for name in [CONTENT_TYPE, RETRY_AFTER] {
            headers.extend(head.headers.get(&name).cloned().map(|value| (name, value)));
        }
        Ok(WholeReply { status: head.status, headers, body: body.to_bytes() })
    }

    /// Bounds a conversation with the engine.
    pub(crate) async fn within<T>(
        &self,
        after: Duration,
        conversation: impl Future<Output = Result<T, EngineError>>,
    ) -> Result<T, EngineError> {
        let late = |_| Err(EngineError::Timeout { engine: self.engine.to_string(), after });
        timeout(after, conversation).await.unwrap_or_else(late)
    }

    fn send_error(&self, error: &legacy::Error) -> EngineError {
        let engine = self.engine.to_string();
        let unsent =
            error.source().and_then(|source| source.downcast_ref::<hyper::Error>()).is_some_and(hyper::Error::is_canceled);
        if error.is_connect() && is_elapsed(error) {
            EngineError::Connect { engine, reason: format!("no connection within {} ms", self.connect_timeout.as_millis()) }
        } else if error.is_connect() || unsent {
            EngineError::Connect { engine, reason: root_cause(error) }
        } else {
            EngineError::Broken { engine, reason: root_cause(error) }
        }
    }

    fn body_error(&self, error: &(dyn Error + Send + Sync + 'static)) -> EngineError {
        let engine = self.engine.to_string();
        if error.is::<LengthLimitError>() {
            let reason = format!("a whole answer of over {} bytes", self.max_whole_body_bytes);
            EngineError::Protocol { engine, reason }
        } else {
            EngineError::Broken { engine, reason: root_cause(error) }
        }
    }
}

/// Whether a connection ended before any byte of an answer.
fn was_closed(error: &legacy::Error) -> bool {
    let closed = [io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionAborted];
    !error.is_connect()
        && chain(error).any(|error| {
            error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_incomplete_message)
                || error.downcast_ref::<io::Error>().is_some_and(|error| closed.contains(&error.kind()))
        })
}

/// What the system said, without what wraps it ("client error (Connect): tcp connect error: …").
pub(crate) fn root_cause(error: &(dyn Error + 'static)) -> String {
    chain(error).last().unwrap_or(error).to_string()
}

/// Whether our own time ran out, as opposed to the system's (ETIMEDOUT).
fn is_elapsed(error: &(dyn Error + 'static)) -> bool {
    chain(error)
        .filter_map(|error| error.downcast_ref::<io::Error>())
        .any(|error| error.kind() == io::ErrorKind::TimedOut && error.raw_os_error().is_none())
}

fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}
