//! What an engine answers, in the shape of vLLM 0.32's own answers, byte for byte where it matters: the fields, their
//! order, and one event for each token.
//!
//! Token *n* of an answer is the text ` n`, so that whoever reads the stream knows of each token that is lost, doubled or
//! out of order.

use std::io::Write;

use serde::Deserialize;
use serde_json::{Value, json};

/// The fields of a request that an answer depends on.
#[derive(Deserialize)]
pub struct Asked {
    #[serde(default)]
    pub stream: bool,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    stream_options: Option<StreamOptions>,
    kv_transfer_params: Option<Transfer>,
    #[serde(default)]
    return_token_ids: bool,
}

/// What a request says of its KV. What another engine has needs no fetching here, and is not looked at.
#[derive(Deserialize)]
struct Transfer {
    #[serde(default)]
    do_remote_decode: bool,
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

impl Asked {
    /// Tokens to answer with.
    pub fn tokens(&self) -> u32 {
        self.max_completion_tokens.or(self.max_tokens).unwrap_or(16).max(1)
    }

    /// Whether the stream ends with an event that counts tokens.
    pub fn usage(&self) -> bool {
        self.stream_options.as_ref().is_some_and(|options| options.include_usage)
    }

    /// Whether another engine decodes what this one prefills.
    pub fn is_prefill(&self) -> bool {
        self.kv_transfer_params.as_ref().is_some_and(|params| params.do_remote_decode)
    }

    /// What a prefill's answer has in place of the last brace: where its KV is, as vLLM's NixlConnector says it, and the prompt's
    /// tokens if they are asked for.
    pub fn prefilled(&self, serial: u64, body: &[u8]) -> String {
        let tokens = tokens(body);
        let blocks: Vec<usize> = (0..tokens.len().div_ceil(16)).collect();
        let params = json!({
            "do_remote_prefill": true, "do_remote_decode": false, "remote_block_ids": [blocks],
            "remote_engine_id": "0b1c6d3e-50b1-4d6c-9d1f-8f3a4c5b6d7e", "remote_request_id": format!("{serial:032x}"),
            "remote_host": "127.0.0.1", "remote_port": 5600, "tp_size": 1, "remote_num_tokens": tokens.len(),
        });
        let ids = if self.return_token_ids { json!(tokens) } else { Value::Null };
        format!(r#","prompt_token_ids":{ids},"kv_transfer_params":{params}}}"#)
    }
}

/// Which of OpenAI's endpoints is answered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Chat,
    Completion,
}

/// An answer of one request.
pub struct Reply<'a> {
    pub kind: Kind,
    pub model: &'a str,
    pub serial: u64,
    /// Unix time in seconds.
    pub created: u64,
    pub tokens: u32,
}

impl Reply<'_> {
    /// The event in front of a chat's tokens. Completions have none.
    pub fn role(&self) -> Option<String> {
        let delta = r#""delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}"#;
        (self.kind == Kind::Chat).then(|| format!("{}\"choices\":[{{\"index\":0,{delta}\n\n", self.head(true)))
    }

    /// What stands before each token's text in its event.
    pub fn before_token(&self) -> String {
        let field = if self.kind == Kind::Chat { r#""delta":{"content":" "# } else { r#""text":" "# };
        format!("{}\"choices\":[{{\"index\":0,{field}", self.head(true))
    }

    /// What stands behind it.
    pub fn after_token(&self, last: bool) -> &'static str {
        match (self.kind, last) {
            (Kind::Chat, false) => "\"},\"logprobs\":null,\"finish_reason\":null,\"token_ids\":null}]}\n\n",
            (Kind::Chat, true) => {
                "\"},\"logprobs\":null,\"finish_reason\":\"length\",\"stop_reason\":null,\"token_ids\":null}]}\n\n"
            }
            (Kind::Completion, false) => {
                "\",\"logprobs\":null,\"finish_reason\":null,\"stop_reason\":null,\"prompt_token_ids\":null,\"token_ids\":null}]}\n\n"
            }
            (Kind::Completion, true) => {
                "\",\"logprobs\":null,\"finish_reason\":\"length\",\"stop_reason\":null,\"prompt_token_ids\":null,\"token_ids\":null}]}\n\n"
            }
        }
    }

    /// The event that counts tokens.
    pub fn usage_event(&self) -> String {
        format!("{}\"choices\":[],{}}}\n\n", self.head(true), self.usage())
    }

    /// The whole answer as one JSON object.
    pub fn whole(&self) -> String {
        let text: String = (0..self.tokens).map(|token| format!(" {token}")).collect();
        let choice = match self.kind {
            Kind::Chat => format!(
                r#""message":{{"role":"assistant","content":"{text}","refusal":null,"tool_calls":[]}},"logprobs":null,"finish_reason":"length","stop_reason":null"#
            ),
            Kind::Completion => format!(r#""text":"{text}","logprobs":null,"finish_reason":"length","stop_reason":null"#),
        };
        format!("{}\"choices\":[{{\"index\":0,{choice}}}],{}}}", self.head(false), self.usage())
    }

    fn head(&self, event: bool) -> String {
        let (id, object) = match (self.kind, event) {
            (Kind::Chat, true) => ("chatcmpl", "chat.completion.chunk"),
            (Kind::Chat, false) => ("chatcmpl", "chat.completion"),
            (Kind::Completion, _) => ("cmpl", "text_completion"),
        };
        let data = if event { "data: " } else { "" };
        let Self { model, serial, created, .. } = self;
        format!(r#"{data}{{"id":"{id}-{serial:016x}","object":"{object}","created":{created},"model":"{model}","#)
    }

    fn usage(&self) -> String {
        let (prompt, tokens) = (64, self.tokens);
        format!(
            r#""usage":{{"prompt_tokens":{prompt},"total_tokens":{},"completion_tokens":{tokens},"prompt_tokens_details":{{"cached_tokens":0}}}},"system_fingerprint":"vllm-0.32.0-2b77934a""#,
            prompt + tokens
        )
    }
}

/// What `/v1/chat/completions/render` answers: a prompt's tokens, and how they would be sampled.
pub fn render(model: &str, body: &[u8]) -> String {
    json!({
        "request_id": "chatcmpl-0000000000000000", "token_ids": tokens(body), "token_offsets": null, "features": null,
        "content_parts": null, "sampling_params": {"temperature": 1.0, "max_tokens": 16, "output_kind": 2}, "model": model,
        "stream": false, "stream_options": null, "cache_salt": null, "priority": 0, "kv_transfer_params": null,
    })
    .to_string()
}

/// What `/tokenize` answers.
pub fn tokenize(body: &[u8]) -> String {
    let tokens = tokens(body);
    json!({"count": tokens.len(), "max_model_len": 32768, "tokens": tokens, "token_strs": null}).to_string()
}

/// Tokens of a request's prompt: one for four bytes, and the same for the same bytes, which is all that a cache looks at.
fn tokens(body: &[u8]) -> Vec<u32> {
    let request: Value = serde_json::from_slice(body).unwrap_or_default();
    let mut text = request["prompt"].as_str().unwrap_or_default().to_owned();
    for message in request["messages"].as_array().into_iter().flatten() {
        text.push_str(message["role"].as_str().unwrap_or_default());
        text.push_str(message["content"].as_str().unwrap_or_default());
    }
    let fold = |bytes: &[u8]| bytes.iter().fold(0u32, |id, &byte| id.wrapping_mul(257).wrapping_add(u32::from(byte)));
    text.as_bytes().chunks(4).map(|bytes| fold(bytes) % 150_000).collect()
}

/// Appends `parts` as one HTTP chunk.
pub fn chunk(output: &mut Vec<u8>, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let _ = write!(output, "{length:x}\r\n");
    for part in parts {
        output.extend_from_slice(part);
    }
    output.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A captured event of vLLM 0.32, and ours: the same fields in the same places.
    #[track_caller]
    fn same_shape(theirs: &str, ours: &str) {
        fn shape(value: &Value) -> Value {
            match value {
                Value::Object(fields) => fields.iter().map(|(key, value)| (key.clone(), shape(value))).collect(),
                Value::Array(items) => items.iter().map(shape).collect(),
                Value::Null => Value::Null,
                other => json!(std::mem::discriminant(other) == std::mem::discriminant(&json!(""))),
            }
        }
        let parse = |event: &str| serde_json::from_str::<Value>(event.trim().trim_start_matches("data: ")).unwrap();
        assert_eq!(shape(&parse(ours)), shape(&parse(theirs)));
    }

    #[test]
    fn events_have_the_shape_of_vllms() {
        let reply = Reply { kind: Kind::Chat, model: "m", serial: 1, created: 1, tokens: 2 };
        let token = |last| format!("{}0{}", reply.before_token(), reply.after_token(last));
        let head =
            r#"data: {"id":"chatcmpl-my-req-1","object":"chat.completion.chunk","created":1795327942,"model":"tiny-qwen3","#;
        same_shape(
            &format!(
                r#"{head}"choices":[{{"index":0,"delta":{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}],"prompt_token_ids":null,"prompt_text":null}}"#
            ),
            &reply.role().unwrap(),
        );
        same_shape(
            &format!(
                r#"{head}"choices":[{{"index":0,"delta":{{"content":" paths"}},"logprobs":null,"finish_reason":null,"token_ids":null}}]}}"#
            ),
            &token(false),
        );
        same_shape(
            &format!(
                r#"{head}"choices":[{{"index":0,"delta":{{"content":"are"}},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}}]}}"#
            ),
            &token(true),
        );
        same_shape(
            &format!(
                r#"{head}"choices":[],"usage":{{"prompt_tokens":12,"total_tokens":17,"completion_tokens":5,"prompt_tokens_details":{{"cached_tokens":0}}}},"system_fingerprint":"vllm-0.32.0-2b77934a"}}"#
            ),
            &reply.usage_event(),
        );
    }

    #[test]
    fn prompts_with_a_common_beginning_have_tokens_in_common() {
        let of = |text: &str| tokens(json!({"messages": [{"role": "user", "content": text}]}).to_string().as_bytes());
        let (one, other) = (of("a prompt that goes this way"), of("a prompt that goes that way"));
        assert_eq!(one[..4], other[..4]);
        assert_ne!(one, other);
    }
}
