//! What reads an engine's bytes, as functions of bytes that panic where a promise is broken: for fuzz targets.

use std::{
    collections::BTreeMap,
    future::poll_fn,
    io,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use dynamo_engine_api::{Endpoint, Leg, Prefilled, Protocol, WholeReply};
use http::{HeaderMap, Request, StatusCode};
use serde_json::{Value, value::RawValue};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{body::Fields, handoff::Handoff, http1::Connection, options::OpenAiOptions, prometheus, url::EngineUrl};

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

/// An engine's answer to a prefill, and as a body in which a leg's fields are put: refused with a reason, or handed on byte for
/// byte; all that a leg does not say stays as it was.
///
/// The first byte chooses protocol and endpoint.
pub fn handoff(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else { return };
    let endpoint = if choice & 1 == 0 { Endpoint::Completions } else { Endpoint::ChatCompletions };
    let protocol = if choice & 2 == 0 { Protocol::Nixl } else { Protocol::Context };
    let url = EngineUrl::parse("http://engine").expect("it is a URL");
    let engine = Handoff::new("engine".into(), &url, &OpenAiOptions::default()).expect("the defaults are in order");
    let leg = |leg: &Leg, body: &[u8]| {
        let mut fields = Fields::default();
        engine.leg(Some(protocol), leg, endpoint, &mut fields).expect("it is a leg of its protocol");
        fields.into_body(Bytes::copy_from_slice(body))
    };
    let prefill = leg(&Leg::Prefill(None), data);
    match serde_json::from_slice::<Value>(data) {
        Ok(Value::Object(body)) => {
            let sent: Value = serde_json::from_slice(&prefill).expect("a leg of a JSON object is one");
            assert_eq!(sent["stream"], false, "a prefill is whole");
            let kept = ["model", "messages", "prompt", "temperature"].iter().filter_map(|name| body.get_key_value(*name));
            kept.for_each(|(name, value)| assert_eq!(&sent[name], value, "{name}"));
        }
        Ok(_) => assert_eq!(prefill, data, "what is no object is sent as it is"),
        // It may be one all the same, with a number that is too large for us.
        Err(_) => {}
    }
    let reply = WholeReply { status: StatusCode::OK, headers: HeaderMap::new(), body: Bytes::copy_from_slice(data) };
    match engine.prefilled(Some(protocol), &reply) {
        Err(error) => assert!(!error.to_string().is_empty() && error.to_string().len() < 1000, "a refusal says why, in short"),
        Ok(Prefilled::Final) => assert_eq!(protocol, Protocol::Context),
        Ok(Prefilled::Ready(ticket)) => {
            let state = ticket.state.get().to_owned();
            assert!(data.windows(state.len()).any(|part| part == state.as_bytes()), "what was said goes on byte for byte");
            let decode = leg(&Leg::Decode(ticket), br#"{"prompt":"p"}"#);
            let decode = serde_json::from_slice::<BTreeMap<String, &RawValue>>(&decode);
            assert!(decode.is_ok(), "a leg of a JSON object is one: {decode:?}");
        }
    }
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
