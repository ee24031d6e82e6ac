//! Engines that fail, and clients that leave.

use hyper::StatusCode;
use serde_json::{Value, json};

use crate::harness::{
    components, eventually,
    host::{Host, MockProcess, chat, completion, streamed},
    scripted::{STREAM_HEAD, Scripted, end_events, http_chunk, stream_answer, token_event, whole_answer},
    soon,
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

#[tokio::test]
async fn an_engine_that_refuses_connections_is_passed_over() {
    let mut dies = MockProcess::start(&["speedup=50"]).await;
    let routing = components::policy("round-robin");
    let worker = format!("{},model=m", dies.url());
    let host = Host::start(&[
        "--worker",
        &worker,
        "--worker",
        "mock://lives?model=m&speedup=50",
        "--routing",
        &routing,
        "--expose-worker",
    ])
    .await;
    dies.process.kill();
    // Half of these begin at the dead one, until its probe says so.
    for i in 0..20 {
        let reply = host.serves(3).await;
        assert_eq!(reply.header("x-dynamo-worker"), "lives", "request {i}");
        assert_eq!(host.http.stream(CHAT, &streamed(chat(5))).await.header("x-dynamo-worker"), "lives");
    }
}

#[tokio::test]
async fn an_engine_that_comes_back_is_used_again() {
    let mut engine = MockProcess::start(&["speedup=50"]).await;
    let address = engine.url().strip_prefix("http://").unwrap().to_owned();
    let host = Host::start(&["--worker", &format!("{},model=m", engine.url())]).await;
    host.serves(3).await;
    engine.process.kill();
    host.workers_are("unreachable").await;
    host.http.post(CHAT, chat(3).to_string()).await.is_error(503, "no_worker");
    let _engine = MockProcess::start_at(&address, &["speedup=50"]).await;
    host.workers_are("healthy").await;
    host.serves(3).await;
}

#[tokio::test]
async fn without_a_live_engine_the_answer_says_so_at_once() {
    let mut engine = MockProcess::start(&["speedup=50"]).await;
    let host = Host::start(&["--worker", &format!("{},model=m", engine.url())]).await;
    engine.process.kill();
    for stream in [false, true] {
        let body = if stream { streamed(chat(3)) } else { chat(3) };
        let reply = host.http.post(CHAT, body.to_string()).await;
        let code = reply.json()["error"]["code"].as_str().unwrap().to_owned();
        // Which of them depends on whether the probe was there before.
        match code.as_str() {
            "engine_connect" => reply.is_error(502, "engine_connect"),
            _ => reply.is_error(503, "no_worker"),
        };
    }
    host.workers_are("unreachable").await;
    let message = host.http.post(CHAT, chat(3).to_string()).await.is_error(503, "no_worker");
    assert!(message.contains('m'), "{message}");
}

#[tokio::test]
async fn a_client_that_leaves_its_stream_frees_the_engine() {
    let engine = MockProcess::start(&["decode_ms_base=20"]).await;
    let host = Host::start(&["--worker", &format!("{},model=m", engine.url())]).await;
    let mut streams = Vec::new();
    for _ in 0..4 {
        let mut stream = host.http.open(CHAT, &streamed(chat(30_000))).await;
        stream.event().await;
        streams.push(stream);
    }
    engine.runs(4).await;
    drop(streams.split_off(1));
    engine.runs(1).await;
    drop(streams);
    engine.runs(0).await;
}

#[tokio::test]
async fn a_client_that_leaves_before_its_answer_frees_the_engine() {
    let engine = MockProcess::start(&["decode_ms_base=1e12"]).await;
    let host = Host::start(&["--worker", &format!("{},model=m", engine.url())]).await;
    let (client, body) = (host.http.clone(), completion(10).to_string());
    let mut waiting = tokio::task::JoinSet::new();
    waiting.spawn(async move { client.post(COMPLETIONS, body).await });
    engine.runs(1).await;
    waiting.shutdown().await;
    engine.runs(0).await;
}

#[tokio::test]
async fn a_client_that_leaves_an_engine_in_this_process_frees_its_place() {
    let host = Host::over_mocks(&["a"], "decode_ms_base=1e12", &[]).await;
    let mut stream = host.http.open(CHAT, &streamed(chat(10))).await;
    stream.event().await;
    drop(stream);
    eventually("nothing is in flight", async || {
        let status = host.admin.get_json("/v1/status").await;
        (status["workers"][0]["active_requests"] == 0).then_some(())
    })
    .await;
}

/// Streams over an engine that answers so; the data of the events, and whether the stream broke.
async fn stream_over(answer: String) -> (Vec<String>, Host) {
    let engine = Scripted::answering(answer).await;
    // An engine that is not known to go on with a chat.
    let host = Host::start(&["--worker", &engine.worker()]).await;
    let (events, end) = host.http.open(CHAT, &streamed(chat(9))).await.rest().await;
    assert_eq!(end, Ok(()), "the host ends what it streams properly");
    (events, host)
}

/// The last event is an error of this code, after the tokens that came.
#[track_caller]
fn ends_in_error(events: &[String], tokens: usize, code: &str) {
    assert!(!events.iter().any(|event| event == "[DONE]"), "a failed stream does not say that it is done: {events:?}");
    assert_eq!(events.len(), tokens + 1, "{events:?}");
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], code, "{last}");
    assert!(!last["error"]["message"].as_str().unwrap().is_empty(), "{last}");
}

#[tokio::test]
async fn a_stream_whose_engine_dies_ends_in_an_error_event() {
    // Two tokens, then the connection closes within the chunked body.
    let (events, host) =
        stream_over(format!("{STREAM_HEAD}{}{}", http_chunk(&token_event(0)), http_chunk(&token_event(1)))).await;
    ends_in_error(&events, 2, "migration_unsound");
    assert_eq!(host.http.metric("dynamo_host_errors_total", &[("kind", "migration_unsound")]).await, 1.0);
}

#[tokio::test]
async fn a_stream_that_ends_early_is_not_taken_for_complete() {
    let (events, host) = stream_over(stream_answer(&(token_event(0) + &token_event(1) + &token_event(2)))).await;
    ends_in_error(&events, 3, "migration_unsound");
    assert_eq!(host.http.metric("dynamo_host_errors_total", &[("kind", "migration_unsound")]).await, 1.0);
    // `[DONE]` alone does not make it complete.
    let (events, _host) = stream_over(stream_answer(&(token_event(0) + "data: [DONE]\n\n"))).await;
    ends_in_error(&events, 1, "migration_unsound");
}

#[tokio::test]
async fn an_engines_error_within_a_stream_reaches_the_client_in_its_words() {
    let error = json!({ "error": { "message": "the core is dead", "type": "InternalServerError", "code": 500 } });
    let (events, host) = stream_over(stream_answer(&format!("{}data: {error}\n\ndata: [DONE]\n\n", token_event(0)))).await;
    assert!(events.iter().any(|event| event.contains("the core is dead")), "{events:?}");
    assert_eq!(host.http.metric("dynamo_host_errors_total", &[("kind", "migration_unsound")]).await, 1.0);
}

#[tokio::test]
async fn a_whole_answer_that_breaks_off_is_a_502() {
    let engine = Scripted::answering("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{").await;
    let host = Host::start(&["--worker", &engine.worker()]).await;
    host.http.post(CHAT, chat(3).to_string()).await.is_error(502, "engine_broken");
    let engine = Scripted::answering("this is no HTTP\r\n\r\n").await;
    let host = Host::start(&["--worker", &engine.worker()]).await;
    let reply = host.http.post(CHAT, chat(3).to_string()).await;
    assert_eq!(reply.status, StatusCode::BAD_GATEWAY, "{}", reply.text());
}

#[tokio::test]
async fn an_engines_own_error_passes_as_it_is() {
    let body = r#"{"error":{"message":"too long by far","type":"exceed_context_size_error","code":400,"n_ctx":4096}}"#;
    for (status, number) in [("400 Bad Request", 400), ("422 Unprocessable Entity", 422), ("429 Too Many Requests", 429)] {
        let engine = Scripted::answering(whole_answer(status, body)).await;
        let host = Host::start(&["--worker", &engine.worker()]).await;
        for asked in [chat(3), streamed(chat(3))] {
            let reply = host.http.post(CHAT, asked.to_string()).await;
            assert_eq!((reply.status.as_u16(), reply.text().as_str()), (number, body));
        }
    }
}

#[tokio::test]
async fn an_engine_that_drops_kept_connections_loses_no_request() {
    // As llama.cpp does after each stream: the connection looks kept, and is closed under the next request.
    let answer = stream_answer(&(token_event(0) + &end_events())).replace("connection: close\r\n", "");
    let engine = Scripted::start(move |mut connection| {
        let answer = answer.clone();
        async move {
            connection.write(answer).await;
            connection.hears_more().await;
        }
    })
    .await;
    let host = Host::start(&["--worker", &engine.worker()]).await;
    for _ in 0..10 {
        assert_eq!(host.http.stream(CHAT, &streamed(chat(1))).await.text(), "t0");
    }
    assert_eq!(host.http.metric("dynamo_host_errors_total", &[]).await, 0.0);
}

#[tokio::test]
async fn an_engine_that_never_answers_holds_nobody_else_up() {
    let engine = Scripted::start(|mut connection| async move { connection.hung_up().await }).await;
    let silent = engine.worker();
    let host = Host::start(&["--worker", &silent, "--worker", "mock://other?model=o&speedup=50"]).await;
    let (client, body) = (host.http.clone(), chat(3).to_string());
    let mut waiting = tokio::task::JoinSet::new();
    waiting.spawn(async move { client.post(CHAT, body).await });
    eventually("the engine has the request", async || (!engine.received().is_empty()).then_some(())).await;
    let mut asked = completion(3);
    asked["model"] = "o".into();
    host.http.ask(COMPLETIONS, &asked).await;
    soon("the client leaves", waiting.shutdown()).await;
}
