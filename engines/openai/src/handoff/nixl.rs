//! vLLM's NixlConnector, pulling or pushing: prefill first, and its `kv_transfer_params` to whoever decodes.
//!
//! The prefill leg makes one token, which nobody reads: decode samples it anew. It is kept from ending for another reason
//! than its length, with which older versions keep no KV, so that what could stop it is left out. Read in vLLM 0.32 and
//! 0.33 (`v1/nixl/pull_scheduler.py`), and seen with a pair of 0.32.

use dynamo_engine_api::{Endpoint, Prefilled, Protocol, Ticket};
use serde::Deserialize;

use super::answer::{self, Answer};
use crate::body::Fields;

pub(super) const PARAMS: &str = "kv_transfer_params";
/// As vLLM's own proxy writes them.
const PREFILL: &str = r#"{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}"#;
/// What says when an answer ends.
const ENDS: [&str; 4] = ["stop", "stop_token_ids", "min_tokens", "stream_options"];

pub(super) fn prefill(endpoint: Endpoint, fields: &mut Fields) {
    one_token(endpoint, fields);
    fields.instead(PARAMS, PREFILL);
    if endpoint == Endpoint::Completions {
        fields.instead("return_token_ids", true);
    } else {
        // Chats do not go on by ids, and to read those of a long prompt costs more than all else of a hand-off.
        fields.without("return_token_ids");
    }
}

/// An answer of one token, whole, that ends by its length.
pub(super) fn one_token(endpoint: Endpoint, fields: &mut Fields) {
    fields.instead("stream", false);
    fields.instead("max_tokens", 1);
    if endpoint == Endpoint::ChatCompletions {
        fields.instead("max_completion_tokens", 1);
    }
    fields.instead("ignore_eos", true);
    ENDS.into_iter().for_each(|name| fields.without(name));
}

pub(super) fn decode(ticket: &Ticket, endpoint: Endpoint, fields: &mut Fields) {
    fields.instead(PARAMS, ticket.state.get());
    // Chats keep their messages: with another prompt than the template's, vLLM could not read what they ask for.
    if let (Endpoint::Completions, Some(ids)) = (endpoint, &ticket.prompt_ids) {
        fields.ids_instead("prompt", ids);
    }
}

pub(super) fn prefilled(body: &[u8]) -> Result<Prefilled, String> {
    let answer = Answer::read(body)?;
    let Some(params) = answer.kv_transfer_params else {
        return Err(format!(
            "its answer to a prefill has no {PARAMS}: it keeps no KV for others; start it with --kv-transfer-config \
             '{{\"kv_connector\":\"NixlConnector\",\"kv_role\":\"kv_producer\"}}', or give it no part in hand-offs"
        ));
    };
    let state = answer::state(PARAMS, params)?;
    let read: Read = serde_json::from_str(state.get()).unwrap_or_default();
    let cached_tokens = read.remote_prefill_cached_tokens.or_else(|| answer.cached_tokens());
    Ok(Prefilled::Ready(Ticket { protocol: Protocol::Nixl, state, prompt_ids: answer.prompt_ids()?, cached_tokens, bytes: None }))
}

/// What of it is for our books; all else is between the engines.
#[derive(Default, Deserialize)]
struct Read {
    #[serde(default)]
    remote_prefill_cached_tokens: Option<u32>,
}
