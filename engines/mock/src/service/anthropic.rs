//! Messages of Anthropic's API, whole and streamed, as vLLM answers them.

use serde_json::{Value, json};

use super::reply::Rendering;
use crate::{driver::Output, model::FinishReason};

/// Why it ended, in Anthropic's words.
fn stop_reason(finish: FinishReason, stop: Option<&str>) -> &'static str {
    match (finish, stop) {
        (_, Some(_)) => "stop_sequence",
        (FinishReason::Length, _) => "max_tokens",
        _ => "end_turn",
    }
}

/// A whole message.
pub(super) fn message(rendering: &Rendering, text: &str, finish: Option<FinishReason>) -> Value {
    let stop = rendering.order.choices[0].stop_reason.as_deref();
    let mut message = json!({
        "id": rendering.id,
        "type": "message",
        "role": "assistant",
        "content": [{ "type": "text", "text": text }],
        "model": rendering.model,
        "stop_reason": finish.map(|finish| stop_reason(finish, stop)),
        "usage": usage(rendering),
    });
    if let Some(stop) = stop {
        message["stop_sequence"] = json!(stop);
    }
    message
}

/// The events of a token.
pub(super) fn token(rendering: &Rendering, output: Output, shown: usize) -> Vec<Value> {
    let mut events = Vec::new();
    if output.index == 0 {
        let message = json!({
            "id": rendering.id, "type": "message", "role": "assistant", "content": [], "model": rendering.model,
            "stop_reason": null, "stop_sequence": null,
            "usage": { "input_tokens": rendering.counted.prompt, "output_tokens": 0 },
        });
        events.push(json!({ "type": "message_start", "message": message }));
        let block = json!({ "type": "text", "text": "" });
        events.push(json!({ "type": "content_block_start", "content_block": block, "index": 0 }));
    }
    if shown > 0 {
        let delta = json!({ "type": "text_delta", "text": rendering.text[..shown] });
        events.push(json!({ "type": "content_block_delta", "delta": delta, "index": 0 }));
    }
    if let Some(finish) = output.finish {
        let stop = rendering.order.choices[0].stop_reason.as_deref();
        let delta = json!({ "stop_reason": stop_reason(finish, stop), "stop_sequence": stop });
        events.push(json!({ "type": "content_block_stop", "index": 0 }));
        events.push(json!({ "type": "message_delta", "delta": delta, "usage": usage(rendering) }));
    }
    events
}

/// The event after the last token.
pub(super) fn end() -> Value {
    json!({ "type": "message_stop" })
}

fn usage(rendering: &Rendering) -> Value {
    let counted = rendering.counted;
    json!({
        // Anthropic counts what was cached apart.
        "input_tokens": counted.prompt - counted.cached,
        "output_tokens": counted.completion,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counted.cached,
    })
}
