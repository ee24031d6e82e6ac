//! HTTP/1.1 to one engine: requests, whole answers, and what goes wrong with them.
//!
//! Invariant: a request is sent again only while no byte of an answer has come, and only because the kept connection that
//! it went out on was closed under it: engines close kept connections whenever they like (llama.cpp after every streamed
//! answer, without saying so), and then the request was most likely never read. What breaks later, or on a connection
//! that was made for it, is [`EngineError::Broken`]: it may be what the engine dies of. [`EngineError::Connect`] means that
//! nothing was sent: a ticket of a hand-off is good after it. So where one that was sent cannot be sent again, it is broken.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use dynamo_engine_api::{EngineError, WholeReply};
use futures_util::StreamExt as _;
use http::{
    HeaderMap, Request, Response, Uri,
    header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER},
};
use rustls::ClientConfig;
use tokio::time::timeout;

use crate::{
    http1::Failure,
    options::OpenAiOptions,
    pool::{Body, Opened, Pool},
};

/// How soon a connection must have been closed for its request to count as unread. Later, the engine may have worked on it:
/// a whole answer says nothing before its end.
const RESEND_WITHIN: Duration = Duration::from_secs(1);

/// Connections to one engine.
#[derive(Debug)]
pub(crate) struct Client {
    engine: Arc<str>,
    pool: Arc<Pool>,
    connect_timeout: Duration,
    max_whole_body_bytes: usize,
}

impl Client {
    /// For the engine at the host and port of `base`, encrypted if there is a TLS configuration.
    pub(crate) fn new(engine: Arc<str>, base: &Uri, options: &OpenAiOptions, tls: Option<Arc<ClientConfig>>) -> Self {
        let pool = Pool::new(base, options, tls);
        Self {
            engine,
            pool: Arc::new(pool),
            connect_timeout: options.connect_timeout,
            max_whole_body_bytes: options.max_whole_body_bytes,
        }
    }

    /// Sends a request and waits for the head of its answer. Dropping the future closes the connection.
    pub(crate) async fn send(&self, request: &Request<Bytes>) -> Result<Response<Body>, EngineError> {
        let mut unanswered = None;
        if let Some(kept) = self.pool.kept() {
            let begun = Instant::now();
            match self.ask(kept, request).await {
                Err(Failure::Unanswered(error)) if is_closed(&error) && begun.elapsed() < RESEND_WITHIN => {
                    unanswered = Some(error);
                }
                answer => return answer.map_err(|failure| self.failed(&failure)),
            }
        }
        let opened = timeout(self.connect_timeout, self.pool.open()).await.unwrap_or_else(|_| {
            let text = format!("no connection within {} ms", self.connect_timeout.as_millis());
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        });
        let refused = |error: io::Error| match &unanswered {
            None => EngineError::Connect { engine: self.engine.to_string(), reason: error.to_string() },
            Some(closed) => {
                let reason = format!("{closed}, and it cannot be connected to again: {error}");
                EngineError::Broken { engine: self.engine.to_string(), reason }
            }
        };
        self.ask(opened.map_err(refused)?, request).await.map_err(|failure| self.failed(&failure))
    }

    async fn ask(&self, mut connection: Opened, request: &Request<Bytes>) -> Result<Response<Body>, Failure> {
        let head = connection.ask(request).await?;
        Ok(head.map(|()| Body::new(connection, Arc::clone(&self.pool))))
    }

    /// Closes connections that have waited too long for another request.
    pub(crate) fn tidy(&self) {
        self.pool.tidy();
    }

    /// Waits for the rest of an answer.
    pub(crate) async fn whole(&self, response: Response<Body>) -> Result<WholeReply, EngineError> {
        let (head, mut body) = response.into_parts();
        let length = head.headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok()).unwrap_or(0);
        let mut collected = BytesMut::with_capacity(self.max_whole_body_bytes.min(length));
        while let Some(piece) = body.next().await {
            collected.extend_from_slice(&piece.map_err(|failure| self.failed(&failure))?);
            if collected.len() > self.max_whole_body_bytes {
                let reason = format!("a whole answer of over {} bytes", self.max_whole_body_bytes);
                return Err(EngineError::Protocol { engine: self.engine.to_string(), reason });
            }
        }
        let mut headers = HeaderMap::new();
        for name in [CONTENT_TYPE, RETRY_AFTER] {
            headers.extend(head.headers.get(&name).cloned().map(|value| (name, value)));
        }
        Ok(WholeReply { status: head.status, headers, body: collected.freeze() })
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

    fn failed(&self, failure: &Failure) -> EngineError {
        EngineError::Broken { engine: self.engine.to_string(), reason: failure.to_string() }
    }
}

/// Whether a connection was closed, as opposed to never having worked.
fn is_closed(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | ConnectionReset | BrokenPipe | ConnectionAborted)
}
