//! Connections to one engine: made when they are needed, kept for a while when they are not.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    thread::{self, ThreadId},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_core::Stream;
use http::Uri;
use rustls::ClientConfig;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

use crate::{
    http1::{Connection, Failure},
    options::OpenAiOptions,
    tls,
};

/// An open connection to an engine.
pub(crate) type Opened = Connection<tls::Stream>;

/// Connections to one engine.
#[derive(Debug)]
pub(crate) struct Pool {
    host: String,
    port: u16,
    tls: Option<Arc<ClientConfig>>,
    keepalive: Duration,
    idle_timeout: Duration,
    max_idle: usize,
    /// The one that was used last is used next, so that those that are not needed grow old.
    idle: Mutex<Vec<Idle>>,
}

/// A connection that waits for its next request.
#[derive(Debug)]
struct Idle {
    connection: Opened,
    since: Instant,
    /// Where its events are waited for: on another thread, it would wake two for each token.
    home: ThreadId,
}

impl Pool {
    /// To the host and port of `base`.
    pub(crate) fn new(base: &Uri, options: &OpenAiOptions, tls: Option<Arc<ClientConfig>>) -> Self {
        let default_port = if tls.is_some() { 443 } else { 80 };
        Self {
            // As a resolver wants it: an IPv6 address without the brackets of a URL.
            host: base.host().unwrap_or_default().trim_matches(['[', ']']).to_owned(),
            port: base.port_u16().unwrap_or(default_port),
            tls,
            keepalive: options.tcp_keepalive,
            idle_timeout: options.idle_timeout,
            max_idle: options.max_idle_connections,
            idle: Mutex::default(),
        }
    }

    /// A connection that was kept and is still good, as far as can be known.
    pub(crate) fn kept(&self) -> Option<Opened> {
        let mut idle = self.tidied();
        let here = thread::current().id();
        while let Some(place) = idle.iter().rposition(|idle| idle.home == here) {
            let Idle { mut connection, .. } = idle.remove(place);
            if connection.is_quiet() {
                return Some(connection);
            }
        }
        None
    }

    /// Closes those whose time is over.
    pub(crate) fn tidy(&self) {
        drop(self.tidied());
    }

    /// Those whose time is not over; the others are closed.
    fn tidied(&self) -> MutexGuard<'_, Vec<Idle>> {
        let mut idle = self.idle();
        let now = Instant::now();
        let expired = idle.iter().take_while(|idle| now - idle.since >= self.idle_timeout).count();
        idle.drain(..expired);
        idle
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new connection, encrypted if it shall be. Takes as long as the system lets it: the caller has the bound.
    pub(crate) async fn open(&self) -> io::Result<Opened> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
        stream.set_nodelay(true)?;
        SockRef::from(&stream).set_tcp_keepalive(&TcpKeepalive::new().with_time(self.keepalive))?;
        let Some(config) = &self.tls else { return Ok(Connection::new(tls::Stream::Plain(stream))) };
        tls::connect(Arc::clone(config), tls::server_name(&self.host)?, stream).await.map(Connection::new)
    }

    fn keep(&self, mut connection: Opened) {
        if !connection.is_reusable() || !connection.is_quiet() {
            return;
        }
        let mut idle = self.idle();
        if idle.len() < self.max_idle {
            idle.push(Idle { connection, since: Instant::now(), home: thread::current().id() });
        }
    }
}

/// The body of an answer, in pieces as they are read. Read to its end, its connection is kept; dropped earlier, closed.
#[derive(Debug)]
pub(crate) struct Body {
    /// Absent once nothing is to be read any more.
    connection: Option<Opened>,
    pool: Arc<Pool>,
}

impl Body {
    pub(crate) fn new(connection: Opened, pool: Arc<Pool>) -> Self {
        Self { connection: Some(connection), pool }
    }

    /// Closes the connection.
    pub(crate) fn give_up(&mut self) {
        self.connection = None;
    }

    /// Whether there is nothing more to read.
    pub(crate) fn is_over(&self) -> bool {
        self.connection.is_none()
    }
}

impl Stream for Body {
    type Item = Result<Bytes, Failure>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(connection) = &mut self.connection else { return Poll::Ready(None) };
        let polled = connection.poll_body(context);
        match &polled {
            Poll::Ready(None) => {
                if let Some(connection) = self.connection.take() {
                    self.pool.keep(connection);
                }
            }
            Poll::Ready(Some(Err(_))) => self.connection = None,
            _ => {}
        }
        polled
    }
}
