//! What is tried again elsewhere, how often, and what the client gets when nothing helps.

use serde_json::json;

use crate::harness::{
    client::Reply,
    host::{Host, MockProcess, chat, streamed},
    scripted::{Scripted, end_events, stream_answer, token_event, whole_answer},
};

const CHAT: &str = "/v1/chat/completions";

/// Engines that all answer so, and a host over them.
async fn over(answers: &[String]) -> (Vec<Scripted>, Host) {
    let mut engines = Vec::new();
    for answer in answers {
        engines.push(Scripted::answering(answer.clone()).await);
    }
    let workers: Vec<String> = engines.iter().map(Scripted::worker).collect();
    let arguments: Vec<&str> = workers.iter().flat_map(|worker| ["--worker", worker]).collect();
    let host = Host::start(&arguments).await;
    (engines, host)
}

fn asked(engines: &[Scripted]) -> usize {
    engines.iter().map(|engine| engine.received().len()).sum()
}

async fn ask(host: &Host) -> Reply {
    host.http.post(CHAT, streamed(chat(3)).to_string()).await
}

#[tokio::test]
async fn a_request_that_breaks_engines_breaks_a_few_only() {
    let (engines, host) = over(&vec![String::new(); 8]).await;
    ask(&host).await.is_error(502, "engine_broken");
    assert_eq!(asked(&engines), 5, "five engines, each asked once: their connections were made for it");
    assert_eq!(host.http.metric("dynamo_host_retries_total", &[("cause", "engine_broken")]).await, 4.0);
}

#[tokio::test]
async fn engines_that_cannot_be_reached_cost_no_attempt() {
    let well = Scripted::answering(stream_answer(&(token_event(0) + &end_events()))).await;
    let mut gone = Vec::new();
    for _ in 0..8 {
        gone.push(Scripted::answering(String::new()).await);
    }
    let workers: Vec<String> = gone.iter().chain([&well]).map(Scripted::worker).collect();
    let arguments: Vec<&str> = workers.iter().flat_map(|worker| ["--worker", worker]).collect();
    // Its probes and readings notice late, so that requests do.
    let slowly = "[migration]\nmax_attempts = 2\n[health]\ncanary = 'off'\nprobe_every_ms = 60000\n";
    let host = Host::configured(slowly, &arguments).await;
    drop(gone);
    for _ in 0..9 {
        let reply = ask(&host).await;
        assert_eq!(reply.status.as_u16(), 200, "{}", reply.text());
    }
    assert_eq!(well.received().len(), 9);
    // With nobody left, what they failed with is the answer.
    drop(well);
    let code = ask(&host).await.json()["error"]["code"].clone();
    assert!(code == "engine_connect" || code == "no_worker", "{code}");
}

#[tokio::test]
async fn an_engines_no_is_not_asked_of_another() {
    let error = json!({ "error": { "message": "no such adapter", "code": 400 } });
    let refuses = stream_answer(&format!("data: {error}\n\ndata: [DONE]\n\n"));
    let (engines, host) = over(&vec![refuses; 3]).await;
    let message = ask(&host).await.is_error(502, "engine_in_stream");
    assert!(message.contains("no such adapter"), "{message}");
    assert_eq!(asked(&engines), 1);
}

#[tokio::test]
async fn a_busy_engine_is_passed_over_and_if_all_are_its_answer_passes() {
    let busy = whole_answer("503 Service Unavailable", r#"{"error":{"message":"all slots are taken"}}"#);
    let (engines, host) = over(&vec![busy.clone(); 2]).await;
    let reply = ask(&host).await;
    assert_eq!((reply.status.as_u16(), reply.text().contains("all slots are taken")), (503, true), "{}", reply.text());
    assert_eq!(asked(&engines), 2);
    assert_eq!(host.http.metric("dynamo_host_retries_total", &[("cause", "engine_unhealthy")]).await, 1.0);

    let busy = Scripted::answering(busy).await;
    let host = Host::start(&["--worker", &busy.worker(), "--worker", "mock://b?model=m&speedup=50"]).await;
    for _ in 0..8 {
        host.serves(2).await;
    }
}

#[tokio::test]
async fn which_engine_failed_is_told_only_where_workers_are_exposed() {
    let (engines, host) = over(&[String::new()]).await;
    let address = engines[0].address.to_string();
    let message = ask(&host).await.is_error(502, "engine_broken");
    assert!(!message.contains(&address), "{message}");
    host.process.logs(&address).await;
    let exposed = Host::start(&["--worker", &engines[0].worker(), "--expose-worker"]).await;
    let message = ask(&exposed).await.is_error(502, "engine_broken");
    assert!(message.contains(&address), "{message}");

    // Within a stream that has begun, too.
    let (engines, host) = over(&[stream_answer(&token_event(0))]).await;
    let text = ask(&host).await.text();
    assert!(text.contains("migration_unsound") && !text.contains(&engines[0].address.to_string()), "{text}");
}

#[tokio::test]
async fn a_model_is_not_denied_before_all_engines_have_said_what_they_serve() {
    let unknown = Host::start_anyhow(&["--worker", "http://127.0.0.1:1", "--worker", "mock://b?model=other"]).await;
    let message = ask(&unknown).await.is_error(503, "no_worker");
    assert!(message.contains("not known yet") && message.contains("\"m\""), "{message}");

    let engine = MockProcess::start(&["speedup=50"]).await;
    let host = Host::start(&["--worker", engine.url()]).await;
    host.serves(2).await;
    let mut other = chat(1);
    other["model"] = "other".into();
    host.http.post(CHAT, other.to_string()).await.is_error(404, "model_not_found");
}
