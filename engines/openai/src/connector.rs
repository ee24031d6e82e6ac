//! How the pool of connections makes one: TCP, and for `https://` the handshake on top.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{Uri, uri::Scheme};
use hyper_util::{
    client::legacy::connect::{Connected, Connection, HttpConnector},
    rt::TokioIo,
};
use rustls::ClientConfig;
use tokio::time::timeout;
use tower_service::Service;

use crate::tls::{self, Stream};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Makes connections to one engine.
#[derive(Clone, Debug)]
pub(crate) struct Connector {
    tcp: HttpConnector,
    tls: Option<Arc<ClientConfig>>,
    handshake_timeout: Duration,
}

impl Connector {
    pub(crate) fn new(mut tcp: HttpConnector, tls: Option<Arc<ClientConfig>>, handshake_timeout: Duration) -> Self {
        tcp.enforce_http(false);
        Self { tcp, tls, handshake_timeout }
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Stream>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.tcp.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let tls = self.tls.clone().filter(|_| uri.scheme() == Some(&Scheme::HTTPS));
        let name = tls::server_name(uri.host().unwrap_or_default());
        let (connecting, handshake_timeout) = (self.tcp.call(uri), self.handshake_timeout);
        Box::pin(async move {
            let tcp = connecting.await?.into_inner();
            let Some(config) = tls else { return Ok(TokioIo::new(Stream::Plain(tcp))) };
            let late = |_| Err(io::Error::from(io::ErrorKind::TimedOut));
            let stream = timeout(handshake_timeout, tls::connect(config, name?, tcp)).await.unwrap_or_else(late)?;
            Ok(TokioIo::new(stream))
        })
    }
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}
