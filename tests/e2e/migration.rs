//! Streams that go on with another worker when theirs is lost: killed, stopped, broken off, or failing within.

use std::collections::BTreeMap;

use dynamo_engine_mock::tokens;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::harness::{
    components, eventually,
    host::{Host, MockProcess, chat, completion, streamed},
    scripted::{STREAM_HEAD, Scripted, end_events, http_chunk, stream_answer, token_event, whole_answer},
    sse::Streamed,
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// Tokens 20 ms apart.
const PACE: &[&str] = &["decode_ms_base=20"];

/// Mock engines as processes, and a host over them.
async fn over(engines: usize, parameters: &[&str]) -> (Vec<MockProcess>, Host) {
    let mut processes = Vec::new();
    for _ in 0..engines {
        processes.push(MockProcess::start(parameters).await);
    }
    let host = host_over(&processes, &[]).await;
    (processes, host)
}

async fn host_over(engines: &[MockProcess], more: &[&str]) -> Host {
    let workers: Vec<String> = engines.iter().map(|engine| format!("{},model=m", engine.url())).collect();
    let routing = components::policy("round-robin");
    let mut arguments = vec!["--routing", &*routing];
    arguments.extend(workers.iter().flat_map(|worker| ["--worker", worker]));
    arguments.extend(more);
    Host::start(&arguments).await
}

/// The place of the engine that runs a request.
async fn busy(engines: &[MockProcess]) -> usize {
    eventually("an engine is busy", async || {
        for (at, engine) in engines.iter().enumerate() {
            if engine.http.try_send(hyper::Method::GET, "/health", &[], "").await.is_ok()
                && engine.http.metric("vllm:num_requests_running", &[]).await > 0.0
            {
                return Some(at);
            }
        }
        None
    })
    .await
}

/// Opens a stream, reads some of it, and has its engine lost; the rest must come as if nothing were.
async fn streamed_over_a_loss(
    engines: &mut [MockProcess],
    host: &Host,
    path: &str,
    body: &Value,
    lose: impl Fn(&mut MockProcess),
) -> Streamed {
    let mut stream = host.http.open(path, body).await;
    let mut events = vec![stream.event().await, stream.event().await, stream.event().await];
    let at = busy(engines).await;
    lose(&mut engines[at]);
    let rest = stream.streamed().await.unwrap();
    events.extend(rest.events);
    Streamed { headers: rest.headers, events }
}

/// The stream is what one engine would have streamed: numbered tokens, one role, one finish, one head, and the usage.
#[track_caller]
fn is_unbroken(stream: &Streamed, choices: u32, tokens: u32, prompt: u64) {
    let (mut texts, mut roles, mut finishes) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for event in &stream.events {
        for name in ["id", "model", "created", "object"] {
            assert_eq!(event[name], stream.events[0][name], "{name} of {event}");
        }
        for choice in event["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap();
            let text = choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or_default();
            texts.entry(index).or_insert_with(String::new).push_str(text);
            *roles.entry(index).or_insert(0) += u32::from(choice["delta"]["role"].is_string());
            *finishes.entry(index).or_insert(0) += u32::from(choice["finish_reason"].is_string());
            assert!(choice["token_ids"].is_null() && event["prompt_token_ids"].is_null(), "nobody asked for ids: {event}");
        }
    }
    let is_chat = stream.events[0]["object"] == "chat.completion.chunk";
    for index in 0..u64::from(choices) {
        assert_eq!(tokens::count(&texts[&index]), Ok(tokens), "choice {index}");
        assert_eq!((roles[&index], finishes[&index]), (u32::from(is_chat), 1), "choice {index}");
    }
    assert_eq!(texts.len() as u32, choices);
    let usages: Vec<&Value> = stream.events.iter().filter(|event| event["choices"] == json!([])).collect();
    assert_eq!(usages.len(), 1, "{usages:?}");
    let usage = &usages[0]["usage"];
    assert_eq!(usage["completion_tokens"], u64::from(tokens * choices), "{usage}");
    assert_eq!(
        (usage["prompt_tokens"].as_u64(), usage["total_tokens"].as_u64()),
        (Some(prompt), Some(prompt + u64::from(tokens * choices)))
    );
}

fn with_usage(mut body: Value) -> Value {
    body["stream_options"] = json!({ "include_usage": true });
    streamed(body)
}

/// Tokens of the prompt as an engine counts them.
async fn prompt_tokens(host: &Host, path: &str, body: &Value) -> u64 {
    let mut body = body.clone();
    for name in ["stream", "stream_options", "n"] {
        body.as_object_mut().unwrap().remove(name);
    }
    body["max_tokens"] = 1.into();
    host.http.ask(path, &body).await.json()["usage"]["prompt_tokens"].as_u64().unwrap()
}

fn dies(engine: &mut MockProcess) {
    engine.process.kill();
}

async fn migrations(host: &Host, result: &str) -> f64 {
    host.http.metric("dynamo_host_migrations_total", &[("result", result)]).await
}

#[tokio::test]
async fn a_chat_whose_engine_is_killed_goes_on_unbroken() {
    let (mut engines, host) = over(2, PACE).await;
    let body = with_usage(chat(20));
    let prompt = prompt_tokens(&host, CHAT, &body).await;
    let stream = streamed_over_a_loss(&mut engines, &host, CHAT, &body, dies).await;
    is_unbroken(&stream, 1, 20, prompt);
    assert_eq!(stream.finish_reasons(), ["length"]);
    assert_eq!(migrations(&host, "continued").await, 1.0);
    assert_eq!(host.http.metric("dynamo_host_migration_pause_seconds_count", &[]).await, 1.0);
    assert_eq!(host.http.metric("dynamo_host_requests_total", &[("code", "200")]).await, 2.0, "it is one request");
}

#[tokio::test]
async fn a_completion_whose_engine_is_killed_goes_on_unbroken() {
    let (mut engines, host) = over(2, PACE).await;
    let body = with_usage(completion(20));
    let prompt = prompt_tokens(&host, COMPLETIONS, &body).await;
    let stream = streamed_over_a_loss(&mut engines, &host, COMPLETIONS, &body, dies).await;
    is_unbroken(&stream, 1, 20, prompt);
}

#[tokio::test]
async fn each_of_several_choices_goes_on_by_itself() {
    for (path, mut body) in [(CHAT, with_usage(chat(20))), (COMPLETIONS, with_usage(completion(20)))] {
        let (mut engines, host) = over(2, PACE).await;
        let prompt = prompt_tokens(&host, path, &body).await;
        body["n"] = 2.into();
        let stream = streamed_over_a_loss(&mut engines, &host, path, &body, dies).await;
        is_unbroken(&stream, 2, 20, prompt);
        assert_eq!(migrations(&host, "continued").await, 2.0);
    }
}
