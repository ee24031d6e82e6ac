//! The books of each worker's load: whatever becomes of requests, nothing is left of them.

use serde_json::{Value, json};

use crate::harness::{
    components, eventually,
    host::{Host, MockProcess, chat, completion, streamed},
    scripted::{STREAM_HEAD, Scripted, http_chunk, stream_answer, token_event, whole_answer},
};

const CHAT: &str = "/v1/chat/completions";
const COLUMNS: [&str; 4] = ["active_requests", "active_prefill_tokens", "active_uncached_tokens", "active_decode_tokens"];

async fn workers(host: &Host) -> Vec<Value> {
    let report = host.admin.get_json("/v1/workers").await;
    report["workers"].as_array().unwrap_or_else(|| panic!("no workers in {report}")).clone()
}

/// Waits until nothing is booked on any worker.
async fn nothing_is_left(host: &Host) {
    eventually("nothing is booked on any worker", async || {
        let booked = |worker: &Value| COLUMNS.iter().any(|column| worker[column] != 0);
        (!workers(host).await.iter().any(booked)).then_some(())
    })
    .await;
}

fn of_model(mut body: Value, model: &str) -> Value {
    body["model"] = model.into();
    body
}

#[tokio::test]
async fn a_request_is_booked_with_what_is_to_be_computed_and_with_what_it_decodes() {
    let host = Host::over_mocks(&["a"], "prefill_ms_base=1e12", &[]).await;
    let (client, body) = (host.http.clone(), completion(5).to_string());
    let mut waiting = tokio::task::JoinSet::new();
    waiting.spawn(async move { client.post("/v1/completions", body).await });
    let booked = eventually("it is in prefill", async || {
        workers(&host).await.into_iter().find(|worker| worker["active_prefill_tokens"].as_u64() > Some(0))
    })
    .await;
    assert_eq!((&booked["active_requests"], &booked["active_decode_tokens"]), (&json!(1), &json!(0)), "{booked}");
    assert_eq!(booked["active_uncached_tokens"], booked["active_prefill_tokens"], "nobody holds any of it: {booked}");
    waiting.shutdown().await;
    nothing_is_left(&host).await;

    let host = Host::over_mocks(&["a"], "decode_ms_base=20", &[]).await;
    let mut stream = host.http.open(CHAT, &streamed(chat(30_000))).await;
    stream.event().await;
    eventually("it decodes", async || {
        let worker = workers(&host).await.remove(0);
        (worker["active_decode_tokens"].as_u64() > Some(1) && worker["active_uncached_tokens"] == 0).then_some(())
    })
    .await;
    drop(stream);
    nothing_is_left(&host).await;
}

#[tokio::test]
async fn nothing_is_left_of_requests_that_end_in_any_way() {
    let mut dies = MockProcess::start(&["decode_ms_base=20"]).await;
    let refusing = Scripted::answering(whole_answer("400 Bad Request", r#"{"error":{"message":"too long"}}"#)).await;
    let breaking = Scripted::answering("").await;
    let half = Scripted::answering(format!("{STREAM_HEAD}{}", http_chunk(&token_event(0)))).await;
    let incomplete = Scripted::answering(stream_answer(&(token_event(0) + &token_event(1)))).await;
    let silent = Scripted::start(|mut connection| async move { connection.hung_up().await }).await;
    let of = |url: &str, model: &str| format!("{url},name={model},model={model}");
    let workers = [
        of(dies.url(), "m"),
        of(&refusing.url(), "refusing"),
        of(&breaking.url(), "breaking"),
        of(&half.url(), "half"),
        of(&incomplete.url(), "incomplete"),
        of(&silent.url(), "silent"),
        // One that breaks and one that serves: requests are tried again.
        format!("{},name=breaks-too,model=tried", breaking.url()),
    ];
    let mut arguments: Vec<&str> = workers.iter().flat_map(|worker| ["--worker", worker.as_str()]).collect();
    arguments.extend([
        "--worker",
        "mock://serves?model=tried&speedup=50",
        "--worker",
        "mock://slow?model=slow&decode_ms_base=20",
    ]);
    let limits = "[limits]\nrequest_timeout_s = 5\nstream_idle_s = 2\n";
    let policy = components::policy("round-robin");
    arguments.extend(["--routing", &policy]);
    let host = Host::configured(limits, &arguments).await;

    let mut requests = tokio::task::JoinSet::new();
    let mut ask = |body: Value| {
        let http = host.http.clone();
        requests.spawn(async move { drop(http.post(CHAT, body.to_string()).await) });
    };
    for model in ["refusing", "breaking", "half", "incomplete", "silent", "tried"] {
        for _ in 0..4 {
            ask(of_model(chat(5), model));
            ask(of_model(streamed(chat(5)), model));
        }
    }
    // Clients that leave before the first byte, and within the stream.
    for _ in 0..4 {
        drop(host.http.open(CHAT, &of_model(streamed(chat(30_000)), "slow")).await);
        let mut stream = host.http.open(CHAT, &of_model(streamed(chat(30_000)), "slow")).await;
        stream.event().await;
        drop(stream);
        let (http, body) = (host.http.clone(), of_model(chat(30_000), "slow").to_string());
        let mut waiting = tokio::task::JoinSet::new();
        waiting.spawn(async move { http.post(CHAT, body).await });
        tokio::task::yield_now().await;
        waiting.shutdown().await;
    }
    // An engine that is killed while it streams.
    let mut streams = Vec::new();
    for _ in 0..4 {
        let mut stream = host.http.open(CHAT, &of_model(streamed(chat(30_000)), "m")).await;
        stream.event().await;
        streams.push(stream);
    }
    dies.process.kill();
    for stream in streams {
        drop(stream.rest().await);
    }
    // Those that time out do so meanwhile.
    drop(requests.join_all().await);
    nothing_is_left(&host).await;
    assert!(!host.process.panicked(), "it panicked");
    assert_eq!(host.http.metric("dynamo_host_requests_in_flight", &[]).await, 0.0);
}
