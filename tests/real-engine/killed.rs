//! An engine killed within a stream, with a second beside it: what the client has in the end is what it would have had.
//!
//! One request at a time: then these engines say the same thing every time, also from the middle on, where they
//! are told the same ids (README.md here).

use serde_json::{Value, json};

use crate::harness::{
    host::{Host, streamed},
    sse::Streamed,
};

/// What a request got.
#[derive(Debug, PartialEq)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) finish: String,
    pub(crate) usage: [u64; 2],
}

impl Answer {
    /// Of a stream with its usage; checks that it is one, whatever engines made it.
    #[track_caller]
    pub(crate) fn of(stream: &Streamed, path: &str) -> Self {
        let id = |event: &Value| event["id"].as_str().unwrap().to_owned();
        assert!(stream.events.iter().all(|event| id(event) == id(&stream.events[0])), "one id: {:?}", stream.events);
        let roles = stream.choices().filter(|choice| !choice["delta"]["role"].is_null()).count();
        assert_eq!(roles, usize::from(path.contains("chat")), "roles: {:?}", stream.events);
        let [finish] = stream.finish_reasons()[..] else { panic!("finish reasons: {:?}", stream.finish_reasons()) };
        let usages: Vec<_> = stream.events.iter().filter(|event| !event["usage"].is_null()).collect();
        let [event] = usages[..] else { panic!("usages: {usages:?}") };
        let count = |name: &str| event["usage"][name].as_u64().unwrap();
        Self { text: stream.text(), finish: finish.to_owned(), usage: [count("prompt_tokens"), count("completion_tokens")] }
    }
}

/// A body that is streamed, with its usage.
pub(crate) fn counted(body: Value) -> Value {
    let mut body = streamed(body);
    body["stream_options"] = json!({ "include_usage": true });
    body
}

/// Streams a request through the host; after so many events `strike` is called with the worker that serves it. Returns what
/// the client had by then, and in the end.
pub(crate) async fn struck(host: &Host, path: &str, body: &Value, after: usize, strike: impl FnOnce(&str)) -> (String, Answer) {
    let mut events = host.http.open(path, body).await;
    let mut seen = Vec::new();
    for _ in 0..after {
        seen.push(events.event().await);
    }
    strike(events.headers["x-dynamo-worker"].to_str().unwrap());
    let rest = events.streamed().await.unwrap_or_else(|error| panic!("after {seen:?}: {error}"));
    let before = Streamed { headers: rest.headers.clone(), events: seen.clone() }.text();
    let whole = Streamed { headers: rest.headers, events: [seen, rest.events].concat() };
    (before, Answer::of(&whole, path))
}
