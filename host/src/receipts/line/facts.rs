//! Facts of the request, as receipts hold them.

use dynamo_host_core::{Endpoint, RequestFacts, Slo, Stage, TokenCount, WorkerId};
use serde::{Deserialize, Serialize};

use super::{DecisionLine, Hex, is_default};

/// What a policy may read of the request. Neither text of the prompt nor tokens of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct FactsLine {
    pub(crate) endpoint: String,
    /// `prefill` or `decode`, where it is not all of the work that was placed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) stage: Option<String>,
    /// The worker that prefills or has prefilled, in the stage `decode`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) prefilled_by: Option<Hex>,
    pub(crate) prompt_tokens: u32,
    /// Whether a tokenizer counted them.
    pub(crate) exact: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) adapter: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tenant_key: Option<Hex>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) session_key: Option<Hex>,
    pub(crate) prefix_key: Hex,
    #[serde(default, skip_serializing_if = "is_default")]
    pub(crate) priority: i32,
    /// Chosen by admission, as the class is.
    #[serde(default, skip_serializing_if = "is_default")]
    pub(crate) tier: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) class: Option<String>,
    #[serde(default, skip_serializing_if = "is_default")]
    pub(crate) generated_tokens: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_output_tokens: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) expected_output_tokens: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) slo_ttft_ms: Option<f32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) slo_itl_ms: Option<f32>,
    pub(crate) choices: u32,
    pub(crate) flags: u32,
    #[serde(default, skip_serializing_if = "is_default")]
    pub(crate) multimodal_items: u32,
    pub(crate) accepted_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) deadline_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "is_default")]
    pub(crate) attempt: u32,
    #[serde(default, skip_serializing_if = "is_default")]
    pub(crate) holds: u32,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) failed_workers: Vec<Hex>,
}

impl FactsLine {
    pub(super) fn of(request: &RequestFacts) -> Self {
        Self {
            endpoint: request.endpoint.label().to_owned(),
            stage: (request.stage != Stage::Whole).then(|| request.stage.label().to_owned()),
            prefilled_by: request.prefilled_by.map(|worker| Hex(worker.0)),
            prompt_tokens: request.prompt.tokens,
            exact: request.prompt.exact,
            adapter: request.adapter.clone(),
            tenant_key: request.tenant_key().map(Hex),
            session_key: request.session_key.map(Hex),
            prefix_key: Hex(request.prefix_key),
            priority: request.priority,
            tier: request.tier,
            class: request.class.as_deref().map(str::to_owned),
            generated_tokens: request.generated_tokens,
            max_output_tokens: request.max_output_tokens,
            expected_output_tokens: request.expected_output_tokens,
            slo_ttft_ms: request.slo.ttft_ms,
            slo_itl_ms: request.slo.itl_ms,
            choices: request.choices,
            flags: request.flags,
            multimodal_items: request.multimodal_items,
            accepted_ms: request.accepted_ms,
            deadline_ms: request.deadline_ms,
            attempt: request.attempt,
            holds: request.holds,
            failed_workers: request.failed_workers.iter().map(|worker| Hex(worker.0)).collect(),
        }
    }

    pub(super) fn request(&self, line: &DecisionLine) -> Result<RequestFacts, String> {
        let endpoint = Endpoint::ALL.into_iter().find(|endpoint| endpoint.label() == self.endpoint);
        let endpoint = endpoint.ok_or_else(|| format!("its endpoint {:?} is not known", self.endpoint))?;
        let stage =
            self.stage.as_deref().map_or(Some(Stage::Whole), |label| Stage::ALL.into_iter().find(|stage| stage.label() == label));
        Ok(RequestFacts {
            stage: stage.ok_or_else(|| format!("its stage {:?} is not known", self.stage))?,
            prefilled_by: self.prefilled_by.map(|worker| WorkerId(worker.0)),
            decision_id: line.id.0,
            adapter: self.adapter.clone(),
            recorded_tenant_key: self.tenant_key.map(|key| key.0),
            priority: self.priority,
            tier: self.tier,
            class: self.class.as_deref().map(Into::into),
            session_key: self.session_key.map(|key| key.0),
            prefix_key: self.prefix_key.0,
            prompt: TokenCount { tokens: self.prompt_tokens, exact: self.exact },
            generated_tokens: self.generated_tokens,
            max_output_tokens: self.max_output_tokens,
            expected_output_tokens: self.expected_output_tokens,
            slo: Slo { ttft_ms: self.slo_ttft_ms, itl_ms: self.slo_itl_ms },
            choices: self.choices,
            flags: self.flags,
            multimodal_items: self.multimodal_items,
            accepted_ms: self.accepted_ms,
            deadline_ms: self.deadline_ms,
            attempt: self.attempt,
            holds: self.holds,
            failed_workers: self.failed_workers.iter().map(|worker| WorkerId(worker.0)).collect(),
            ..RequestFacts::new(line.request.clone(), line.model.clone(), endpoint)
        })
    }
}
