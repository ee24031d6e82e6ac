//! SGLang 0.5.23, after its source.

use std::sync::{Arc, Mutex, atomic::Ordering};

use serde_json::{Value, json};

use super::{Answer, AtWork, Left, MODEL, Manners, shapes::Shapes};

pub(crate) struct Sglang {
    pub(crate) shapes: Shapes,
    /// New enough for `/ready`.
    pub(crate) ready: bool,
    /// What comes of `/server_info`.
    pub(crate) info: Arc<Mutex<Answer>>,
}

impl Default for Sglang {
    fn default() -> Self {
        let usage = json!({ "prompt_tokens": 0, "total_tokens": 0, "completion_tokens": 0, "prompt_tokens_details": null, "reasoning_tokens": 0 });
        let of = |object: &str, choice: Value| json!({ "id": "3c9f", "object": object, "created": 1_795_329_285, "model": MODEL, "choices": [choice] });
        let chunk = |delta: Value| {
            let choice = json!({ "index": 0, "delta": delta, "logprobs": null, "finish_reason": null, "matched_stop": null });
            of("chat.completion.chunk", choice)
        };
        let message = json!({ "role": "assistant", "content": "", "reasoning_content": null, "tool_calls": null });
        let choice = json!({ "index": 0, "message": message, "logprobs": null, "finish_reason": "length", "matched_stop": null });
        let mut chat = of("chat.completion", choice);
        chat["usage"] = usage.clone();
        let text = json!({ "index": 0, "text": "", "logprobs": null, "finish_reason": null, "matched_stop": null });
        let mut completion = of("text_completion", text.clone());
        completion["usage"] = usage;
        let role = chunk(json!({ "role": "assistant", "content": "", "reasoning_content": null, "tool_calls": null }));
        let chat_delta = chunk(json!({ "role": null, "content": "", "reasoning_content": null, "tool_calls": null }));
        let completion_delta = of("text_completion", text);
        let info = json!({ "page_size": 64, "chunked_prefill_size": 8192, "version": "0.5.23" });
        let info = Arc::new(Mutex::new(("200 OK", info.to_string())));
        Self { shapes: Shapes { chat, completion, role, chat_delta, completion_delta, always_usage: false }, ready: true, info }
    }
}

impl Manners for Sglang {
    fn answer(&self, at_work: &AtWork, line: &str, body: &str) -> Option<Answer> {
        let answer = match line {
            "get /ready" if self.ready => String::new(),
            // It would generate a token; tests count how often it is asked.
            "get /health" => String::new(),
            "get /v1/models" => include_str!("../../fixtures/sglang_models.json").to_owned(),
            "get /server_info" => return Some(self.info.lock().unwrap().clone()),
            "get /v1/loads?format=json" => loads(at_work),
            "post /abort_request" => {
                let body: Value = serde_json::from_str(body).unwrap();
                assert_eq!(body["abort_all"], false);
                at_work.aborted.lock().unwrap().push(body["rid"].as_str().unwrap().to_owned());
                String::new()
            }
            "post /v1/messages" => include_str!("../../fixtures/vllm_message.json").to_owned(),
            "post /v1/responses" => include_str!("../../fixtures/vllm_response.json").to_owned(),
            _ => return None,
        };
        Some(("200 OK", answer))
    }

    fn refusal(&self, body: Option<&Value>) -> Option<Answer> {
        let error = |message: &str| {
            let error = json!({ "object": "error", "message": message, "type": "Bad Request", "param": null, "code": 400 });
            ("400 Bad Request", error.to_string())
        };
        let Some(body) = body else { return Some(error("[{'type': 'json_invalid', 'loc': ('body', 0)}]")) };
        // Types are checked, unknown names are not.
        let wrong = |name: &str, is: fn(&Value) -> bool| !body[name].is_null() && !is(&body[name]);
        let wrong = wrong("rid", Value::is_string) || wrong("priority", Value::is_i64) || wrong("routed_dp_rank", Value::is_u64);
        wrong.then(|| error("1 validation error"))
    }

    fn shapes(&self) -> &Shapes {
        &self.shapes
    }

    fn client_left(&self, stream: bool) -> Left {
        if stream { Left::NoticedLate } else { Left::Stops }
    }
}

fn loads(at_work: &AtWork) -> String {
    let rank = |rank: u32, running: u32| {
        json!({ "dp_rank": rank, "num_running_reqs": running, "num_waiting_reqs": 0, "num_waiting_uncached_tokens": 0,
            "num_used_tokens": running * 100, "num_total_tokens": running * 100, "max_total_num_tokens": 524_288,
            "max_running_requests": 256, "token_usage": 0.0, "gen_throughput": at_work.tokens.load(Ordering::SeqCst) as f64,
            "cache_hit_rate": 0.0, "utilization": 0.0, "queues": { "waiting": 0, "grammar": 0, "paused": 0, "retracted": 0 } })
    };
    let loads = [rank(0, at_work.running()), rank(1, 0)];
    json!({ "timestamp": "2026-08-06T09:15:23.481920+00:00", "version": "0.5.23", "loads": loads }).to_string()
}
