//! What reads an engine's bytes, as functions of bytes that panic where a promise is broken: for fuzz targets.

use std::{
    future::poll_fn,
    io,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http::Request;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{http1::Connection, prometheus};

/// An HTTP answer: the same status, body and end however the network cuts it. The first byte says where it is cut.
pub fn http_answer(data: &[u8]) {
    let Some((&cut, answer)) = data.split_first() else { return };
    let step = usize::from(cut) % 13 + 1;
    assert_eq!(answered(answer, usize::MAX), answered(answer, step), "cut every {step} bytes");
}

/// A page of metrics: nothing comes after what is refused, and what is read has a name.
pub fn metrics(data: &[u8]) {
    let mut samples = prometheus::samples(data);
    for sample in samples.by_ref() {
        match sample {
            Ok(sample) => assert!(!sample.name.is_empty(), "a sample without a name"),
            Err(error) => {
                assert!(!error.to_string().is_empty(), "a refusal says why");
                break;
            }
        }
    }
    assert!(samples.next().is_none(), "something comes after the end");
}

/// Status and body, or the failure. Nothing here ever waits.
fn answered(answer: &[u8], step: usize) -> Result<(u16, Vec<u8>), String> {
    let read = async {
        let mut connection = Connection::new(Cut { rest: answer, step });
        let request = Request::get("http://engine/").body(Bytes::new()).expect("it is a request");
        let head = connection.ask(&request).await.map_err(|failure| failure.to_string())?;
        let mut body = Vec::new();
        while let Some(piece) = poll_fn(|context| connection.poll_body(context)).await {
            body.extend_from_slice(&piece.map_err(|failure| failure.to_string())?);
        }
        Ok((head.status().as_u16(), body))
    };
    match pin!(read).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(read) => read,
        Poll::Pending => unreachable!("all of the answer is there"),
    }
}

/// An answer that comes in pieces, and then the connection's end; whatever is asked is taken.
struct Cut<'a> {
    rest: &'a [u8],
    step: usize,
}

impl AsyncRead for Cut<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let length = self.step.min(buffer.remaining()).min(self.rest.len());
        let (piece, rest) = self.rest.split_at(length);
        buffer.put_slice(piece);
        self.rest = rest;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Cut<'_> {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
