//! vLLM 0.32, as captured.

use std::sync::atomic::Ordering;

use serde_json::Value;

use super::{Answer, AtWork, MODEL, Manners, shapes::Shapes};

const METRICS: &str = include_str!("../../fixtures/vllm_metrics.txt");

pub(crate) struct Vllm(Shapes);

impl Default for Vllm {
    fn default() -> Self {
        Self(Shapes::captured(
            include_str!("../../fixtures/vllm_chat.json"),
            include_str!("../../fixtures/vllm_completion.json"),
            include_str!("../../fixtures/vllm_chat.sse"),
            include_str!("../../fixtures/vllm_completions_token_ids.sse"),
        ))
    }
}

impl Manners for Vllm {
    fn answer(&self, at_work: &AtWork, line: &str, _body: &str) -> Option<Answer> {
        let answer = match line {
            "get /health" => "",
            "get /version" => r#"{"version":"0.32.0"}"#,
            "get /v1/models" => include_str!("../../fixtures/vllm_models.json"),
            "get /metrics" => return Some(("200 OK", metrics(at_work))),
            "post /v1/messages" => include_str!("../../fixtures/vllm_message.json"),
            "post /v1/messages/count_tokens" => include_str!("../../fixtures/vllm_count_tokens.json"),
            "post /v1/responses" => include_str!("../../fixtures/vllm_response.json"),
            _ => return None,
        };
        Some(("200 OK", answer.to_owned()))
    }

    fn refusal(&self, body: Option<&Value>) -> Option<Answer> {
        let Some(body) = body else {
            return Some(("400 Bad Request", include_str!("../../fixtures/vllm_malformed.json").to_owned()));
        };
        let unknown = body["model"] != MODEL;
        unknown.then(|| ("404 Not Found", include_str!("../../fixtures/vllm_unknown_model.json").to_owned()))
    }

    fn shapes(&self) -> &Shapes {
        &self.0
    }
}

/// The scrape with the numbers of now.
fn metrics(at_work: &AtWork) -> String {
    let now = |line: &str| {
        let value = match line.split('{').next()? {
            "vllm:num_requests_running" => f64::from(at_work.running()),
            "vllm:generation_tokens_total" => at_work.tokens.load(Ordering::SeqCst) as f64,
            _ => return None,
        };
        Some(format!("{} {value:.1}", line.rsplit_once(' ')?.0))
    };
    METRICS.lines().map(|line| now(line).unwrap_or_else(|| line.to_owned()) + "\n").collect()
}
