use serde_json::json;

use super::*;
use crate::migrate::record::Stage;

fn chat(endpoint: Endpoint, body: Value) -> Result<Value, &'static str> {
    let Value::Object(fields) = body else { panic!("a body is an object") };
    as_chat(endpoint, fields).map(Value::Object).map_err(|unsound| unsound.0)
}

#[test]
fn a_message_is_the_chat_that_engines_make_of_it() {
    let body = json!({
        "model": "m", "max_tokens": 7, "top_k": 3, "stop_sequences": ["END"], "metadata": { "user_id": "u" },
        "system": [{ "type": "text", "text": "x-anthropic-billing-header: 1;" }, { "type": "text", "text": "Be" }, { "type": "text", "text": " brief." }],
        "messages": [
            { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] },
            { "role": "assistant", "content": [
                { "type": "thinking", "thinking": "hm", "signature": "s" },
                { "type": "text", "text": "I look." },
                { "type": "tool_use", "id": "c1", "name": "look", "input": { "at": 1 } },
            ] },
            { "role": "user", "content": [
                { "type": "tool_result", "tool_use_id": "c1", "content": [{ "type": "text", "text": "x" }, { "type": "text", "text": "y" }] },
                { "type": "text", "text": "so?" },
            ] },
        ],
        "tools": [{ "name": "look", "description": "looks", "input_schema": { "type": "object" } }],
        "tool_choice": { "type": "auto", "disable_parallel_tool_use": true },
    });
    let call = json!({ "type": "function", "id": "c1", "function": { "name": "look", "arguments": "{\"at\":1}" } });
    let tool = json!({ "name": "look", "description": "looks", "parameters": { "type": "object" } });
    let expected = json!({
        "model": "m", "max_tokens": 7, "top_k": 3, "stop": ["END"],
        "messages": [
            { "role": "system", "content": "Be brief." },
            { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] },
            { "role": "assistant", "reasoning": "hm", "content": "I look.", "tool_calls": [call] },
            { "role": "tool", "tool_call_id": "c1", "content": "x\ny" },
            { "role": "user", "content": "so?" },
        ],
        "tools": [{ "type": "function", "function": tool }], "tool_choice": "auto", "parallel_tool_calls": false,
    });
    assert_eq!(chat(Endpoint::Messages, body), Ok(expected));
}

#[test]
fn a_response_is_the_chat_that_engines_make_of_it() {
    let body = json!({
        "model": "m", "max_output_tokens": 7, "temperature": 0, "instructions": "Be brief.", "store": true, "user": null,
        "text": { "format": { "type": "text" } },
        "input": [
            { "role": "user", "content": "a" },
            { "type": "message", "role": "user", "content": [{ "type": "input_text", "text": "b" }] },
            { "type": "reasoning", "summary": [], "content": [{ "type": "reasoning_text", "text": "hm" }] },
            { "type": "message", "role": "assistant", "content": [{ "type": "output_text", "text": "I look." }] },
            { "type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}" },
            { "type": "function_call", "call_id": "c2", "name": "look", "arguments": "{}" },
            { "type": "function_call_output", "call_id": "c1", "output": "x" },
        ],
        "tools": [{ "type": "function", "name": "look", "parameters": { "type": "object" } }],
    });
    let call = |id: &str| json!({ "type": "function", "id": id, "function": { "name": "look", "arguments": "{}" } });
    let expected = json!({
        "model": "m", "max_tokens": 7, "temperature": 0,
        "messages": [
            { "role": "system", "content": "Be brief." },
            { "role": "user", "content": "a" },
            { "role": "user", "content": [{ "type": "text", "text": "b" }] },
            { "role": "assistant", "reasoning": "hm", "content": "I look.", "tool_calls": [call("c1"), call("c2")] },
            { "role": "tool", "tool_call_id": "c1", "content": "x" },
        ],
        "tools": [{ "type": "function", "function": { "name": "look", "parameters": { "type": "object" } } }],
    });
    assert_eq!(chat(Endpoint::Responses, body), Ok(expected));
}

#[test]
fn what_a_chat_has_no_word_for_is_refused() {
    let message = |parts: Value| json!({ "messages": [{ "role": "user", "content": parts }] });
    for (endpoint, body, says) in [
        (Endpoint::Messages, message(json!([{ "type": "document", "source": {} }])), "parts"),
        (Endpoint::Messages, message(json!([{ "type": "tool_result", "content": [{ "type": "image" }] }])), "plain text"),
        (Endpoint::Messages, json!({ "tools": [{ "type": "web_search_20250305", "name": "web_search" }] }), "tools"),
        (Endpoint::Responses, json!({ "tools": [{ "type": "web_search" }], "input": "a" }), "tools"),
        (Endpoint::Responses, json!({ "input": [{ "type": "computer_call" }] }), "items"),
        (Endpoint::Responses, json!({ "input": "a", "tool_choice": { "type": "allowed_tools" } }), "chooses"),
        (Endpoint::Responses, json!({ "input": "a", "truncation": "auto" }), "truncated"),
        (Endpoint::Responses, json!({ "input": "a", "include": ["message.output_text.logprobs"] }), "log probabilities"),
        (Endpoint::Responses, json!({ "input": "a", "prompt": { "id": "p" } }), "kept elsewhere"),
    ] {
        let refused = chat(endpoint, body.clone()).unwrap_err();
        assert!(refused.contains(says), "{body}: {refused}");
    }
}

/// Streams of a real vLLM 0.32.
const MESSAGES: &str = include_str!("../fixtures/vllm_messages.sse");
const RESPONSES: &str = include_str!("../fixtures/vllm_responses.sse");

fn recorded(endpoint: Endpoint, frames: &str) -> (Nested, Choice) {
    let (mut nested, mut choice) = (Nested::of(endpoint).unwrap(), Choice::new());
    for data in frames.lines().filter_map(|line| line.strip_prefix("data: ")) {
        nested.read(&serde_json::from_str(data).unwrap(), &mut choice);
    }
    (nested, choice)
}

fn chunk(delta: Value, finish: Value) -> String {
    format!("data: {}\n\n", json!({ "choices": [{ "index": 0, "delta": delta, "finish_reason": finish }] }))
}

fn events(frames: &str) -> Vec<Value> {
    let data = frames.lines().filter_map(|line| line.strip_prefix("data: "));
    data.map(|data| serde_json::from_str(data).unwrap()).collect()
}

fn outline(frames: &str) -> Vec<(String, Value)> {
    let of = |event: &Value| {
        (event["type"].as_str().unwrap().to_owned(), event.get("index").or(event.get("sequence_number")).cloned())
    };
    events(frames).iter().map(of).map(|(kind, at)| (kind, at.unwrap_or_default())).collect()
}

#[test]
fn captured_streams_that_are_cut_at_any_event_are_told_to_their_end() {
    for (endpoint, stream, all, begins) in
        [(Endpoint::Messages, MESSAGES, "sigintxit(Thread", 1), (Endpoint::Responses, RESPONSES, "sigintxit(Thread", 1)]
    {
        let frames: Vec<&str> = stream.split_inclusive("\n\n").collect();
        for cut in begins..frames.len() {
            let had = frames[..cut].concat();
            let (mut nested, choice) = recorded(endpoint, &had);
            assert!(choice.stage != Stage::Unknown && nested.has_begun());
            let mut rest = String::new();
            if !choice.is_finished {
                let left = &all[choice.text.len()..];
                let pieces = [(json!({ "content": left }), Value::Null), (json!({}), json!("length"))];
                for (delta, finish) in pieces {
                    rest += str::from_utf8(&nested.tell(chunk(delta, finish).as_bytes())).unwrap();
                }
            }
            rest += str::from_utf8(&nested.end(Tokens { prompt: 11, output: 3 })).unwrap();
            // What comes as one piece is one event.
            let is_delta = |kind: &(String, Value)| kind.0.ends_with("_delta") || kind.0.ends_with("text.delta");
            let kinds = |frames: &str| {
                let mut kinds: Vec<String> = outline(frames).into_iter().map(|(kind, _)| kind).collect();
                kinds.dedup();
                kinds
            };
            let told = had.clone() + &rest;
            assert_eq!(kinds(&told), kinds(stream), "cut at {cut}");
            if endpoint == Endpoint::Responses {
                let numbers: Vec<u64> = outline(&told).iter().map(|(_, number)| number.as_u64().unwrap()).collect();
                assert_eq!(numbers, (0..numbers.len() as u64).collect::<Vec<_>>(), "cut at {cut}");
                let last = events(&told).pop().unwrap();
                assert_eq!(last["response"]["output"][0]["content"][0]["text"], all, "cut at {cut}");
                assert_eq!(last["response"]["status"], "incomplete");
                assert_eq!(last["response"]["usage"]["total_tokens"], 14);
            } else {
                assert!(outline(&told).iter().filter(|kind| is_delta(kind)).all(|(_, at)| at.is_null() || *at == 0));
                let stop = events(&told).into_iter().find(|event| event["type"] == "message_delta").unwrap();
                assert_eq!((&stop["delta"]["stop_reason"], &stop["usage"]["output_tokens"]), (&json!("max_tokens"), &json!(3)));
            }
        }
    }
}

#[test]
fn text_between_calls_of_tools_is_told_behind_the_call() {
    for (endpoint, begins) in [
        (Endpoint::Messages, json!({ "type": "message_start", "message": { "usage": { "input_tokens": 5 } } })),
        (Endpoint::Responses, json!({ "type": "response.created", "response": { "id": "resp_1" }, "sequence_number": 0 })),
    ] {
        let (mut nested, _) = recorded(endpoint, &format!("data: {begins}"));
        let call = |index: u32, id: Value, arguments: &str| {
            let function = json!({ "name": if id.is_null() { Value::Null } else { json!("look") }, "arguments": arguments });
            json!({ "tool_calls": [{ "index": index, "id": id, "function": function }] })
        };
        let mut told = String::new();
        for (delta, finish) in [
            (json!({ "reasoning": "hm" }), Value::Null),
            (call(0, json!("c0"), "{"), Value::Null),
            (json!({ "content": "\n" }), Value::Null),
            (call(0, Value::Null, "}"), Value::Null),
            (call(1, json!("c1"), "{}"), Value::Null),
            (json!({}), json!("stop")),
        ] {
            told += str::from_utf8(&nested.tell(chunk(delta, finish).as_bytes())).unwrap();
        }
        told += str::from_utf8(&nested.end(Tokens { prompt: 5, output: 9 })).unwrap();
        let events = events(&told);
        let of = |kind: &str| -> Vec<&Value> { events.iter().filter(|event| event["type"] == kind).collect() };
        if endpoint == Endpoint::Messages {
            let begun: Vec<&Value> = of("content_block_start").iter().map(|event| &event["content_block"]["type"]).collect();
            assert_eq!(begun, ["thinking", "tool_use", "text", "tool_use"]);
            assert_eq!(of("message_delta")[0]["delta"]["stop_reason"], "tool_use");
        } else {
            let output = events.last().unwrap()["response"]["output"].as_array().unwrap();
            let kinds: Vec<&Value> = output.iter().map(|item| &item["type"]).collect();
            assert_eq!(kinds, ["reasoning", "function_call", "message", "function_call"]);
            assert_eq!((&output[1]["arguments"], &output[1]["call_id"]), (&json!("{}"), &json!("c0")));
            let ids: std::collections::BTreeSet<&str> = output.iter().filter_map(|item| item["id"].as_str()).collect();
            assert_eq!(ids.len(), 4);
        }
    }
}

#[test]
fn a_schema_and_a_forced_tool_are_said_as_a_chat_says_them() {
    let schema = json!({ "type": "object" });
    let message = json!({ "messages": [], "output_config": { "format": { "type": "json_schema", "schema": schema } } });
    let response = json!({
        "input": "a", "text": { "format": { "type": "json_schema", "name": "n", "schema": schema, "strict": true } },
        "tool_choice": { "type": "function", "name": "look" },
    });
    let said = chat(Endpoint::Messages, message).unwrap();
    let format = json!({ "type": "json_schema", "json_schema": { "name": "output", "schema": schema } });
    assert_eq!(said["response_format"], format);
    let said = chat(Endpoint::Responses, response).unwrap();
    let format = json!({ "type": "json_schema", "json_schema": { "name": "n", "schema": schema, "strict": true } });
    assert_eq!(said["response_format"], format);
    assert_eq!(said["tool_choice"], json!({ "type": "function", "function": { "name": "look" } }));
}

#[test]
fn what_a_stream_has_reasoned_before_its_text_is_known() {
    let of = |kind: &str, delta: Value| format!("data: {}\n", json!({ "type": kind, "index": 0, "delta": delta }));
    let begins = format!("data: {}\n", json!({ "type": "message_start", "message": {} }));
    let thinks = of("content_block_delta", json!({ "type": "thinking_delta", "thinking": "hm" }));
    let says = of("content_block_delta", json!({ "type": "text_delta", "text": "So" }));
    let (nested, choice) = recorded(Endpoint::Messages, &(begins + &thinks + &says));
    assert!(choice.has_reasoned && choice.stage == Stage::Text && nested.has_begun());
    let (nested, _) = recorded(Endpoint::Messages, "data: {\"type\":\"ping\"}");
    assert!(!nested.has_begun());
    let (_, choice) = recorded(Endpoint::Messages, "data: {\"type\":\"something_new\"}");
    assert_eq!(choice.stage, Stage::Unknown);
}
