//! What the doubles say, and of which tokens: a prompt's words are its tokens, and each word of an answer follows from all words
//! before it, so that whoever goes on with what another said says the same.

use std::{
    hash::{DefaultHasher, Hash, Hasher as _},
    time::Duration,
};

use serde_json::{Value, json};

use super::{MODEL, server::Answer};

/// Answers of more tokens than this take their time.
const QUICK_TOKENS: u64 = 64;
const TOKEN_TIME: Duration = Duration::from_millis(1);
/// Answers of as many take longer than any test waits.
pub(crate) const ENDLESS_TOKENS: u64 = 4000;
const ENDLESS_TOKEN_TIME: Duration = Duration::from_millis(20);

/// One request for tokens.
pub(super) struct Speech {
    pub(super) chat: bool,
    pub(super) stream: bool,
    pub(super) max_tokens: u64,
    with_usage: bool,
    pub(super) ids: Vec<u32>,
    pub(super) seed: Option<i64>,
}

impl Speech {
    /// Reads a body of `/v1/chat/completions` or `/v1/completions`.
    pub(super) fn read(chat: bool, body: &Value) -> Self {
        let ids =
            if chat { ids_of_chat(&body["messages"], body["continue_final_message"] == true) } else { ids_of(&body["prompt"]) };
        let limit = body["max_completion_tokens"].as_u64().filter(|_| chat);
        Self {
            chat,
            stream: body["stream"] == true,
            max_tokens: limit.or(body["max_tokens"].as_u64()).unwrap_or(16),
            with_usage: body["stream_options"]["include_usage"] == true,
            ids,
            seed: body["seed"].as_i64(),
        }
    }

    /// The words from a place on.
    pub(super) fn words(&self, tokens: u64) -> Vec<String> {
        words_after(&self.ids, self.seed).take(usize::try_from(tokens).unwrap()).collect()
    }

    pub(super) fn pace(&self) -> Duration {
        match self.max_tokens {
            ENDLESS_TOKENS.. => ENDLESS_TOKEN_TIME,
            tokens if tokens > QUICK_TOKENS => TOKEN_TIME,
            _ => Duration::ZERO,
        }
    }

    /// All of it, as an engine answers that serves whole requests.
    pub(super) fn answer(&self) -> Answer {
        if self.stream {
            return Answer::Stream(self.events(self.max_tokens), self.pace(), Box::new(|| ()));
        }
        Answer::Whole("200 OK", self.whole(self.max_tokens, "length").to_string())
    }

    /// The whole answer of so many tokens.
    pub(super) fn whole(&self, tokens: u64, finish: &str) -> Value {
        let text = self.words(tokens).concat();
        let mut choice = json!({ "index": 0, "finish_reason": finish, "logprobs": null });
        if self.chat {
            choice["message"] = json!({ "role": "assistant", "content": text });
        } else {
            choice["text"] = text.into();
        }
        let object = if self.chat { "chat.completion" } else { "text_completion" };
        json!({ "id": "d-1", "object": object, "created": 1_795_329_285, "model": MODEL, "choices": [choice], "usage": self.usage(tokens) })
    }

    /// The same as the data of events.
    pub(super) fn events(&self, tokens: u64) -> Vec<String> {
        let object = if self.chat { "chat.completion.chunk" } else { "text_completion" };
        let event = |choices: Value| json!({ "id": "d-1", "object": object, "created": 1_795_329_285, "model": MODEL, "choices": choices });
        let said = |text: &str, finish: Value| {
            let mut choice = json!({ "index": 0, "finish_reason": finish, "logprobs": null });
            match (self.chat, text) {
                (true, "") => choice["delta"] = json!({}),
                (true, text) => choice["delta"] = json!({ "content": text }),
                (false, text) => choice["text"] = text.into(),
            }
            event(json!([choice]))
        };
        let role = json!([{ "index": 0, "delta": { "role": "assistant", "content": "" }, "finish_reason": null }]);
        let mut events: Vec<Value> = self.chat.then(|| event(role)).into_iter().collect();
        events.extend(self.words(tokens).iter().map(|word| said(word, Value::Null)));
        events.push(said("", "length".into()));
        if self.with_usage {
            let mut counted = event(json!([]));
            counted["usage"] = self.usage(tokens);
            events.push(counted);
        }
        events.iter().map(Value::to_string).collect()
    }

    fn usage(&self, tokens: u64) -> Value {
        let prompt = self.ids.len() as u64;
        json!({ "prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens })
    }
}

/// What any double says to a prompt, text or messages, in so many tokens.
pub(crate) fn text_of(prompt: &Value, tokens: u64) -> String {
    text_by(prompt, None, tokens)
}

/// The same by a seed.
pub(crate) fn text_by(prompt: &Value, seed: Option<i64>, tokens: u64) -> String {
    let ids = if prompt[0].is_object() { ids_of_chat(prompt, false) } else { ids_of(prompt) };
    words_after(&ids, seed).take(usize::try_from(tokens).unwrap()).collect()
}

/// A prompt's tokens: one a word; ids are what they are.
fn ids_of(prompt: &Value) -> Vec<u32> {
    match prompt {
        Value::Array(ids) if !ids.is_empty() && ids.iter().all(Value::is_u64) => {
            ids.iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
        }
        Value::String(text) => text.split_whitespace().map(id_of).collect(),
        _ => Vec::new(),
    }
}

/// A chat's tokens, up to where the answer begins, or goes on if the last message is its beginning.
fn ids_of_chat(messages: &Value, goes_on: bool) -> Vec<u32> {
    let mut messages: &[Value] = messages.as_array().map_or(&[], Vec::as_slice);
    let mut begun = "";
    if let Some((last, before)) = messages.split_last().filter(|_| goes_on) {
        (messages, begun) = (before, last["content"].as_str().unwrap());
    }
    let rendered = |message: &Value| format!("<{}> {} ", message["role"], message["content"]);
    let text: String = messages.iter().map(rendered).collect();
    ids_of(&format!("{text}<\"assistant\">{begun}").into())
}

/// The words that follow on tokens.
fn words_after(ids: &[u32], seed: Option<i64>) -> impl Iterator<Item = String> {
    let first = ids.iter().fold(seed.unwrap_or_default().cast_unsigned(), |state, &id| hashed((state, id)));
    std::iter::successors(Some((first, String::new())), |(state, _)| {
        let word = format!(" w{:03}", state % 1000);
        Some((hashed((state, id_of(word.trim()))), word))
    })
    .skip(1)
    .map(|(_, word)| word)
}

fn id_of(word: &str) -> u32 {
    (hashed(word) % 50_000) as u32
}

fn hashed(what: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}
