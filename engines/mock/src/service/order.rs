//! Order: what a request asks of the engine, decoded and checked.

use std::{ops::Range, sync::Arc};

use dynamo_engine_api::Endpoint;
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use super::{
    embeddings::Embedding,
    error::ApiError,
    fields::Fields,
    prompt::{Ending, messages, prompts, text_prompt},
};
use crate::{
    model::{FinishReason, Sequence},
    options::MockOptions,
    tokens::{self, Script},
};

/// Output tokens of a completion whose request does not limit them: vLLM's default.
const COMPLETION_TOKENS: u32 = 16;

/// Choices that one request may ask for, over all its prompts.
const MAX_CHOICES: usize = 1024;

/// A request as the engine carries it out.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    pub(crate) endpoint: Endpoint,
    pub(crate) stream: bool,
    /// A last chunk with the usage.
    pub(crate) include_usage: bool,
    /// The usage in every chunk.
    pub(crate) continuous_usage: bool,
    pub(crate) return_token_ids: bool,
    /// Choices of one prompt.
    pub(crate) n: usize,
    /// All choices, prompt by prompt.
    pub(crate) choices: Vec<Choice>,
    /// How embeddings are written.
    pub(super) embedding: Embedding,
    pub(super) script: Script,
    salt: u64,
}

/// One choice of the answer.
#[derive(Clone, Debug)]
pub(crate) struct Choice {
    pub(crate) prompt: Arc<[u32]>,
    /// The number of its first token: how many tokens of its output the prompt has.
    pub(crate) first: u32,
    output_tokens: u32,
    finish: FinishReason,
    /// Bytes of output text that are shown: up to the stop string, if there is one.
    pub(crate) shown_bytes: usize,
    /// Bytes at the end of what was generated that are held back, since they may be the beginning of a stop string.
    pub(crate) held_bytes: usize,
    /// The stop string that ends it.
    pub(crate) stop_reason: Option<String>,
}

impl Order {
    /// What to submit, one for each choice.
    pub(crate) fn sequences(&self) -> Vec<Sequence> {
        let sequence = |choice: &Choice| Sequence {
            prompt: Arc::clone(&choice.prompt),
            first_output_token: tokens::VOCABULARY + choice.first,
            output_tokens: choice.output_tokens,
            finish: choice.finish,
            salt: self.salt,
            hold: false,
            remote: false,
        };
        self.choices.iter().map(sequence).collect()
    }
}

/// Reads a request's body.
///
/// # Errors
/// As a vLLM server answers it.
pub(crate) fn decode(endpoint: Endpoint, body: &[u8], options: &MockOptions) -> Result<Order, ApiError> {
    let mut fields = Fields::parse(body)?;
    let model = fields.string("model");
    let is_chat = !matches!(endpoint, Endpoint::Completions | Endpoint::Embeddings);
    let prefill = options.assistant_prefill;
    let prompts = match endpoint {
        Endpoint::ChatCompletions | Endpoint::Messages | Endpoint::CountTokens => one_chat(&mut fields, "messages", prefill)?,
        Endpoint::Responses => one_chat(&mut fields, "input", prefill)?,
        Endpoint::Completions => prompts(&mut fields, "prompt")?,
        Endpoint::Embeddings => prompts(&mut fields, "input")?,
    };
    let limit = limit(&mut fields, endpoint);
    let embedding = Embedding::decode(&mut fields);
    let n = fields.integer("n").unwrap_or(1);
    let temperature = fields.number("temperature");
    let min_tokens = fields.integer("min_tokens").unwrap_or(0);
    let stops = stops(&mut fields, if endpoint == Endpoint::Messages { "stop_sequences" } else { "stop" });
    let shows_stop = fields.boolean("include_stop_str_in_output");
    let stream = fields.boolean("stream");
    let stream_options = fields.take("stream_options");
    let stream_option =
        |name| stream && stream_options.as_ref().and_then(|options| options.get(name)?.as_bool()).unwrap_or_default();
    let return_token_ids = fields.boolean("return_token_ids");
    let salt = fields.string("cache_salt").map_or(0, |salt| xxh3_64(salt.as_bytes()));
    fields.finish()?;

    check_model(model, options)?;
    let n = check_sampling(n, temperature, prompts.len())?;
    if endpoint == Endpoint::Embeddings && stream {
        return Err(ApiError::bad_value("stream", stream, "Embeddings are not streamed."));
    }
    let min_tokens = check_min_tokens(min_tokens, limit)?;
    let wanted = Wanted { limit, min_tokens, is_chat, stops: &stops, shows_stop, options };
    let mut choices = Vec::with_capacity(n * prompts.len());
    for prompt in prompts {
        let choice = choice(prompt, &wanted)?;
        choices.extend(std::iter::repeat_n(choice, n));
    }
    let (include_usage, continuous_usage) = (stream_option("include_usage"), stream_option("continuous_usage_stats"));
    let script = options.script;
    Ok(Order { endpoint, stream, include_usage, continuous_usage, return_token_ids, n, choices, embedding, script, salt })
}

/// Reads a body of `/tokenize`: the ids of its `prompt` or `messages`.
///
/// # Errors
/// As a vLLM server answers it.
pub(crate) fn decode_tokenize(body: &[u8], options: &MockOptions) -> Result<Vec<u32>, ApiError> {
    let mut fields = Fields::parse(body)?;
    let model = fields.string("model");
    let prompt = fields.string("prompt");
    let ids = match prompt {
        Some(text) => text_prompt(&text),
        None => one_chat(&mut fields, "messages", options.assistant_prefill)?.pop().unwrap_or_default(),
    };
    fields.finish()?;
    check_model(model, options)?;
    Ok(ids)
}

/// Reads a body of `/v1/messages/count_tokens`: how many tokens its prompt has.
///
/// # Errors
/// As a vLLM server answers it.
pub(crate) fn count_tokens(body: &[u8], options: &MockOptions) -> Result<usize, ApiError> {
    let mut fields = Fields::parse(body)?;
    let model = fields.string("model");
    let ids = messages(&mut fields, "messages", Ending::Answer).unwrap_or_default();
    fields.finish()?;
    check_model(model, options)?;
    Ok(ids.len())
}

fn one_chat(fields: &mut Fields, name: &str, assistant_prefill: bool) -> Result<Vec<Vec<u32>>, ApiError> {
    let ending = Ending::of(fields, name, assistant_prefill)?;
    Ok(messages(fields, name, ending).map(|ids| vec![ids]).unwrap_or_default())
}

/// The limit on output tokens, under its names.
fn limit(fields: &mut Fields, endpoint: Endpoint) -> Option<i64> {
    match endpoint {
        Endpoint::ChatCompletions => {
            let limit = fields.integer("max_tokens");
            fields.integer("max_completion_tokens").or(limit)
        }
        Endpoint::Responses => fields.integer("max_output_tokens"),
        Endpoint::Completions => fields.integer("max_tokens"),
        Endpoint::Messages => {
            let limit = fields.integer("max_tokens");
            if limit.is_none() {
                fields.missing("max_tokens");
            }
            limit
        }
        // What is embedded is prefilled, which ends with a token.
        Endpoint::Embeddings => Some(1),
        Endpoint::CountTokens => None,
    }
}

/// A request without a model gets the one that there is.
fn check_model(model: Option<String>, options: &MockOptions) -> Result<(), ApiError> {
    match model.filter(|model| !model.is_empty() && *model != options.model) {
        Some(model) => Err(ApiError::unknown_model(&model, &options.model)),
        None => Ok(()),
    }
}

/// Returns the choices of one prompt.
fn check_sampling(n: i64, temperature: Option<f64>, prompts: usize) -> Result<usize, ApiError> {
    if let Some(temperature) = temperature.filter(|&temperature| temperature < 0.0) {
        let value = format!("{temperature:?}");
        return Err(ApiError::bad_value("temperature", &value, &format!("temperature must be non-negative, got {value}.")));
    }
    if n < 1 {
        return Err(ApiError::bad_value("n", n, &format!("n must be at least 1, got {n}.")));
    }
    if n > 1 && temperature == Some(0.0) {
        return Err(ApiError::bad_request(None, format!("n must be 1 when using greedy sampling, got {n}.")));
    }
    let n = usize::try_from(n).unwrap_or(usize::MAX);
    if n.saturating_mul(prompts) > MAX_CHOICES {
        return Err(ApiError::bad_value("n", n, &format!("n times the number of prompts must be at most {MAX_CHOICES}.")));
    }
    Ok(n)
}

/// Tokens before which neither the model nor a stop string ends an output.
fn check_min_tokens(min_tokens: i64, limit: Option<i64>) -> Result<u32, ApiError> {
    if min_tokens < 0 {
        let message = format!("min_tokens must be greater than or equal to 0, got {min_tokens}.");
        return Err(ApiError::bad_value("min_tokens", min_tokens, &message));
    }
    if let Some(limit) = limit.filter(|&limit| limit < min_tokens) {
        let message = format!("min_tokens must be less than or equal to max_tokens={limit}, got {min_tokens}.");
        return Err(ApiError::bad_value("min_tokens", min_tokens, &message));
    }
    Ok(u32::try_from(min_tokens).unwrap_or(u32::MAX))
}

/// What a request says of the length of its outputs.
struct Wanted<'a> {
    limit: Option<i64>,
    min_tokens: u32,
    is_chat: bool,
    stops: &'a [String],
    shows_stop: bool,
    options: &'a MockOptions,
}

/// How long a prompt's output is, and how it ends.
fn choice(prompt: Vec<u32>, wanted: &Wanted<'_>) -> Result<Choice, ApiError> {
    let Wanted { limit, min_tokens, options, .. } = *wanted;
    let max_model_len = options.profile.max_model_len;
    let first = tokens::unfinished(&prompt);
    let default = match wanted.is_chat {
        // The model is done where it would have been without a break.
        true => (options.chat_tokens.saturating_sub(first).max(min_tokens).max(1), FinishReason::Stop),
        false => (COMPLETION_TOKENS, FinishReason::Length),
    };
    let input = prompt.len();
    if input == 0 {
        return Err(ApiError::bad_request(None, "The decoder prompt cannot be empty"));
    }
    let context = format!("This model's maximum context length is {max_model_len} tokens. However, ");
    let room = match u32::try_from(input).ok().and_then(|input| max_model_len.checked_sub(input)) {
        Some(room) => room,
        None => {
            let message = format!(
                "{context}your prompt contains {input} input tokens, which exceeds this limit even without any output tokens. \
                 Please reduce the length of the input prompt."
            );
            return Err(ApiError::bad_value("input_tokens", input, &message));
        }
    };
    let stops = wanted.stops;
    let (output_tokens, finish) = match limit {
        Some(limit) if limit < 1 => {
            return Err(ApiError::bad_value("max_tokens", limit, &format!("max_tokens must be at least 1, got {limit}.")));
        }
        Some(limit) if limit > i64::from(max_model_len) => {
            let message = format!(
                "max_tokens={limit} cannot be greater than max_model_len={max_model_len}. Please request fewer output tokens."
            );
            return Err(ApiError::bad_value("max_tokens", limit, &message));
        }
        Some(limit) => (u32::try_from(limit).unwrap_or(max_model_len), FinishReason::Length),
        None if default.0 > room => (room, FinishReason::Length),
        None => default,
    };
    if output_tokens == 0 || output_tokens > room {
        let total = input + output_tokens.max(1) as usize;
        let message = format!(
            "{context}you requested {output_tokens} output tokens and your prompt contains at least {input} input tokens, \
             for a total of at least {total} tokens. \
             Please reduce the length of the input prompt or the number of requested output tokens."
        );
        return Err(ApiError::bad_value("input_tokens", input, &message));
    }
    let held_bytes = stops.iter().map(String::len).max().filter(|_| !wanted.shows_stop).map_or(0, |longest| longest - 1);
    let whole =
        Choice { prompt: prompt.into(), first, output_tokens, finish, shown_bytes: usize::MAX, held_bytes, stop_reason: None };
    Ok(match first_stop(first..first + output_tokens, wanted) {
        Some((at, stop, output_tokens)) => {
            let shown_bytes = if wanted.shows_stop { at + stop.len() } else { at };
            Choice { output_tokens, finish: FinishReason::Stop, shown_bytes, stop_reason: Some(stop.to_owned()), ..whole }
        }
        None => whole,
    })
}

/// The stop string that an output of these tokens meets first, past the least that were asked for: where it begins, itself,
/// and how many tokens there are up to the one that completes it. What the prompt has of the output is not looked at.
fn first_stop<'a>(output: Range<u32>, wanted: &Wanted<'a>) -> Option<(usize, &'a str, u32)> {
    let Wanted { stops, min_tokens, options, .. } = *wanted;
    if stops.is_empty() {
        return None;
    }
    let mut text = String::new();
    for (index, number) in output.enumerate() {
        let known = text.len();
        options.script.push_text(number, &mut text);
        if index < min_tokens as usize {
            continue;
        }
        let begins = |stop: &String| {
            // A stop string that ends before this token was met before, or too soon.
            let from = text.ceil_char_boundary((known + 1).saturating_sub(stop.len()));
            text[from..].find(stop.as_str()).map(|at| from + at)
        };
        let met = stops.iter().filter_map(|stop| begins(stop).map(|at| (at, stop.as_str()))).min_by_key(|&(at, _)| at);
        if let Some((at, stop)) = met {
            return Some((at, stop, index as u32 + 1));
        }
    }
    None
}

/// `stop`: a string or a list of strings.
fn stops(fields: &mut Fields, name: &str) -> Vec<String> {
    let stops = match fields.take(name) {
        None => return Vec::new(),
        Some(Value::String(stop)) => vec![stop],
        Some(Value::Array(items)) if items.iter().all(Value::is_string) => {
            items.iter().filter_map(Value::as_str).map(str::to_owned).collect()
        }
        Some(other) => {
            return fields
                .wrong(name, "string_type", "Input should be a valid string or list of strings", &other)
                .unwrap_or_default();
        }
    };
    stops.into_iter().filter(|stop| !stop.is_empty()).collect()
}

#[cfg(test)]
mod tests;
