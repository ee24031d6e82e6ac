//! One HTTP/1.1 connection: heads found by `httparse`, bodies decoded as they come.

use std::io;

use tokio::{io::AsyncReadExt, net::TcpStream};

/// Longest head, and how much of a body is read at once.
const READ: usize = 64 * 1024;
/// Most headers of a message.
const HEADERS: usize = 64;

/// Something that is not the HTTP that we speak.
pub fn malformed(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// A connection, and what was read of it but not yet understood.
pub struct Connection {
    pub stream: TcpStream,
    raw: Vec<u8>,
}

/// A request's head.
pub struct Request {
    pub method: String,
    pub path: String,
    pub body: Body,
    /// The peer ends the connection after this exchange.
    pub close: bool,
}

/// A response's head.
pub struct Response {
    pub status: u16,
    pub body: Body,
    /// The connection ends with this response.
    pub close: bool,
}

/// What is left of a message's body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// So many bytes.
    Length(u64),
    /// A chunk's size line.
    ChunkSize,
    /// So many bytes of a chunk, its line end included.
    Chunk(u64),
    /// Trailers after the last chunk, up to an empty line.
    Trailers,
    /// Everything up to the connection's end.
    UntilClose,
    /// Nothing.
    Done,
}

impl Connection {
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self { stream, raw: Vec::with_capacity(READ) })
    }

    /// Reads a request's head; `None` if the peer has closed the connection instead.
    pub async fn request(&mut self) -> io::Result<Option<Request>> {
        loop {
            let mut headers = [httparse::EMPTY_HEADER; HEADERS];
            let mut head = httparse::Request::new(&mut headers);
            if let httparse::Status::Complete(length) = head.parse(&self.raw).map_err(|error| malformed(error.to_string()))? {
                let fields = Fields::of(head.headers)?;
                let request = Request {
                    method: head.method.unwrap_or_default().to_owned(),
                    path: head.path.unwrap_or_default().to_owned(),
                    body: fields.body.unwrap_or(Body::Done),
                    close: fields.close || head.version == Some(0),
                };
                self.raw.drain(..length);
                return Ok(Some(request));
            }
            if !self.fill().await? {
                return if self.raw.is_empty() { Ok(None) } else { Err(malformed("the connection ended within a head")) };
            }
        }
    }

    /// Reads a response's head.
    pub async fn response(&mut self) -> io::Result<Response> {
        loop {
            let mut headers = [httparse::EMPTY_HEADER; HEADERS];
            let mut head = httparse::Response::new(&mut headers);
            if let httparse::Status::Complete(length) = head.parse(&self.raw).map_err(|error| malformed(error.to_string()))? {
                let fields = Fields::of(head.headers)?;
                let body = fields.body.unwrap_or(Body::UntilClose);
                let response = Response {
                    status: head.code.unwrap_or_default(),
                    body,
                    close: fields.close || head.version == Some(0) || body == Body::UntilClose,
                };
                self.raw.drain(..length);
                return Ok(response);
            }
            if !self.fill().await? {
                return Err(malformed("the connection ended before an answer"));
            }
        }
    }

    /// Appends to `text` what has come of a body; waits for more if nothing has. `false` at its end.
    pub async fn read_body(&mut self, body: &mut Body, text: &mut Vec<u8>) -> io::Result<bool> {
        let before = text.len();
        loop {
            let used = body.decode(&self.raw, text)?;
            self.raw.drain(..used);
            if *body == Body::Done {
                return Ok(text.len() > before);
            }
            if text.len() > before {
                return Ok(true);
            }
            if !self.fill().await? {
                return if *body == Body::UntilClose { Ok(false) } else { Err(malformed("the connection ended within a body")) };
            }
        }
    }

    /// Reads more of the connection; `false` at its end.
    async fn fill(&mut self) -> io::Result<bool> {
        if self.raw.len() >= READ {
            return Err(malformed(format!("a head or chunk line of more than {READ} bytes")));
        }
        Ok(self.stream.read_buf(&mut self.raw).await? > 0)
    }
}

impl Body {
    /// Decodes what it can from the front of `raw`, appends it to `text`, and says how much of `raw` that took.
    fn decode(&mut self, raw: &[u8], text: &mut Vec<u8>) -> io::Result<usize> {
        let mut at = 0;
        loop {
            let rest = &raw[at..];
            match *self {
                Self::Done | Self::Length(0) => {
                    *self = Self::Done;
                    return Ok(at);
                }
                _ if rest.is_empty() => return Ok(at),
                Self::UntilClose => {
                    text.extend_from_slice(rest);
                    return Ok(raw.len());
                }
                Self::Length(left) => {
                    let take = left.min(rest.len() as u64);
                    text.extend_from_slice(&rest[..take as usize]);
                    at += take as usize;
                    *self = Self::Length(left - take);
                }
                Self::ChunkSize => match httparse::parse_chunk_size(rest) {
                    Ok(httparse::Status::Complete((used, size))) => {
                        at += used;
                        *self = if size == 0 { Self::Trailers } else { Self::Chunk(size + 2) };
                    }
                    Ok(httparse::Status::Partial) => return Ok(at),
                    Err(_) => return Err(malformed("a chunk without a size")),
                },
                Self::Chunk(left) => {
                    let take = left.min(rest.len() as u64);
                    // The last two bytes are the line end behind the chunk.
                    let data = take.min(left.saturating_sub(2));
                    text.extend_from_slice(&rest[..data as usize]);
                    at += take as usize;
                    *self = if left == take { Self::ChunkSize } else { Self::Chunk(left - take) };
                }
                Self::Trailers => {
                    let Some(line) = memchr::memchr(b'\n', rest) else { return Ok(at) };
                    at += line + 1;
                    if matches!(&rest[..line], b"" | b"\r") {
                        *self = Self::Done;
                    }
                }
            }
        }
    }
}

/// The headers that matter.
struct Fields {
    body: Option<Body>,
    close: bool,
}

impl Fields {
    fn of(headers: &[httparse::Header<'_>]) -> io::Result<Self> {
        let mut fields = Self { body: None, close: false };
        for header in headers {
            if header.name.eq_ignore_ascii_case("transfer-encoding") {
                fields.body = Some(Body::ChunkSize);
            } else if header.name.eq_ignore_ascii_case("content-length") && fields.body.is_none() {
                let length = std::str::from_utf8(header.value).ok().and_then(|value| value.trim().parse().ok());
                fields.body = Some(Body::Length(length.ok_or_else(|| malformed("a content-length that is no number"))?));
            } else if header.name.eq_ignore_ascii_case("connection") {
                fields.close = header.value.eq_ignore_ascii_case(b"close");
            }
        }
        Ok(fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes `raw` handed over in pieces of `size`.
    fn decode(mut body: Body, raw: &[u8], size: usize) -> (Body, String) {
        let (mut pending, mut text) = (Vec::new(), Vec::new());
        for piece in raw.chunks(size) {
            pending.extend_from_slice(piece);
            let used = body.decode(&pending, &mut text).unwrap();
            pending.drain(..used);
        }
        (body, String::from_utf8(text).unwrap())
    }

    #[test]
    fn a_body_is_the_same_however_it_is_cut() {
        let chunked = b"5\r\nhello\r\n7;x=y\r\n, world\r\n0\r\ntrailer: t\r\n\r\n";
        for size in 1..=chunked.len() {
            assert_eq!(decode(Body::ChunkSize, chunked, size), (Body::Done, "hello, world".to_owned()), "pieces of {size}");
            assert_eq!(decode(Body::Length(5), b"hello, next", size), (Body::Done, "hello".to_owned()), "pieces of {size}");
        }
    }

    #[test]
    fn a_body_that_is_cut_short_is_not_done() {
        assert_ne!(decode(Body::ChunkSize, b"5\r\nhello\r\n0\r\n", 64).0, Body::Done);
        assert_ne!(decode(Body::Length(6), b"hello", 64).0, Body::Done);
        assert!(Body::ChunkSize.decode(b"hello\r\n", &mut Vec::new()).is_err());
    }
}
