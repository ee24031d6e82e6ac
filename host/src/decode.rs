//! Decodes a body: the few fields that the host needs are read, what belongs to the host is taken out, and all else
//! stays as the client wrote it, so that an engine's new parameter works on the day it appears.
//!
//! Invariants: a body from which nothing was taken is forwarded byte for byte; what remains of another keeps its order
//! and spelling. Every string of the client's ends here or in the forwarded body: facts hold hashes and counts.

mod fields;
mod parts;
mod prompt;
#[cfg(test)]
mod tests;

use bytes::Bytes;
use dynamo_host_core::{Endpoint, RequestFacts};
use serde_json::{error::Category, value::RawValue};

pub(crate) use self::parts::{Parts, parts};
use self::{fields::Fields, prompt::Prompt};
use crate::error::RequestError;

/// Longest name of a model.
const MAX_MODEL_BYTES: usize = 256;

/// A body that can be routed and forwarded.
#[derive(Debug)]
pub(crate) struct Decoded {
    /// What policies may know.
    pub(crate) facts: RequestFacts,
    /// What the engine gets.
    pub(crate) body: Bytes,
    /// Whether the client wants a stream.
    pub(crate) stream: bool,
    /// Whether it wants the ids of tokens.
    pub(crate) returns_ids: bool,
}

/// Bounds on what clients may ask for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) max_output_tokens: u64,
    pub(crate) max_choices: u64,
}

/// Decodes a body for an endpoint.
///
/// # Errors
/// Says which field is wrong, what it is and what is accepted.
pub(crate) fn decode(endpoint: Endpoint, id: String, body: Bytes, bounds: Bounds) -> Result<Decoded, RequestError> {
    let text = std::str::from_utf8(&body).map_err(|error| RequestError::InvalidUtf8 { at: error.valid_up_to() })?;
    let fields: Fields<'_> =
        serde_json::from_str(text).map_err(|error| RequestError::InvalidJson { reason: explain(text, &error) })?;
    let fields = fields.bounded()?;

    fields.refuse_ambiguous("model")?;
    let model: String = fields
        .read("model", "a string naming a model of GET /v1/models")?
        .ok_or(RequestError::MissingField { field: "model", expected: "the name of a model of GET /v1/models" })?;
    if model.len() > MAX_MODEL_BYTES {
        let expected = format!("use a name of GET /v1/models, of at most {MAX_MODEL_BYTES} bytes");
        return Err(RequestError::InvalidField { field: "model", found: format!("{} bytes long", model.len()), expected });
    }
    let is_streamable = !matches!(endpoint, Endpoint::Embeddings | Endpoint::CountTokens);
    let stream = is_streamable && fields.read("stream", "true or false")?.unwrap_or(false);
    let prompt = match endpoint {
        Endpoint::ChatCompletions => Prompt::of_chat(&fields)?,
        Endpoint::Completions => Prompt::of_batch(&fields, "prompt")?,
        Endpoint::Embeddings => Prompt::of_batch(&fields, "input")?,
        Endpoint::Responses => {
            refuse_stored(&fields)?;
            Prompt::of_response(&fields)?
        }
        Endpoint::Messages | Endpoint::CountTokens => Prompt::of_message(&fields)?,
    };
    let limit = format!("a whole number from 0 to {}; omit it for the model's own limit", bounds.max_output_tokens);
    let mut max_output_tokens = None;
    for field in output_limits(endpoint) {
        max_output_tokens = max_output_tokens.or(fields.integer(field, bounds.max_output_tokens, &limit)?);
    }
    let choices = match endpoint {
        Endpoint::ChatCompletions | Endpoint::Completions => choices(&fields, prompt.count, bounds.max_choices)?,
        _ => 1,
    };

    let mut facts = RequestFacts::new(id, model, endpoint);
    facts.prompt = prompt.tokens;
    facts.prefix_key = prompt.prefix_key;
    facts.multimodal_items = prompt.multimodal_items;
    facts.max_output_tokens = max_output_tokens.map(|tokens| tokens as u32);
    facts.choices = choices;
    facts.prompts = prompt.count;
    facts.tells_prompt = fields.tells_prompt();
    facts.flags = fields.flags(stream);
    let body = fields.without_hosts()?.map_or_else(|| body.clone(), Bytes::from);
    let returns_ids = fields.get("return_token_ids").is_some_and(|value| value.get() == "true");
    Ok(Decoded { facts, body, stream, returns_ids })
}

/// The fields that limit the output, the one that wins first.
fn output_limits(endpoint: Endpoint) -> &'static [&'static str] {
    match endpoint {
        Endpoint::ChatCompletions => &["max_completion_tokens", "max_tokens"],
        Endpoint::Completions | Endpoint::Messages => &["max_tokens"],
        Endpoint::Responses => &["max_output_tokens"],
        Endpoint::Embeddings | Endpoint::CountTokens => &[],
    }
}

/// Choices of the answer: `n` for each prompt.
fn choices(fields: &Fields<'_>, prompts: u32, max: u64) -> Result<u32, RequestError> {
    let expected = format!("a whole number from 1 to {max}");
    let n = fields.integer("n", max, &expected)?;
    match (n, fields.get("n")) {
        (Some(0), Some(raw)) => Err(invalid("n", raw, &expected)),
        _ => Ok((n.unwrap_or(1) as u32).saturating_mul(prompts)),
    }
}

/// Refuses what only the engine that stored something could serve.
fn refuse_stored(fields: &Fields<'_>) -> Result<(), RequestError> {
    for (field, instead) in [
        ("previous_response_id", "send the whole conversation as `input`"),
        ("conversation", "send the whole conversation as `input`"),
        ("background", "wait for the answer, or stream it"),
    ] {
        if fields.get(field).is_some_and(|value| value.get() != "false") {
            return Err(RequestError::Stateful { field, instead });
        }
    }
    Ok(())
}

/// A decoded body with another model, for a name that stands for it; all else stays as it is.
pub(crate) fn rename(body: &Bytes, model: &str) -> Bytes {
    let fields = std::str::from_utf8(body).ok().and_then(|text| serde_json::from_str::<Fields<'_>>(text).ok());
    // It was decoded before, so that it is one.
    fields.map_or_else(|| body.clone(), |fields| Bytes::from(fields.with_model(model)))
}

/// A field that is not what it should be. Only a number is shown: anything else may be a prompt.
fn invalid(field: &'static str, raw: &RawValue, expected: &str) -> RequestError {
    let raw = raw.get();
    let found = match raw.as_bytes()[0] {
        b'"' => "a string".to_owned(),
        b'[' if raw == "[]" => "an empty array".to_owned(),
        b'[' => "an array of another kind".to_owned(),
        b'{' => "an object".to_owned(),
        _ => raw[..raw.len().min(40)].to_owned(),
    };
    RequestError::InvalidField { field, found, expected: format!("use {expected}") }
}

/// What serde says, and for the common mistakes what to do. It never quotes the body: that may be a prompt.
fn explain(text: &str, error: &serde_json::Error) -> String {
    let text = text.trim();
    if text.is_empty() {
        return "it is empty; send a JSON object".to_owned();
    }
    match error.classify() {
        Category::Eof => format!("{error}; it was cut off, or content-length is too small"),
        Category::Data => {
            let found = match text.as_bytes()[0] {
                b'"' => "a string",
                b'[' => "an array",
                b'{' => "an object with a name that is no text",
                b'n' => "null",
                b't' | b'f' => "a boolean",
                _ => "a number",
            };
            format!("it is {found}; send a JSON object")
        }
        Category::Syntax | Category::Io => format!("{error}; send a JSON object"),
    }
}
