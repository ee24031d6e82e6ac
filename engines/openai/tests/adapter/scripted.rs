//! A server that does what a test tells it, connection by connection, and the requests that tests send.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use dynamo_engine_api::{ChunkStream, Endpoint, Engine as _, EngineError, GenerateRequest, Reply, WholeReply};
use dynamo_engine_openai::{OpenAiEngine, OpenAiOptions};
use futures_util::StreamExt as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};

/// Longer than anything here takes; a wait that reaches it has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The server. It ends when it is dropped.
pub(crate) struct Scripted {
    pub(crate) address: SocketAddr,
    accepted: Arc<AtomicUsize>,
    tasks: JoinSet<()>,
}

impl Scripted {
    /// Plays `script` on each connection.
    pub(crate) async fn start<Script, Played>(script: Script) -> Self
    where
        Script: Fn(Connection) -> Played + Send + 'static,
        Played: Future<Output = ()> + Send + 'static,
    {
        Self::start_at("127.0.0.1:0".parse().unwrap(), script).await
    }

    pub(crate) async fn start_at<Script, Played>(address: SocketAddr, script: Script) -> Self
    where
        Script: Fn(Connection) -> Played + Send + 'static,
        Played: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let accepted = Arc::new(AtomicUsize::new(0));
        let count = accepted.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                count.fetch_add(1, Ordering::Relaxed);
                connections.spawn(script(Connection { stream }));
            }
        });
        Self { address, accepted, tasks }
    }

    /// Answers each request with the same bytes and keeps the connection.
    pub(crate) async fn answering(answer: impl Into<Vec<u8>>) -> Self {
        let answer: Arc<[u8]> = answer.into().into();
        Self::start(move |mut connection| {
            let answer = answer.clone();
            async move {
                while connection.request().await.is_some() {
                    connection.write(&answer).await;
                }
            }
        })
        .await
    }

    /// Connections accepted so far.
    pub(crate) fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }

    pub(crate) fn engine(&self) -> OpenAiEngine {
        self.engine_with(OpenAiOptions::default())
    }

    pub(crate) fn engine_with(&self, options: OpenAiOptions) -> OpenAiEngine {
        OpenAiEngine::new(&format!("http://{}", self.address), options).unwrap()
    }

    /// Closes the port and all connections.
    pub(crate) async fn stop(mut self) -> SocketAddr {
        self.tasks.shutdown().await;
        self.address
    }
}

/// One accepted connection.
pub(crate) struct Connection {
    stream: TcpStream,
}

/// A request as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    /// Request line and headers.
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Connection {
    /// The next request; none if the client hung up.
    pub(crate) async fn request(&mut self) -> Option<Received> {
        let mut bytes = Vec::new();
        loop {
            if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
                let head = String::from_utf8(bytes[..end].to_vec()).unwrap().to_lowercase();
                let length =
                    head.lines().find_map(|line| line.strip_prefix("content-length: ")).map_or(0, |n| n.parse().unwrap());
                if bytes.len() == end + 4 + length {
                    return Some(Received { head, body: String::from_utf8(bytes[end + 4..].to_vec()).unwrap() });
                }
            }
            if self.stream.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    /// A client that is gone does not mind.
    pub(crate) async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.stream.write_all(bytes.as_ref()).await;
    }

    /// Waits until the client hangs up.
    pub(crate) async fn hung_up(&mut self) {
        let mut rest = [0; 1024];
        while self.stream.read(&mut rest).await.is_ok_and(|length| length > 0) {}
    }

    /// Says that nothing more will be said.
    pub(crate) async fn close_our_half(&mut self) {
        let _ = self.stream.shutdown().await;
    }

    /// Says nothing for ever.
    pub(crate) async fn stall(self) {
        std::future::pending::<()>().await;
    }

    /// Closes it so that the client sees a reset, not an end.
    pub(crate) fn reset(self) {
        self.stream.set_zero_linger().unwrap();
    }
}

/// Head of a chunked event stream.
pub(crate) const STREAM_HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";

/// One HTTP chunk.
pub(crate) fn http_chunk(data: &str) -> String {
    format!("{:x}\r\n{data}\r\n", data.len())
}

/// A whole chunked answer with one HTTP chunk per event, as uvicorn sends it.
pub(crate) fn stream_answer(events: &str) -> String {
    let chunks: String = events.split_inclusive("\n\n").map(http_chunk).collect();
    format!("{STREAM_HEAD}{chunks}0\r\n\r\n")
}

/// An answer with its length.
pub(crate) fn whole_answer(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

pub(crate) fn ask(stream: bool) -> GenerateRequest {
    let body = format!(r#"{{"model":"m","messages":[],"stream":{stream}}}"#);
    GenerateRequest::new(Endpoint::ChatCompletions, body.into(), stream, "request-1".into())
}

/// Bounds a wait.
pub(crate) async fn soon<T>(wait: impl Future<Output = T>) -> T {
    timeout(PATIENCE, wait).await.expect("it should have happened by now")
}

pub(crate) async fn stream_of(engine: &OpenAiEngine) -> ChunkStream {
    match soon(engine.generate(ask(true))).await {
        Ok(Reply::Stream(chunks)) => chunks,
        Ok(Reply::Whole(whole)) => panic!("a stream was expected, not {whole:?}"),
        Err(error) => panic!("a stream was expected, not: {error}"),
    }
}

pub(crate) async fn whole_of(engine: &OpenAiEngine) -> WholeReply {
    match soon(engine.generate(ask(false))).await {
        Ok(Reply::Whole(whole)) => whole,
        Ok(Reply::Stream(_)) => panic!("a whole reply was expected, not a stream"),
        Err(error) => panic!("a whole reply was expected, not: {error}"),
    }
}

pub(crate) async fn error_of(engine: &OpenAiEngine) -> EngineError {
    soon(engine.generate(ask(false))).await.err().expect("an error was expected")
}

/// A stream's bytes, and how it ended: `done`, or an error's label.
pub(crate) async fn read(mut chunks: ChunkStream) -> (String, &'static str) {
    let mut bytes = Vec::new();
    let mut end = "nothing";
    while let Some(item) = soon(chunks.next()).await {
        assert_eq!(end, "nothing", "an item after the one that ends the stream");
        match item {
            Ok(chunk) => {
                bytes.extend_from_slice(&chunk.bytes);
                if chunk.summary.done {
                    end = "done";
                }
            }
            Err(error) => end = error.label(),
        }
    }
    assert!(chunks.next().await.is_none(), "an ended stream stays ended");
    (String::from_utf8(bytes).unwrap(), end)
}
