//! Wire: connections that can be cut at a byte, and heads that do not end.
//!
//! Contract: whoever answers pulls a connection's [`Lever`] before the bytes that it is for are written; it takes effect
//! when they are. A connection whose lever was not pulled is its socket.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use axum::{
    extract::connect_info::Connected,
    serve::{IncomingStream, Listener},
};
use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
};

use crate::faults::Tear;

/// Header lines that are written in one poll; then others have their turn.
const LINES_PER_POLL: usize = 64;
const STATUS_LINE: &[u8] = b"HTTP/1.1 200 OK\r\n";
const HEADER_LINE: &[u8] = b"x-one-more: and another one, and another one, and another one\r\n";

/// Listens for connections with levers.
pub(super) struct Wires(pub(super) TcpListener);

/// A connection.
pub(super) struct Wire {
    socket: TcpStream,
    lever: Lever,
    /// What is still written before it is closed, and how much of it was.
    last: Option<(Vec<u8>, usize)>,
    /// How much was written of a head that does not end.
    endless: Option<usize>,
}

/// What is done to a connection.
#[derive(Clone, Debug, Default)]
pub(super) struct Lever(Arc<Mutex<Option<Pull>>>);

#[derive(Debug)]
enum Pull {
    /// Cut after so many of these bytes.
    Cut(Bytes, usize),
    EndlessHeaders,
}

impl Lever {
    /// Cuts the connection within these bytes, which are about to be written.
    pub(super) fn cut(&self, within: Bytes, tear: Tear) {
        let character = within.iter().rposition(|&byte| byte >= 0xC0).filter(|_| tear == Tear::Character);
        let at = character.map_or(within.len() / 2, |lead| lead + 1);
        self.pull(Pull::Cut(within, at));
    }

    /// Writes a head without an end instead of the answer that is about to be written.
    pub(super) fn endless_headers(&self) {
        self.pull(Pull::EndlessHeaders);
    }

    fn pull(&self, pull: Pull) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(pull);
    }

    /// What is to be done with these bytes, if they are those.
    fn take(&self, bytes: &[u8]) -> Option<Taken> {
        let mut pulled = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = match &*pulled {
            None => return None,
            Some(Pull::EndlessHeaders) => Taken::EndlessHeaders,
            Some(Pull::Cut(within, at)) => {
                let start = bytes.windows(within.len()).rposition(|window| window == &within[..])?;
                Taken::Cut(start + at)
            }
        };
        *pulled = None;
        Some(taken)
    }
}

enum Taken {
    Cut(usize),
    EndlessHeaders,
}

impl Connected<IncomingStream<'_, Wires>> for Lever {
    fn connect_info(stream: IncomingStream<'_, Wires>) -> Self {
        stream.io().lever.clone()
    }
}

impl Listener for Wires {
    type Io = Wire;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Wire, SocketAddr) {
        // Axum's own waits and tries again when the system is out of files.
        let (socket, address) = Listener::accept(&mut self.0).await;
        // Best effort: a connection that closes at once may refuse the option.
        drop(socket.set_nodelay(true));
        (Wire { socket, lever: Lever::default(), last: None, endless: None }, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

impl Wire {
    /// Writes the last bytes; then the connection is as if its process had died.
    fn poll_last(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        while let Some((bytes, written)) = &mut self.last
            && *written < bytes.len()
        {
            *written += ready!(Pin::new(&mut self.socket).poll_write(cx, &bytes[*written..]))?;
        }
        Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, "cut, as the faults say")))
    }

    /// Writes header lines until the client has enough.
    fn poll_endless(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        for _ in 0..LINES_PER_POLL {
            let Some(written) = self.endless else { break };
            let rest = match STATUS_LINE.get(written..) {
                Some(rest) if !rest.is_empty() => rest,
                _ => &HEADER_LINE[(written - STATUS_LINE.len()) % HEADER_LINE.len()..],
            };
            let length = ready!(Pin::new(&mut self.socket).poll_write(cx, rest))?;
            self.endless = Some(written + length);
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Wire {
    // Not vectored: what is written at once is in one piece, and is found in it.
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let wire = &mut *self;
        match wire.lever.take(bytes) {
            Some(Taken::Cut(at)) => wire.last = Some((bytes[..at].to_vec(), 0)),
            Some(Taken::EndlessHeaders) => wire.endless = Some(0),
            None => {}
        }
        if wire.last.is_some() {
            return wire.poll_last(cx);
        }
        if wire.endless.is_some() {
            return wire.poll_endless(cx);
        }
        Pin::new(&mut wire.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
