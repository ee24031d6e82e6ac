//! Several choices and prompts where engines only prefill and decode for each other: each a hand-off of its own, all of them one answer.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{CHAT, COMPLETIONS, chat, completion, over, prefilled, sglang, streamed, with_arguments};
use crate::{
    doubles::{ENDLESS_TOKENS, REFUSED_SEED, Sglang, text_by, text_of},
    harness::{eventually, host::Host, process::run},
};

/// What each choice of a stream says, and how it ends.
fn said(events: &[Value]) -> BTreeMap<u64, (String, Vec<String>)> {
    let mut said = BTreeMap::<u64, (String, Vec<String>)>::new();
    for choice in events.iter().flat_map(|event| event["choices"].as_array().unwrap()) {
        let (text, finishes) = said.entry(choice["index"].as_u64().unwrap()).or_default();
        text.push_str(choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or_default());
        finishes.extend(choice["finish_reason"].as_str().map(str::to_owned));
    }
    said
}

/// The same of a whole answer, whose choices are in order.
fn said_whole(answer: &Value) -> Vec<String> {
    let choices = answer["choices"].as_array().unwrap();
    let numbered = choices.iter().enumerate().map(|(number, choice)| {
        assert_eq!((choice["index"].as_u64(), &choice["finish_reason"]), (Some(number as u64), &json!("length")), "{answer}");
        choice["text"].as_str().or(choice["message"]["content"].as_str()).unwrap().to_owned()
    });
    numbered.collect()
}

fn with(mut body: Value, fields: &Value) -> Value {
    body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    body
}

/// Client requests that were counted, by status.
async fn counted(host: &Host, code: &str) -> f64 {
    host.http.metric("dynamo_host_requests_total", &[("code", code)]).await
}

async fn in_flight(host: &Host) -> f64 {
    host.http.metric("dynamo_host_requests_in_flight", &[]).await
}

#[tokio::test]
async fn the_choices_of_a_chat_are_handed_over_one_by_one_and_are_one_answer() {
    let (network, _prefill, _decode, workers) = sglang().await;
    let host = over(&workers).await;
    let asked = with(chat("three of them", 5), &json!({ "n": 3, "seed": 7 }));
    let expected: Vec<String> = (7..10).map(|seed| text_by(&asked["messages"], Some(seed), 5)).collect();
    let one = host.http.ask(CHAT, &chat("three of them", 5)).await.json()["usage"]["prompt_tokens"].as_u64().unwrap();

    let whole = host.http.ask(CHAT, &asked).await;
    assert_eq!(said_whole(&whole.json()), expected);
    let usage = json!({ "prompt_tokens": one, "completion_tokens": 15, "total_tokens": one + 15 });
    assert_eq!(whole.json()["usage"], usage);

    let asked = with(streamed(asked), &json!({ "stream_options": { "include_usage": true } }));
    let stream = host.http.stream(CHAT, &asked).await;
    let (last, events) = stream.events.split_last().unwrap();
    let seen: Vec<_> = said(events).into_iter().collect();
    let expected: Vec<_> = (0..).zip(expected.into_iter().map(|text| (text, vec!["length".to_owned()]))).collect();
    assert_eq!(seen, expected);
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &usage));
    let roles = stream.choices().filter(|choice| choice["delta"]["role"] == "assistant").count();
    assert_eq!(roles, 3);
    let ids: Vec<&Value> = stream.events.iter().map(|event| &event["id"]).collect();
    assert!(ids.windows(2).all(|two| two[0] == two[1]), "{ids:?}");

    assert_eq!((prefilled(&host, "remote").await, network.faults()), (7.0, vec![]));
    eventually("each of three requests is counted once", async || (counted(&host, "200").await == 3.0).then_some(())).await;
    assert_eq!(host.http.metric("dynamo_host_output_tokens_total", &[]).await, 35.0);
    assert_eq!(host.http.metric("dynamo_host_prompt_tokens_total", &[]).await, 3.0 * one as f64);
    assert_eq!(in_flight(&host).await, 0.0);
}

#[tokio::test]
async fn each_prompt_of_a_batch_has_its_choices_in_order() {
    let (network, _prefill, _decode, workers) = sglang().await;
    let host = over(&workers).await;
    let prompts = [json!("one of them"), json!("and another that is longer")];
    let asked = with(completion("", 4), &json!({ "prompt": prompts, "n": 2 }));
    let expected: Vec<String> = prompts.iter().flat_map(|prompt| [text_of(prompt, 4), text_of(prompt, 4)]).collect();
    let whole = host.http.ask(COMPLETIONS, &asked).await.json();
    assert_eq!(said_whole(&whole), expected);
    assert_eq!(whole["usage"], json!({ "prompt_tokens": 8, "completion_tokens": 16, "total_tokens": 24 }));
    let stream = host.http.stream(COMPLETIONS, &streamed(asked)).await;
    let seen: Vec<String> = said(&stream.events).into_values().map(|(text, _)| text).collect();
    assert_eq!((seen, stream.finish_reasons().len()), (expected, 4));

    let ids = with(completion("", 4), &json!({ "prompt": [[7, 8], [9]] }));
    let whole = host.http.ask(COMPLETIONS, &ids).await.json();
    assert_eq!(said_whole(&whole), [text_of(&json!([7, 8]), 4), text_of(&json!([9]), 4)]);
    assert_eq!((prefilled(&host, "remote").await, network.faults()), (10.0, vec![]));
}

#[tokio::test]
async fn a_client_that_leaves_ends_all_parts() {
    let (network, _prefill, decode, workers) = sglang().await;
    let host = over(&workers).await;
    let mut events = host.http.open(CHAT, &streamed(with(chat("never stop", ENDLESS_TOKENS as u32), &json!({ "n": 3 })))).await;
    let mut begun = BTreeMap::new();
    while begun.len() < 3 {
        begun.extend(said(&[events.event().await]));
    }
    assert_eq!((in_flight(&host).await, decode.iter().any(Sglang::was_told_to_abort)), (1.0, false));
    drop(events);
    eventually("nobody works on any of them", async || (network.at_work() == 0).then_some(())).await;
    assert!(network.abandoned() >= 3, "they were ended");
    eventually("it is counted once", async || (counted(&host, "200").await == 1.0).then_some(())).await;
    assert_eq!((in_flight(&host).await, network.faults()), (0.0, vec![]));
}

#[tokio::test]
async fn a_part_that_fails_fails_all() {
    let (network, _prefill, _decode, workers) = sglang().await;
    let host = over(&workers).await;
    let asked = with(chat("one is not liked", 5), &json!({ "n": 3, "seed": REFUSED_SEED - 2 }));
    let reply = host.http.post(CHAT, asked.to_string()).await;
    assert!(reply.status == 400 && reply.text().contains("it does not like its seed"), "{} {}", reply.status, reply.text());
    eventually("it is counted once", async || (counted(&host, "400").await == 1.0).then_some(())).await;
    let asked = with(streamed(asked), &json!({ "max_tokens": ENDLESS_TOKENS }));
    let events = host.http.open(CHAT, &asked).await;
    let (events, ended) = events.rest().await;
    ended.unwrap();
    let (last, others) = events.split_last().unwrap();
    let last: Value = serde_json::from_str(last).unwrap();
    assert!(last["error"]["message"].as_str().unwrap().contains("it does not like its seed"), "{last}");
    assert!(!others.iter().any(|data| data == "[DONE]" || data.contains("\"error\"")), "{others:?}");
    eventually("the others are given up", async || (network.at_work() == 0).then_some(())).await;
    eventually("nobody waits for them", async || (in_flight(&host).await == 0.0).then_some(())).await;
    assert_eq!(network.faults(), [""; 0]);
}

#[tokio::test]
async fn where_somebody_serves_whole_requests_nothing_is_taken_apart() {
    let (network, prefill, _decode, workers) = sglang().await;
    let host = over(&workers).await;
    let asked = with(chat("two of them", 5), &json!({ "n": 2, "temperature": 1 }));
    assert_eq!(said_whole(&host.http.ask(CHAT, &asked).await.json()).len(), 2);
    let before = prefilled(&host, "remote").await;
    drop(host);
    let all = [&workers[..], &["mock://whole?model=m".to_owned()]].concat();
    let arguments: Vec<&str> = all.iter().flat_map(|worker| ["--worker", worker]).collect();
    let host = Host::start(&arguments).await;
    eventually("those who hand over can", async || {
        let status = host.admin.get_json("/v1/status").await;
        let ready = status["workers"].as_array().unwrap().iter().filter(|worker| worker["handoff"]["state"] == "ready");
        (ready.count() == workers.len()).then_some(())
    })
    .await;
    let asked_before: usize = prefill.iter().map(Sglang::asked).sum();
    assert_eq!(said_whole(&host.http.ask(CHAT, &asked).await.json()).len(), 2);
    assert_eq!((before, prefilled(&host, "remote").await, prefilled(&host, "aggregated").await), (2.0, 0.0, 1.0));
    assert_eq!(prefill.iter().map(Sglang::asked).sum::<usize>(), asked_before);
    assert_eq!(network.faults(), [""; 0]);
}

#[tokio::test]
async fn each_part_has_receipts_and_the_request_is_admitted_once() {
    let (_network, _prefill, _decode, workers) = sglang().await;
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().to_str().unwrap();
    let host = with_arguments(&["--state-dir", state], &workers).await;
    host.http.ask(CHAT, &with(chat("two of them", 5), &json!({ "n": 2 }))).await;
    let decisions = eventually("the decisions for both parts are written", async || {
        if !directory.path().join("receipts").is_dir() {
            return None;
        }
        let all = run(&["receipts", "export", "--state-dir", state]).await;
        let lines = all.succeeded().lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let decisions: Vec<Value> = lines.filter(|line| line["kind"] == "decision").collect();
        (decisions.len() >= 4).then_some(decisions)
    })
    .await;
    assert_eq!(decisions.len(), 4, "who prefills and who decodes, for each: {decisions:?}");
    assert!(decisions.iter().all(|decision| decision["request"] == decisions[0]["request"]));
    assert_eq!(host.http.metric("dynamo_host_admission_total", &[]).await, 1.0);
}

#[tokio::test]
async fn what_cannot_be_taken_apart_is_refused_by_name() {
    let (network, prefill, _decode, workers) = sglang().await;
    let host = over(&workers).await;
    let before: usize = prefill.iter().map(Sglang::asked).sum();
    for (fields, says) in [
        (json!({ "n": 2, "best_of": 3 }), "`best_of`"),
        (json!({ "n": 2, "use_beam_search": true }), "`use_beam_search`"),
        (json!({ "n": 100, "prompt": ["a", "b"] }), "at most 128"),
        (json!({ "prompt": [[1.5], [2]] }), "`prompt`"),
    ] {
        let message =
            host.http.post(COMPLETIONS, with(completion("one", 4), &fields).to_string()).await.is_error(400, "invalid_field");
        assert!(message.contains(says), "{message}");
    }
    assert_eq!((counted(&host, "400").await, counted(&host, "499").await), (4.0, 0.0), "each is counted once");
    assert_eq!((prefill.iter().map(Sglang::asked).sum::<usize>(), network.faults()), (before, vec![]));
}
