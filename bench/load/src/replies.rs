//! What an engine answers, in the shape of vLLM 0.32's own answers, byte for byte where it matters: the fields, their
//! order, and one event for each token.
//!
//! Token *n* of an answer is the text ` n`, so that whoever reads the stream knows of each token that is lost, doubled or
//! out of order.

use std::io::Write;

use serde::Deserialize;

/// The fields of a request that an answer depends on.
#[derive(Deserialize)]
pub struct Asked {
    #[serde(default)]
    pub stream: bool,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    stream_options: Option<StreamOptions>,
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

/// Appends `parts` as one HTTP chunk.
pub fn chunk(output: &mut Vec<u8>, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let _ = write!(output, "{length:x}\r\n");
    for part in parts {
        output.extend_from_slice(part);
    }
    output.extend_from_slice(b"\r\n");
}
