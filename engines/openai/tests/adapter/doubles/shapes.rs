//! Answers made of one that was captured, or written after the server's source: its fields stay, what it says changes.

use serde_json::{Value, json};

/// What is said.
pub(super) struct Whole<'a> {
    pub(super) chat: bool,
    pub(super) prompt_tokens: u64,
    pub(super) words: &'a [String],
}

/// One server's JSON.
pub(crate) struct Shapes {
    pub(super) chat: Value,
    pub(super) completion: Value,
    /// The first event of a streamed chat.
    pub(super) role: Value,
    pub(super) chat_delta: Value,
    pub(super) completion_delta: Value,
    /// Whether usage comes without being asked for.
    pub(super) always_usage: bool,
}

impl Shapes {
    /// Of two captured answers and two captured streams.
    pub(super) fn captured(chat: &str, completion: &str, chat_stream: &str, completion_stream: &str) -> Self {
        let event = |stream: &str, at: usize| {
            let data = stream.split("\n\n").nth(at).and_then(|event| event.strip_prefix("data: ")).unwrap();
            serde_json::from_str(data).unwrap()
        };
        Self {
            chat: serde_json::from_str(chat).unwrap(),
            completion: serde_json::from_str(completion).unwrap(),
            role: event(chat_stream, 0),
            chat_delta: event(chat_stream, 1),
            completion_delta: event(completion_stream, 0),
            always_usage: false,
        }
    }

    pub(super) fn whole(&self, said: &Whole<'_>) -> String {
        let mut answer = if said.chat { &self.chat } else { &self.completion }.clone();
        let text = if said.chat { &mut answer["choices"][0]["message"]["content"] } else { &mut answer["choices"][0]["text"] };
        *text = said.words.concat().into();
        answer["choices"][0]["finish_reason"] = "length".into();
        said.count(&mut answer["usage"]);
        answer.to_string()
    }

    pub(super) fn events(&self, said: &Whole<'_>, usage_asked: bool) -> Vec<String> {
        let template = if said.chat { &self.chat_delta } else { &self.completion_delta };
        let delta = |text: Option<&str>| {
            let mut event = template.clone();
            let choice = &mut event["choices"][0];
            match (said.chat, text) {
                (true, Some(text)) => choice["delta"]["content"] = text.into(),
                (true, None) => choice["delta"] = json!({}),
                (false, text) => choice["text"] = text.unwrap_or_default().into(),
            }
            if text.is_none() {
                choice["finish_reason"] = "length".into();
            }
            event
        };
        let mut events: Vec<Value> = said.chat.then(|| self.role.clone()).into_iter().collect();
        events.extend(said.words.iter().map(|word| delta(Some(word))));
        events.push(delta(None));
        if usage_asked || self.always_usage {
            let mut event = template.clone();
            event["choices"] = json!([]);
            event["usage"] = json!({});
            said.count(&mut event["usage"]);
            events.push(event);
        }
        events.iter().map(Value::to_string).collect()
    }
}

impl Whole<'_> {
    fn count(&self, usage: &mut Value) {
        let made = self.words.len() as u64;
        usage["prompt_tokens"] = self.prompt_tokens.into();
        usage["completion_tokens"] = made.into();
        usage["total_tokens"] = (self.prompt_tokens + made).into();
    }
}
