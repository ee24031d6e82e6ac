//! Listeners: connections are accepted and served HTTP/1.1, plain or with TLS, with a bound on their number and on every
//! wait.
//!
//! Contract: a client that is slow to say what it wants, or reads next to nothing of what is there for it, loses its
//! connection, and what that held is free again; so does one that has not taken its answer by its request's deadline.
//! When there are as many connections as may be, no more are accepted:
//! they wait in the system's backlog; one client's that are too many are told so and closed. The other waits of a request are the request's own.

mod pace;
mod seats;

use std::{io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use axum::Router;
use http::{HeaderValue, Request, header::CONNECTION};
use hyper::{
    body::Incoming,
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use sha2::{Digest as _, Sha256};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::{JoinError, JoinSet},
};
use tokio_rustls::TlsAcceptor;

pub(crate) use self::pace::TakenBy;
use self::{
    pace::{Impatient, Pace},
    seats::{Seat, Seats},
};
use crate::{
    config::Limits,
    cores::{Core, Cores},
    stop::{Phase, Stopping},
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
    /// Whether requests say whose they are, by a [`Peer`] among their extensions.
    pub(crate) names_peers: bool,
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug, Default)]
pub(crate) struct Peer {
    pub(crate) address: Option<SocketAddr>,
    /// SHA-256 of the certificate that it showed.
    pub(crate) certificate: Option<String>,
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
    names_peers: bool,
    stopping: Stopping,
}

/// Serves until it is over; then lets clients take their last words.
pub(crate) async fn serve(server: Server, limits: &Limits, stopping: Stopping) {
    let Server { what, listener, router, tls, cores, names_peers } = server;
    // Accepted sockets inherit it.
    if let Err(error) = SockRef::from(&listener).set_send_buffer_size(limits.client_buffer_bytes as usize) {
        tracing::warn!(listener = what, "limits.client_buffer_bytes is not in force: {error}");
    }
    let most = limits.max_connections as usize;
    let header_timeout = Duration::from_secs(limits.header_timeout_s);
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_headers(limits.max_headers as usize)
        .max_buf_size(limits.max_header_bytes as usize);
    let write_stall = Duration::from_secs(limits.write_stall_s);
    let manner = Manner { http, router, tls, header_timeout, write_stall, names_peers, stopping: stopping.clone() };
    let seats = Seats::new(limits.max_connections_per_client);
    let gauge = metrics::gauge!("dynamo_host_connections", "listener" => what);
    let refused = metrics::counter!("dynamo_host_connections_refused_total", "listener" => what);
    let mut over = pin!(stopping.reached(Phase::Over));
    let mut connections = JoinSet::new();
    let mut was_full = false;
    loop {
        tokio::select! {
            () = &mut over => break,
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
    let peer = Peer { address: stream.peer_addr().ok(), certificate: None };
    let pace = Pace::new(manner.write_stall);
    let Some(tls) = manner.tls.clone() else {
        let stream = Impatient::new(stream, pace.clone());
        return exchange(manner, stream, pace, peer).await;
    };
    let patience = manner.header_timeout;
    let handshake = async {
        let mut first = [0];
        if stream.peek(&mut first).await? == 1 && first[0] != TLS_HANDSHAKE {
            tell(stream, SPEAK_TLS, patience).await;
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is no TLS"));
        }
        TlsAcceptor::from(tls.current()).accept(Impatient::new(stream, pace.clone())).await
    };
    match tokio::time::timeout(patience, handshake).await {
        Ok(Ok(stream)) => {
            let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
            let certificate = shown.map(|shown| format!("{:x}", Sha256::digest(shown)));
            exchange(manner, stream, pace, Peer { certificate, ..peer }).await;
        }
        Ok(Err(error)) => tracing::debug!("a TLS handshake failed: {error}"),
        Err(_) => tracing::debug!("a TLS handshake was not done within {} s", patience.as_secs()),
    }
}

/// Serves what is said on a connection.
async fn exchange<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(manner: Manner, stream: S, pace: Pace, peer: Peer) {
    let Manner { http, router, names_peers, stopping, .. } = manner;
    let router = TowerToHyperService::new(router);
    let service = service_fn(|mut request: Request<Incoming>| {
        if names_peers {
            request.extensions_mut().insert(peer.clone());
        }
        pace.take_by(None);
        let (answer, stopping, pace) = (router.call(request), &stopping, &pace);
        async move {
            let mut answer = answer.await?;
            pace.take_by(answer.extensions().get().copied());
            if stopping.has_reached(Phase::Leaving) {
                answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, std::convert::Infallible>(answer)
        }
    });
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        biased;
        ended = connection.as_mut() => ended,
        // It wakes what runs on this connection, which then sees that it is over.
        () = stopping.reached(Phase::Over) => {
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
