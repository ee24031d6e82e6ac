//! Shapes: vLLM's reply bodies, member by member, in its order.

use serde::Serialize;
use serde_json::value::RawValue;

/// A member that is left out, or there and possibly null.
type Optional<T> = Option<Option<T>>;

/// A frame of a stream.
#[derive(Serialize)]
pub(super) struct Frame<'a, C> {
    pub(super) id: &'a str,
    pub(super) object: &'a str,
    pub(super) created: u64,
    pub(super) model: &'a str,
    pub(super) choices: &'a [C],
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) usage: Option<Usage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) system_fingerprint: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prompt_token_ids: Optional<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prompt_text: Optional<&'a str>,
}

/// A choice in a frame of a chat.
#[derive(Serialize)]
pub(super) struct ChatDelta<'a> {
    pub(super) index: u32,
    pub(super) delta: Delta<'a>,
    pub(super) logprobs: (),
    pub(super) finish_reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) stop_reason: Optional<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) token_ids: Optional<[u32; 1]>,
}

#[derive(Serialize)]
pub(super) struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) role: Option<&'a str>,
    pub(super) content: &'a str,
}

/// A choice in a frame of a completion.
#[derive(Serialize)]
pub(super) struct TextDelta<'a> {
    pub(super) index: u32,
    pub(super) text: &'a str,
    pub(super) logprobs: (),
    pub(super) finish_reason: Option<&'a str>,
    pub(super) stop_reason: Option<&'a str>,
    pub(super) prompt_token_ids: Option<&'a [u32]>,
    pub(super) token_ids: Option<[u32; 1]>,
}

#[derive(Clone, Copy, Serialize)]
pub(super) struct Usage {
    pub(super) prompt_tokens: u32,
    pub(super) total_tokens: u32,
    pub(super) completion_tokens: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) prompt_tokens_details: Option<PromptTokensDetails>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) completion_tokens_details: Optional<()>,
}

#[derive(Clone, Copy, Serialize)]
pub(super) struct PromptTokensDetails {
    pub(super) cached_tokens: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) created_cache_tokens: Optional<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) multimodal_tokens: Optional<u32>,
}

/// A whole chat.
#[derive(Serialize)]
pub(super) struct Chat<'a> {
    pub(super) id: &'a str,
    pub(super) object: &'a str,
    pub(super) created: u64,
    pub(super) model: &'a str,
    pub(super) choices: Vec<ChatChoice<'a>>,
    pub(super) service_tier: (),
    pub(super) system_fingerprint: &'a str,
    pub(super) usage: Usage,
    pub(super) prompt_logprobs: (),
    pub(super) prompt_token_ids: Option<&'a [u32]>,
    pub(super) prompt_text: (),
    pub(super) kv_transfer_params: Option<&'a RawValue>,
    pub(super) ec_transfer_params: (),
    pub(super) metrics: (),
}

#[derive(Serialize)]
pub(super) struct ChatChoice<'a> {
    pub(super) index: u32,
    pub(super) message: Message<'a>,
    pub(super) logprobs: (),
    pub(super) finish_reason: Option<&'a str>,
    pub(super) stop_reason: Option<&'a str>,
    pub(super) token_ids: Option<&'a [u32]>,
    pub(super) routed_experts: (),
}

#[derive(Serialize)]
pub(super) struct Message<'a> {
    pub(super) role: &'a str,
    pub(super) content: &'a str,
    pub(super) refusal: (),
    pub(super) annotations: (),
    pub(super) audio: (),
    pub(super) function_call: (),
    pub(super) reasoning: (),
}

/// A whole completion.
#[derive(Serialize)]
pub(super) struct Completion<'a> {
    pub(super) id: &'a str,
    pub(super) object: &'a str,
    pub(super) created: u64,
    pub(super) model: &'a str,
    pub(super) choices: Vec<TextChoice<'a>>,
    pub(super) service_tier: (),
    pub(super) system_fingerprint: &'a str,
    pub(super) usage: Usage,
    pub(super) kv_transfer_params: Option<&'a RawValue>,
    pub(super) ec_transfer_params: (),
    pub(super) metrics: (),
}

#[derive(Serialize)]
pub(super) struct TextChoice<'a> {
    pub(super) index: u32,
    pub(super) text: &'a str,
    pub(super) logprobs: (),
    pub(super) finish_reason: Option<&'a str>,
    pub(super) stop_reason: Option<&'a str>,
    pub(super) token_ids: Option<&'a [u32]>,
    pub(super) prompt_logprobs: (),
    pub(super) prompt_token_ids: Option<&'a [u32]>,
    pub(super) routed_experts: (),
}
