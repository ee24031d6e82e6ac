//! Responses of OpenAI's API, whole and streamed, as vLLM answers them.

use serde_json::{Value, json};

use super::reply::Rendering;
use crate::{driver::Output, model::FinishReason};

/// Places of the one text of the one message that every response has.
const OUTPUT: u32 = 0;
const CONTENT: u32 = 0;

/// A response, as far as it is: without a text, it has only begun.
pub(super) fn response(rendering: &Rendering, text: Option<&str>, finish: Option<FinishReason>) -> Value {
    let is_cut = finish == Some(FinishReason::Length);
    let status = match finish {
        None => "in_progress",
        Some(_) if is_cut => "incomplete",
        Some(_) => "completed",
    };
    let output: Vec<_> = text.into_iter().map(|text| item(rendering, Some(text), "completed")).collect();
    json!({
        "id": rendering.id,
        "object": "response",
        "created_at": rendering.created,
        "status": status,
        "error": null,
        "incomplete_details": is_cut.then(|| json!({ "reason": "max_output_tokens" })),
        "instructions": null,
        "metadata": null,
        "model": rendering.model,
        "output": output,
        "parallel_tool_calls": true,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "background": false,
        "previous_response_id": null,
        "service_tier": "auto",
        "truncation": "disabled",
        "usage": finish.map(|_| usage(rendering)),
    })
}

/// The events of a token; `said` is all text up to and with it.
pub(super) fn token(rendering: &Rendering, output: Output, shown: usize, said: &str) -> Vec<Value> {
    let mut events = Vec::new();
    let id = item_id(rendering);
    if output.index == 0 {
        let begun = response(rendering, None, None);
        events.push(json!({ "type": "response.created", "response": begun }));
        events.push(json!({ "type": "response.in_progress", "response": begun }));
        let item = item(rendering, None, "in_progress");
        events.push(json!({ "type": "response.output_item.added", "output_index": OUTPUT, "item": item }));
        events.push(at_text("response.content_part.added", &id, "part", text_part("")));
    }
    if shown > 0 {
        let mut delta = at_text("response.output_text.delta", &id, "delta", json!(rendering.text[..shown]));
        delta["logprobs"] = json!([]);
        events.push(delta);
    }
    if output.finish.is_some() {
        let mut done = at_text("response.output_text.done", &id, "text", json!(said));
        done["logprobs"] = json!([]);
        events.push(done);
        events.push(at_text("response.content_part.done", &id, "part", text_part(said)));
        let item = item(rendering, Some(said), "completed");
        events.push(json!({ "type": "response.output_item.done", "output_index": OUTPUT, "item": item }));
    }
    events
}

/// The event after the last token.
pub(super) fn end(rendering: &Rendering, said: &str, finish: Option<FinishReason>) -> Value {
    json!({ "type": "response.completed", "response": response(rendering, Some(said), finish) })
}

fn at_text(kind: &str, item_id: &str, member: &str, value: Value) -> Value {
    json!({ "type": kind, "item_id": item_id, "output_index": OUTPUT, "content_index": CONTENT, member: value })
}

fn item(rendering: &Rendering, text: Option<&str>, status: &str) -> Value {
    let content: Vec<_> = text.into_iter().map(text_part).collect();
    json!({ "id": item_id(rendering), "type": "message", "role": "assistant", "status": status, "content": content })
}

fn text_part(text: &str) -> Value {
    json!({ "type": "output_text", "text": text, "annotations": [], "logprobs": [] })
}

fn item_id(rendering: &Rendering) -> String {
    rendering.id.replacen("resp_", "msg_", 1)
}

fn usage(rendering: &Rendering) -> Value {
    let counted = rendering.counted;
    json!({
        "input_tokens": counted.prompt,
        "input_tokens_details": { "cached_tokens": counted.cached },
        "output_tokens": counted.completion,
        "output_tokens_details": { "reasoning_tokens": 0 },
        "total_tokens": counted.prompt + counted.completion,
    })
}
