//! llama.cpp's server 0.5.0, as captured.

use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use super::{Answer, AtWork, Left, Manners, shapes::Shapes};

const METRICS: &str = include_str!("../../fixtures/llama_metrics.txt");
const SLOTS: u32 = 4;

pub(crate) struct Llamacpp {
    pub(crate) shapes: Shapes,
    /// Started with `--metrics`.
    pub(crate) metrics: bool,
    /// Started without `--no-slots`.
    pub(crate) slots: bool,
}

impl Default for Llamacpp {
    fn default() -> Self {
        let mut shapes = Shapes::captured(
            include_str!("../../fixtures/llama_chat.json"),
            include_str!("../../fixtures/llama_completion.json"),
            include_str!("../../fixtures/llama_chat.sse"),
            include_str!("../../fixtures/llama_sigterm.sse"),
        );
        shapes.always_usage = true;
        Self { shapes, metrics: true, slots: true }
    }
}

impl Manners for Llamacpp {
    fn answer(&self, at_work: &AtWork, line: &str, _body: &str) -> Option<Answer> {
        let answer = match line {
            "get /health" => r#"{"status":"ok"}"#.to_owned(),
            "get /v1/models" => include_str!("../../fixtures/llama_models.json").to_owned(),
            "get /props" => include_str!("../../fixtures/llama_props.json").to_owned(),
            "get /slots" if self.slots => slots(at_work.running()),
            "get /metrics" if self.metrics => metrics(at_work),
            "get /slots" => return Some(not_supported("slots", "--slots")),
            "get /metrics" => return Some(not_supported("metrics", "--metrics")),
            "post /v1/embeddings" => return Some(not_supported("embeddings", "--embeddings")),
            "post /v1/messages" => include_str!("../../fixtures/llama_message.json").to_owned(),
            "post /v1/messages/count_tokens" => r#"{"input_tokens":17}"#.to_owned(),
            "post /v1/responses" => include_str!("../../fixtures/llama_response.json").to_owned(),
            _ => return None,
        };
        Some(("200 OK", answer))
    }

    fn refusal(&self, body: Option<&Value>) -> Option<Answer> {
        let message = "[json.exception.parse_error.101] parse error at line 1, column 36: syntax error while parsing value";
        let error = json!({ "error": { "code": 500, "message": message, "type": "server_error" } });
        body.is_none().then(|| ("500 Internal Server Error", error.to_string()))
    }

    fn shapes(&self) -> &Shapes {
        &self.shapes
    }

    fn closes_after_streams(&self) -> bool {
        true
    }

    fn client_left(&self, stream: bool) -> Left {
        if stream { Left::Stops } else { Left::RunsOn }
    }
}

fn slots(running: u32) -> String {
    let slot = |id: u32| match id < running {
        true => {
            json!({ "id": id, "n_ctx": 2048, "speculative": false, "is_processing": true, "id_task": 7, "n_prompt_tokens": 48,
            "n_prompt_tokens_processed": 10, "n_prompt_tokens_cache": 0, "next_token": [{ "has_next_token": true, "n_decoded": 38 }] })
        }
        false => json!({ "id": id, "n_ctx": 2048, "speculative": false, "is_processing": false }),
    };
    Value::from_iter((0..SLOTS).map(slot)).to_string()
}

fn metrics(at_work: &AtWork) -> String {
    let (running, tokens) = (at_work.running(), at_work.tokens.load(Ordering::SeqCst));
    METRICS
        .replace("llamacpp:requests_processing 0\n", &format!("llamacpp:requests_processing {}\n", running.min(SLOTS)))
        .replace("llamacpp:requests_deferred 0\n", &format!("llamacpp:requests_deferred {}\n", running.saturating_sub(SLOTS)))
        .replace("tokens_predicted_total 9330\n", &format!("tokens_predicted_total {tokens}\n"))
}

fn not_supported(what: &str, flag: &str) -> Answer {
    let message = format!("This server does not support {what} endpoint. Start it with `{flag}`");
    let error = json!({ "error": { "code": 501, "message": message, "type": "not_supported_error" } });
    ("501 Not Implemented", error.to_string())
}
