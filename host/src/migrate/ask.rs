//! What another engine is asked, so that it goes on with a choice.
//!
//! Forms, best first: token ids, which say exactly what was computed; the chat with the answer's beginning as its last
//! message; the prompt's text with the answer's behind it. Nothing else is guessed: where none of them is sound, the reason is
//! said. A choice of which the client has nothing is simply asked for again.

use bytes::Bytes;
use dynamo_engine_api::{ChatContinuation, Continues, Endpoint};
use serde_json::{Map, Value, json};

use super::{
    asked_as, has_choices, nested,
    record::{Choice, Stage},
    seam::Seam,
};

/// Why nobody can go on with a choice, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unsound(pub(crate) &'static str);

/// Fields of a chat that a completion does not have, or that its ids say already.
const NOT_OF_IDS: &[&str] = &[
    "messages",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "functions",
    "function_call",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "chat_template",
    "chat_template_kwargs",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "reasoning_effort",
    "include_reasoning",
    "reasoning",
    "thinking",
    "verbosity",
    "modalities",
    "prediction",
    "store",
    "metadata",
    "service_tier",
    "response_format",
    "mm_processor_kwargs",
    "add_special_tokens",
    "truncate_prompt_tokens",
];

/// Fields with which the beginning of an answer cannot be given back to an engine, and why.
const UNSOUND: &[(&str, &str)] = &[
    ("echo", "the prompt is echoed in its text"),
    ("suffix", "its end is given, and a continuation would be written for another beginning"),
    ("use_beam_search", "beams are searched, and one that was cut off is not the best one"),
    ("prompt_logprobs", "log probabilities of the prompt would be of a longer one"),
];

/// vLLM's `max_tokens` of a completion that says none, and OpenAI's.
const DEFAULT_COMPLETION_TOKENS: u64 = 16;

/// A request as the client made it, to be asked for the rest of one of its choices.
pub(super) struct Original {
    endpoint: Endpoint,
    fields: Map<String, Value>,
    /// Choices of each prompt.
    n: u32,
    is_guided: bool,
    has_tools: bool,
    is_multimodal: bool,
    is_retold: bool,
}

/// What is asked next for a choice.
pub(super) enum Next {
    Ask(Ask),
    /// It has all tokens that it may have; only its end was not heard.
    Full,
}

/// A request for the rest of a choice.
pub(super) struct Ask {
    pub(super) endpoint: Endpoint,
    pub(super) body: Bytes,
    pub(super) seam: Seam,
    /// Whether its prompt's ids say all so far, so that new ones follow the old.
    pub(super) is_by_ids: bool,
    /// How it is said, for the log.
    pub(super) form: &'static str,
}

impl Original {
    /// Reads a body that was decoded before; of an API whose streams have no choices, as a chat.
    ///
    /// # Errors
    /// Why it cannot be asked again.
    pub(super) fn read(
        endpoint: Endpoint,
        body: &[u8],
        is_guided: bool,
        has_tools: bool,
        is_multimodal: bool,
    ) -> Result<Self, Unsound> {
        let fields = serde_json::from_slice(body).map_err(|_| Unsound("its request cannot be read again"))?;
        let is_retold = !has_choices(endpoint);
        let fields: Map<String, Value> = if is_retold { nested::as_chat(endpoint, fields)? } else { fields };
        let is_guided = is_guided || is_retold && fields.contains_key("response_format");
        let n = fields.get("n").and_then(Value::as_u64).map_or(1, |n| n.clamp(1, u64::from(u32::MAX)) as u32);
        let offers_none = fields.get("tool_choice").is_some_and(|choice| choice == "none");
        let is_told = fields.get("tool_choice").is_some_and(|choice| choice == "required" || choice.is_object());
        let (is_guided, has_tools) = (is_guided || is_told, has_tools && !offers_none);
        Ok(Self { endpoint: asked_as(endpoint), fields, n, is_guided, has_tools, is_multimodal, is_retold })
    }

    /// What is asked: what the client asked, or the chat that it is.
    pub(super) fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    /// Whether it is a chat only because its own API is not gone on with.
    pub(super) fn is_retold(&self) -> bool {
        self.is_retold
    }

    /// A text, as a prompt of its own.
    pub(super) fn text_alone(&self, text: &str) -> Bytes {
        json!({ "model": self.fields.get("model"), "prompt": text, "add_special_tokens": false }).to_string().into()
    }

    /// Which prompt a choice answers.
    pub(super) fn prompt_of(&self, choice: u32) -> usize {
        (choice / self.n) as usize
    }

    /// How many prompts there are.
    pub(super) fn prompts(&self) -> usize {
        match self.fields.get("prompt") {
            Some(Value::Array(prompts)) if prompts.iter().any(|prompt| !prompt.is_number()) => prompts.len(),
            _ => 1,
        }
    }

    /// Whether the client wants a last frame with the usage.
    pub(super) fn wants_usage(&self) -> bool {
        self.fields.get("stream_options").and_then(|options| options.get("include_usage")?.as_bool()).unwrap_or_default()
    }

    /// The request of one choice's prompt alone, to learn how long it is; none if it has images, which are no text.
    pub(super) fn with_prompt_of(&self, choice: u32) -> Option<Bytes> {
        if self.is_multimodal {
            return None;
        }
        let mut fields = self.fields.clone();
        if let Some(prompt) = self.prompt(choice) {
            fields.insert("prompt".to_owned(), prompt);
        }
        Some(Value::Object(fields).to_string().into())
    }

    /// What to ask an engine for the rest of a choice.
    ///
    /// # Errors
    /// Why it cannot go on.
    pub(super) fn next(
        &self,
        index: u32,
        choice: &Choice,
        engine: Continues,
        max_model_len: Option<u32>,
    ) -> Result<Next, Unsound> {
        let is_blank = choice.text.trim().is_empty();
        match choice.stage {
            Stage::Nothing => return Ok(Next::Ask(self.anew(index, choice))),
            // White space alone is nothing that a template could be told. Who has reasoned before it would do so again.
            Stage::Text
                if is_blank
                    && !choice.has_reasoned
                    && self.endpoint == Endpoint::ChatCompletions
                    && choice.all_ids().is_none() =>
            {
                return Ok(Next::Ask(self.anew(index, choice)));
            }
            Stage::Text => {}
            Stage::Reasoning => return Err(Unsound("it was cut off within its reasoning, which no engine can be given back")),
            Stage::ToolCall => return Err(Unsound("it was cut off within a call of a tool")),
            Stage::Unknown => return Err(Unsound("it has parts that the host does not know")),
        }
        if self.is_guided {
            return Err(Unsound("its output is held to a grammar, which would begin anew in the middle"));
        }
        let is_set = |name: &&(&str, &str)| self.fields.get(name.0).is_some_and(|value| !is_nothing(value));
        if let Some((_, reason)) = UNSOUND.iter().find(is_set) {
            return Err(Unsound(reason));
        }
        let has_logprobs = self.fields.get("logprobs").is_some_and(|value| !is_nothing(value));
        if self.endpoint == Endpoint::Completions && has_logprobs {
            return Err(Unsound("the places of its log probabilities in the text would be wrong"));
        }
        let left = match self.limit(choice, engine) {
            Some(limit) => match limit.saturating_sub(u64::from(choice.tokens)) {
                0 => return Ok(Next::Full),
                left => Some(left),
            },
            None => None,
        };
        let has_stops = !self.stops().is_empty();
        let ids = choice.all_ids().filter(|_| {
            // Where text is held back for stop strings, ids are ahead of the client; what the host does not read again (calls of
            // tools, log probabilities, images) is lost in a completion.
            engine.takes_ids && !has_stops && !self.has_tools && !self.is_multimodal && !has_logprobs
        });
        if let Some(ids) = ids {
            let room = || max_model_len.map(|most| u64::from(most).saturating_sub(ids.len() as u64));
            // A chat without a limit has all the room, a completion has not.
            match left.or_else(room) {
                Some(0) => return Ok(Next::Full),
                Some(left) => return Ok(Next::Ask(self.by_ids(choice, ids, left))),
                None => {}
            }
        }
        match self.endpoint {
            Endpoint::ChatCompletions => self.by_chat(choice, engine, left).map(Next::Ask),
            _ => self.by_text(index, choice, left).map(Next::Ask),
        }
    }

    /// The same request again, for one choice.
    fn anew(&self, index: u32, choice: &Choice) -> Ask {
        let mut fields = self.fields.clone();
        if let Some(prompt) = self.prompt(index) {
            fields.insert("prompt".to_owned(), prompt);
        }
        let body = as_stream_of_one(fields);
        let seam = Seam::new(&choice.text, choice.text.len(), &[], false);
        Ask { endpoint: self.endpoint, body, seam, is_by_ids: false, form: "anew" }
    }

    fn by_ids(&self, choice: &Choice, ids: Vec<u32>, left: u64) -> Ask {
        let mut fields = self.fields.clone();
        NOT_OF_IDS.iter().for_each(|name| drop(fields.remove(*name)));
        fields.insert("prompt".to_owned(), ids.into());
        limit_to(&mut fields, &["max_tokens"], Some(left), choice.tokens);
        Ask {
            endpoint: Endpoint::Completions,
            body: as_stream_of_one(fields),
            seam: Seam::default(),
            is_by_ids: true,
            form: "ids",
        }
    }

    fn by_chat(&self, choice: &Choice, engine: Continues, left: Option<u64>) -> Result<Ask, Unsound> {
        let form = engine.chat.ok_or(Unsound("engines of this kind are not known to go on with a message"))?;
        if choice.has_reasoned {
            return Err(Unsound("it has reasoned before its text, and a chat is not told that again"));
        }
        if self.fields.get("truncate_prompt_tokens").is_some_and(|value| !value.is_null()) {
            return Err(Unsound("its prompt was truncated, and a longer one would be truncated elsewhere"));
        }
        let mut fields = self.fields.clone();
        let Some(Value::Array(messages)) = fields.get_mut("messages") else { return Err(Unsound("its messages are no list")) };
        let is_said = self.fields.get("continue_final_message") == Some(&Value::Bool(true));
        let last = messages.last_mut().filter(|last| last["role"] == "assistant");
        let goes_on = last.is_some() && (is_said || form == ChatContinuation::Prefill);
        // A template may cut white space at the end, or not: it is left out, and taken for said when it comes again.
        let told = if form == ChatContinuation::FinalMessage { choice.text.trim_end() } else { &choice.text };
        let content = match last {
            Some(last) if goes_on => {
                let before = last["content"].as_str().ok_or(Unsound("its last message is no plain text"))?;
                // An engine that says again what it goes on with has said the client's own beginning, too.
                let is_in_told = form == ChatContinuation::Prefill && !before.is_empty() && told.starts_with(before);
                let content = if is_in_told { told.to_owned() } else { format!("{before}{told}") };
                last["content"] = content.as_str().into();
                content
            }
            _ => {
                messages.push(json!({ "role": "assistant", "content": told }));
                told.to_owned()
            }
        };
        if form == ChatContinuation::FinalMessage {
            fields.insert("continue_final_message".to_owned(), true.into());
            fields.insert("add_generation_prompt".to_owned(), false.into());
        }
        limit_to(&mut fields, &["max_completion_tokens", "max_tokens"], left, choice.tokens);
        let untold = choice.text.len() - told.len();
        let mut seam = Seam::new(&choice.text, untold, &self.stops(), self.includes_stop());
        if form == ChatContinuation::Prefill {
            seam.may_echo(content);
        }
        Ok(Ask { endpoint: Endpoint::ChatCompletions, body: as_stream_of_one(fields), seam, is_by_ids: false, form: "chat" })
    }

    fn by_text(&self, index: u32, choice: &Choice, left: Option<u64>) -> Result<Ask, Unsound> {
        let Some(Value::String(prompt)) = self.prompt(index) else {
            let reason = if self.stops().is_empty() {
                "its prompt is token ids, and the ids of its output are not known"
            } else {
                "its prompt is token ids, and stop strings hold back text that its ids are ahead of"
            };
            return Err(Unsound(reason));
        };
        let mut fields = self.fields.clone();
        fields.insert("prompt".to_owned(), (prompt + &choice.text).into());
        limit_to(&mut fields, &["max_tokens"], left, choice.tokens);
        let seam = Seam::new(&choice.text, 0, &self.stops(), self.includes_stop());
        Ok(Ask { endpoint: Endpoint::Completions, body: as_stream_of_one(fields), seam, is_by_ids: false, form: "text" })
    }

    /// The prompt that a choice of a completion answers.
    fn prompt(&self, index: u32) -> Option<Value> {
        let prompt = self.fields.get("prompt")?;
        match prompt {
            Value::Array(prompts) if prompts.iter().any(|prompt| !prompt.is_number()) => {
                prompts.get(self.prompt_of(index)).cloned()
            }
            _ => Some(prompt.clone()),
        }
    }

    /// The limit on output tokens: the client's, or an engine's own for a completion that has none.
    fn limit(&self, choice: &Choice, engine: Continues) -> Option<u64> {
        let names: &[&str] = match self.endpoint {
            Endpoint::ChatCompletions => &["max_completion_tokens", "max_tokens"],
            _ => &["max_tokens"],
        };
        let said = names.iter().find_map(|name| self.fields.get(*name)?.as_u64());
        // Who has more has it from an engine with another one.
        let has_default = self.endpoint == Endpoint::Completions && !self.fields.contains_key("max_tokens") && engine.gives_ids;
        said.or((has_default && u64::from(choice.tokens) <= DEFAULT_COMPLETION_TOKENS).then_some(DEFAULT_COMPLETION_TOKENS))
    }

    fn stops(&self) -> Vec<String> {
        match self.fields.get("stop") {
            Some(Value::String(stop)) => vec![stop.clone()],
            Some(Value::Array(stops)) => stops.iter().filter_map(|stop| stop.as_str().map(str::to_owned)).collect(),
            _ => Vec::new(),
        }
        .into_iter()
        .filter(|stop| !stop.is_empty())
        .collect()
    }

    fn includes_stop(&self) -> bool {
        self.fields.get("include_stop_str_in_output") == Some(&Value::Bool(true))
    }
}

/// Whether a field says as much as if it were not there.
fn is_nothing(value: &Value) -> bool {
    matches!(value, Value::Null | Value::Bool(false)) || value == "" || value.as_array().is_some_and(Vec::is_empty)
}

/// Limits the output to what is left; `before`: output tokens that count towards the least number.
fn limit_to(fields: &mut Map<String, Value>, names: &[&str], left: Option<u64>, before: u32) {
    if let Some(left) = left {
        // Where the client gave two, the one that it meant is the one that was read.
        let name =
            names.iter().find(|name| fields.get(**name).is_some_and(|value| !value.is_null())).unwrap_or(&names[names.len() - 1]);
        names.iter().for_each(|name| drop(fields.remove(*name)));
        fields.insert((*name).to_owned(), left.into());
    }
    if let Some(least) = fields.get("min_tokens").and_then(Value::as_u64) {
        fields.insert("min_tokens".to_owned(), least.saturating_sub(u64::from(before)).into());
    }
}

fn as_stream_of_one(mut fields: Map<String, Value>) -> Bytes {
    fields.remove("n");
    fields.remove("best_of");
    fields.insert("stream".to_owned(), true.into());
    fields.insert("stream_options".to_owned(), json!({ "include_usage": true }));
    Value::Object(fields).to_string().into()
}
