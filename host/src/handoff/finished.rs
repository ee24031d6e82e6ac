//! An answer that a prefill worker has finished: with its first token there was nothing left to decode.
//!
//! It was asked for as a whole, with what its adapter needs to hand KV over. The client gets what it asked for: neither ids of
//! tokens nor parameters of a hand-off, and a stream if it wants one. That is made of the answer as it is, field by field, and not asked
//! for again: where output is drawn by chance, it would be another one.

use bytes::Bytes;
use dynamo_engine_api::sse::DONE_FRAME;
use serde_json::{Map, Value, json};

/// What engines say of a hand-off, and clients do not get.
const OF_HANDOFF: &[&str] = &["kv_transfer_params", "ec_transfer_params", "disaggregated_params"];
/// Ids of tokens, which adapters ask for.
const OF_IDS: &[&str] = &["prompt_token_ids", "token_ids"];

/// The answer as the client asked for it, as a whole. `None` if it is no JSON object: it passes as it is.
pub(super) fn as_whole(body: &[u8], returns_ids: bool) -> Option<Bytes> {
    read(body, returns_ids).map(|fields| Value::Object(fields).to_string().into())
}

/// The answer as a stream: one event for its choices, one for the usage if the client (`asked`) wants that, and the end.
pub(super) fn as_stream(body: &[u8], asked: &[u8], returns_ids: bool) -> Option<Bytes> {
    let mut answer = read(body, returns_ids)?;
    let usage = answer.remove("usage");
    if answer.get("object").is_some_and(|object| object == "chat.completion") {
        answer.insert("object".to_owned(), "chat.completion.chunk".into());
    }
    for choice in choices(&mut answer) {
        if let Some(mut message) = choice.remove("message") {
            number_tool_calls(&mut message);
            choice.insert("delta".to_owned(), message);
        }
    }
    let mut events = format!("data: {}\n\n", Value::Object(answer.clone()));
    if let Some(usage) = usage.filter(|_| wants_usage(asked)) {
        answer.insert("choices".to_owned(), json!([]));
        answer.insert("usage".to_owned(), usage);
        events.push_str(&format!("data: {}\n\n", Value::Object(answer)));
    }
    let mut events = events.into_bytes();
    events.extend_from_slice(DONE_FRAME);
    Some(events.into())
}

/// The answer without what the client did not ask for.
fn read(body: &[u8], returns_ids: bool) -> Option<Map<String, Value>> {
    let mut answer: Map<String, Value> = serde_json::from_slice(body).ok()?;
    let unwanted: Vec<&str> = OF_HANDOFF.iter().chain(OF_IDS.iter().filter(|_| !returns_ids)).copied().collect();
    unwanted.iter().for_each(|name| drop(answer.remove(*name)));
    for choice in choices(&mut answer) {
        unwanted.iter().for_each(|name| drop(choice.remove(*name)));
    }
    Some(answer)
}

fn choices(answer: &mut Map<String, Value>) -> impl Iterator<Item = &mut Map<String, Value>> {
    let choices = answer.get_mut("choices").and_then(Value::as_array_mut);
    choices.into_iter().flatten().filter_map(Value::as_object_mut)
}

/// Calls of tools have a place in streams, which they have by their order in whole answers.
fn number_tool_calls(message: &mut Value) {
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
    for (place, call) in calls.into_iter().flatten().enumerate() {
        if let Some(call) = call.as_object_mut() {
            call.entry("index").or_insert(place.into());
        }
    }
}

fn wants_usage(asked: &[u8]) -> bool {
    let asked: Option<Value> = serde_json::from_slice(asked).ok();
    asked.is_some_and(|asked| asked["stream_options"]["include_usage"] == true)
}

#[cfg(test)]
mod tests {
    use dynamo_engine_api::Chunk;

    use super::*;

    fn chat(usage: bool) -> (Value, Value) {
        let answer = json!({
            "id": "chatcmpl-1", "object": "chat.completion", "created": 7, "model": "m", "prompt_token_ids": [1, 2],
            "choices": [{ "index": 0, "finish_reason": "stop", "logprobs": null, "token_ids": [9], "stop_reason": 9,
                "message": { "role": "assistant", "content": "no", "tool_calls": [{ "id": "c", "type": "function" }] } }],
            "usage": { "prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3 },
            "kv_transfer_params": { "x": 1 },
        });
        (answer, json!({ "stream": true, "stream_options": { "include_usage": usage } }))
    }

    fn events(stream: &[u8]) -> Vec<String> {
        let text = std::str::from_utf8(stream).unwrap();
        text.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap().to_owned()).collect()
    }

    #[test]
    fn a_finished_chat_is_a_stream_that_hosts_and_clients_read() {
        let (answer, asked) = chat(true);
        let stream = as_stream(answer.to_string().as_bytes(), asked.to_string().as_bytes(), false).unwrap();
        let summary = Chunk::new(stream.clone()).summary;
        assert!(summary.done && summary.error.is_none());
        assert_eq!((summary.finishes, summary.usage.unwrap().completion_tokens), (1, 1));
        let events = events(&stream);
        assert_eq!((events.len(), events[2].as_str()), (3, "[DONE]"));
        let first: Value = serde_json::from_str(&events[0]).unwrap();
        assert_eq!(
            first,
            json!({
                "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 7, "model": "m",
                "choices": [{ "index": 0, "finish_reason": "stop", "logprobs": null, "stop_reason": 9,
                    "delta": { "role": "assistant", "content": "no",
                        "tool_calls": [{ "id": "c", "type": "function", "index": 0 }] } }],
            })
        );
        let last: Value = serde_json::from_str(&events[1]).unwrap();
        assert_eq!((&last["choices"], &last["usage"]["total_tokens"]), (&json!([]), &json!(3)));
    }

    #[test]
    fn usage_and_ids_come_only_if_they_were_asked_for() {
        let (answer, asked) = chat(false);
        let stream = as_stream(answer.to_string().as_bytes(), asked.to_string().as_bytes(), true).unwrap();
        let events = events(&stream);
        assert_eq!(events.len(), 2);
        assert!(!events[0].contains("usage") && events[0].contains("\"token_ids\":[9]"), "{}", events[0]);
        let whole = as_whole(answer.to_string().as_bytes(), false).unwrap();
        let whole: Value = serde_json::from_slice(&whole).unwrap();
        assert!(whole.get("kv_transfer_params").is_none() && whole.get("prompt_token_ids").is_none());
        assert!(whole["choices"][0].get("token_ids").is_none() && whole["usage"]["total_tokens"] == 3);
    }

    #[test]
    fn a_finished_completion_keeps_its_text_and_what_is_no_answer_passes_as_it_is() {
        let answer =
            json!({ "id": "1", "object": "text_completion", "choices": [{ "index": 0, "text": "", "finish_reason": "stop" }] });
        let stream = as_stream(answer.to_string().as_bytes(), b"{}", false).unwrap();
        let events = events(&stream);
        assert_eq!(serde_json::from_str::<Value>(&events[0]).unwrap(), answer);
        assert_eq!(as_stream(b"what", b"{}", false), None);
    }
}
