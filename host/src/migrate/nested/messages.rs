//! Messages of Anthropic's API: a message of content blocks, told block by block.
//!
//! Spec: <https://docs.anthropic.com/en/api/messages-streaming>

use dynamo_engine_api::Usage;
use serde_json::{Map, Value, json};

use super::{Api, Call, Finish, Kind, Tokens, push_event, text_of};
use crate::migrate::record::{Choice, Stage};

/// Parts of a prompt's count that are told beside `input_tokens`, and not in it.
const APART: [&str; 2] = ["cache_creation_input_tokens", "cache_read_input_tokens"];

#[derive(Debug, Default)]
pub(super) struct Messages {
    /// The usage that its first event had.
    usage: Option<Map<String, Value>>,
    /// The place of the next block.
    next: u64,
    open: Option<Kind>,
    /// Whether it is told why the answer ended.
    has_stopped: bool,
}

impl Messages {
    fn block(&self, kind: &str, name: &str, value: Value) -> Value {
        json!({ "type": kind, "index": self.next.saturating_sub(1), name: value })
    }

    fn count(&self, name: &str) -> u64 {
        self.usage.as_ref().and_then(|usage| usage.get(name)?.as_u64()).unwrap_or_default()
    }
}

impl Api for Messages {
    fn read(&mut self, event: &Map<String, Value>, choice: &mut Choice) {
        let of = |name: &str| event.get(name).unwrap_or(&Value::Null);
        let mut unknown = || choice.take("", &[], Some(Stage::Unknown));
        match text_of(of("type")) {
            "message_start" => self.usage = Some(of("message")["usage"].as_object().cloned().unwrap_or_default()),
            "content_block_start" => {
                self.next = of("index").as_u64().unwrap_or(self.next) + 1;
                let block = of("content_block");
                match text_of(&block["type"]) {
                    "text" => {
                        self.open = Some(Kind::Text);
                        choice.take(text_of(&block["text"]), &[], None);
                    }
                    "thinking" | "redacted_thinking" => {
                        self.open = Some(Kind::Thought);
                        choice.take("", &[], Some(Stage::Reasoning));
                    }
                    "tool_use" => {
                        self.open = Some(Kind::Call);
                        choice.take("", &[], Some(Stage::ToolCall));
                    }
                    _ => unknown(),
                }
            }
            "content_block_delta" => match text_of(&of("delta")["type"]) {
                "text_delta" => choice.take(text_of(&of("delta")["text"]), &[], None),
                "thinking_delta" => choice.take("", &[], Some(Stage::Reasoning)),
                "input_json_delta" => choice.take("", &[], Some(Stage::ToolCall)),
                "signature_delta" => {}
                _ => unknown(),
            },
            "content_block_stop" => self.open = None,
            "message_delta" => {
                self.has_stopped |= of("delta")["stop_reason"].is_string();
                choice.is_finished |= self.has_stopped;
            }
            "message_stop" | "ping" | "error" => {}
            _ => unknown(),
        }
    }

    fn has_begun(&self) -> bool {
        self.usage.is_some()
    }

    fn usage(&self) -> Option<Usage> {
        let prompt = APART.iter().fold(self.count("input_tokens"), |sum, name| sum.saturating_add(self.count(name)));
        Some(Usage { prompt_tokens: u32::try_from(prompt).ok()?, ..Usage::default() })
    }

    fn open(&self) -> Option<Kind> {
        self.open
    }

    fn begin(&mut self, kind: Kind, call: Call<'_>, out: &mut Vec<u8>) {
        let block = match kind {
            Kind::Thought => json!({ "type": "thinking", "thinking": "" }),
            Kind::Text => json!({ "type": "text", "text": "" }),
            Kind::Call => json!({ "type": "tool_use", "id": call.id, "name": call.name, "input": {} }),
        };
        self.next += 1;
        self.open = Some(kind);
        push_event(out, &self.block("content_block_start", "content_block", block));
    }

    fn add(&mut self, text: &str, out: &mut Vec<u8>) {
        let delta = match self.open {
            Some(Kind::Thought) => json!({ "type": "thinking_delta", "thinking": text }),
            Some(Kind::Call) => json!({ "type": "input_json_delta", "partial_json": text }),
            _ => json!({ "type": "text_delta", "text": text }),
        };
        push_event(out, &self.block("content_block_delta", "delta", delta));
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        if self.open.take().is_some() {
            push_event(out, &json!({ "type": "content_block_stop", "index": self.next.saturating_sub(1) }));
        }
    }

    fn end(&mut self, finish: &Finish, tokens: Tokens, out: &mut Vec<u8>) {
        if !self.has_stopped {
            let reason = match (&*finish.reason, &finish.stop) {
                (_, Some(_)) => "stop_sequence",
                ("length", _) => "max_tokens",
                ("tool_calls", _) => "tool_use",
                ("content_filter", _) => "refusal",
                _ => "end_turn",
            };
            // As its first event had it, so that what was cached stays apart.
            let mut usage = self.usage.take().unwrap_or_default();
            if usage.get("input_tokens").and_then(Value::as_u64).unwrap_or_default() == 0 {
                let apart: u64 = APART.iter().filter_map(|name| usage.get(*name)?.as_u64()).sum();
                usage.insert("input_tokens".to_owned(), u64::from(tokens.prompt).saturating_sub(apart).into());
            }
            usage.insert("output_tokens".to_owned(), tokens.output.into());
            let delta = json!({ "stop_reason": reason, "stop_sequence": finish.stop });
            push_event(out, &json!({ "type": "message_delta", "delta": delta, "usage": usage }));
        }
        push_event(out, &json!({ "type": "message_stop" }));
    }

    fn bytes(&self) -> usize {
        0
    }
}
