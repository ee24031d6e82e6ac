//! A JSON object's fields in order, their values unread; and what of them may be forwarded.

use std::{borrow::Cow, fmt};

use dynamo_host_core::request::flags;
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::value::RawValue;

use super::invalid;
use crate::error::RequestError;

/// Fields that an object may have. Real requests have dozens; each is looked up among all.
const MAX_FIELDS: usize = 512;

/// Fields that are the host's to set: a client's own would place the request, choose an adapter past what its key allows,
/// take the id of another's request, or break the engine it lands on (vLLM dies of a foreign `kv_transfer_params`).
const HOST_FIELDS: &[&str] = &[
    "kv_transfer_params",
    "ec_transfer_params",
    "disaggregated_params",
    "disagg_prefill_dp_rank",
    "data_parallel_rank",
    "routed_dp_rank",
    "decode_tp_size",
    "priority",
    "lora",
    "lora_id",
    "lora_path",
    "request_id",
    "rid",
];

/// How the names of more such fields begin: SGLang's, and our own.
const HOST_PREFIXES: &[&str] = &["bootstrap_", "x-dynamo", "x_dynamo"];

/// The object within which vLLM takes more arguments, some of the host's among them.
const ARGUMENTS: &str = "vllm_xargs";

/// A JSON object's fields in order.
pub(super) struct Fields<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'a> Fields<'a> {
    /// Refuses an object of too many fields.
    pub(super) fn bounded(self) -> Result<Self, RequestError> {
        if self.0.len() > MAX_FIELDS { Err(RequestError::TooManyFields { max: MAX_FIELDS }) } else { Ok(self) }
    }

    /// The last value of a field, as JSON parsers take it; null is absent.
    pub(super) fn get(&self, name: &str) -> Option<&'a RawValue> {
        let found = self.0.iter().rev().find(|(key, _)| key == name);
        found.map(|(_, value)| *value).filter(|value| value.get() != "null")
    }

    /// Refuses a field that is there twice, or in another spelling: engines differ in which one they take.
    pub(super) fn refuse_ambiguous(&self, name: &'static str) -> Result<(), RequestError> {
        let mut alike = self.0.iter().filter(|(key, _)| key.eq_ignore_ascii_case(name));
        match (alike.next(), alike.next()) {
            (Some((key, _)), None) if key == name => Ok(()),
            (None, _) => Ok(()),
            _ => {
                let expected = format!("send it once, spelled `{name}`");
                Err(RequestError::InvalidField { field: name, found: "there twice, or in another spelling".to_owned(), expected })
            }
        }
    }

    pub(super) fn read<T: Deserialize<'a>>(&self, name: &'static str, expected: &str) -> Result<Option<T>, RequestError> {
        let Some(raw) = self.get(name) else { return Ok(None) };
        serde_json::from_str(raw.get()).map(Some).map_err(|_| invalid(name, raw, expected))
    }

    pub(super) fn integer(&self, name: &'static str, max: u64, expected: &str) -> Result<Option<u64>, RequestError> {
        let value: Option<u64> = self.read(name, expected)?;
        match (value, self.get(name)) {
            (Some(value), Some(raw)) if value > max => Err(invalid(name, raw, expected)),
            _ => Ok(value),
        }
    }

    /// `request.flags` of the contract.
    pub(super) fn flags(&self, stream: bool) -> u32 {
        let has = |name: &str| self.get(name).is_some_and(|value| !matches!(value.get(), "[]" | "false" | "{}"));
        let guided =
            ["guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"].into_iter().any(has)
                || self.get("response_format").is_some_and(is_constrained)
                || self.get("text").is_some_and(|text| format_of(text).is_some_and(is_constrained));
        [(stream, flags::STREAM), (has("tools"), flags::TOOLS), (guided, flags::GUIDED), (has("logprobs"), flags::LOGPROBS)]
            .into_iter()
            .filter_map(|(set, flag)| set.then_some(flag))
            .sum()
    }

    /// Whether the answer is to tell of the prompt's tokens: echo them, or say how likely they were.
    pub(super) fn tells_prompt(&self) -> bool {
        let echoes = self.get("echo").is_some_and(|value| value.get() != "false");
        // Of none but the token itself (0), too.
        echoes || self.get("prompt_logprobs").is_some_and(|value| value.get() != "false")
    }

    /// The object without the host's fields; `None` if there are none.
    pub(super) fn without_hosts(&self) -> Result<Option<Vec<u8>>, RequestError> {
        let mut arguments = Vec::new();
        for (at, (key, value)) in self.0.iter().enumerate() {
            if key.eq_ignore_ascii_case(ARGUMENTS) && value.get().starts_with('{') {
                const EXPECTED: &str = "an object of few fields, with names in UTF-8";
                let inner: Result<Fields<'_>, _> = serde_json::from_str(value.get());
                let inner =
                    inner.ok().and_then(|inner| inner.bounded().ok()).ok_or_else(|| invalid(ARGUMENTS, value, EXPECTED))?;
                if inner.has_hosts() {
                    arguments.push((at, inner.write(&[])));
                }
            }
        }
        Ok((self.has_hosts() || !arguments.is_empty()).then(|| self.write(&arguments)))
    }

    /// The object with another model, in all places that name it: which of them counts is the engine's choice.
    pub(super) fn with_model(&self, model: &str) -> Vec<u8> {
        let model = serde_json::to_string(model).expect("a string is JSON");
        self.with(&[("model", &model)])
    }

    /// The object with other values for those of these fields that are there, in all their places.
    pub(super) fn with(&self, values: &[(&str, &str)]) -> Vec<u8> {
        let other = |key: &str| values.iter().find(|(name, _)| *name == key).map(|(_, value)| value.as_bytes().to_vec());
        let others: Vec<_> = (0..).zip(&self.0).filter_map(|(at, (key, _))| Some((at, other(key)?))).collect();
        self.write(&others)
    }

    fn has_hosts(&self) -> bool {
        self.0.iter().any(|(key, _)| is_hosts(key))
    }

    /// The object without the host's fields, and with other values for some of the rest, by place.
    fn write(&self, others: &[(usize, Vec<u8>)]) -> Vec<u8> {
        let mut object = vec![b'{'];
        for (at, (key, value)) in self.0.iter().enumerate().filter(|(_, (key, _))| !is_hosts(key)) {
            if object.len() > 1 {
                object.push(b',');
            }
            object.extend(serde_json::to_vec(key).expect("a string is JSON"));
            object.push(b':');
            let other = others.iter().find(|(place, _)| *place == at);
            object.extend_from_slice(other.map_or(value.get().as_bytes(), |(_, other)| other));
        }
        object.push(b'}');
        object
    }
}

/// In any case: what a gateway before an engine makes of names, nobody knows.
fn is_hosts(key: &str) -> bool {
    let begins = |prefix: &&str| key.get(..prefix.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(prefix));
    HOST_FIELDS.iter().any(|field| field.eq_ignore_ascii_case(key)) || HOST_PREFIXES.iter().any(begins)
}

/// The format within a response's `text`.
fn format_of(text: &RawValue) -> Option<&RawValue> {
    #[derive(Deserialize)]
    struct Text<'a> {
        #[serde(borrow, default)]
        format: Option<&'a RawValue>,
    }
    serde_json::from_str::<Text<'_>>(text.get()).ok()?.format
}

/// Whether a `response_format` constrains the output.
fn is_constrained(format: &RawValue) -> bool {
    #[derive(Deserialize)]
    struct Format<'a> {
        #[serde(borrow, rename = "type")]
        kind: Cow<'a, str>,
    }
    // What has no type is the engine's to refuse.
    serde_json::from_str::<Format<'_>>(format.get()).is_ok_and(|format| format.kind != "text")
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
                while let Some(Key(key)) = map.next_key()? {
                    // One over the bound shows that it was passed; the rest need not be kept.
                    if fields.len() > MAX_FIELDS {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        fields.push((key, map.next_value()?));
                    }
                }
                Ok(fields)
            }
        }

        deserializer.deserialize_map(FieldsVisitor).map(Fields)
    }
}
