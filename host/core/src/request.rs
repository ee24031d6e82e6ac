//! Facts of a request: what a policy may ask about.

use std::{collections::BTreeMap, sync::Arc};

use crate::id::{self, WorkerId};

/// What a client asks of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// `POST /v1/chat/completions`
    ChatCompletions,
    /// `POST /v1/completions`
    Completions,
    /// `POST /v1/embeddings`
    Embeddings,
    /// `POST /v1/responses`
    Responses,
    /// `POST /v1/messages`, Anthropic's API
    Messages,
    /// `POST /v1/messages/count_tokens`
    CountTokens,
}

impl Endpoint {
    /// Every endpoint.
    pub const ALL: [Self; 6] =
        [Self::ChatCompletions, Self::Completions, Self::Embeddings, Self::Responses, Self::Messages, Self::CountTokens];

    /// The contract's code (`request.endpoint`).
    #[must_use]
    pub fn code(self) -> u32 {
        match self {
            Self::ChatCompletions => 0,
            Self::Completions => 1,
            Self::Embeddings => 2,
            Self::Responses => 3,
            Self::Messages => 4,
            Self::CountTokens => 5,
        }
    }

    /// Path on the front door and on OpenAI-compatible engines.
    #[must_use]
    pub fn path(self) -> &'static str {
        match self {
            Self::ChatCompletions => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Embeddings => "/v1/embeddings",
            Self::Responses => "/v1/responses",
            Self::Messages => "/v1/messages",
            Self::CountTokens => "/v1/messages/count_tokens",
        }
    }

    /// Metric label.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::ChatCompletions => "chat_completions",
            Self::Completions => "completions",
            Self::Embeddings => "embeddings",
            Self::Responses => "responses",
            Self::Messages => "messages",
            Self::CountTokens => "count_tokens",
        }
    }
}

/// Which part of a request's work is being placed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// All of it, as a policy sees fit: on one worker, or prefill and decode apart.
    #[default]
    Whole,
    /// Prefill; who decodes is asked next.
    Prefill,
    /// Decode of what [`RequestFacts::prefilled_by`] prefills or has prefilled.
    Decode,
}

impl Stage {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Whole, Self::Prefill, Self::Decode];

    /// Its name in receipts, logs and metrics.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }

    /// The contract's code (`request.stage`).
    #[must_use]
    pub fn code(self) -> u32 {
        match self {
            Self::Whole => 0,
            Self::Prefill => 1,
            Self::Decode => 2,
        }
    }
}

/// A number of tokens, and whether a tokenizer counted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenCount {
    /// How many.
    pub tokens: u32,
    /// Whether the model's tokenizer counted them.
    pub exact: bool,
}

impl TokenCount {
    /// The estimate from text: a token is about four bytes. At least 1.
    #[must_use]
    pub fn estimate(bytes: usize) -> Self {
        Self { tokens: u32::try_from(bytes.div_ceil(4)).unwrap_or(crate::UNKNOWN - 1).max(1), exact: false }
    }
}

/// Bits of `request.flags`.
pub mod flags {
    /// The client wants a stream.
    pub const STREAM: u32 = 1;
    /// The request offers tools.
    pub const TOOLS: u32 = 2;
    /// Output is constrained to a grammar or schema.
    pub const GUIDED: u32 = 4;
    /// Log probabilities are asked for.
    pub const LOGPROBS: u32 = 8;
}

/// Targets for a request's latencies, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Slo {
    /// Time to first token.
    pub ttft_ms: Option<f32>,
    /// Time between tokens.
    pub itl_ms: Option<f32>,
}

/// What is known of a request when it is placed.
#[derive(Clone, Debug)]
pub struct RequestFacts {
    /// The id that the client sees (`x-request-id`).
    pub id: String,
    /// Identity of the decision; unique within a host's run.
    pub decision_id: u64,
    /// Model asked for, after aliases; of an adapter, its base model.
    pub model: String,
    /// LoRA adapter asked for.
    pub adapter: Option<String>,
    /// What is asked.
    pub endpoint: Endpoint,
    /// Which part of it is placed.
    pub stage: Stage,
    /// Authenticated tenant.
    pub tenant: Option<String>,
    /// Its key, where no more than that is known: receipts do not name tenants.
    pub recorded_tenant_key: Option<u64>,
    /// Priority: higher is sooner, 0 is normal.
    pub priority: i32,
    /// Strict tier that admission chose: lower is served first.
    pub tier: u32,
    /// Class that admission chose.
    pub class: Option<Arc<str>>,
    /// Key of the client's session.
    pub session_key: Option<u64>,
    /// Key of the prompt's beginning.
    pub prefix_key: u64,
    /// Length of the prompt.
    pub prompt: TokenCount,
    /// Tokens of output that the client has already, from an earlier attempt.
    pub generated_tokens: u32,
    /// The client's limit on output tokens.
    pub max_output_tokens: Option<u32>,
    /// What is expected in output tokens, per choice.
    pub expected_output_tokens: Option<u32>,
    /// Targets for its latencies.
    pub slo: Slo,
    /// Choices asked for.
    pub choices: u32,
    /// Bits, see [`flags`].
    pub flags: u32,
    /// Images, audio and video items in the prompt.
    pub multimodal_items: u32,
    /// When the host accepted it, in milliseconds of its monotonic clock.
    pub accepted_ms: u64,
    /// When it must be done, on the same clock.
    pub deadline_ms: Option<u64>,
    /// How often it has been placed before.
    pub attempt: u32,
    /// How often the present decision was held.
    pub holds: u32,
    /// Workers that failed it, oldest first.
    pub failed_workers: Vec<WorkerId>,
    /// In the stage [`Stage::Decode`]: the worker that prefills, or has prefilled.
    pub prefilled_by: Option<WorkerId>,
    /// Prompts that its body holds: a completion may ask for several at once.
    pub prompts: u32,
    /// Whether its answer tells of the prompt's tokens, which only who computes them knows.
    pub tells_prompt: bool,
    /// Facts by name: allowed headers.
    pub attributes: BTreeMap<String, String>,
}

impl RequestFacts {
    /// A plain request for `model`; the rest as for a short prompt with nothing special.
    #[must_use]
    pub fn new(id: impl Into<String>, model: impl Into<String>, endpoint: Endpoint) -> Self {
        Self {
            id: id.into(),
            decision_id: 0,
            model: model.into(),
            adapter: None,
            endpoint,
            stage: Stage::Whole,
            tenant: None,
            recorded_tenant_key: None,
            priority: 0,
            tier: 0,
            class: None,
            session_key: None,
            prefix_key: 0,
            prompt: TokenCount::estimate(1),
            generated_tokens: 0,
            max_output_tokens: None,
            expected_output_tokens: None,
            slo: Slo::default(),
            choices: 1,
            flags: 0,
            multimodal_items: 0,
            accepted_ms: 0,
            deadline_ms: None,
            attempt: 0,
            holds: 0,
            failed_workers: Vec::new(),
            prefilled_by: None,
            prompts: 1,
            tells_prompt: false,
            attributes: BTreeMap::new(),
        }
    }

    /// Whether its KV may be handed from one worker to another: engines do that for one prompt with one answer, and where
    /// the first token is not the last. Who decodes has computed no logits of the prompt.
    #[must_use]
    pub fn may_hand_over(&self) -> bool {
        matches!(self.endpoint, Endpoint::ChatCompletions | Endpoint::Completions)
            && (self.choices, self.prompts, self.multimodal_items, self.generated_tokens) == (1, 1, 0, 0)
            && !self.tells_prompt
            && self.max_output_tokens.is_none_or(|tokens| tokens > 1)
    }

    /// Whether it has one prompt and one answer: where no worker serves whole requests, engines of concurrent protocols hand
    /// that over whatever else it asks for, as both are asked the same.
    #[must_use]
    pub fn has_one_answer(&self) -> bool {
        matches!(self.endpoint, Endpoint::ChatCompletions | Endpoint::Completions) && (self.choices, self.prompts) == (1, 1)
    }

    /// Key of the tenant.
    #[must_use]
    pub fn tenant_key(&self) -> Option<u64> {
        self.tenant.as_deref().map(|tenant| id::key(tenant.as_bytes())).or(self.recorded_tenant_key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_estimate_is_a_quarter_of_the_bytes_and_never_exact_or_zero() {
        assert_eq!(TokenCount::estimate(0), TokenCount { tokens: 1, exact: false });
        assert_eq!(TokenCount::estimate(4001).tokens, 1001);
        assert_eq!(TokenCount::estimate(usize::MAX).tokens, crate::UNKNOWN - 1);
    }
}
