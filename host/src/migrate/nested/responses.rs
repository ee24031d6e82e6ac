//! Responses of OpenAI's API: a response of output items, told item by item, and as a whole at its end.
//!
//! Spec: <https://platform.openai.com/docs/api-reference/responses-streaming>

use dynamo_engine_api::Usage;
use serde_json::{Map, Value, json};

use super::{Api, Call, Finish, Kind, Tokens, push_event, text_of};
use crate::migrate::record::{Choice, Stage};

/// The place of the one part that an item has.
const CONTENT: u32 = 0;

#[derive(Debug, Default)]
pub(super) struct Responses {
    /// The response as its first events had it.
    response: Option<Map<String, Value>>,
    /// The number of the next event, where events are numbered.
    sequence: Option<u64>,
    /// Items that are done.
    items: Vec<Value>,
    open: Option<Open>,
    /// Whether it is told that it is worked on.
    is_in_progress: bool,
    /// Whether the last event came.
    is_over: bool,
}

/// An item that is not done.
#[derive(Debug)]
struct Open {
    kind: Kind,
    item: Value,
    /// All that was added to it.
    text: String,
    told: Told,
}

/// How far the client has heard of an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Told {
    Item,
    Part,
    /// All of its text.
    Text,
    /// The end of its part.
    PartEnd,
}

impl Responses {
    fn push(&mut self, mut event: Value, out: &mut Vec<u8>) {
        if let Some(sequence) = &mut self.sequence {
            event["sequence_number"] = (*sequence).into();
            *sequence += 1;
        }
        push_event(out, &event);
    }

    /// An event of the open item.
    fn of_item(&self, open: &Open, kind: &str, name: &str, value: Value) -> Value {
        json!({ "type": kind, "output_index": self.items.len(), "item_id": open.item["id"], name: value })
    }

    /// An event of the open item's part.
    fn of_part(&self, open: &Open, kind: &str, name: &str, value: Value) -> Value {
        let mut event = self.of_item(open, kind, name, value);
        event["content_index"] = CONTENT.into();
        if open.kind == Kind::Text && name != "part" {
            event["logprobs"] = json!([]);
        }
        event
    }

    /// An id that no other item of the response has.
    fn id(&self, prefix: &str) -> String {
        let response = self.response.as_ref().map_or("", |response| text_of(response.get("id").unwrap_or(&Value::Null)));
        format!("{prefix}_{}_{}", response.strip_prefix("resp_").unwrap_or(response), self.items.len())
    }
}

impl Open {
    fn part(&self) -> Value {
        match self.kind {
            Kind::Thought => json!({ "type": "reasoning_text", "text": self.text }),
            _ => json!({ "type": "output_text", "text": self.text, "annotations": [], "logprobs": [] }),
        }
    }

    /// The item as it is at its end.
    fn done(mut self) -> Value {
        let part = self.part();
        let item = &mut self.item;
        item["status"] = "completed".into();
        match self.kind {
            Kind::Call => item["arguments"] = self.text.into(),
            _ => item["content"] = if self.text.is_empty() { json!([]) } else { json!([part]) },
        }
        self.item
    }

    /// The names of its events that add to it and that tell all of it.
    fn names(&self) -> [&'static str; 2] {
        match self.kind {
            Kind::Thought => ["response.reasoning_text.delta", "response.reasoning_text.done"],
            Kind::Text => ["response.output_text.delta", "response.output_text.done"],
            Kind::Call => ["response.function_call_arguments.delta", "response.function_call_arguments.done"],
        }
    }
}

impl Api for Responses {
    fn read(&mut self, event: &Map<String, Value>, choice: &mut Choice) {
        let of = |name: &str| event.get(name).unwrap_or(&Value::Null);
        self.sequence = of("sequence_number").as_u64().map(|number| number + 1).or(self.sequence);
        let mut unknown = || choice.take("", &[], Some(Stage::Unknown));
        match text_of(of("type")) {
            kind @ ("response.created" | "response.queued" | "response.in_progress") => {
                self.is_in_progress |= kind == "response.in_progress";
                self.response = of("response").as_object().cloned().or(self.response.take());
            }
            "response.output_item.added" => {
                let kind = match text_of(&of("item")["type"]) {
                    "message" => Kind::Text,
                    "reasoning" => Kind::Thought,
                    "function_call" => Kind::Call,
                    _ => return unknown(),
                };
                match kind {
                    Kind::Text => {}
                    Kind::Thought => choice.take("", &[], Some(Stage::Reasoning)),
                    Kind::Call => choice.take("", &[], Some(Stage::ToolCall)),
                }
                self.open = Some(Open { kind, item: of("item").clone(), text: String::new(), told: Told::Item });
            }
            "response.content_part.added" => match &mut self.open {
                Some(open) if open.told == Told::Item => open.told = Told::Part,
                // An item of several parts.
                _ => unknown(),
            },
            "response.output_text.delta" => {
                let text = text_of(of("delta"));
                choice.take(text, &[], None);
                match &mut self.open {
                    Some(open) if open.told <= Told::Part => {
                        open.told = Told::Part;
                        open.text.push_str(text);
                    }
                    _ => choice.take("", &[], Some(Stage::Unknown)),
                }
            }
            "response.output_text.done" => self.open.iter_mut().for_each(|open| open.told = Told::Text),
            "response.content_part.done" => self.open.iter_mut().for_each(|open| open.told = Told::PartEnd),
            "response.output_item.done" => {
                self.open = None;
                self.items.push(of("item").clone());
            }
            "response.completed" | "response.incomplete" => (self.is_over, choice.is_finished) = (true, true),
            "response.failed" | "error" => {}
            kind if kind.starts_with("response.reasoning") => choice.take("", &[], Some(Stage::Reasoning)),
            kind if kind.starts_with("response.function_call_arguments") => choice.take("", &[], Some(Stage::ToolCall)),
            _ => unknown(),
        }
    }

    fn has_begun(&self) -> bool {
        self.response.is_some()
    }

    fn usage(&self) -> Option<Usage> {
        None
    }

    fn open(&self) -> Option<Kind> {
        self.open.as_ref().filter(|open| open.told <= Told::Part).map(|open| open.kind)
    }

    fn begin(&mut self, kind: Kind, call: Call<'_>, out: &mut Vec<u8>) {
        if !std::mem::replace(&mut self.is_in_progress, true) {
            self.push(json!({ "type": "response.in_progress", "response": self.response }), out);
        }
        let item = match kind {
            Kind::Thought => json!({ "type": "reasoning", "id": self.id("rs"), "summary": [], "content": [] }),
            Kind::Text => json!({ "type": "message", "id": self.id("msg"), "role": "assistant", "content": [] }),
            Kind::Call => {
                json!({ "type": "function_call", "id": self.id("fc"), "call_id": call.id, "name": call.name, "arguments": "" })
            }
        };
        let mut open = Open { kind, item, text: String::new(), told: Told::Item };
        open.item["status"] = "in_progress".into();
        let at = self.items.len();
        self.push(json!({ "type": "response.output_item.added", "output_index": at, "item": open.item }), out);
        self.open = Some(open);
    }

    fn add(&mut self, text: &str, out: &mut Vec<u8>) {
        let Some(mut open) = self.open.take() else { return };
        let [delta, _] = open.names();
        let event = if open.kind == Kind::Call {
            self.of_item(&open, delta, "delta", text.into())
        } else {
            if open.told < Told::Part {
                self.push(self.of_part(&open, "response.content_part.added", "part", open.part()), out);
                open.told = Told::Part;
            }
            self.of_part(&open, delta, "delta", text.into())
        };
        self.push(event, out);
        open.text.push_str(text);
        self.open = Some(open);
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        let Some(open) = self.open.take() else { return };
        let [_, done] = open.names();
        if open.kind == Kind::Call {
            let event = self.of_item(&open, done, "arguments", open.text.clone().into());
            self.push(event, out);
        } else {
            if open.told == Told::Part {
                self.push(self.of_part(&open, done, "text", open.text.clone().into()), out);
            }
            if matches!(open.told, Told::Part | Told::Text) {
                self.push(self.of_part(&open, "response.content_part.done", "part", open.part()), out);
            }
        }
        let (at, item) = (self.items.len(), open.done());
        self.push(json!({ "type": "response.output_item.done", "output_index": at, "item": item }), out);
        self.items.push(item);
    }

    /// With the event that engines end all responses with, also those that were cut short: their status tells that.
    fn end(&mut self, finish: &Finish, tokens: Tokens, out: &mut Vec<u8>) {
        if self.is_over {
            return;
        }
        let is_cut = finish.reason == "length";
        let mut response = self.response.take().unwrap_or_default();
        let (status, details) =
            if is_cut { ("incomplete", json!({ "reason": "max_output_tokens" })) } else { ("completed", Value::Null) };
        let usage = json!({
            "input_tokens": tokens.prompt,
            "input_tokens_details": { "cached_tokens": 0 },
            "output_tokens": tokens.output,
            "output_tokens_details": { "reasoning_tokens": 0 },
            "total_tokens": u64::from(tokens.prompt) + u64::from(tokens.output),
        });
        let items = std::mem::take(&mut self.items);
        for (name, value) in
            [("status", status.into()), ("incomplete_details", details), ("output", items.into()), ("usage", usage)]
        {
            response.insert(name.to_owned(), value);
        }
        self.push(json!({ "type": "response.completed", "response": response }), out);
    }

    fn bytes(&self) -> usize {
        // What is done is told again at the end, and so is what is open.
        self.items.iter().map(|item| item.to_string().len()).sum::<usize>() + self.open.as_ref().map_or(0, |open| open.text.len())
    }
}
