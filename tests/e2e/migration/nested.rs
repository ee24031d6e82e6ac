//! Streams whose events nest, Anthropic's messages and OpenAI's responses, over the loss of their worker.

use super::*;
use crate::harness::scripted::Connection;

const MESSAGES: &str = "/v1/messages";
const RESPONSES: &str = "/v1/responses";

fn message(tokens: u32) -> Value {
    json!({
        "model": "m", "max_tokens": tokens, "stream": true, "system": [{ "type": "text", "text": "Count." }],
        "messages": [{ "role": "user", "content": [{ "type": "text", "text": "up, please" }] }],
    })
}

fn response(tokens: u32) -> Value {
    json!({ "model": "m", "max_output_tokens": tokens, "stream": true, "instructions": "Count.", "input": "up, please" })
}

async fn read(host: &Host, path: &str, body: &Value) -> Vec<Value> {
    let (events, end) = host.http.open(path, body).await.rest().await;
    assert_eq!(end, Ok(()));
    events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
}

/// The whole of a stream without what is another one in each: its ids, and when it was made.
fn without_ids(events: &[Value]) -> Vec<Value> {
    fn strip(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                ["id", "item_id", "created_at"].iter().for_each(|name| drop(fields.remove(*name)));
                // What was cached is another matter for each prompt.
                let cached = fields.remove("cache_read_input_tokens").and_then(|tokens| tokens.as_u64());
                let prompt = fields.get("input_tokens").and_then(Value::as_u64);
                if let (Some(cached), Some(prompt)) = (cached, prompt) {
                    fields.insert("input_tokens".to_owned(), (prompt + cached).into());
                }
                ["cache_creation_input_tokens", "input_tokens_details"].iter().for_each(|name| drop(fields.remove(*name)));
                fields.values_mut().for_each(strip);
            }
            Value::Array(values) => values.iter_mut().for_each(strip),
            _ => {}
        }
    }
    let mut events = events.to_vec();
    events.iter_mut().for_each(strip);
    events
}

/// All text of a stream.
fn text(events: &[Value]) -> String {
    let of = |event: &Value| match event["type"].as_str() {
        Some("content_block_delta") => event["delta"]["text"].as_str().map(str::to_owned),
        Some("response.output_text.delta") => event["delta"].as_str().map(str::to_owned),
        _ => None,
    };
    events.iter().filter_map(of).collect()
}

/// Ids of one stream: nothing that is gone on with gets another.
#[track_caller]
fn has_one_of_each(events: &[Value]) {
    for pointer in ["/response/id", "/item/id", "/item_id"] {
        let mut ids: Vec<&Value> = events.iter().filter_map(|event| event.pointer(pointer)).collect();
        ids.dedup();
        assert!(ids.len() <= 1, "{pointer}: {ids:?}");
    }
}

#[tokio::test]
async fn a_message_or_a_response_whose_engine_is_killed_goes_on_unbroken() {
    for (path, body) in [(MESSAGES, message(60)), (RESPONSES, response(60))] {
        let (mut engines, host) = over(2, PACE).await;
        let undisturbed = read(&host, path, &body).await;
        let mut stream = host.http.open(path, &body).await;
        let mut events = Vec::new();
        while text(&events).is_empty() {
            events.push(stream.event().await);
        }
        let at = busy(&engines).await;
        dies(&mut engines[at]);
        let (rest, end) = stream.rest().await;
        assert_eq!(end, Ok(()));
        events.extend(rest.iter().map(|event| serde_json::from_str::<Value>(event).unwrap()));
        assert_eq!(tokens::count(&text(&events)), Ok(60), "{path}");
        assert_eq!(without_ids(&events), without_ids(&undisturbed), "{path}");
        has_one_of_each(&events);
        assert_eq!(migrations(&host, "continued").await, 1.0, "{path}");
        let counted = host.http.metric("dynamo_host_output_tokens_total", &[]).await;
        assert_eq!(counted, 120.0, "{path}: of both streams");
    }
}

#[tokio::test]
async fn engines_that_break_off_at_any_event_lose_and_double_none() {
    let (engines, host) = over(3, &["decode_ms_base=2", "script=wide"]).await;
    for (path, body) in [(MESSAGES, message(9)), (RESPONSES, response(9))] {
        let undisturbed = without_ids(&read(&host, path, &body).await);
        for fault in ["error_event", "cut", "cut_character", "end"] {
            for after in [1, 4] {
                let before = migrations(&host, "continued").await;
                strike(&engines, fault, after).await;
                let events = read(&host, path, &body).await;
                assert_eq!(without_ids(&events), undisturbed, "{fault} after {after} at {path}");
                has_one_of_each(&events);
                assert!(migrations(&host, "continued").await > before, "{fault} after {after} at {path}");
                for engine in &engines {
                    engine.http.post("/mock/faults", "{}").await;
                }
            }
        }
    }
}

#[tokio::test]
async fn a_message_ends_at_a_stop_sequence_across_the_seam() {
    let (engines, host) = over(2, &["decode_ms_base=2"]).await;
    let mut body = message(30);
    body["stop_sequences"] = json!(["6 t7", "nope"]);
    // At the last token the cut may lie behind half a token, of which the mock does not know how to go on.
    for after in 1..7 {
        strike(&engines, "cut", after).await;
        let events = read(&host, MESSAGES, &body).await;
        assert_eq!(text(&events), "t0 t1 t2 t3 t4 t5 t", "cut after {after}");
        let stop = events.iter().find(|event| event["type"] == "message_delta").unwrap();
        assert_eq!(stop["delta"], json!({ "stop_reason": "stop_sequence", "stop_sequence": "6 t7" }), "cut after {after}");
        for engine in &engines {
            engine.http.post("/mock/faults", "{}").await;
        }
    }
}

#[tokio::test]
async fn what_a_chat_cannot_say_ends_in_an_error_of_its_api() {
    let (engines, host) = over(2, &["decode_ms_base=2"]).await;
    let mut searching = message(20);
    searching["tools"] = json!([{ "type": "web_search_20250305", "name": "web_search" }]);
    let mut guided = response(20);
    guided["text"] = json!({ "format": { "type": "json_schema", "name": "n", "schema": {} } });
    for (path, body, says) in [(MESSAGES, searching, "tools"), (RESPONSES, guided, "grammar")] {
        strike(&engines, "cut", 4).await;
        let events = read(&host, path, &body).await;
        let last = events.last().unwrap();
        assert_eq!(last["type"], "error", "{last}");
        let message = last["error"]["message"].as_str().or(last["message"].as_str()).unwrap();
        assert!(message.contains(says), "{last}");
        assert!(!events.iter().any(|event| event["type"] == "message_stop" || event["type"] == "response.completed"));
    }
    assert_eq!(migrations(&host, "unsound").await, 2.0);
}

/// Events under their names, as engines write them.
fn named(events: &[Value]) -> String {
    events.iter().map(|event| format!("event: {}\ndata: {event}\n\n", event["type"].as_str().unwrap())).collect()
}

#[tokio::test]
async fn a_tool_may_be_called_by_the_engine_that_goes_on() {
    let message = json!({
        "id": "x", "type": "message", "role": "assistant", "content": [], "model": "m",
        "usage": { "input_tokens": 5, "output_tokens": 0 },
    });
    let delta = json!({ "type": "text_delta", "text": "Let me" });
    let begins = named(&[
        json!({ "type": "message_start", "message": message }),
        json!({ "type": "content_block_start", "index": 0, "content_block": { "type": "text", "text": "" } }),
        json!({ "type": "content_block_delta", "index": 0, "delta": delta }),
    ]);
    let deltas = [
        (json!({ "role": "assistant", "content": " look." }), Value::Null),
        (
            json!({ "tool_calls": [{ "index": 0, "id": "c1", "type": "function", "function": { "name": "look", "arguments": "" } }] }),
            Value::Null,
        ),
        (json!({ "tool_calls": [{ "index": 0, "function": { "arguments": "{\"at\":1}" } }] }), Value::Null),
        (json!({}), json!("tool_calls")),
    ];
    let chunk = |(delta, finish)| {
        let choice = json!({ "index": 0, "delta": delta, "finish_reason": finish });
        format!("data: {}\n\n", json!({ "id": "y", "model": "m", "choices": [choice] }))
    };
    let goes_on = stream_answer(&(deltas.map(chunk).concat() + "data: [DONE]\n\n"));
    let begins = format!("{STREAM_HEAD}{}", http_chunk(&begins));
    let script = move |mut connection: Connection| {
        let is_message = connection.asked().head.starts_with("post /v1/messages ");
        let answer = if is_message { begins.clone() } else { goes_on.clone() };
        async move { connection.write(answer).await }
    };
    let engines = [Scripted::start(script.clone()).await, Scripted::start(script).await];
    let workers = engines.each_ref().map(|engine| format!("{},kind=sglang", engine.worker()));
    let host = Host::start(&["--worker", &workers[0], "--worker", &workers[1]]).await;
    let tool = json!({ "name": "look", "description": "looks", "input_schema": { "type": "object" } });
    let body = json!({
        "model": "m", "max_tokens": 50, "stream": true, "tools": [tool], "messages": [{ "role": "user", "content": "look" }],
    });
    let events = read(&host, MESSAGES, &body).await;
    let told: Vec<(&str, Option<u64>)> =
        events.iter().map(|event| (event["type"].as_str().unwrap(), event["index"].as_u64())).collect();
    let expected = [
        ("message_start", None),
        ("content_block_start", Some(0)),
        ("content_block_delta", Some(0)),
        ("content_block_delta", Some(0)),
        ("content_block_stop", Some(0)),
        ("content_block_start", Some(1)),
        ("content_block_delta", Some(1)),
        ("content_block_stop", Some(1)),
        ("message_delta", None),
        ("message_stop", None),
    ];
    assert_eq!(told, expected);
    assert_eq!(text(&events), "Let me look.");
    assert_eq!(events[5]["content_block"], json!({ "type": "tool_use", "id": "c1", "name": "look", "input": {} }));
    assert_eq!(events[6]["delta"], json!({ "type": "input_json_delta", "partial_json": "{\"at\":1}" }));
    assert_eq!(events[8]["delta"]["stop_reason"], "tool_use");
    let asked =
        engines.iter().flat_map(Scripted::received).find(|asked| asked.head.starts_with("post /v1/chat/")).unwrap().json();
    assert_eq!(asked["messages"][1], json!({ "role": "assistant", "content": "Let me" }));
    assert_eq!(asked["tools"][0]["function"]["parameters"], json!({ "type": "object" }));
    assert_eq!((&asked["max_tokens"], &asked["continue_final_message"]), (&json!(49), &json!(true)));
}
