//! What an engine that prefilled says, read without trust: a refusal says which field is wrong, and shows none of it.

use std::{fmt::Display, sync::Arc};

use serde::Deserialize;
use serde_json::value::RawValue;

/// Longest state that is handed on. vLLM's has a number for each block: 64,000 of them for a prompt of a million tokens.
const MAX_STATE_BYTES: usize = 4 << 20;

#[derive(Deserialize)]
pub(super) struct Answer<'a> {
    #[serde(borrow, default)]
    pub(super) kv_transfer_params: Option<&'a RawValue>,
    #[serde(borrow, default)]
    prompt_token_ids: Option<&'a RawValue>,
    #[serde(borrow, default)]
    choices: Option<Vec<Choice<'a>>>,
    #[serde(borrow, default)]
    usage: Option<&'a RawValue>,
}

#[derive(Deserialize)]
pub(super) struct Choice<'a> {
    #[serde(borrow, default)]
    pub(super) disaggregated_params: Option<&'a RawValue>,
    #[serde(borrow, default)]
    pub(super) finish_reason: Option<&'a RawValue>,
    #[serde(borrow, default)]
    prompt_token_ids: Option<&'a RawValue>,
}

impl<'a> Answer<'a> {
    pub(super) fn read(body: &'a [u8]) -> Result<Self, String> {
        serde_json::from_slice(body).map_err(|error| refusal("is not what it should be", error))
    }

    pub(super) fn choice(&self) -> Option<&Choice<'a>> {
        self.choices.as_ref()?.first()
    }

    /// The prompt's tokens, which chats have at the top and completions in the choice (vLLM).
    pub(super) fn prompt_ids(&self) -> Result<Option<Arc<[u32]>>, String> {
        let ids = self.prompt_token_ids.or_else(|| self.choice()?.prompt_token_ids);
        let read = |ids: &RawValue| serde_json::from_str::<Vec<u32>>(ids.get());
        let ids = ids.map(read).transpose().map_err(|error| refusal("has prompt_token_ids that are none", error))?;
        Ok(ids.filter(|ids| !ids.is_empty()).map(Arc::from))
    }

    /// Prompt tokens that were cached, by the usage.
    pub(super) fn cached_tokens(&self) -> Option<u32> {
        #[derive(Deserialize)]
        struct Usage {
            prompt_tokens_details: Option<Details>,
        }
        #[derive(Deserialize)]
        struct Details {
            cached_tokens: Option<u32>,
        }
        let usage: Usage = serde_json::from_str(self.usage?.get()).ok()?;
        usage.prompt_tokens_details?.cached_tokens
    }
}

/// A state that may be handed on: an object of bounded size.
pub(super) fn state(name: &str, state: &RawValue) -> Result<Arc<RawValue>, String> {
    let text = state.get();
    if !text.starts_with('{') {
        return Err(refusal(&format!("has {name} of the wrong kind"), "an object is expected"));
    }
    if text.len() > MAX_STATE_BYTES {
        return Err(refusal(
            &format!("has {name} of {} bytes", text.len()),
            format_args!("at most {MAX_STATE_BYTES} are handed on"),
        ));
    }
    Ok(state.to_owned().into())
}

fn refusal(what: &str, why: impl Display) -> String {
    format!("its answer to a prefill {what}: {why}")
}
