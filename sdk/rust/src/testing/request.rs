//! Requests that a test gives.

use super::given;
use crate::Request;

/// For tests: see [`testing`](crate::testing).
impl Request {
    /// A request for a test: what no `with_` gives is unknown, or absent where the contract has a value for that.
    #[must_use]
    pub fn test() -> Self {
        Self::default()
    }

    /// Gives [`decision_id`](Self::decision_id).
    #[must_use]
    pub fn with_decision_id(self, id: u64) -> Self {
        Self { decision_id: given(id), ..self }
    }

    /// Gives [`model`](Self::model).
    #[must_use]
    pub fn with_model(self, model: &str) -> Self {
        Self { model: given(model.to_owned()), ..self }
    }

    /// Gives [`adapter`](Self::adapter).
    #[must_use]
    pub fn with_adapter(self, adapter: &str) -> Self {
        Self { adapter: given(Some(adapter.to_owned())), ..self }
    }

    /// Gives [`endpoint`](Self::endpoint).
    #[must_use]
    pub fn with_endpoint(self, endpoint: u32) -> Self {
        Self { endpoint: given(endpoint), ..self }
    }

    /// Gives [`stage`](Self::stage).
    #[must_use]
    pub fn with_stage(self, stage: u32) -> Self {
        Self { stage: given(stage), ..self }
    }

    /// Gives [`tenant`](Self::tenant).
    #[must_use]
    pub fn with_tenant(self, tenant: &str) -> Self {
        Self { tenant: given(Some(tenant.to_owned())), ..self }
    }

    /// Gives [`tenant_key`](Self::tenant_key).
    #[must_use]
    pub fn with_tenant_key(self, key: u64) -> Self {
        Self { tenant_key: given(Some(key)), ..self }
    }

    /// Gives [`session_key`](Self::session_key).
    #[must_use]
    pub fn with_session_key(self, key: u64) -> Self {
        Self { session_key: given(Some(key)), ..self }
    }

    /// Gives [`parent_session_key`](Self::parent_session_key).
    #[must_use]
    pub fn with_parent_session_key(self, key: u64) -> Self {
        Self { parent_session_key: given(Some(key)), ..self }
    }

    /// Gives [`prefix_key`](Self::prefix_key).
    #[must_use]
    pub fn with_prefix_key(self, key: u64) -> Self {
        Self { prefix_key: given(key), ..self }
    }

    /// Gives [`prompt_tokens`](Self::prompt_tokens).
    #[must_use]
    pub fn with_prompt_tokens(self, tokens: u32) -> Self {
        Self { prompt_tokens: given(tokens), ..self }
    }

    /// Gives [`prompt_tokens_exact`](Self::prompt_tokens_exact).
    #[must_use]
    pub fn with_prompt_tokens_exact(self, is_exact: bool) -> Self {
        Self { prompt_tokens_exact: given(is_exact), ..self }
    }

    /// Gives [`generated_tokens`](Self::generated_tokens).
    #[must_use]
    pub fn with_generated_tokens(self, tokens: u32) -> Self {
        Self { generated_tokens: given(tokens), ..self }
    }

    /// Gives [`max_output_tokens`](Self::max_output_tokens).
    #[must_use]
    pub fn with_max_output_tokens(self, tokens: u32) -> Self {
        Self { max_output_tokens: given(tokens), ..self }
    }

    /// Gives [`expected_output_tokens`](Self::expected_output_tokens).
    #[must_use]
    pub fn with_expected_output_tokens(self, tokens: u32) -> Self {
        Self { expected_output_tokens: given(tokens), ..self }
    }

    /// Gives [`choices`](Self::choices).
    #[must_use]
    pub fn with_choices(self, choices: u32) -> Self {
        Self { choices: given(choices), ..self }
    }

    /// Gives [`flags`](Self::flags).
    #[must_use]
    pub fn with_flags(self, flags: u32) -> Self {
        Self { flags: given(flags), ..self }
    }

    /// Gives [`multimodal_items`](Self::multimodal_items).
    #[must_use]
    pub fn with_multimodal_items(self, items: u32) -> Self {
        Self { multimodal_items: given(items), ..self }
    }

    /// Gives [`multimodal_bytes`](Self::multimodal_bytes).
    #[must_use]
    pub fn with_multimodal_bytes(self, bytes: u64) -> Self {
        Self { multimodal_bytes: given(bytes), ..self }
    }

    /// Gives [`priority_tier`](Self::priority_tier).
    #[must_use]
    pub fn with_priority_tier(self, tier: u32) -> Self {
        Self { priority_tier: given(tier), ..self }
    }

    /// Gives [`priority`](Self::priority).
    #[must_use]
    pub fn with_priority(self, priority: f32) -> Self {
        Self { priority: given(priority), ..self }
    }

    /// Gives [`class`](Self::class).
    #[must_use]
    pub fn with_class(self, class: &str) -> Self {
        Self { class: given(Some(class.to_owned())), ..self }
    }

    /// Gives [`age_ms`](Self::age_ms).
    #[must_use]
    pub fn with_age_ms(self, ms: u32) -> Self {
        Self { age_ms: given(ms), ..self }
    }

    /// Gives [`deadline_ms`](Self::deadline_ms).
    #[must_use]
    pub fn with_deadline_ms(self, ms: u32) -> Self {
        Self { deadline_ms: given(Some(ms)), ..self }
    }

    /// Gives [`slo_ttft_ms`](Self::slo_ttft_ms).
    #[must_use]
    pub fn with_slo_ttft_ms(self, ms: f32) -> Self {
        Self { slo_ttft_ms: given(ms), ..self }
    }

    /// Gives [`slo_itl_ms`](Self::slo_itl_ms).
    #[must_use]
    pub fn with_slo_itl_ms(self, ms: f32) -> Self {
        Self { slo_itl_ms: given(ms), ..self }
    }

    /// Gives [`attempt`](Self::attempt).
    #[must_use]
    pub fn with_attempt(self, attempt: u32) -> Self {
        Self { attempt: given(attempt), ..self }
    }

    /// Gives [`holds`](Self::holds).
    #[must_use]
    pub fn with_holds(self, holds: u32) -> Self {
        Self { holds: given(holds), ..self }
    }

    /// Gives [`failed_workers`](Self::failed_workers).
    #[must_use]
    pub fn with_failed_workers(self, workers: impl Into<Vec<u64>>) -> Self {
        Self { failed_workers: given(workers.into()), ..self }
    }

    /// Gives [`pinned_worker`](Self::pinned_worker).
    #[must_use]
    pub fn with_pinned_worker(self, worker: u64) -> Self {
        Self { pinned_worker: given(Some(worker)), ..self }
    }

    /// Gives [`affinity_worker`](Self::affinity_worker).
    #[must_use]
    pub fn with_affinity_worker(self, worker: u64) -> Self {
        Self { affinity_worker: given(Some(worker)), ..self }
    }

    /// Gives [`tags`](Self::tags).
    #[must_use]
    pub fn with_tags(self, tags: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { tags: given(tags.into_iter().map(Into::into).collect()), ..self }
    }

    /// Gives an [`attribute`](Self::attribute).
    #[must_use]
    pub fn with_attribute(mut self, key: &str, value: &str) -> Self {
        self.attributes.push((key.to_owned(), value.to_owned()));
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{UNKNOWN, flags};

    #[test]
    fn what_a_test_does_not_give_is_unknown_or_absent() {
        let request = Request::test();
        assert_eq!((request.prompt_tokens(), request.max_output_tokens()), (UNKNOWN, UNKNOWN));
        assert_eq!((request.tenant(), request.tenant_key(), request.deadline_ms()), (None, None, None));
        assert_eq!((request.multimodal_items(), request.multimodal_bytes(), request.holds(), request.choices()), (0, 0, 0, 1));
        assert!(request.slo_ttft_ms().is_nan());
    }

    #[test]
    fn what_a_test_gives_is_read() {
        let request = Request::test()
            .with_tenant("acme")
            .with_tenant_key(7)
            .with_flags(flags::STREAM | flags::TOOLS)
            .with_tags(["batch"])
            .with_failed_workers([3])
            .with_attribute("x-team", "a")
            .with_attribute("x-team", "b");
        assert_eq!((request.tenant(), request.tenant_key()), (Some("acme"), Some(7)));
        assert_eq!(request.flags() & flags::TOOLS, flags::TOOLS);
        assert_eq!((request.tags(), request.failed_workers()), (&["batch".to_owned()][..], &[3][..]));
        assert_eq!(request.attribute("x-team").as_deref(), Some("b"), "the value given last counts, as for every fact");
        assert_eq!(request.attribute("x-other"), None);
    }
}
