//! An engine that does what a test tells it, request by request.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::own_address;

/// The engine: it serves model `m`, is healthy, and plays a script at each request for tokens. It ends when it is dropped.
pub(crate) struct Scripted {
    pub(crate) address: SocketAddr,
    received: Arc<Mutex<Vec<Received>>>,
    is_loading: Arc<AtomicBool>,
    _tasks: JoinSet<()>,
}

/// A request for tokens as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    /// Request line and headers, in lower case.
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Received {
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

impl Scripted {
    /// Plays `script` at each request for tokens; then its connection is closed.
    pub(crate) async fn start<Script, Played>(script: Script) -> Self
    where
        Script: Fn(Connection) -> Played + Clone + Send + Sync + 'static,
        Played: Future<Output = ()> + Send + 'static,
    {
        Self::listing(models(), script).await
    }

    /// The same, with another answer to whoever asks for its models.
    pub(crate) async fn listing<Script, Played>(models: Value, script: Script) -> Self
    where
        Script: Fn(Connection) -> Played + Clone + Send + Sync + 'static,
        Played: Future<Output = ()> + Send + 'static,
    {
        let models: Arc<str> = models.to_string().into();
        let listener = TcpListener::bind(own_address()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let received: Arc<Mutex<Vec<Received>>> = Arc::default();
        let requests = Arc::clone(&received);
        let is_loading = Arc::new(AtomicBool::new(false));
        let loading = Arc::clone(&is_loading);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                let (script, requests, models) = (script.clone(), Arc::clone(&requests), Arc::clone(&models));
                let loading = Arc::clone(&loading);
                connections.spawn(async move {
                    let mut connection = Connection { stream, is_broken: false, asked: None };
                    let Some(request) = connection.request().await else { return };
                    if request.head.starts_with("post ") {
                        requests.lock().unwrap().push(request.clone());
                        connection.asked = Some(request);
                        script(connection).await;
                    } else if loading.load(Relaxed) {
                        let body = r#"{"error":{"message":"Loading model","type":"unavailable_error","code":503}}"#;
                        connection.write(whole_answer("503 Service Unavailable", body)).await;
                    } else {
                        connection.write(whole_answer("200 OK", &models)).await;
                    }
                });
            }
        });
        Self { address, received, is_loading, _tasks: tasks }
    }

    /// Has it say to whoever looks that its model is loading, or not any more.
    pub(crate) fn loads(&self, is_loading: bool) {
        self.is_loading.store(is_loading, Relaxed);
    }

    /// Answers each request for tokens with the same bytes.
    pub(crate) async fn answering(answer: impl Into<Vec<u8>>) -> Self {
        let answer: Arc<[u8]> = answer.into().into();
        Self::start(move |mut connection| {
            let answer = Arc::clone(&answer);
            async move { connection.write(answer).await }
        })
        .await
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A worker of model `m` for the host's command line.
    pub(crate) fn worker(&self) -> String {
        format!("{},model=m", self.url())
    }

    /// Requests for tokens so far.
    pub(crate) fn received(&self) -> Vec<Received> {
        self.received.lock().unwrap().clone()
    }
}

/// One accepted connection.
pub(crate) struct Connection {
    stream: TcpStream,
    is_broken: bool,
    asked: Option<Received>,
}

impl Connection {
    async fn request(&mut self) -> Option<Received> {
        let mut bytes = Vec::new();
        loop {
            if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
                let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
                let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
                let length = length.map_or(0, |length| length.parse::<usize>().unwrap());
                if bytes.len() >= end + 4 + length {
                    return Some(Received { head, body: String::from_utf8_lossy(&bytes[end + 4..]).into_owned() });
                }
            }
            if self.stream.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    /// What is asked for.
    #[track_caller]
    pub(crate) fn asked(&self) -> &Received {
        self.asked.as_ref().expect("a script is played when something was asked")
    }

    /// A client that is gone does not mind.
    pub(crate) async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        self.is_broken |= self.stream.write_all(bytes.as_ref()).await.is_err();
    }

    /// Whether all that was written found the client there.
    pub(crate) fn is_open(&self) -> bool {
        !self.is_broken
    }

    /// Waits until the client sends something more, or hangs up.
    pub(crate) async fn hears_more(&mut self) {
        let _ = self.stream.read(&mut [0; 1024]).await;
    }

    /// Waits until the client hangs up.
    pub(crate) async fn hung_up(&mut self) {
        let mut rest = [0; 1024];
        while self.stream.read(&mut rest).await.is_ok_and(|length| length > 0) {}
    }
}

fn models() -> Value {
    json!({ "object": "list", "data": [{ "id": "m", "object": "model", "created": 0, "owned_by": "a test" }] })
}

/// Head of a chunked event stream.
pub(crate) const STREAM_HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n\
    transfer-encoding: chunked\r\nconnection: close\r\n\r\n";

/// The end of a chunked answer.
pub(crate) const STREAM_END: &str = "0\r\n\r\n";

/// One HTTP chunk.
pub(crate) fn http_chunk(data: &str) -> String {
    format!("{:x}\r\n{data}\r\n", data.len())
}

/// A whole chunked answer with one HTTP chunk per event.
pub(crate) fn stream_answer(events: &str) -> String {
    let chunks: String = events.split_inclusive("\n\n").map(http_chunk).collect();
    format!("{STREAM_HEAD}{chunks}{STREAM_END}")
}

/// An answer with its length.
pub(crate) fn whole_answer(status: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}")
}

/// The event of one token of a chat.
pub(crate) fn token_event(index: u32) -> String {
    let space = if index == 0 { "" } else { " " };
    let choice = json!({ "index": 0, "delta": { "content": format!("{space}t{index}") }, "finish_reason": null });
    format!("data: {}\n\n", json!({ "id": "x", "object": "chat.completion.chunk", "model": "m", "choices": [choice] }))
}

/// The event that ends a chat, and `[DONE]`.
pub(crate) fn end_events() -> String {
    let choice = json!({ "index": 0, "delta": {}, "finish_reason": "length" });
    let event = json!({ "id": "x", "object": "chat.completion.chunk", "model": "m", "choices": [choice] });
    format!("data: {event}\n\ndata: [DONE]\n\n")
}
