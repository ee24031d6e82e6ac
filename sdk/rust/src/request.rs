//! Facts of the request being decided.

use std::cell::OnceCell;

use crate::{
    UNKNOWN,
    bindings::dynamo::policy::request as host,
    codes::{endpoint, stage},
};

/// The request being decided. Facts are constant during one call, and each is asked of the host when a policy first reads
/// it.
///
/// Unless a function says otherwise, an unknown `u32` or `u64` amount is its largest value ([`UNKNOWN`]) and an unknown
/// float is NaN; what may be absent is an option. Keys (`*_key`) are stable 64-bit hashes, equal on every host: compare
/// and store those, never the strings behind them.
#[derive(Debug, Default)]
pub struct Request {
    pub(crate) decision_id: OnceCell<u64>,
    pub(crate) model: OnceCell<String>,
    pub(crate) adapter: OnceCell<Option<String>>,
    pub(crate) endpoint: OnceCell<u32>,
    pub(crate) stage: OnceCell<u32>,
    pub(crate) tenant: OnceCell<Option<String>>,
    pub(crate) tenant_key: OnceCell<Option<u64>>,
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
    pub(crate) holds: OnceCell<u32>,
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
    /// Identity of this decision, unique on this host; [`Outcomes`](crate::Outcomes) names it when what it placed has ended.
    /// Asked again after a hold it is the same decision; a request that is placed anew is a new one.
    pub fn decision_id(&self) -> u64 {
        *ask(&self.decision_id, host::decision_id, 0)
    }

    /// The model that is asked for, after the host resolved aliases.
    pub fn model(&self) -> &str {
        ask(&self.model, host::model, String::new()).as_str()
    }

    /// The LoRA adapter that is asked for.
    pub fn adapter(&self) -> Option<&str> {
        ask(&self.adapter, host::adapter, None).as_deref()
    }

    /// What is asked of the engine, see [`endpoint`].
    pub fn endpoint(&self) -> u32 {
        *ask(&self.endpoint, host::endpoint, endpoint::CHAT_COMPLETION)
    }

    /// Which part of the work is being placed, see [`stage`].
    pub fn stage(&self) -> u32 {
        *ask(&self.stage, host::stage, stage::WHOLE)
    }

    /// The authenticated tenant.
    pub fn tenant(&self) -> Option<&str> {
        ask(&self.tenant, host::tenant, None).as_deref()
    }

    /// Key of the tenant.
    pub fn tenant_key(&self) -> Option<u64> {
        *ask(&self.tenant_key, host::tenant_key, None)
    }

    /// Key of the client's session.
    pub fn session_key(&self) -> Option<u64> {
        *ask(&self.session_key, host::session_key, None)
    }

    /// Key of the session that this one was forked from.
    pub fn parent_session_key(&self) -> Option<u64> {
        *ask(&self.parent_session_key, host::parent_session_key, None)
    }

    /// Key of the prompt's beginning, its first kilobyte as the client wrote it: equal for prompts that begin alike for that
    /// long. A hint for affinity; a short prompt that grows has another key.
    pub fn prefix_key(&self) -> u64 {
        *ask(&self.prefix_key, host::prefix_key, 0)
    }

    /// Length of the prompt, in tokens.
    pub fn prompt_tokens(&self) -> u32 {
        *ask(&self.prompt_tokens, host::prompt_tokens, UNKNOWN)
    }

    /// Whether `prompt_tokens` was counted by the model's tokenizer, not estimated from bytes.
    pub fn prompt_tokens_exact(&self) -> bool {
        *ask(&self.prompt_tokens_exact, host::prompt_tokens_exact, false)
    }

    /// Tokens that an earlier attempt has already delivered to the client.
    pub fn generated_tokens(&self) -> u32 {
        *ask(&self.generated_tokens, host::generated_tokens, 0)
    }

    /// The client's limit on output tokens, per choice.
    pub fn max_output_tokens(&self) -> u32 {
        *ask(&self.max_output_tokens, host::max_output_tokens, UNKNOWN)
    }

    /// What the host expects in output tokens, per choice.
    pub fn expected_output_tokens(&self) -> u32 {
        *ask(&self.expected_output_tokens, host::expected_output_tokens, UNKNOWN)
    }

    /// Choices that are asked for (`n`), at least 1.
    pub fn choices(&self) -> u32 {
        *ask(&self.choices, host::choices, 1)
    }

    /// Bits, see [`flags`](crate::flags).
    pub fn flags(&self) -> u32 {
        *ask(&self.flags, host::flags, 0)
    }

    /// Images, audio and video items in the prompt.
    pub fn multimodal_items(&self) -> u32 {
        *ask(&self.multimodal_items, host::multimodal_items, 0)
    }

    /// Their size in bytes; 0 without any.
    pub fn multimodal_bytes(&self) -> u64 {
        *ask(&self.multimodal_bytes, host::multimodal_bytes, 0)
    }

    /// Strict tier that admission chose: a lower tier is served first. 0 without admission. While admission decides: the one
    /// that the host's configuration gives.
    pub fn priority_tier(&self) -> u32 {
        *ask(&self.priority_tier, host::priority_tier, 0)
    }

    /// Priority within the tier: higher is sooner. 0 is normal.
    pub fn priority(&self) -> f32 {
        *ask(&self.priority, host::priority, 0.0)
    }

    /// Class that admission chose. While admission decides: the one that the host's configuration gives.
    pub fn class(&self) -> Option<&str> {
        ask(&self.class, host::class, None).as_deref()
    }

    /// Milliseconds since the host accepted the request.
    pub fn age_ms(&self) -> u32 {
        *ask(&self.age_ms, host::age_ms, 0)
    }

    /// Milliseconds that remain until the request's deadline.
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

    /// 0 for a request's first placing; counts each further one.
    pub fn attempt(&self) -> u32 {
        *ask(&self.attempt, host::attempt, 0)
    }

    /// How often this decision was held before.
    pub fn holds(&self) -> u32 {
        *ask(&self.holds, host::holds, 0)
    }

    /// Workers that failed this request, oldest first. They are not among the candidates.
    pub fn failed_workers(&self) -> &[u64] {
        ask(&self.failed_workers, host::failed_workers, Vec::new()).as_slice()
    }

    /// The worker that the client demands. If it is eligible it is the only candidate.
    pub fn pinned_worker(&self) -> Option<u64> {
        *ask(&self.pinned_worker, host::pinned_worker, None)
    }

    /// The worker that last served this session: advice.
    pub fn affinity_worker(&self) -> Option<u64> {
        *ask(&self.affinity_worker, host::affinity_worker, None)
    }

    /// Tags that the operator's configuration puts on the request.
    pub fn tags(&self) -> &[String] {
        ask(&self.tags, host::tags, Vec::new()).as_slice()
    }

    /// A fact by name: request headers that the operator allowed (several of one name joined by `, `), and whatever later
    /// hosts offer without a function of its own. Asked of the host at each call: keep it.
    pub fn attribute(&self, key: &str) -> Option<String> {
        if cfg!(target_arch = "wasm32") {
            host::attribute(key)
        } else {
            self.attributes.iter().rfind(|(name, _)| name == key).map(|(_, value)| value.clone())
        }
    }
}
