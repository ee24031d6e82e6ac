//! Bad input at the front door: each a clear error in OpenAI's shape, none a panic, none a hang.

use hyper::Method;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

use crate::harness::{
    eventually,
    host::{Host, chat, completion, streamed},
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

async fn host() -> Host {
    Host::over_mocks(&["a"], "speedup=50", &[]).await
}

/// The same request with one field changed; null takes it away.
fn with(mut body: Value, field: &str, value: Value) -> String {
    let fields = body.as_object_mut().unwrap();
    match value {
        Value::Null => drop(fields.remove(field)),
        value => drop(fields.insert(field.to_owned(), value)),
    }
    body.to_string()
}

#[tokio::test]
async fn malformed_json_is_told_where_it_breaks() {
    let host = host().await;
    for body in ["", "{", "not json", r#"{"model":"m","messages":[{"role":"user""#, r#"{"model":"m",}"#, "{} {}"] {
        for path in [CHAT, COMPLETIONS] {
            let message = host.http.post(path, body).await.is_error(400, "invalid_json");
            assert!(message.contains("line 1") || message.contains("empty"), "{body:?}: {message}");
        }
    }
    for body in ["[]", "3", "null", r#""text""#] {
        let reply = host.http.post(CHAT, body).await;
        let message = reply.is_error(400, "invalid_json");
        assert!(message.contains("object"), "{body:?}: {message}");
    }
    host.is_well().await;
}

#[tokio::test]
async fn nesting_without_end_is_refused() {
    let host = host().await;
    for (open, close) in [("[", "]"), (r#"{"a":"#, "}")] {
        let deep = format!("{}1{}", open.repeat(100_000), close.repeat(100_000));
        let body = format!(r#"{{"model":"m","messages":[],"x":{deep}}}"#);
        let reply = host.http.post(CHAT, body).await;
        assert_eq!(reply.status, 400, "{}", reply.text());
    }
    host.is_well().await;
}

#[tokio::test]
async fn a_body_that_is_not_utf8_is_refused() {
    let host = host().await;
    let body = b"{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":\"\xff\xfe\"}]}".to_vec();
    host.http.post(CHAT, body.clone()).await.is_error(400, "invalid_utf8");
    let in_a_field_that_passes = b"{\"model\":\"m\",\"messages\":[],\"a_field_of_tomorrow\":\"\xc3\x28\"}".to_vec();
    host.http.post(CHAT, in_a_field_that_passes).await.is_error(400, "invalid_utf8");
    host.is_well().await;
}

#[tokio::test]
async fn a_field_of_the_wrong_type_is_named() {
    let host = host().await;
    for (path, field, value) in [
        (CHAT, "model", json!(3)),
        (CHAT, "messages", json!("hello")),
        (CHAT, "messages", json!({})),
        (CHAT, "stream", json!("yes")),
        (CHAT, "max_tokens", json!("many")),
        (CHAT, "max_completion_tokens", json!([1])),
        (CHAT, "n", json!("two")),
        (COMPLETIONS, "prompt", json!({ "text": "x" })),
        (COMPLETIONS, "prompt", json!(3)),
        (COMPLETIONS, "stream", json!(1)),
    ] {
        let body = if path == CHAT { chat(2) } else { completion(2) };
        let reply = host.http.post(path, with(body, field, value.clone())).await;
        let message = reply.is_error(400, "invalid_field");
        assert_eq!(reply.json()["error"]["param"], field, "{message}");
        assert!(message.contains(field), "{field} = {value}: {message}");
    }
    host.is_well().await;
}

#[tokio::test]
async fn an_absurd_number_of_tokens_is_refused_as_such() {
    let host = host().await;
    for value in ["-1", "1.5", "1e12", "4294967296", "99999999999999999999999", "-9223372036854775809"] {
        for stream in [false, true] {
            let body =
                format!(r#"{{"model":"m","messages":[{{"role":"user","content":"x"}}],"max_tokens":{value},"stream":{stream}}}"#);
            let reply = host.http.post(CHAT, body).await;
            let message = reply.is_error(400, "invalid_field");
            assert_eq!(reply.json()["error"]["param"], "max_tokens", "{value}: {message}");
        }
    }
    // What the host cannot know to be too much, the engine refuses, in its own words.
    let reply = host.http.post(CHAT, chat(1_000_000).to_string()).await;
    assert_eq!(reply.status, 400, "{}", reply.text());
    assert!(reply.text().contains("max_model_len"), "{}", reply.text());
    host.is_well().await;
}

#[tokio::test]
async fn a_missing_field_is_named() {
    let host = host().await;
    for (path, field) in [(CHAT, "model"), (CHAT, "messages"), (COMPLETIONS, "model"), (COMPLETIONS, "prompt")] {
        let body = if path == CHAT { chat(2) } else { completion(2) };
        let reply = host.http.post(path, with(body, field, Value::Null)).await;
        let message = reply.is_error(400, "missing_field");
        assert_eq!(reply.json()["error"]["param"], field, "{message}");
    }
    host.is_well().await;
}

#[tokio::test]
async fn an_unknown_model_is_answered_with_those_that_exist() {
    let host = host().await;
    for body in [chat(2), streamed(chat(2))] {
        let reply = host.http.post(CHAT, with(body, "model", json!("gpt-17"))).await;
        let message = reply.is_error(404, "model_not_found");
        assert!(message.contains("gpt-17") && message.contains("/v1/models"), "{message}");
        assert_eq!(reply.json()["error"]["param"], "model");
    }
    host.is_well().await;
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused_however_it_is_sent() {
    let host = Host::over_mocks(&["a"], "speedup=50", &["--max-body-bytes", "65536"]).await;
    let fits = with(chat(2), "padding", json!("x".repeat(60_000)));
    assert_eq!(host.http.post(CHAT, fits).await.status, 200);
    for bytes in [70_000, 16 << 20] {
        let message =
            host.http.post(CHAT, with(chat(2), "padding", json!("x".repeat(bytes)))).await.is_error(413, "body_too_large");
        assert!(message.contains("65536"), "{message}");
    }
    // Without a length, it shows only when it is read.
    let mut chunked = format!("POST {CHAT} HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n").into_bytes();
    for _ in 0..20 {
        chunked.extend(format!("1000\r\n{}\r\n", "x".repeat(4096)).into_bytes());
    }
    chunked.extend(b"0\r\n\r\n");
    let answer = host.http.raw(&chunked, "body_too_large").await;
    assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("body_too_large"), "{answer}");
    host.is_well().await;
}

#[tokio::test]
async fn an_unknown_path_and_a_wrong_method_say_so() {
    let host = host().await;
    let message = host.http.get("/v1/chat/completion").await.is_error(404, "not_found");
    assert!(message.contains("/v1/chat/completion"), "{message}");
    host.http.post("/nothing", "{}").await.is_error(404, "not_found");
    for (method, path, allowed) in
        [(Method::GET, CHAT, "POST"), (Method::DELETE, COMPLETIONS, "POST"), (Method::POST, "/v1/models", "GET")]
    {
        let reply = host.http.send(method, path, &[], "").await;
        reply.is_error(405, "method_not_allowed");
        assert!(reply.header("allow").contains(allowed), "{:?}", reply.headers);
    }
    host.is_well().await;
}

#[tokio::test]
async fn bytes_that_are_no_http_harm_nobody() {
    let host = host().await;
    let answer = host.http.raw(b"\x16\x03\x01 this is no HTTP\r\n\r\n", "400").await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{answer}");
    let huge_header = format!("GET /live HTTP/1.1\r\nhost: h\r\nx: {}\r\n\r\n", "y".repeat(1 << 20));
    let answer = host.http.raw(huge_header.as_bytes(), "HTTP/1.1 4").await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    host.is_well().await;
}

#[tokio::test]
async fn a_client_that_leaves_before_its_body_is_whole_is_forgotten() {
    let host = host().await;
    for _ in 0..8 {
        let mut socket = host.http.socket().await;
        let half = format!("POST {CHAT} HTTP/1.1\r\nhost: h\r\ncontent-length: 1000\r\n\r\n{{\"model\":");
        socket.write_all(half.as_bytes()).await.unwrap();
    }
    host.is_well().await;
    eventually("nothing is in flight", async || {
        let status = host.admin.get_json("/v1/status").await;
        (status["workers"][0]["active_requests"] == 0).then_some(())
    })
    .await;
}
