//! Listeners: connections are accepted and served HTTP/1.1, with a bound on their number and on every wait.
//!
//! Contract: a client that is slow to say what it wants, or reads nothing of what is there for it, loses its
//! connection, and what that held is free again. When there are as many connections as may be, no more are accepted:
//! they wait in the system's backlog. The other waits of a request are the request's own.

use std::{
    io,
    pin::{Pin, pin},
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
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinError, JoinSet},
    time::Sleep,
};

use crate::{
    config::Limits,
    cores::{Cores, Seat},
};

/// How long to wait when the system gives no more connections, such as when it is out of file descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_secs(1);

/// Serves `router` until `stop`, then lets running requests end.
pub(crate) async fn serve(
    what: &'static str,
    listener: TcpListener,
    router: Router,
    limits: &Limits,
    cores: &Cores,
    stop: watch::Receiver<bool>,
) {
    let most = limits.max_connections as usize;
    let write_stall = Duration::from_secs(limits.write_stall_s);
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(limits.header_timeout_s));
    let gauge = metrics::gauge!("dynamo_host_connections", "listener" => what);
    let mut stopped = pin!(stopped(stop.clone()));
    let mut connections = JoinSet::new();
    let mut was_full = false;
    loop {
        tokio::select! {
            () = &mut stopped => break,
            accepted = listener.accept(), if connections.len() < most => match accepted {
                Ok((stream, _)) => {
                    let seat = cores.seat();
                    let core = seat.runtime().clone();
                    connections.spawn_on(converse(seat, http.clone(), stream, router.clone(), write_stall, stop.clone()), &core);
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
async fn converse(
    _seat: Seat,
    http: http1::Builder,
    stream: TcpStream,
    router: Router,
    write_stall: Duration,
    stop: watch::Receiver<bool>,
) {
    // It was accepted on another runtime, whose events this one does not wait for.
    let Ok(stream) = stream.into_std().and_then(TcpStream::from_std) else { return };
    // A token must not wait for the next one to fill a segment. Best effort: a connection may be gone already.
    let _ = stream.set_nodelay(true);
    let io = TokioIo::new(Impatient::new(stream, write_stall));
    let mut connection = pin!(http.serve_connection(io, TowerToHyperService::new(router)));
    let ended = tokio::select! {
        biased;
        ended = connection.as_mut() => ended,
        () = stopped(stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        let cause = std::error::Error::source(&error).map_or_else(String::new, |source| format!(": {source}"));
        tracing::debug!("a connection broke: {error}{cause}");
    }
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
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

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
