//! TensorRT-LLM's `trtllm-serve`, after its source: what it does not know it refuses.

use std::sync::Mutex;

use serde_json::{Value, json};

use super::{Answer, AtWork, MODEL, Manners, shapes::Shapes};

/// What its models of a request know, as far as tests send it.
const KNOWN: [&str; 12] = [
    "model",
    "messages",
    "prompt",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
];

pub(crate) struct Trtllm {
    shapes: Shapes,
    /// Statistics that nobody has read.
    iterations: Mutex<Vec<Value>>,
}

impl Default for Trtllm {
    fn default() -> Self {
        let usage = json!({ "prompt_tokens": 0, "total_tokens": 0, "completion_tokens": 0 });
        let of = |object: &str, choice: Value| json!({ "id": "chatcmpl-1f", "object": object, "created": 1_795_329_285, "model": MODEL, "choices": [choice] });
        let message = json!({ "role": "assistant", "content": "", "reasoning_content": null, "tool_calls": [] });
        let ends = json!({ "logprobs": null, "finish_reason": "length", "stop_reason": null, "disaggregated_params": null });
        let with = |mut choice: Value, finish: Value| {
            choice.as_object_mut().unwrap().extend(ends.as_object().unwrap().clone());
            choice["finish_reason"] = finish;
            choice
        };
        let mut chat = of("chat.completion", with(json!({ "index": 0, "message": message }), "length".into()));
        chat["usage"] = usage.clone();
        let text = json!({ "index": 0, "text": "", "token_ids": null });
        let mut completion = of("text_completion", with(text.clone(), "length".into()));
        completion["usage"] = usage;
        let chunk = |delta: Value| of("chat.completion.chunk", with(json!({ "index": 0, "delta": delta }), Value::Null));
        let role = chunk(json!({ "role": "assistant", "content": "" }));
        let chat_delta = chunk(json!({ "content": "", "reasoning_content": null, "tool_calls": [] }));
        let completion_delta = of("text_completion", with(text, Value::Null));
        let shapes = Shapes { chat, completion, role, chat_delta, completion_delta, always_usage: false };
        Self { shapes, iterations: Mutex::default() }
    }
}

impl Manners for Trtllm {
    fn answer(&self, _at_work: &AtWork, line: &str, _body: &str) -> Option<Answer> {
        let answer = match line {
            "get /health" => String::new(),
            "get /version" => r#"{"version":"1.2.0"}"#.to_owned(),
            "get /v1/models" => include_str!("../../fixtures/trtllm_models.json").to_owned(),
            // Each is handed out once.
            "get /metrics" => Value::from(std::mem::take(&mut *self.iterations.lock().unwrap())).to_string(),
            "post /v1/responses" => include_str!("../../fixtures/vllm_response.json").to_owned(),
            _ => return None,
        };
        Some(("200 OK", answer))
    }

    fn refusal(&self, body: Option<&Value>) -> Option<Answer> {
        let error = |text: String| ("400 Bad Request", json!({ "error": text }).to_string());
        let Some(body) = body else { return Some(error("[{'type': 'json_invalid', 'loc': ('body', 0)}]".to_owned())) };
        let unknown = body.as_object()?.keys().find(|name| !KNOWN.contains(&name.as_str()))?;
        Some(error(format!(
            "[{{'type': 'extra_forbidden', 'loc': ('body', '{unknown}'), 'msg': 'Extra inputs are not permitted'}}]"
        )))
    }

    fn shapes(&self) -> &Shapes {
        &self.shapes
    }

    fn worked(&self, at_work: &AtWork) {
        let mut iterations = self.iterations.lock().unwrap();
        let number = iterations.len();
        let running = at_work.running();
        iterations.push(json!({ "iter": number, "iterLatencyMS": 15.5, "gpuMemUsage": 4_000_000_000_u64, "numActiveRequests": running,
            "numQueuedRequests": 3, "maxNumActiveRequests": 64, "maxNumTokensRuntime": 8192, "attentionDpRank": 0,
            "kvCacheStats": { "maxNumBlocks": 1000, "freeNumBlocks": 1000 - running, "usedNumBlocks": running, "tokensPerBlock": 32,
                "allocNewBlocks": 0, "allocTotalBlocks": 0, "cacheHitRate": 0.0, "missedBlocks": 0, "reusedBlocks": 0 },
            "inflightBatchingStats": { "numContextRequests": 0, "numGenRequests": running, "numPausedRequests": 0 } }));
    }
}
