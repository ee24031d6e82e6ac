//! A graceful stop: not ready at once, what runs ends well, what outlives its time is told so, and nobody is cut in silence.

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::watch,
};

use crate::harness::{
    client::{Client, read_raw},
    eventually,
    host::{Host, chat, completion, streamed},
    scripted::{STREAM_END, STREAM_HEAD, Scripted, end_events, http_chunk, token_event},
    soon,
    sse::Events,
};

const CHAT: &str = "/v1/chat/completions";
/// A token each 50 ms or so.
const SLOW: &str = "mock://a?model=m&decode_ms_base=50";
const QUICK: &str = "mock://a?model=m&speedup=50";

async fn is_stopping(host: &Host) {
    eventually("it is not ready", async || (host.http.get("/ready").await.status.as_u16() == 503).then_some(())).await;
}

/// A stream that has begun.
async fn begun(client: &Client, path: &str, tokens: u32) -> Events {
    let body = if path == "/v1/completions" { completion(tokens) } else { chat(tokens) };
    let mut stream = client.open(path, &streamed(body)).await;
    stream.event().await;
    stream
}

#[tokio::test]
async fn while_it_drains_it_is_not_ready_refuses_what_is_new_and_serves_what_it_has() {
    let (end, may_end) = watch::channel(false);
    let engine = Scripted::start(move |mut connection| {
        let mut may_end = may_end.clone();
        async move {
            connection.write(format!("{STREAM_HEAD}{}", http_chunk(&token_event(0)))).await;
            drop(may_end.wait_for(|may| *may).await);
            connection.write(http_chunk(&end_events()) + STREAM_END).await;
        }
    })
    .await;
    let mut host = Host::start(&["--worker", &engine.worker()]).await;
    let stream = begun(&host.http, CHAT, 1).await;
    let mut idle = host.http.socket().await;
    idle.write_all(b"GET /live HTTP/1.1\r\nhost: h\r\n\r\n").await.unwrap();
    read_raw(&mut idle, "live").await;
    host.process.signal("TERM");
    is_stopping(&host).await;
    let ready = host.http.get("/ready").await;
    assert_eq!((ready.status.as_u16(), ready.header("connection")), (503, "close"));
    assert_eq!(ready.json()["reason"], "the host is stopping");
    assert_eq!(host.http.get("/health").await.json()["status"], "stopping");
    assert_eq!(host.http.get("/live").await.status, 200);
    let refused = host.http.post(CHAT, chat(3).to_string()).await;
    assert!(refused.is_error(503, "shutting_down").contains("another"), "{}", refused.text());
    assert_eq!((refused.header("retry-after"), refused.header("connection")), ("1", "close"));
    // A connection that a balancer keeps is answered too, not cut under its request.
    let body = chat(3).to_string();
    let request = format!("POST {CHAT} HTTP/1.1\r\nhost: h\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    idle.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    soon("it is answered and closed", idle.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("shutting_down"), "{answer}");
    // The admin API works on.
    assert_eq!(host.admin.get("/v1/status").await.status, 200);
    end.send_replace(true);
    let answer = stream.streamed().await.unwrap();
    assert_eq!(answer.finish_reasons(), ["length"]);
    assert_eq!(host.process.ended().await.code(), Some(0));
}

#[tokio::test]
async fn what_outlives_its_time_ends_with_an_error_in_its_clients_shape() {
    let silent = Scripted::start(|mut connection| async move { connection.hung_up().await }).await;
    let config = format!("[limits]\ndrain_s = 1\n[[worker]]\nurl = \"{}\"\nmodel = \"s\"\n", silent.url());
    let mut host = Host::configured(&config, &["--worker", SLOW]).await;
    let streams = [begun(&host.http, "/v1/completions", 10_000).await, begun(&host.http, CHAT, 10_000).await];
    let body = json!({ "model": "s", "messages": [{ "role": "user", "content": "?" }], "max_tokens": 5 }).to_string();
    let client = host.http.clone();
    let mut whole = tokio::task::JoinSet::new();
    whole.spawn(async move { client.post(CHAT, body).await });
    eventually("the engine has it", async || (silent.received().len() == 1).then_some(())).await;
    host.process.signal("TERM");
    for stream in streams {
        let (events, end) = stream.rest().await;
        assert_eq!(end, Ok(()));
        let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
        assert_eq!((&last["error"]["code"], &last["error"]["type"]), (&json!("shutting_down"), &json!("server_error")), "{last}");
        assert!(!events.iter().any(|event| event == "[DONE]"));
    }
    whole.join_next().await.unwrap().unwrap().is_error(503, "shutting_down");
    assert_eq!(host.process.ended().await.code(), Some(0));
    host.process.logs("outlive their time").await;
}

#[tokio::test]
async fn a_stream_of_anthropics_api_ends_with_an_error_in_its_shape() {
    let mut host = Host::configured("[limits]\ndrain_s = 0\n", &["--worker", SLOW]).await;
    let body = streamed(chat(10_000)).to_string();
    let mut socket = host.http.socket().await;
    let request = format!("POST /v1/messages HTTP/1.1\r\nhost: h\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    socket.write_all(request.as_bytes()).await.unwrap();
    read_raw(&mut socket, "content_block_delta").await;
    host.process.signal("TERM");
    let mut rest = String::new();
    soon("it ends", socket.read_to_string(&mut rest)).await.unwrap();
    let (_, error) = rest.rsplit_once("event: error\ndata: ").unwrap_or_else(|| panic!("no error event: {rest}"));
    assert!(error.contains("overloaded_error") && rest.ends_with("0\r\n\r\n") && !rest.contains("message_stop"), "{rest}");
    assert_eq!(host.process.ended().await.code(), Some(0));
}

#[tokio::test]
async fn with_a_delay_all_is_served_until_balancers_have_seen_that_it_is_not_ready() {
    let mut host = Host::configured("[limits]\nstop_delay_s = 600\n", &["--worker", QUICK]).await;
    host.process.signal("TERM");
    is_stopping(&host).await;
    assert_eq!(host.serves(3).await.header("connection"), "close");
    host.process.signal("TERM");
    assert_eq!(host.process.ended().await.code(), Some(143));
}

#[tokio::test]
async fn when_the_delay_is_over_it_drains_and_ends() {
    let mut host = Host::configured("[limits]\nstop_delay_s = 1\n", &["--worker", QUICK]).await;
    host.process.signal("TERM");
    assert_eq!(host.process.ended().await.code(), Some(0));
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once_and_the_exit_code_says_so() {
    let mut host = Host::start(&["--worker", SLOW]).await;
    let stream = begun(&host.http, CHAT, 10_000).await;
    host.process.signal("TERM");
    is_stopping(&host).await;
    host.process.signal("TERM");
    let (events, _) = stream.rest().await;
    assert!(events.last().unwrap().contains("shutting_down"), "{:?}", events.last());
    assert_eq!(host.process.ended().await.code(), Some(143));
    host.process.logs("second signal").await;
}
