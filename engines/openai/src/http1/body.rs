//! How far a body goes, and the payload of what has been read of it.

use bytes::{Buf as _, Bytes, BytesMut};

/// Bytes that the line before a chunk, or a trailer's, may have.
const MAX_LINE_BYTES: usize = 8 << 10;

/// What is still to come of a body.
#[derive(Debug)]
pub(super) enum Framing {
    /// Nothing.
    None,
    /// This many bytes.
    Sized(u64),
    /// Chunks.
    Chunked(Chunked),
    /// All that comes before the connection ends.
    UntilClose,
}

/// Where we are among chunks.
#[derive(Debug, PartialEq)]
pub(super) enum Chunked {
    /// Before the line with a chunk's size.
    Size,
    /// Before this many bytes of a chunk.
    Payload(u64),
    /// Before the line end that follows a chunk.
    Border,
    /// Within the lines after the last chunk, of which so many bytes have been read.
    Trailers(usize),
    /// After all of it.
    Over,
}

impl Framing {
    pub(super) fn chunked() -> Self {
        Self::Chunked(Chunked::Size)
    }

    /// Whether all of the body has been taken.
    pub(super) fn is_over(&self) -> bool {
        matches!(self, Self::None | Self::Sized(0) | Self::Chunked(Chunked::Over))
    }

    pub(super) fn ends_with_connection(&self) -> bool {
        matches!(self, Self::UntilClose)
    }

    /// Takes the payload of what was read, in one piece; empty if there is none. What does not belong to the body stays.
    ///
    /// # Errors
    /// Says what is not as chunks are written.
    pub(super) fn take(&mut self, read: &mut BytesMut) -> Result<Bytes, String> {
        match self {
            Self::None => Ok(Bytes::new()),
            Self::Sized(left) => {
                let taken = (*left).min(read.len() as u64);
                *left -= taken;
                Ok(read.split_to(taken as usize).freeze())
            }
            Self::UntilClose => Ok(read.split().freeze()),
            Self::Chunked(state) => state.take(read),
        }
    }
}

impl Chunked {
    /// Chunks that were read together become one piece: their payloads are moved next to the first one's.
    fn take(&mut self, read: &mut BytesMut) -> Result<Bytes, String> {
        // Payload lies in `start..end`; up to `at` everything has been looked at.
        let (mut start, mut end, mut at) = (0, 0, 0);
        loop {
            let rest = &read[at..];
            match self {
                // httparse takes a line without a digit for a size of 0.
                Self::Size if rest.first().is_some_and(|byte| !byte.is_ascii_hexdigit()) => {
                    return Err("a chunk without a size".to_owned());
                }
                Self::Size => match httparse::parse_chunk_size(rest) {
                    Ok(httparse::Status::Complete((length, size))) => {
                        at += length;
                        *self = if size == 0 { Self::Trailers(0) } else { Self::Payload(size) };
                    }
                    Ok(httparse::Status::Partial) if rest.len() <= MAX_LINE_BYTES => break,
                    _ => return Err("a chunk without a size".to_owned()),
                },
                Self::Payload(left) => {
                    let length = (*left).min(rest.len() as u64) as usize;
                    if length == 0 {
                        break;
                    }
                    *left -= length as u64;
                    if *left == 0 {
                        *self = Self::Border;
                    }
                    if start == end {
                        (start, end) = (at, at);
                    } else {
                        read.copy_within(at..at + length, end);
                    }
                    end += length;
                    at += length;
                }
                Self::Border => match rest {
                    [b'\r', b'\n', ..] => {
                        at += 2;
                        *self = Self::Size;
                    }
                    [] | [b'\r'] => break,
                    _ => return Err("a chunk that is longer than its size".to_owned()),
                },
                Self::Trailers(bytes) => match memchr::memchr(b'\n', rest) {
                    Some(line) => {
                        at += line + 1;
                        *bytes += line + 1;
                        if *bytes > MAX_LINE_BYTES {
                            return Err("trailers without an end".to_owned());
                        }
                        if matches!(&rest[..line], [] | [b'\r']) {
                            *self = Self::Over;
                        }
                    }
                    None if rest.len() <= MAX_LINE_BYTES => break,
                    None => return Err("a trailer without an end".to_owned()),
                },
                Self::Over => break,
            }
        }
        read.advance(start);
        let payload = read.split_to(end - start).freeze();
        read.advance(at - end);
        Ok(payload)
    }
}
