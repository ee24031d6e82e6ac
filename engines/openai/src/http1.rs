//! HTTP/1.1 as a client speaks it, over one connection at a time.
//!
//! Why our own: every token of every stream passes here. What is asked, answered and relayed happens in the one task that
//! wants it, so that a token wakes nobody else, and a read that holds many tokens comes out as one piece, moved within
//! the buffer that it was read into and not copied out of it.
//!
//! Contract: one exchange after the other; [`Connection::ask`], then [`Connection::poll_body`] to its end, then the
//! connection may be asked again if [`Connection::is_reusable`]. Dropping it closes it. Answers are read as RFC 9112 has
//! them: sized, chunked, or ended by the connection's end; interim answers are skipped, trailers are thrown away.
//!
//! Deliberately absent: pipelining, upgrades, `expect: 100-continue`, compression (engines are asked for none).

mod body;

use std::{
    fmt::Write as _,
    io::{self, IoSlice},
    pin::{Pin, pin},
    task::{Context, Poll, Waker, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode, Version,
    header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING},
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};

use self::body::Framing;

/// Bytes that the head of an answer may have.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Header lines that it may have.
const MAX_HEADERS: usize = 100;
/// Interim answers (`100 Continue`) before the final one.
const MAX_INTERIM: usize = 16;
/// Bytes that are read at once: some thirty tokens. Each open stream holds as many.
const READ_BYTES: usize = 8 << 10;

/// What went wrong in an exchange.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The connection was closed before any byte of an answer.
    #[error("{0}")]
    Unanswered(io::Error),
    /// It broke within the answer.
    #[error("{0}")]
    Broken(io::Error),
    /// What came is not HTTP/1.1.
    #[error("{0}")]
    NotHttp(String),
}

/// A connection to a server.
#[derive(Debug)]
pub(crate) struct Connection<S> {
    io: S,
    /// What was read and not taken yet.
    buffer: BytesMut,
    /// How far the present answer's body goes.
    body: Framing,
    /// Whether both sides want to go on after this answer.
    keep_alive: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Over a stream that is open.
    pub(crate) fn new(io: S) -> Self {
        Self { io, buffer: BytesMut::new(), body: Framing::None, keep_alive: true }
    }

    /// Sends a request and waits for the head of its answer.
    pub(crate) async fn ask(&mut self, request: &Request<Bytes>) -> Result<Response<()>, Failure> {
        // Whatever goes wrong from here on, there is no telling where the next answer begins.
        self.keep_alive = false;
        let mut outgoing = head(request).chain(request.body().clone());
        let sent = std::future::poll_fn(|context| self.poll_send(context, &mut outgoing)).await;
        // A server that refuses a request before it has read all of it says why, and may close its end.
        match (self.head().await, sent) {
            (Err(Failure::Unanswered(_)), Err(error)) => Err(Failure::Unanswered(error)),
            (answer, sent) => {
                let answer = answer?;
                self.keep_alive = sent.is_ok() && is_kept(&answer);
                Ok(answer)
            }
        }
    }

    /// The next piece of the body, as much as one read brought; `None` at its end.
    pub(crate) fn poll_body(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, Failure>>> {
        loop {
            match self.body.take(&mut self.buffer) {
                Ok(piece) if !piece.is_empty() => return Poll::Ready(Some(Ok(piece))),
                Ok(_) if self.body.is_over() => return Poll::Ready(None),
                Ok(_) => {}
                Err(reason) => return Poll::Ready(Some(Err(Failure::NotHttp(reason)))),
            }
            match ready!(self.poll_fill(context)) {
                Ok(0) if self.body.ends_with_connection() => {
                    self.body = Framing::None;
                    self.keep_alive = false;
                }
                Ok(0) => return Poll::Ready(Some(Err(Failure::Broken(io::ErrorKind::UnexpectedEof.into())))),
                Ok(_) => {}
                Err(error) => return Poll::Ready(Some(Err(Failure::Broken(error)))),
            }
        }
    }

    /// Whether the answer has been read to its end, and another request may follow.
    pub(crate) fn is_reusable(&self) -> bool {
        self.keep_alive && self.body.is_over() && self.buffer.is_empty()
    }

    /// Whether it is still open, as far as is known here, and nothing came that nobody asked for. Lets go of what an idle
    /// connection need not hold.
    pub(crate) fn is_quiet(&mut self) -> bool {
        self.buffer = BytesMut::new();
        let mut byte = [0];
        let mut read = ReadBuf::new(&mut byte);
        Pin::new(&mut self.io).poll_read(&mut Context::from_waker(Waker::noop()), &mut read).is_pending()
    }

    /// Writes a request, and stops when the server answers before it has read all of it.
    fn poll_send(&mut self, context: &mut Context<'_>, outgoing: &mut impl Buf) -> Poll<io::Result<()>> {
        while outgoing.has_remaining() {
            let mut pieces = [IoSlice::new(&[]); 2];
            let count = outgoing.chunks_vectored(&mut pieces);
            match Pin::new(&mut self.io).poll_write_vectored(context, &pieces[..count]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(written)) => outgoing.advance(written),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                // It takes no more for now: perhaps since it has made up its mind.
                Poll::Pending => match ready!(self.poll_fill(context)) {
                    Ok(0) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                    Ok(_) if self.buffer.len() <= MAX_HEAD_BYTES && matches!(parse_head(&self.buffer), Ok(None)) => {}
                    Ok(_) => return Poll::Ready(Err(io::Error::other("answered before it was read"))),
                    Err(error) => return Poll::Ready(Err(error)),
                },
            }
        }
        Pin::new(&mut self.io).poll_flush(context)
    }

    async fn head(&mut self) -> Result<Response<()>, Failure> {
        let mut interim = 0;
        loop {
            if let Some((answer, length)) = parse_head(&self.buffer)? {
                self.buffer.advance(length);
                if answer.status().is_informational() && answer.status() != StatusCode::SWITCHING_PROTOCOLS {
                    interim += 1;
                    if interim > MAX_INTERIM {
                        return Err(Failure::NotHttp(format!("over {MAX_INTERIM} interim answers")));
                    }
                    continue;
                }
                self.body = Framing::of(&answer).map_err(Failure::NotHttp)?;
                return Ok(answer);
            }
            if self.buffer.len() > MAX_HEAD_BYTES {
                return Err(Failure::NotHttp(format!("the head of an answer of over {MAX_HEAD_BYTES} bytes")));
            }
            let is_first = interim == 0 && self.buffer.is_empty();
            let failure = |error| if is_first { Failure::Unanswered(error) } else { Failure::Broken(error) };
            match std::future::poll_fn(|context| self.poll_fill(context)).await {
                Ok(0) => return Err(failure(io::Error::new(io::ErrorKind::UnexpectedEof, "connection closed before an answer"))),
                Ok(_) => {}
                Err(error) => return Err(failure(error)),
            }
        }
    }

    fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        // Takes up the room of pieces that have been passed on, unless somebody still holds them.
        self.buffer.reserve(READ_BYTES - self.buffer.len().min(READ_BYTES / 2));
        pin!(self.io.read_buf(&mut self.buffer)).poll(context)
    }
}

/// A request's head as it is written.
fn head(request: &Request<Bytes>) -> Bytes {
    let mut text = String::with_capacity(512);
    let uri = request.uri();
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let host = uri.authority().map_or("", |authority| authority.as_str());
    // Writing to a string cannot fail.
    let _ = write!(text, "{} {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {}\r\n", request.method(), request.body().len());
    let mut bytes = text.into_bytes();
    for (name, value) in request.headers() {
        bytes.extend_from_slice(name.as_ref());
        bytes.extend_from_slice(b": ");
        bytes.extend_from_slice(value.as_bytes());
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"\r\n");
    bytes.into()
}

/// An answer's head and its length, once it is there as a whole.
fn parse_head(bytes: &[u8]) -> Result<Option<(Response<()>, usize)>, Failure> {
    let not_http = |reason: String| Failure::NotHttp(format!("what is no HTTP/1.1: {reason}"));
    if bytes.is_empty() {
        return Ok(None);
    }
    let mut lines = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Response::new(&mut lines);
    let httparse::Status::Complete(length) = parsed.parse(bytes).map_err(|error| not_http(error.to_string()))? else {
        return Ok(None);
    };
    let mut headers = HeaderMap::with_capacity(parsed.headers.len());
    for line in parsed.headers.iter() {
        let name = HeaderName::from_bytes(line.name.as_bytes()).map_err(|error| not_http(error.to_string()))?;
        let value = HeaderValue::from_bytes(line.value).map_err(|error| not_http(error.to_string()))?;
        headers.append(name, value);
    }
    let mut answer = Response::new(());
    *answer.status_mut() = StatusCode::from_u16(parsed.code.unwrap_or_default()).map_err(|error| not_http(error.to_string()))?;
    *answer.version_mut() = if parsed.version == Some(0) { Version::HTTP_10 } else { Version::HTTP_11 };
    *answer.headers_mut() = headers;
    Ok(Some((answer, length)))
}

/// Whether the server means to keep the connection.
fn is_kept(answer: &Response<()>) -> bool {
    let says = |token: &str| {
        answer
            .headers()
            .get_all(CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .any(|value| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(token)))
    };
    match answer.version() {
        Version::HTTP_10 => says("keep-alive"),
        _ => !says("close"),
    }
}

impl Framing {
    /// How the body of an answer is delimited.
    fn of(answer: &Response<()>) -> Result<Self, String> {
        let headers = answer.headers();
        if matches!(answer.status(), StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED) {
            return Ok(Self::None);
        }
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Err("another protocol, which was not asked for".to_owned());
        }
        let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
        if let Some(coding) = codings.next() {
            let is_chunked = coding.as_bytes().eq_ignore_ascii_case(b"chunked") && codings.next().is_none();
            return if is_chunked && answer.version() == Version::HTTP_11 {
                Ok(Self::chunked())
            } else {
                Err(format!("transfer-encoding {coding:?}, which was not asked for"))
            };
        }
        let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
        let Some(length) = lengths.next() else { return Ok(Self::UntilClose) };
        if lengths.any(|other| other != length) {
            return Err("two content-lengths".to_owned());
        }
        let digits = length.to_str().ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
        digits.and_then(|text| text.parse().ok()).map(Self::Sized).ok_or_else(|| "a content-length that is no number".to_owned())
    }
}

#[cfg(test)]
mod tests;
