//! Decodes a body: the few fields that the host needs are read, what belongs to the host is taken out, and all else
//! stays as the client wrote it, so that an engine's new parameter works on the day it appears.
//!
//! Invariants: a body from which nothing was taken is forwarded byte for byte; what remains of another keeps its order
//! and spelling. Every string of the client's ends here or in the forwarded body: facts hold hashes and counts.

use std::{borrow::Cow, fmt};

use bytes::Bytes;
use dynamo_host_core::{Endpoint, RequestFacts, TokenCount, id, request::flags};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

use crate::error::RequestError;

/// Fields that are the host's to set: a client's own would place the request, or break the engine it lands on (vLLM
/// dies of a foreign `kv_transfer_params`).
const HOST_FIELDS: &[&str] = &[
    "kv_transfer_params",
    "ec_transfer_params",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bootstrap_rooms",
    "bootstrap_pair_key",
    "disaggregated_params",
    "disagg_prefill_dp_rank",
    "data_parallel_rank",
    "routed_dp_rank",
    "decode_tp_size",
    "priority",
];

/// Bytes of the prompt that the prefix key covers.
const PREFIX_BYTES: usize = 1024;

/// A body that can be routed and forwarded.
#[derive(Debug)]
pub(crate) struct Decoded {
    /// What policies may know.
    pub(crate) facts: RequestFacts,
    /// What the engine gets.
    pub(crate) body: Bytes,
    /// Whether the client wants a stream.
    pub(crate) stream: bool,
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

    let model: String = fields
        .read("model", "a string naming a model of GET /v1/models")?
        .ok_or(RequestError::MissingField { field: "model", expected: "name a model of GET /v1/models" })?;
    let stream = fields.read("stream", "true or false")?.unwrap_or(false);
    let prompt = match endpoint {
        Endpoint::ChatCompletions => messages(&fields)?,
        Endpoint::Completions => prompt(&fields)?,
    };
    let limit = format!("a whole number from 0 to {}; omit it for the model's own limit", bounds.max_output_tokens);
    let max_completion_tokens = fields.integer("max_completion_tokens", bounds.max_output_tokens, &limit)?;
    let max_tokens = fields.integer("max_tokens", bounds.max_output_tokens, &limit)?;
    let choices_expected = format!("a whole number from 1 to {}", bounds.max_choices);
    let choices = fields.integer("n", bounds.max_choices, &choices_expected)?;
    if let (Some(0), Some(raw)) = (choices, fields.get("n")) {
        return Err(invalid("n", raw, &choices_expected));
    }

    let mut facts = RequestFacts::new(id, model, endpoint);
    facts.prompt = prompt.tokens;
    facts.prefix_key = prompt.prefix_key;
    facts.multimodal_items = prompt.multimodal_items;
    facts.max_output_tokens = max_completion_tokens.or(max_tokens).map(|tokens| tokens as u32);
    facts.choices = choices.unwrap_or(1) as u32;
    facts.flags = fields.flags(stream);
    let body = fields.without_host_fields().map_or_else(|| body.clone(), Bytes::from);
    Ok(Decoded { facts, body, stream })
}

struct Prompt {
    tokens: TokenCount,
    prefix_key: u64,
    multimodal_items: u32,
}

impl Prompt {
    fn of(raw: &str, tokens: TokenCount) -> Self {
        let prefix_key = id::key(&raw.as_bytes()[..raw.len().min(PREFIX_BYTES)]);
        Self { tokens, prefix_key, multimodal_items: 0 }
    }
}

fn messages(fields: &Fields<'_>) -> Result<Prompt, RequestError> {
    const EXPECTED: &str = "an array of at least one message {\"role\": …, \"content\": …}";
    let raw = fields.get("messages").ok_or(RequestError::MissingField { field: "messages", expected: EXPECTED })?;
    let messages: Vec<Message<'_>> = serde_json::from_str(raw.get()).map_err(|_| invalid("messages", raw, EXPECTED))?;
    if messages.is_empty() {
        return Err(invalid("messages", raw, EXPECTED));
    }
    let parts = messages.iter().filter_map(|message| message.content).filter(|content| content.get().starts_with('['));
    let multimodal_items = parts.map(multimodal_items).sum();
    Ok(Prompt { multimodal_items, ..Prompt::of(raw.get(), TokenCount::estimate(raw.get().len())) })
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
}

/// Content parts that are not text.
fn multimodal_items(content: &RawValue) -> u32 {
    #[derive(Deserialize)]
    struct Part<'a> {
        #[serde(borrow, default, rename = "type")]
        kind: Option<Cow<'a, str>>,
    }
    let parts: Vec<Part<'_>> = serde_json::from_str(content.get()).unwrap_or_default();
    parts.iter().filter(|part| part.kind.as_deref().is_some_and(|kind| !kind.ends_with("text"))).count() as u32
}

fn prompt(fields: &Fields<'_>) -> Result<Prompt, RequestError> {
    const EXPECTED: &str = "a string, an array of token ids, or an array of either";
    let raw = fields.get("prompt").ok_or(RequestError::MissingField { field: "prompt", expected: EXPECTED })?;
    let tokens = match raw.get().as_bytes()[0] {
        b'"' => TokenCount::estimate(raw.get().len() - 2),
        b'[' => match serde_json::from_str::<Vec<u32>>(raw.get()) {
            Ok(ids) => TokenCount { tokens: ids.len() as u32, exact: true },
            Err(_) => {
                let is_batch = serde_json::from_str::<Vec<PromptItem>>(raw.get()).is_ok();
                if !is_batch {
                    return Err(invalid("prompt", raw, EXPECTED));
                }
                TokenCount::estimate(raw.get().len())
            }
        },
        _ => return Err(invalid("prompt", raw, EXPECTED)),
    };
    Ok(Prompt::of(raw.get(), tokens))
}

/// An element of a batch prompt.
#[derive(Deserialize)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its shape matters")]
enum PromptItem {
    Text(String),
    Tokens(Vec<u32>),
}

/// A JSON object's fields in order, their values unread.
struct Fields<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'a> Fields<'a> {
    /// The last value of a field, as JSON parsers take it; null is absent.
    fn get(&self, name: &str) -> Option<&'a RawValue> {
        let found = self.0.iter().rev().find(|(key, _)| key == name);
        found.map(|(_, value)| *value).filter(|value| value.get() != "null")
    }

    fn read<T: Deserialize<'a>>(&self, name: &'static str, expected: &str) -> Result<Option<T>, RequestError> {
        let Some(raw) = self.get(name) else { return Ok(None) };
        serde_json::from_str(raw.get()).map(Some).map_err(|_| invalid(name, raw, expected))
    }

    fn integer(&self, name: &'static str, max: u64, expected: &str) -> Result<Option<u64>, RequestError> {
        let value: Option<u64> = self.read(name, expected)?;
        match (value, self.get(name)) {
            (Some(value), Some(raw)) if value > max => Err(invalid(name, raw, expected)),
            _ => Ok(value),
        }
    }

    fn flags(&self, stream: bool) -> u32 {
        let has = |name: &str| self.get(name).is_some_and(|value| !matches!(value.get(), "[]" | "false" | "{}"));
        let guided =
            ["guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"].into_iter().any(has)
                || self.get("response_format").is_some_and(|format| !format.get().contains("\"text\""));
        [(stream, flags::STREAM), (has("tools"), flags::TOOLS), (guided, flags::GUIDED), (has("logprobs"), flags::LOGPROBS)]
            .into_iter()
            .filter_map(|(set, flag)| set.then_some(flag))
            .sum()
    }

    /// The object without the host's fields; `None` if there are none.
    fn without_host_fields(&self) -> Option<Vec<u8>> {
        let is_hosts = |key: &str| HOST_FIELDS.contains(&key);
        if !self.0.iter().any(|(key, _)| is_hosts(key)) {
            return None;
        }
        let mut body = vec![b'{'];
        for (key, value) in self.0.iter().filter(|(key, _)| !is_hosts(key)) {
            if body.len() > 1 {
                body.push(b',');
            }
            body.extend(serde_json::to_vec(key).expect("a string is JSON"));
            body.push(b':');
            body.extend_from_slice(value.get().as_bytes());
        }
        body.push(b'}');
        Some(body)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FieldsVisitor;

        #[derive(Deserialize)]
        struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

        impl<'de> Visitor<'de> for FieldsVisitor {
            type Value = Vec<(Cow<'de, str>, &'de RawValue)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::with_capacity(16);
                while let Some((Key(key), value)) = map.next_entry()? {
                    fields.push((key, value));
                }
                Ok(fields)
            }
        }

        deserializer.deserialize_map(FieldsVisitor).map(Fields)
    }
}

/// A field that is not what it should be. Its value is shown, short: it may be a prompt.
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

/// What serde says, and for the two common mistakes what to do.
fn explain(text: &str, error: &serde_json::Error) -> String {
    if text.trim().is_empty() {
        return "it is empty; send a JSON object".to_owned();
    }
    if error.is_eof() {
        return format!("{error}; it was cut off, or content-length is too small");
    }
    format!("{error}; send a JSON object")
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { max_output_tokens: 1_000_000, max_choices: 128 };

    fn decode_text(endpoint: Endpoint, body: &str) -> Result<Decoded, RequestError> {
        decode(endpoint, "id".to_owned(), Bytes::copy_from_slice(body.as_bytes()), BOUNDS)
    }

    fn chat(rest: &str) -> String {
        format!(r#"{{"model":"m","messages":[{{"role":"user","content":"hi"}}]{rest}}}"#)
    }

    #[track_caller]
    fn check_error(endpoint: Endpoint, body: &str, says: &[&str]) {
        let error = decode_text(endpoint, body).expect_err("it should be refused").to_string();
        for part in says {
            assert!(error.contains(part), "{error:?} should say {part:?}");
        }
    }

    #[test]
    fn a_body_without_host_fields_is_forwarded_as_it_is() {
        let body = Bytes::from(chat(r#", "new_parameter" : {"a":[1, 2]}, "seed":7"#));
        let decoded = decode(Endpoint::ChatCompletions, "id".to_owned(), body.clone(), BOUNDS).unwrap();
        assert_eq!(decoded.body.as_ptr(), body.as_ptr(), "not even copied");
        assert!(!decoded.stream);
        assert_eq!((decoded.facts.model.as_str(), decoded.facts.choices), ("m", 1));
    }

    #[test]
    fn host_fields_are_taken_out_however_they_are_spelled_or_repeated() {
        let body = r#"{"kv_transfer_params":{"x":1},"model":"m","priorit\u0079":-5,"prompt":"p","priority":1,"a\"b":[ 1 ]}"#;
        let decoded = decode_text(Endpoint::Completions, body).unwrap();
        assert_eq!(decoded.body, r#"{"model":"m","prompt":"p","a\"b":[ 1 ]}"#);
    }

    #[test]
    fn facts_are_read() {
        let body = chat(
            r#","stream":true,"max_tokens":5,"max_completion_tokens":7,"n":2,"tools":[{}],"response_format":{"type":"json_object"}"#,
        );
        let decoded = decode_text(Endpoint::ChatCompletions, &body).unwrap();
        assert!(decoded.stream);
        assert_eq!(decoded.facts.max_output_tokens, Some(7));
        assert_eq!(decoded.facts.choices, 2);
        assert_eq!(decoded.facts.flags, flags::STREAM | flags::TOOLS | flags::GUIDED);
        assert!(!decoded.facts.prompt.exact);
    }

    #[test]
    fn token_ids_are_counted_and_text_is_estimated() {
        let tokens = |body: &str| decode_text(Endpoint::Completions, body).unwrap().facts.prompt;
        assert_eq!(tokens(r#"{"model":"m","prompt":[1,2,3]}"#), TokenCount { tokens: 3, exact: true });
        assert_eq!(tokens(r#"{"model":"m","prompt":"12345678"}"#), TokenCount { tokens: 2, exact: false });
        assert!(!tokens(r#"{"model":"m","prompt":["a","b"]}"#).exact);
        assert!(!tokens(r#"{"model":"m","prompt":[[1],[2]]}"#).exact);
    }

    #[test]
    fn prompts_that_begin_alike_share_a_prefix_key() {
        let key = |tail: &str| {
            let body = format!(r#"{{"model":"m","prompt":"{}{tail}"}}"#, "x".repeat(2000));
            decode_text(Endpoint::Completions, &body).unwrap().facts.prefix_key
        };
        assert_eq!(key("a"), key("b"));
    }

    #[test]
    fn images_are_counted() {
        let body = r#"{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"t"},{"type":"image_url","image_url":{}}]}]}"#;
        assert_eq!(decode_text(Endpoint::ChatCompletions, body).unwrap().facts.multimodal_items, 1);
    }

    #[test]
    fn a_null_is_an_absent_field() {
        let decoded = decode_text(Endpoint::ChatCompletions, &chat(r#","stream":null,"max_tokens":null,"n":null"#)).unwrap();
        assert!(!decoded.stream);
        assert_eq!(decoded.facts.max_output_tokens, None);
    }

    #[test]
    fn each_wrong_field_is_named_with_what_is_accepted() {
        let chat_error = |rest: &str, says: &[&str]| check_error(Endpoint::ChatCompletions, &chat(rest), says);
        chat_error(r#","stream":"yes""#, &["`stream` is a string", "use true or false"]);
        chat_error(r#","max_tokens":-1"#, &["`max_tokens` is -1", "from 0 to 1000000"]);
        chat_error(r#","max_tokens":1e30"#, &["`max_tokens` is 1e30"]);
        chat_error(r#","max_tokens":99999999999999999999999"#, &["`max_tokens` is 99999"]);
        chat_error(r#","max_tokens":1000001"#, &["`max_tokens` is 1000001"]);
        chat_error(r#","n":1.5"#, &["`n` is 1.5"]);
        chat_error(r#","n":0"#, &["`n` is 0", "from 1"]);
        check_error(Endpoint::ChatCompletions, r#"{"messages":[]}"#, &["`model` is missing"]);
        check_error(Endpoint::ChatCompletions, r#"{"model":7,"messages":[]}"#, &["`model` is 7"]);
        check_error(Endpoint::ChatCompletions, r#"{"model":"m"}"#, &["`messages` is missing"]);
        check_error(Endpoint::ChatCompletions, r#"{"model":"m","messages":[]}"#, &["`messages` is an empty array"]);
        check_error(Endpoint::ChatCompletions, r#"{"model":"m","messages":"hi"}"#, &["`messages` is a string"]);
        check_error(Endpoint::ChatCompletions, r#"{"model":"m","messages":[1]}"#, &["`messages` is an array"]);
        check_error(Endpoint::Completions, r#"{"model":"m"}"#, &["`prompt` is missing"]);
        check_error(Endpoint::Completions, r#"{"model":"m","prompt":{}}"#, &["`prompt` is an object"]);
        check_error(Endpoint::Completions, r#"{"model":"m","prompt":[-1]}"#, &["`prompt` is an array"]);
    }

    #[test]
    fn what_is_not_a_json_object_says_so() {
        check_error(Endpoint::Completions, "", &["it is empty"]);
        check_error(Endpoint::Completions, "{\"model\":", &["cut off"]);
        check_error(Endpoint::Completions, "[]", &["JSON object"]);
        check_error(Endpoint::Completions, "{'model':1}", &["line 1 column 2"]);
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        let _ = decode_text(Endpoint::Completions, &format!(r#"{{"model":"m","prompt":{deep}}}"#)).unwrap_err();
        let error = decode(Endpoint::Completions, String::new(), Bytes::from_static(b"{\"a\":\"\xff\"}"), BOUNDS).unwrap_err();
        assert!(error.to_string().contains("byte 6"), "{error}");
    }
}
