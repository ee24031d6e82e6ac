//! `transformers serve` 5.19 as captured: a server that is nobody's kind.

use serde_json::{Value, json};

use super::{Answer, AtWork, MODEL, Manners, shapes::Shapes};

const CHAT: &str = include_str!("../../fixtures/transformers_chat.sse");

pub(crate) struct Transformers(Shapes);

impl Default for Transformers {
    fn default() -> Self {
        let event = |at: usize| -> Value {
            serde_json::from_str(CHAT.split("\n\n").nth(at).unwrap().strip_prefix("data: ").unwrap()).unwrap()
        };
        let of = |object: &str, choice: Value| json!({ "id": "695a", "object": object, "created": 1, "model": MODEL, "choices": [choice], "usage": {} });
        let message = json!({ "index": 0, "message": { "role": "assistant", "content": "" }, "finish_reason": "length" });
        let text = json!({ "index": 0, "text": "", "finish_reason": "length" });
        let mut completion_delta = event(1);
        completion_delta["choices"] = json!([{ "index": 0, "text": "" }]);
        Self(Shapes {
            chat: of("chat.completion", message),
            completion: of("text_completion", text),
            role: event(0),
            chat_delta: event(1),
            completion_delta,
            always_usage: true,
        })
    }
}

impl Manners for Transformers {
    fn answer(&self, _at_work: &AtWork, line: &str, _body: &str) -> Option<Answer> {
        match line {
            "get /health" => Some(("200 OK", r#"{"status":"ok"}"#.to_owned())),
            // It asks a hub, and fails without a network.
            "get /v1/models" => Some(("500 Internal Server Error", "Internal Server Error".to_owned())),
            _ => None,
        }
    }

    fn refusal(&self, body: Option<&Value>) -> Option<Answer> {
        body.is_none().then(|| ("422 Unprocessable Entity", json!({ "detail": "JSON decode error" }).to_string()))
    }

    fn shapes(&self) -> &Shapes {
        &self.0
    }

    fn says_done(&self) -> bool {
        false
    }
}
