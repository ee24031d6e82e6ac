//! Streams that go on with another worker when theirs is lost: killed, stopped, broken off, or failing within.

mod nested;

use std::collections::BTreeMap;

use dynamo_engine_mock::tokens;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::harness::{
    components, eventually,
    host::{Host, MockProcess, chat, completion, streamed},
    scripted::{STREAM_HEAD, Scripted, http_chunk, stream_answer},
    sse::Streamed,
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// Tokens 20 ms apart.
const PACE: &[&str] = &["decode_ms_base=20"];
/// How many times as slow engines are until one of them is lost: a request is under way for as long as it takes to find out
/// where, be the machine as busy as it may.
const HELD_BACK: f64 = 15.0;

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

/// Sets how many times as long all engines but one take.
async fn slow_down(engines: &[MockProcess], times: f64, but: Option<usize>) {
    for (_, engine) in engines.iter().enumerate().filter(|(at, _)| Some(*at) != but) {
        engine.http.ask("/mock/faults", &json!({ "slow": times })).await;
    }
}

/// Opens a stream, reads some of it, and has its engine lost; the rest must come as if nothing were.
async fn streamed_over_a_loss(
    engines: &mut [MockProcess],
    host: &Host,
    path: &str,
    body: &Value,
    lose: impl Fn(&mut MockProcess),
) -> Streamed {
    slow_down(engines, HELD_BACK, None).await;
    let mut stream = host.http.open(path, body).await;
    let mut events = vec![stream.event().await, stream.event().await, stream.event().await];
    let at = busy(engines).await;
    lose(&mut engines[at]);
    slow_down(engines, 1.0, Some(at)).await;
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

/// Strikes the next request for tokens that any of the engines has.
async fn strike(engines: &[MockProcess], fault: &str, after: u32) {
    for engine in engines {
        let faults = json!({ fault: after, "next": 1 });
        let reply = engine.http.post("/mock/faults", faults.to_string()).await;
        assert_eq!(reply.status, 200, "{}", reply.text());
    }
}

#[tokio::test]
async fn engines_that_break_off_in_any_way_lose_no_token() {
    // Characters of several bytes, so that some can be cut.
    let (engines, host) = over(3, &["decode_ms_base=2", "script=wide"]).await;
    let undisturbed = host.http.stream(CHAT, &streamed(chat(12))).await.text();
    for fault in ["error_event", "cut", "cut_character", "end"] {
        for (path, body) in [(CHAT, chat(12)), (COMPLETIONS, completion(12))] {
            let before = migrations(&host, "continued").await;
            strike(&engines, fault, 4).await;
            let stream = host.http.stream(path, &with_usage(body)).await;
            assert_eq!(stream.text(), undisturbed, "{fault} at {path}");
            assert_eq!(stream.finish_reasons(), ["length"], "{fault}");
            let usage = stream.events.last().unwrap()["usage"].clone();
            assert_eq!(usage["completion_tokens"], 12, "{fault}: {usage}");
            assert!(migrations(&host, "continued").await > before, "{fault}");
            for engine in &engines {
                engine.http.post("/mock/faults", "{}").await;
            }
        }
    }
}

#[tokio::test]
async fn a_completion_without_a_limit_ends_where_its_engine_ends_it() {
    let (engines, host) = over(2, &["decode_ms_base=2"]).await;
    let mut body = with_usage(completion(1));
    body.as_object_mut().unwrap().remove("max_tokens");
    let undisturbed = host.http.stream(COMPLETIONS, &body).await;
    strike(&engines, "cut", 4).await;
    let stream = host.http.stream(COMPLETIONS, &body).await;
    assert_eq!((stream.text(), stream.finish_reasons()), (undisturbed.text(), undisturbed.finish_reasons()));
    assert_eq!(stream.events.last().unwrap()["usage"]["completion_tokens"], 16);
    assert!(migrations(&host, "continued").await > 0.0);
}

#[tokio::test]
async fn a_whole_answer_whose_engine_is_killed_is_made_by_another() {
    let (mut engines, host) = over(2, PACE).await;
    slow_down(&engines, HELD_BACK, None).await;
    let mut waiting = tokio::task::JoinSet::new();
    let client = host.http.clone();
    waiting.spawn(async move { client.post(CHAT, chat(40).to_string()).await });
    let at = busy(&engines).await;
    dies(&mut engines[at]);
    slow_down(&engines, 1.0, Some(at)).await;
    let reply = waiting.join_next().await.unwrap().unwrap();
    assert_eq!(reply.status, 200, "{}", reply.text());
    let answer = reply.json();
    assert_eq!(tokens::count(answer["choices"][0]["message"]["content"].as_str().unwrap()), Ok(40));
    assert_eq!(answer["usage"]["completion_tokens"], 40);
}

#[tokio::test]
async fn a_stream_whose_engine_is_stopped_goes_on_elsewhere() {
    let (mut engines, host) = over(2, PACE).await;
    // What is usual for them is known then.
    for _ in 0..4 {
        host.http.stream(CHAT, &streamed(chat(5))).await;
    }
    let body = with_usage(chat(20));
    let prompt = prompt_tokens(&host, CHAT, &body).await;
    let stops = |engine: &mut MockProcess| signal(engine, Signal::STOP);
    let stream = streamed_over_a_loss(&mut engines, &host, CHAT, &body, stops).await;
    is_unbroken(&stream, 1, 20, prompt);
    engines.iter_mut().for_each(|engine| signal(engine, Signal::CONT));
}

fn signal(engine: &MockProcess, signal: Signal) {
    let id = Pid::from_raw(i32::try_from(engine.process.id()).unwrap()).unwrap();
    kill_process(id, signal).unwrap();
}

#[tokio::test]
async fn with_nobody_left_a_stream_ends_in_an_error_within_the_hold() {
    let (mut engines, host) = over(2, PACE).await;
    let mut stream = host.http.open(CHAT, &streamed(chat(400))).await;
    stream.event().await;
    engines.iter_mut().for_each(dies);
    let (events, end) = stream.rest().await;
    assert_eq!(end, Ok(()));
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "no_worker", "{last}");
    assert!(!events.contains(&"[DONE]".to_owned()));
    assert_eq!(migrations(&host, "failed").await, 1.0);
}

#[tokio::test]
async fn what_cannot_go_on_soundly_ends_in_an_error_that_says_why() {
    let (engines, host) = over(2, &["decode_ms_base=2"]).await;
    let mut guided = chat(20);
    guided["response_format"] = json!({ "type": "json_object" });
    let mut logprobs = completion(20);
    logprobs["logprobs"] = 1.into();
    for (path, body, says) in [(CHAT, guided, "grammar"), (COMPLETIONS, logprobs, "log probabilities")] {
        strike(&engines, "cut", 4).await;
        let (events, end) = host.http.open(path, &streamed(body)).await.rest().await;
        assert_eq!(end, Ok(()));
        let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
        assert_eq!(last["error"]["code"], "migration_unsound", "{last}");
        assert!(last["error"]["message"].as_str().unwrap().contains(says), "{last}");
        assert!(!events.contains(&"[DONE]".to_owned()));
    }
    assert_eq!(migrations(&host, "unsound").await, 2.0);
}

#[tokio::test]
async fn stop_strings_hold_across_the_seam() {
    let (engines, host) = over(2, &["decode_ms_base=2"]).await;
    for (path, mut body) in [(CHAT, chat(30)), (COMPLETIONS, completion(30))] {
        // Held back are three bytes, a token's: the mock goes on with whole tokens only.
        body["stop"] = json!(["6 t7", "nope"]);
        for after in 1..8 {
            strike(&engines, "cut", after).await;
            let stream = host.http.stream(path, &streamed(body.clone())).await;
            assert_eq!(stream.text(), "t0 t1 t2 t3 t4 t5 t", "{path}, cut after {after}");
            assert_eq!(stream.finish_reasons(), ["stop"], "{path}, cut after {after}");
            for engine in &engines {
                engine.http.post("/mock/faults", "{}").await;
            }
        }
    }
}

#[tokio::test]
async fn whoever_asks_for_token_ids_gets_all_of_them() {
    let (engines, host) = over(2, &["decode_ms_base=2"]).await;
    let mut body = chat(12);
    body["return_token_ids"] = true.into();
    strike(&engines, "cut", 5).await;
    let stream = host.http.stream(CHAT, &streamed(body)).await;
    let ids = stream.choices().flat_map(|choice| choice["token_ids"].as_array().cloned().unwrap_or_default());
    let ids: Vec<u64> = ids.map(|id| id.as_u64().unwrap() - u64::from(tokens::VOCABULARY)).collect();
    assert_eq!(ids, (0..12).collect::<Vec<_>>());
}

#[tokio::test]
async fn turned_off_a_lost_stream_says_what_was_lost() {
    let (engines, _host) = over(1, &["decode_ms_base=2"]).await;
    let worker = format!("{},model=m", engines[0].url());
    let host = Host::configured("[migration]\nenabled = false\n", &["--worker", &worker]).await;
    strike(&engines, "cut", 4).await;
    let (events, _) = host.http.open(CHAT, &streamed(chat(20))).await.rest().await;
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "engine_broken", "{last}");
}

#[tokio::test]
async fn an_engine_of_another_kind_goes_on_by_the_text() {
    let begins = format!("{STREAM_HEAD}{}", http_chunk(&text_event("t0", None)));
    let goes_on = stream_answer(&(text_event(" t1", None) + &text_event(" t2", Some("length")) + "data: [DONE]\n\n"));
    let (first, second) = (Scripted::answering(begins).await, Scripted::answering(goes_on).await);
    let host = Host::start(&["--worker", &first.worker(), "--worker", &second.worker()]).await;
    // Until the first one is asked first.
    let asked = eventually("a stream goes on", async || {
        let stream = host.http.stream(COMPLETIONS, &streamed(completion(3))).await;
        let bodies: Vec<Value> = second.received().iter().map(|request| request.json()).collect();
        let continued = bodies.into_iter().find(|body| body["prompt"] != "count")?;
        assert_eq!(stream.text(), "t0 t1 t2");
        Some(continued)
    })
    .await;
    assert_eq!((&asked["prompt"], &asked["max_tokens"]), (&json!("countt0"), &json!(2)));
}

fn text_event(text: &str, finish: Option<&str>) -> String {
    format!("data: {}\n\n", json!({ "id": "x", "choices": [{ "index": 0, "text": text, "finish_reason": finish }] }))
}

#[tokio::test]
async fn who_waits_for_an_engine_to_come_back_waits_no_longer_than_its_deadline() {
    let mut engines = [MockProcess::start(PACE).await];
    let worker = format!("{},model=m", engines[0].url());
    let host = Host::configured("[health]\nhold_s = 3000", &["--worker", &worker]).await;
    let body = chat(30_000).to_string();
    let asked = host.http.send(hyper::Method::POST, CHAT, &[("x-request-timeout-ms", "5000")], body);
    let lost = async {
        busy(&engines).await;
        engines[0].process.kill();
    };
    let (reply, ()) = tokio::join!(asked, lost);
    assert!(reply.status.is_server_error(), "{}", reply.text());
}
