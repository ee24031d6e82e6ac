//! TensorRT-LLM: the context first, and its `disaggregated_params` to whoever generates.
//!
//! The context's engine makes the first token, which the generating engine gives out as its own; where that was the last one there is
//! nothing to generate, and its answer is all. A field that it does not know is a 400: nothing is said but what is needed. Its state may
//! be signed: only `request_type` changes. Read in its source (`serve/openai_disagg_service.py`); no pair of that kind has been
//! at hand.

use dynamo_engine_api::{Endpoint, Prefilled, Protocol, Ticket};

use super::answer::{self, Answer};
use crate::body::Fields;

const PARAMS: &str = "disaggregated_params";
const REQUEST_TYPE: &str = "request_type";
/// Reasons after which there is more to come.
const GOES_ON: [&str; 2] = ["\"length\"", "\"not_finished\""];

pub(super) fn prefill(fields: &mut Fields) {
    fields.instead("stream", false);
    fields.without("stream_options");
    fields.instead(PARAMS, format_args!("{{\"{REQUEST_TYPE}\":\"context_only\"}}"));
}

pub(super) fn decode(ticket: &Ticket, endpoint: Endpoint, fields: &mut Fields) {
    let mut generation = Fields::default();
    generation.instead(REQUEST_TYPE, "\"generation_only\"");
    let params = generation.into_body(ticket.state.get().to_owned().into());
    fields.instead(PARAMS, String::from_utf8_lossy(&params));
    if let Some(ids) = &ticket.prompt_ids {
        fields.ids_instead(if endpoint == Endpoint::Completions { "prompt" } else { "prompt_token_ids" }, ids);
    }
}

pub(super) fn prefilled(body: &[u8]) -> Result<Prefilled, String> {
    let answer = Answer::read(body)?;
    let Some(choice) = answer.choice() else { return Err("its answer to a prefill has no choices".to_owned()) };
    if choice.finish_reason.is_some_and(|reason| !GOES_ON.contains(&reason.get())) {
        return Ok(Prefilled::Final);
    }
    let Some(params) = choice.disaggregated_params else {
        return Err(format!(
            "its answer to a prefill has no {PARAMS}: it keeps no KV for others; start it with a cache_transceiver_config, or give it no \
             part in hand-offs"
        ));
    };
    let state = answer::state(PARAMS, params)?;
    let prompt_ids = answer.prompt_ids()?;
    Ok(Prefilled::Ready(Ticket {
        protocol: Protocol::Context,
        state,
        prompt_ids,
        cached_tokens: answer.cached_tokens(),
        bytes: None,
    }))
}
