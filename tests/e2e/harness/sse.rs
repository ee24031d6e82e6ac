//! Event streams, read strictly: each event a `data` line of JSON, `[DONE]` last, then the end. An event's name may come
//! before its data, if it is the data's `type`.

use http_body_util::BodyExt as _;
use hyper::{Response, body::Incoming, header::HeaderMap};
use serde_json::Value;

use super::{client::header, soon};

/// A stream that is being read. Dropping it hangs up.
pub(crate) struct Events {
    pub(crate) headers: HeaderMap,
    body: Incoming,
    bytes: Vec<u8>,
    read: usize,
}

/// A stream that was read to its `[DONE]`.
#[derive(Debug)]
pub(crate) struct Streamed {
    pub(crate) headers: HeaderMap,
    /// The data of its events but `[DONE]`.
    pub(crate) events: Vec<Value>,
}

impl Events {
    pub(crate) fn new(reply: Response<Incoming>) -> Self {
        let (head, body) = reply.into_parts();
        Self { headers: head.headers, body, bytes: Vec::new(), read: 0 }
    }

    /// The data of the next event; none at the stream's end.
    ///
    /// # Errors
    /// If the connection breaks, or something else than an event comes.
    pub(crate) async fn next(&mut self) -> Result<Option<String>, String> {
        loop {
            if let Some(length) = self.bytes[self.read..].windows(2).position(|window| window == b"\n\n") {
                let event = str::from_utf8(&self.bytes[self.read..self.read + length]).map_err(|error| error.to_string())?;
                let (name, line) = match event.split_once('\n') {
                    Some((name, data)) => (name.strip_prefix("event: "), data),
                    None => (None, event),
                };
                let data = line.strip_prefix("data: ").ok_or_else(|| format!("not a data event: {event:?}"))?.to_owned();
                if name.is_some_and(|name| !data.contains(&format!("\"type\":\"{name}\""))) {
                    return Err(format!("an event of another name: {event:?}"));
                }
                self.read += length + 2;
                return Ok(Some(data));
            }
            match soon("more of a stream", self.body.frame()).await {
                Some(Ok(frame)) => self.bytes.extend_from_slice(frame.data_ref().map_or(&[], |data| data)),
                Some(Err(error)) => return Err(format!("the stream broke: {error:?}")),
                None if self.read == self.bytes.len() => return Ok(None),
                None => return Err(format!("half an event: {:?}", String::from_utf8_lossy(&self.bytes[self.read..]))),
            }
        }
    }

    /// The next event, which must come.
    pub(crate) async fn event(&mut self) -> Value {
        let data = self.next().await.unwrap().expect("an event, not the stream's end");
        serde_json::from_str(&data).unwrap_or_else(|error| panic!("{error}: {data}"))
    }

    /// Reads to the end.
    ///
    /// # Errors
    /// If it does not end with `[DONE]`.
    pub(crate) async fn streamed(mut self) -> Result<Streamed, String> {
        let mut events = Vec::new();
        loop {
            let Some(data) = self.next().await? else {
                return Err(format!("the stream ended without [DONE]: {}", String::from_utf8_lossy(&self.bytes)));
            };
            if data == "[DONE]" {
                break;
            }
            events.push(serde_json::from_str(&data).map_err(|error| format!("{error}: {data}"))?);
        }
        match self.next().await? {
            None => Ok(Streamed { headers: self.headers, events }),
            Some(more) => Err(format!("after [DONE]: {more:?}")),
        }
    }

    /// Reads to the end, whatever it is; the data of all events.
    pub(crate) async fn rest(mut self) -> (Vec<String>, Result<(), String>) {
        let mut events = Vec::new();
        loop {
            match self.next().await {
                Ok(Some(data)) => events.push(data),
                Ok(None) => return (events, Ok(())),
                Err(error) => return (events, Err(error)),
            }
        }
    }
}

impl Streamed {
    /// What the first choice says.
    pub(crate) fn text(&self) -> String {
        self.choices().filter_map(|choice| choice["text"].as_str().or(choice["delta"]["content"].as_str())).collect()
    }

    /// The first choice of each event that has one.
    pub(crate) fn choices(&self) -> impl Iterator<Item = &Value> {
        self.events.iter().filter_map(|event| event["choices"].get(0))
    }

    /// All finish reasons.
    pub(crate) fn finish_reasons(&self) -> Vec<&str> {
        self.choices().filter_map(|choice| choice["finish_reason"].as_str()).collect()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        header(&self.headers, name)
    }
}
