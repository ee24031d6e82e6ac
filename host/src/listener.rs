//! Listeners: connections are accepted and served HTTP/1.1, plain or with TLS, with a bound on their number and on every
//! wait.
//!
//! Contract: a client that is slow to say what it wants, or reads nothing of what is there for it, loses its
//! connection, and what that held is free again. When there are as many connections as may be, no more are accepted:
//! they wait in the system's backlog; one client's that are too many are told so and closed. The other waits of a request are the request's own.

mod seats;

use std::{
    io,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinError, JoinSet},
    time::Sleep,
};
use tokio_rustls::TlsAcceptor;

use self::seats::{Seat, Seats};
use crate::{
    config::Limits,
    cores::{Core, Cores},
    tls::ServerTls,
};

/// How long to wait when the system gives no more connections, such as when it is out of file descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_secs(1);

/// How long a client that is not served may take to hear so, and what is read of it meanwhile.
const MAX_TELLING: Duration = Duration::from_secs(2);
const MAX_UNREAD_BYTES: u64 = 1 << 20;

/// The first byte of every TLS connection: a handshake record's type.
const TLS_HANDSHAKE: u8 = 0x16;

/// What a client that spoke plain HTTP to TLS is told.
const SPEAK_TLS: &str = "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: application/json\r\n\r\n\
    {\"error\":{\"message\":\"this port speaks TLS; use https://\",\"type\":\"invalid_request_error\",\"param\":null,\"code\":\"tls_required\"}}";

/// What a client with too many connections is told.
const TOO_MANY: &str = "HTTP/1.1 429 Too Many Requests\r\nconnection: close\r\nretry-after: 1\r\ncontent-type: application/json\r\n\r\n\
    {\"error\":{\"message\":\"too many connections of one client; use fewer, or have the operator raise limits.max_connections_per_client\",\
    \"type\":\"rate_limit_error\",\"param\":null,\"code\":\"too_many_connections\"}}";

/// A server: what connections are accepted, and what is served on them.
pub(crate) struct Server {
    /// Its name, for the log and the metrics.
    pub(crate) what: &'static str,
    pub(crate) listener: TcpListener,
    pub(crate) router: Router,
    pub(crate) tls: Option<Arc<ServerTls>>,
    /// Where connections live.
    pub(crate) cores: Cores,
}

/// How one connection is served.
#[derive(Clone)]
struct Manner {
    http: http1::Builder,
    router: Router,
    tls: Option<Arc<ServerTls>>,
    /// How long a client may take to say what it wants, its TLS handshake included.
    header_timeout: Duration,
    write_stall: Duration,
    stop: watch::Receiver<bool>,
}

/// Serves until `stop`, then lets running requests end.
pub(crate) async fn serve(server: Server, limits: &Limits, stop: watch::Receiver<bool>) {
    let Server { what, listener, router, tls, cores } = server;
    let most = limits.max_connections as usize;
    let header_timeout = Duration::from_secs(limits.header_timeout_s);
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_headers(limits.max_headers as usize)
        .max_buf_size(limits.max_header_bytes as usize);
    let write_stall = Duration::from_secs(limits.write_stall_s);
    let manner = Manner { http, router, tls, header_timeout, write_stall, stop: stop.clone() };
    let seats = Seats::new(limits.max_connections_per_client);
    let gauge = metrics::gauge!("dynamo_host_connections", "listener" => what);
    let refused = metrics::counter!("dynamo_host_connections_refused_total", "listener" => what);
    let mut stopped = pin!(stopped(stop));
    let mut connections = JoinSet::new();
    let mut was_full = false;
    loop {
        tokio::select! {
            () = &mut stopped => break,
            accepted = listener.accept(), if connections.len() < most => match accepted {
                Ok((stream, address)) => {
                    match seats.take(address.ip()) {
                        Some(seat) => {
                            let core = cores.next();
                            let runtime = core.runtime().clone();
                            connections.spawn_on(converse(manner.clone(), stream, seat, core), &runtime);
                        }
                        None => {
                            refused.increment(1);
                            let tells = manner.tls.is_none();
                            connections.spawn(async move { if tells { tell(stream, TOO_MANY, header_timeout).await } });
                        }
                    }
                    if connections.len() == most && !was_full {
                        was_full = true;
                        tracing::warn!(listener = what, "all {most} connections are in use, more must wait; raise limits.max_connections");
                    }
                }
                // The client left again before it was let in.
                Err(error) if is_clients(&error) => {}
                Err(error) => {
                    tracing::error!(listener = what, "no connection can be accepted: {error}; trying again");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            },
            Some(ended) = connections.join_next() => look_at(&ended),
        }
        gauge.set(connections.len() as f64);
    }
    drop(listener);
    while let Some(ended) = connections.join_next().await {
        look_at(&ended);
        gauge.set(connections.len() as f64);
    }
}

/// Serves one connection to its end.
async fn converse(manner: Manner, stream: TcpStream, _seat: Seat, _core: Core) {
    // It was accepted on another runtime, whose events this one does not wait for.
    let Ok(stream) = stream.into_std().and_then(TcpStream::from_std) else { return };
    // A token must not wait for the next one to fill a segment. Best effort: a connection may be gone already.
    let _ = stream.set_nodelay(true);
    let Some(tls) = manner.tls.clone() else {
        let stream = Impatient::new(stream, manner.write_stall);
        return exchange(manner, stream).await;
    };
    let (patience, write_stall) = (manner.header_timeout, manner.write_stall);
    let handshake = async {
        let mut first = [0];
        if stream.peek(&mut first).await? == 1 && first[0] != TLS_HANDSHAKE {
            tell(stream, SPEAK_TLS, patience).await;
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no TLS"));
        }
        TlsAcceptor::from(tls.current()).accept(Impatient::new(stream, write_stall)).await
    };
    match tokio::time::timeout(patience, handshake).await {
        Ok(Ok(stream)) => exchange(manner, stream).await,
        Ok(Err(error)) => tracing::debug!("a TLS handshake failed: {error}"),
        Err(_) => tracing::debug!("a TLS handshake was not done within {} s", patience.as_secs()),
    }
}

/// Serves what is said on a connection.
async fn exchange<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(manner: Manner, stream: S) {
    let mut connection = pin!(manner.http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(manner.router)));
    let ended = tokio::select! {
        biased;
        ended = connection.as_mut() => ended,
        () = stopped(manner.stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        let cause = std::error::Error::source(&error).map_or_else(String::new, |source| format!(": {source}"));
        tracing::debug!("a connection broke: {error}{cause}");
    }
}

/// Answers a connection that is not served, and closes it. What the client has sent is read first, for a while: a
/// connection closed over unread bytes is reset, and the answer with it.
async fn tell(mut stream: TcpStream, answer: &'static str, patience: Duration) {
    let told = async {
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await?;
        let mut rest = tokio::io::AsyncReadExt::take(&mut stream, MAX_UNREAD_BYTES);
        tokio::io::copy(&mut rest, &mut tokio::io::sink()).await
    };
    drop(tokio::time::timeout(patience.min(MAX_TELLING), told).await);
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    // A sender that is gone will not say it any more.
    drop(stop.wait_for(|stop| *stop).await);
}

fn is_clients(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

fn look_at(ended: &Result<(), JoinError>) {
    if ended.as_ref().is_err_and(JoinError::is_panic) {
        metrics::counter!("dynamo_host_task_panics_total", "task" => "connection").increment(1);
        tracing::error!(task = "connection", "a connection's task panicked; the others go on");
    }
}

/// A connection whose writes fail when its client takes nothing for a while: a body that nobody reads is not even
/// polled any more, and would hold its engine for ever. Costs a timer per wait, not per write.
struct Impatient<S> {
    inner: S,
    patience: Duration,
    /// Runs while a write waits.
    alarm: Option<Pin<Box<Sleep>>>,
}

impl<S> Impatient<S> {
    fn new(inner: S, patience: Duration) -> Self {
        Self { inner, patience, alarm: None }
    }

    fn bound<T>(&mut self, context: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.alarm = None;
            return written;
        }
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep(self.patience)));
        ready!(alarm.as_mut().poll(context));
        let text = format!("the client read nothing for {} s", self.patience.as_secs());
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, text)))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Impatient<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Impatient<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(context, bytes);
        self.bound(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(context, slices);
        self.bound(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn a_write_that_nobody_reads_fails_and_one_that_is_read_does_not() {
        let (writer, mut reader) = tokio::io::duplex(4);
        let mut writer = Impatient::new(writer, Duration::from_millis(1));
        let error = writer.write_all(b"too much").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);

        reader.read_exact(&mut [0; 4]).await.unwrap();
        writer.write_all(b"fits").await.unwrap();
    }
}
