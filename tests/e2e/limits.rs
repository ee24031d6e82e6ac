//! Waits that end: slow clients, clients that stop reading, requests without end, more connections than there may be.

use std::fs;

use futures_util::future::join_all;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::watch,
};

use crate::harness::{
    client::Client,
    eventually,
    host::{Host, chat, streamed},
    scripted::{STREAM_HEAD, Scripted, http_chunk, token_event},
    soon,
};

const CHAT: &str = "/v1/chat/completions";

/// A host over one worker with other limits than usual.
async fn host_with(limits: &str, worker: &str) -> Host {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("host.toml");
    fs::write(&file, format!("[limits]\n{limits}\n")).unwrap();
    Host::start(&["--config", file.to_str().unwrap(), "--worker", worker]).await
}

const MOCK: &str = "mock://a?model=m&speedup=50";

/// Sends the beginning of a request, and reads until the server hangs up.
async fn is_hung_up_on(client: &Client, begins: &str) {
    let mut socket = client.socket().await;
    socket.write_all(begins.as_bytes()).await.unwrap();
    let mut rest = Vec::new();
    let _ = soon("the server hangs up", socket.read_to_end(&mut rest)).await;
}

#[tokio::test]
async fn a_client_that_is_slow_to_say_what_it_wants_is_hung_up_on() {
    let host = host_with("header_timeout_s = 1", MOCK).await;
    // The last of these is answered, kept, and then not used again.
    let beginnings = ["", "GET /live HT", "GET /live HTTP/1.1\r\nhost: h\r\n", "GET /live HTTP/1.1\r\nhost: h\r\n\r\n"];
    let clients = [&host.http, &host.admin].into_iter();
    join_all(clients.flat_map(|client| beginnings.map(|begins| is_hung_up_on(client, begins)))).await;
    host.is_well().await;
}

/// A client in the middle of a stream of which there is more than all buffers on the way hold.
struct Flooded {
    host: Host,
    socket: TcpStream,
    /// Whether the engine has been left.
    has_left: watch::Receiver<bool>,
    _engine: Scripted,
}

impl Flooded {
    async fn start(limits: &str) -> Self {
        let (left, has_left) = watch::channel(false);
        let engine = Scripted::start(move |mut connection| {
            let left = left.clone();
            async move {
                let plenty = http_chunk(&token_event(0).repeat(1000));
                connection.write(STREAM_HEAD).await;
                while connection.is_open() {
                    connection.write(&plenty).await;
                }
                left.send_replace(true);
            }
        })
        .await;
        let host = host_with(limits, &engine.worker()).await;
        let body = streamed(chat(9)).to_string();
        let mut socket = host.http.socket().await;
        let request = format!("POST {CHAT} HTTP/1.1\r\nhost: h\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        socket.write_all(request.as_bytes()).await.unwrap();
        Self { host, socket, has_left, _engine: engine }
    }
}

#[tokio::test]
async fn a_client_that_stops_reading_its_stream_frees_the_engine() {
    let Flooded { host, has_left, .. } = &mut Flooded::start("write_stall_s = 1").await;
    soon("the host leaves the engine", has_left.wait_for(|left| *left)).await.unwrap();
    assert!(!host.process.panicked());
}

#[tokio::test]
async fn a_client_that_reads_a_little_now_and_then_does_not_outlast_its_request() {
    // By the stall alone it would have an hour.
    let Flooded { host, socket, has_left, .. } = &mut Flooded::start("request_timeout_s = 2\nwrite_stall_s = 3600").await;
    let sip = async {
        while socket.read(&mut [0; 1]).await.is_ok_and(|length| length > 0) {
            // Other work between two sips.
            host.http.get("/live").await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = sip => unreachable!("it never ends"),
        left = soon("the host leaves the engine", has_left.wait_for(|left| *left)) => drop(left.unwrap()),
    }
    eventually("its request is in the books no more", async || {
        (host.http.metric("dynamo_host_requests_in_flight", &[]).await == 0.0).then_some(())
    })
    .await;
    assert!(!host.process.panicked());
}

#[tokio::test]
async fn how_long_an_engine_tells_clients_to_stay_away_is_bounded() {
    for (said, told) in [("31536000000000", "86400"), ("7", "7"), ("Fri, 31 Dec 9999 23:59:59 GMT", "86400"), ("a while", "")] {
        let body = r#"{"error":{"message":"busy"}}"#;
        let head = format!("HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/json\r\nretry-after: {said}\r\n");
        let engine =
            Scripted::answering(format!("{head}content-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())).await;
        let host = Host::start(&["--worker", &engine.worker()]).await;
        let reply = host.http.post(CHAT, chat(3).to_string()).await;
        assert_eq!((reply.status.as_u16(), reply.header("retry-after")), (429, told), "{said}");
    }
}

#[tokio::test]
async fn a_request_that_takes_too_long_is_ended() {
    let silent = Scripted::start(|mut connection| async move { connection.hung_up().await }).await;
    let host = host_with("request_timeout_s = 1", &silent.worker()).await;
    let message = host.http.post(CHAT, chat(3).to_string()).await.is_error(504, "request_timeout");
    assert!(message.contains("within 1 s") && message.contains("limits.request_timeout_s"), "{message}");

    let host = host_with("request_timeout_s = 3", "mock://a?model=m&decode_ms_base=50").await;
    let (events, end) = host.http.open(CHAT, &streamed(chat(10_000))).await.rest().await;
    assert_eq!(end, Ok(()));
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert!(events.len() > 1 && last["error"]["code"] == "request_timeout", "{last}");
}

#[tokio::test]
async fn more_connections_than_there_may_be_wait_for_their_turn() {
    let host = host_with("max_connections = 1\nheader_timeout_s = 1", MOCK).await;
    let mut first = host.http.socket().await;
    let mut second = host.http.socket().await;
    second.write_all(b"GET /live HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n").await.unwrap();
    // The first is idle until it is hung up on; only then it is the second's turn.
    let mut answer = String::new();
    soon("an answer", second.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(soon("the first is hung up on", first.read(&mut [0])).await.unwrap(), 0);
    host.process.logs("limits.max_connections").await;
}
