//! Faults as they are on the wire.

use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{Server, client, within_60_s};

/// Sends a completion of ten tokens on a connection of its own, and reads bytes as they are until it is closed or `enough`.
async fn raw(server: &Server, stream: bool, enough: usize) -> Vec<u8> {
    let body = json!({ "prompt": "x", "max_tokens": 10, "stream": stream }).to_string();
    let mut socket = TcpStream::connect(server.address).await.unwrap();
    let head = format!("POST /v1/completions HTTP/1.1\r\nhost: m\r\ncontent-length: {}\r\n\r\n", body.len());
    socket.write_all((head + &body).as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    while bytes.len() < enough && within_60_s(socket.read_buf(&mut bytes)).await.unwrap() > 0 {}
    bytes
}

async fn set(server: &Server, faults: Value) {
    let reply = server.client().await.post("/mock/faults", &[], faults.to_string()).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.body);
}

#[tokio::test]
async fn a_connection_is_cut_within_an_event() {
    let server = Server::start("fault.cut=3").await;
    let bytes = raw(&server, true, usize::MAX).await;
    let text = String::from_utf8(bytes).unwrap();
    let (whole, torn) = text.rsplit_once("data: ").unwrap();
    assert!(whole.contains(r#""text":" t2""#) && !whole.contains("t3"), "{whole}");
    assert!(!torn.contains('\n') && !torn.ends_with('}'), "{torn}");
    // Within an HTTP chunk, too: it announced more.
    let announced = whole.lines().rev().find(|line| !line.is_empty()).unwrap();
    assert!(usize::from_str_radix(announced, 16).unwrap() > torn.len() + "data: ".len(), "{announced}");
}

#[tokio::test]
async fn a_connection_is_cut_within_a_character() {
    let server = Server::start("script=wide&fault.cut_character=3").await;
    let bytes = raw(&server, true, usize::MAX).await;
    let error = std::str::from_utf8(&bytes).unwrap_err();
    assert_eq!((error.error_len(), bytes.len() - error.valid_up_to()), (None, 1), "one byte of a character is there");
    assert!(bytes.windows(4).any(|bytes| bytes == "🌊".as_bytes()));
}

#[tokio::test]
async fn a_whole_reply_is_cut() {
    let server = Server::start("fault.cut=10").await;
    let text = String::from_utf8(raw(&server, false, usize::MAX).await).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let length: usize = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap().parse().unwrap();
    assert_eq!(body.len(), length / 2);
}

#[tokio::test]
async fn a_dead_core_says_so_and_ends_as_a_good_stream_does() {
    let server = Server::start("fault.error_event=2").await;
    let text = String::from_utf8(raw(&server, true, 700).await).unwrap();
    let error = r#"data: {"error": {"message": "EngineCore encountered an issue. See stack trace (above) for the root cause.", "type": "InternalServerError", "param": null, "code": 500}}"#;
    assert!(text.contains(&format!("{error}\n\ndata: [DONE]\n\n")), "{text}");
    assert!(text.contains("t1") && !text.contains("t2") && text.ends_with("\r\n0\r\n\r\n"), "{text}");
}

#[tokio::test]
async fn a_stream_ends_without_a_word() {
    let server = Server::start("fault.end=2").await;
    let mut client = server.client().await;
    let reply = client.post("/v1/completions", &[], json!({ "prompt": "x", "stream": true }).to_string()).await;
    assert!(reply.body.contains("t1") && !reply.body.contains("t2") && !reply.body.contains("[DONE]"), "{}", reply.body);
}

#[tokio::test]
async fn a_head_does_not_end_and_a_page_is_no_stream() {
    let server = Server::start("fault.endless_headers=true&fault.next=1").await;
    let text = String::from_utf8(raw(&server, true, 1 << 20).await).unwrap();
    assert!(text.starts_with("HTTP/1.1 200 OK\r\nx-one-more: ") && !text.contains("\r\n\r\n"), "{}", &text[..200]);
    set(&server, json!({ "content_type": "text/html" })).await;
    let reply = server.client().await.post("/v1/completions", &[], json!({ "prompt": "x", "stream": true }).to_string()).await;
    assert_eq!((reply.status, &reply.headers["content-type"]), (StatusCode::OK, &"text/html".parse().unwrap()));
}

#[tokio::test]
async fn a_hung_server_takes_connections_and_is_healed_by_its_switches() {
    let server = Server::start("fault.hang=0").await;
    let mut client = server.client().await;
    let health = client.get("/health");
    tokio::pin!(health);
    assert!(tokio::time::timeout(std::time::Duration::from_millis(100), &mut health).await.is_err());
    set(&server, json!({})).await;
    assert_eq!(health.await.status, StatusCode::OK);
}

#[tokio::test]
async fn faults_are_told_and_health_says_what_it_was_told() {
    let server = Server::start("").await;
    let mut client = server.client().await;
    set(&server, json!({ "unhealthy": true, "refuse": "draining" })).await;
    assert_eq!(client.get("/health").await.status, StatusCode::SERVICE_UNAVAILABLE);
    let reply = client.post("/v1/completions", &[], json!({ "prompt": "x" }).to_string()).await;
    assert_eq!(
        (reply.status.as_u16(), &reply.json()["error"]["message"]),
        (500, &json!("cannot schedule new futures after shutdown"))
    );
    let told = client.get("/mock/faults").await.json();
    assert_eq!((&told["faults"]["refuse"], &told["struck"]), (&json!("draining"), &json!(1)));
    let refused = client.post("/mock/faults", &[], r#"{"fire":1}"#.to_owned()).await;
    assert_eq!(refused.status, StatusCode::BAD_REQUEST);
    assert!(refused.json()["error"]["message"].as_str().unwrap().contains("\"fire\" is not known"));
}

#[tokio::test]
async fn a_server_that_stalls_on_stop_takes_no_connections_and_leaves_its_streams_open() {
    let server = Server::start("speedup=1&fault.stall_on_stop=true").await;
    let mut client = server.client().await;
    let body = json!({ "prompt": "x", "max_tokens": 10_000, "stream": true }).to_string();
    let mut stream = client.send(Method::POST, "/v1/completions", &[], body).await;
    client::next_frame(&mut stream).await;
    let (address, task) = (server.address, server.task);
    server.shutdown.send(()).unwrap();
    within_60_s(async { while TcpStream::connect(address).await.is_ok() {} }).await;
    // What was generated before may still come.
    let silence = async {
        loop {
            client::next_frame(&mut stream).await;
        }
    };
    assert!(tokio::time::timeout(std::time::Duration::from_millis(300), silence).await.is_err());
    assert_eq!(task.len(), 1, "it does not end");
}
