//! Facts of the request being decided.

use std::cell::OnceCell;

use crate::{UNKNOWN, bindings::dynamo::policy::request as host};

/// Values of [`Request::endpoint`]. Further ones may come.
pub mod endpoint {
    /// A chat completion.
    pub const CHAT_COMPLETIONS: u32 = 0;
    /// A text completion.
    pub const COMPLETIONS: u32 = 1;
}

/// Bits of [`Request::flags`]. Further ones may come.
pub mod flags {
    /// The client wants a stream.
    pub const STREAM: u32 = 1;
    /// The request offers tools.
    pub const TOOLS: u32 = 2;
    /// Output is constrained to a grammar or schema.
    pub const GUIDED: u32 = 4;
    /// Log probabilities are asked for.
    pub const LOGPROBS: u32 = 8;
    /// The session's last request.
    pub const SESSION_FINAL: u32 = 16;
    /// The input is a tool's result.
    pub const TOOL_RESULT: u32 = 32;
}

/// The request being decided. Each fact is asked of the host when a policy first reads it.
///
/// An unknown `u32` is [`UNKNOWN`], an unknown float NaN.
#[derive(Debug, Default)]
pub struct Request {
    pub(crate) decision_id: OnceCell<u64>,
    pub(crate) model: OnceCell<String>,
    pub(crate) adapter: OnceCell<Option<String>>,
    pub(crate) endpoint: OnceCell<u32>,
    pub(crate) stage: OnceCell<u32>,
    pub(crate) tenant: OnceCell<Option<String>>,
    pub(crate) tenant_key: OnceCell<u64>,
    pub(crate) session_key: OnceCell<Option<u64>>,
    pub(crate) parent_session_key: OnceCell<Option<u64>>,
    pub(crate) prefix_key: OnceCell<u64>,
    pub(crate) prompt_tokens: OnceCell<u32>,
    pub(crate) prompt_tokens_exact: OnceCell<bool>,
    pub(crate) generated_tokens: OnceCell<u32>,
    pub(crate) max_output_tokens: OnceCell<u32>,
    pub(crate) expected_output_tokens: OnceCell<u32>,
    pub(crate) choices: OnceCell<u32>,
    pub(crate) flags: OnceCell<u32>,
    pub(crate) multimodal_items: OnceCell<u32>,
    pub(crate) multimodal_bytes: OnceCell<u64>,
    pub(crate) priority_tier: OnceCell<u32>,
    pub(crate) priority: OnceCell<f32>,
    pub(crate) class: OnceCell<Option<String>>,
    pub(crate) age_ms: OnceCell<u32>,
    pub(crate) deadline_ms: OnceCell<Option<u32>>,
    pub(crate) slo_ttft_ms: OnceCell<f32>,
    pub(crate) slo_itl_ms: OnceCell<f32>,
    pub(crate) attempt: OnceCell<u32>,
    pub(crate) failed_workers: OnceCell<Vec<u64>>,
    pub(crate) pinned_worker: OnceCell<Option<u64>>,
    pub(crate) affinity_worker: OnceCell<Option<u64>>,
    pub(crate) tags: OnceCell<Vec<String>>,
    pub(crate) attributes: Vec<(String, String)>,
}

/// The fact, asked of the host once; outside the sandbox, where there is no host to ask, what stands for unknown.
fn ask<T>(cell: &OnceCell<T>, host: fn() -> T, unknown: T) -> &T {
    cell.get_or_init(|| if cfg!(target_arch = "wasm32") { host() } else { unknown })
}

impl Request {
    /// Identity of this decision; [`Outcomes`](crate::Outcomes) names it again.
    pub fn decision_id(&self) -> u64 {
        *ask(&self.decision_id, host::decision_id, 0)
    }

    /// Model asked for.
    pub fn model(&self) -> &str {
        ask(&self.model, host::model, String::new()).as_str()
    }

    /// LoRA adapter asked for.
    pub fn adapter(&self) -> Option<&str> {
        ask(&self.adapter, host::adapter, None).as_deref()
    }

    /// What is asked of the engine, see [`endpoint`].
    pub fn endpoint(&self) -> u32 {
        *ask(&self.endpoint, host::endpoint, endpoint::CHAT_COMPLETIONS)
    }

    /// Which part of the work is placed: 0 whole, 1 prefill, 2 decode.
    pub fn stage(&self) -> u32 {
        *ask(&self.stage, host::stage, 0)
    }

    /// Authenticated tenant.
    pub fn tenant(&self) -> Option<&str> {
        ask(&self.tenant, host::tenant, None).as_deref()
    }

    /// Key of the tenant, equal on every host; 0 without one.
    pub fn tenant_key(&self) -> u64 {
        *ask(&self.tenant_key, host::tenant_key, 0)
    }

    /// Key of the client's session.
    pub fn session_key(&self) -> Option<u64> {
        *ask(&self.session_key, host::session_key, None)
    }

    /// Key of the session that this one was forked from.
    pub fn parent_session_key(&self) -> Option<u64> {
        *ask(&self.parent_session_key, host::parent_session_key, None)
    }

    /// Key of the prompt's beginning.
    pub fn prefix_key(&self) -> u64 {
        *ask(&self.prefix_key, host::prefix_key, 0)
    }

    /// Length of the prompt in tokens.
    pub fn prompt_tokens(&self) -> u32 {
        *ask(&self.prompt_tokens, host::prompt_tokens, UNKNOWN)
    }

    /// Whether a tokenizer counted them.
    pub fn prompt_tokens_exact(&self) -> bool {
        *ask(&self.prompt_tokens_exact, host::prompt_tokens_exact, false)
    }

    /// Tokens that an earlier attempt delivered.
    pub fn generated_tokens(&self) -> u32 {
        *ask(&self.generated_tokens, host::generated_tokens, 0)
    }

    /// The client's limit on output tokens.
    pub fn max_output_tokens(&self) -> u32 {
        *ask(&self.max_output_tokens, host::max_output_tokens, UNKNOWN)
    }

    /// Output tokens that the host expects.
    pub fn expected_output_tokens(&self) -> u32 {
        *ask(&self.expected_output_tokens, host::expected_output_tokens, UNKNOWN)
    }

    /// Choices asked for, at least 1.
    pub fn choices(&self) -> u32 {
        *ask(&self.choices, host::choices, 1)
    }

    /// Bits, see [`flags`].
    pub fn flags(&self) -> u32 {
        *ask(&self.flags, host::flags, 0)
    }

    /// Images, audio and video items in the prompt.
    pub fn multimodal_items(&self) -> u32 {
        *ask(&self.multimodal_items, host::multimodal_items, 0)
    }

    /// Their size in bytes.
    pub fn multimodal_bytes(&self) -> u64 {
        *ask(&self.multimodal_bytes, host::multimodal_bytes, 0)
    }

    /// Strict tier: lower is served first.
    pub fn priority_tier(&self) -> u32 {
        *ask(&self.priority_tier, host::priority_tier, 0)
    }

    /// Priority within the tier: higher is sooner.
    pub fn priority(&self) -> f32 {
        *ask(&self.priority, host::priority, 0.0)
    }

    /// Class that admission chose.
    pub fn class(&self) -> Option<&str> {
        ask(&self.class, host::class, None).as_deref()
    }

    /// Milliseconds since the host accepted the request.
    pub fn age_ms(&self) -> u32 {
        *ask(&self.age_ms, host::age_ms, 0)
    }

    /// Milliseconds that remain.
    pub fn deadline_ms(&self) -> Option<u32> {
        *ask(&self.deadline_ms, host::deadline_ms, None)
    }

    /// Target for the time to first token.
    pub fn slo_ttft_ms(&self) -> f32 {
        *ask(&self.slo_ttft_ms, host::slo_ttft_ms, f32::NAN)
    }

    /// Target for the time between tokens.
    pub fn slo_itl_ms(&self) -> f32 {
        *ask(&self.slo_itl_ms, host::slo_itl_ms, f32::NAN)
    }

    /// 0 for the first placing; counts each further one.
    pub fn attempt(&self) -> u32 {
        *ask(&self.attempt, host::attempt, 0)
    }

    /// Workers that failed this request, oldest first.
    pub fn failed_workers(&self) -> &[u64] {
        ask(&self.failed_workers, host::failed_workers, Vec::new()).as_slice()
    }

    /// The worker that the client demands.
    pub fn pinned_worker(&self) -> Option<u64> {
        *ask(&self.pinned_worker, host::pinned_worker, None)
    }

    /// The worker that last served this session.
    pub fn affinity_worker(&self) -> Option<u64> {
        *ask(&self.affinity_worker, host::affinity_worker, None)
    }

    /// Tags from the operator's configuration.
    pub fn tags(&self) -> &[String] {
        ask(&self.tags, host::tags, Vec::new()).as_slice()
    }

    /// A fact by name: an allowed header, or what later hosts offer without a function of its own.
    pub fn attribute(&self, key: &str) -> Option<String> {
        if cfg!(target_arch = "wasm32") {
            host::attribute(key)
        } else {
            self.attributes.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone())
        }
    }
}
