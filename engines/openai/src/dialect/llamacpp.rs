//! llama.cpp: load from its slots, and from its metrics where they are on; nothing is added to its requests.
//!
//! A slot is a place for one request with a context of its own, so that slots are both what it runs at once and its KV
//! capacity. A client that leaves a stream frees its slot at once; one that leaves a plain request does not: it runs to
//! its end, and there is no way to stop it. Seen with a real server of version 0.5.0.

use std::{sync::Mutex, time::Instant};

use bytes::Bytes;
use dynamo_engine_api::{ChatContinuation, Continues, Endpoint, EngineError, RankLoad};
use futures_core::future::BoxFuture;
use serde::Deserialize;
use serde_json::json;

use super::{Dialect, rate::Rates, succeeds};
use crate::{
    control::Control,
    prometheus::{Malformed, samples},
};

pub(super) const OWNED_BY: &str = "llamacpp";
const METRICS: &str = "/metrics";
const SLOTS: &str = "/slots";
const PROPS: &str = "/props";
const TEMPLATE: &str = "/apply-template";
const TOKENIZE: &str = "/tokenize";

#[derive(Debug, Default)]
pub(super) struct Llamacpp {
    rates: Mutex<Rates>,
}

impl Dialect for Llamacpp {
    /// 503 while it loads its model.
    fn probe<'a>(&'a self, control: &'a Control) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(succeeds(control, "/health"))
    }

    fn load<'a>(&'a self, control: &'a Control) -> BoxFuture<'a, Result<Vec<RankLoad>, EngineError>> {
        Box::pin(async {
            let mut decoded = 0;
            let mut load = match control.report(SLOTS).await? {
                Some(body) => {
                    let slots = control.json::<Vec<Slot>>(SLOTS, &body)?;
                    decoded = slots.iter().map(Slot::decoded).sum();
                    of_slots(&slots)
                }
                // Turned off by --no-slots.
                None => match control.report(PROPS).await? {
                    Some(body) => of_props(&control.json(PROPS, &body)?),
                    None => RankLoad::default(),
                },
            };
            if let Some(text) = control.report(METRICS).await? {
                let mut rates = self.rates.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let metrics = with_metrics(&mut load, &text, decoded, &mut rates, Instant::now());
                metrics.map_err(|error| control.protocol(METRICS, error))?;
            }
            // A server that tells nothing has no ranks.
            Ok(Some(load).filter(|load| *load != RankLoad::default()).into_iter().collect())
        })
    }

    /// As its endpoints do: a chat's text by `/apply-template`, and the tokens of a text by `/tokenize`.
    fn tokenize<'a>(
        &'a self,
        control: &'a Control,
        endpoint: Endpoint,
        body: Bytes,
    ) -> BoxFuture<'a, Result<Option<Vec<u32>>, EngineError>> {
        Box::pin(async move {
            let text = match endpoint {
                Endpoint::ChatCompletions => {
                    let Some(body) = control.asked(TEMPLATE, body).await? else { return Ok(None) };
                    control.json::<Text>(TEMPLATE, &body)?
                }
                // Batches, and prompts of ids, are no text.
                Endpoint::Completions => match serde_json::from_slice(&body) {
                    Ok(text) => text,
                    Err(_) => return Ok(None),
                },
                _ => return Ok(None),
            };
            let asked = json!({ "content": text.prompt, "add_special": true, "parse_special": true });
            let Some(body) = control.asked(TOKENIZE, asked.to_string()).await? else { return Ok(None) };
            control.json::<Tokens>(TOKENIZE, &body).map(|Tokens { tokens }| Some(tokens))
        })
    }

    /// Ids are given by its own `/completion` only.
    fn continues(&self) -> Continues {
        Continues { gives_ids: false, takes_ids: true, chat: Some(ChatContinuation::Prefill) }
    }

    fn forget(&self) {
        self.rates.lock().unwrap_or_else(std::sync::PoisonError::into_inner).forget();
    }
}

/// A prompt as text: what `/apply-template` answers, and a completion.
#[derive(Deserialize)]
struct Text {
    prompt: String,
}

#[derive(Deserialize)]
struct Tokens {
    tokens: Vec<u32>,
}

#[derive(Deserialize)]
struct Slot {
    n_ctx: u32,
    is_processing: bool,
    /// What its context holds.
    #[serde(default)]
    n_prompt_tokens: u32,
    #[serde(default)]
    next_token: Vec<NextToken>,
}

#[derive(Deserialize)]
struct NextToken {
    #[serde(default)]
    n_decoded: u64,
}

impl Slot {
    /// Output tokens of the request that it works on.
    fn decoded(&self) -> u64 {
        self.next_token.iter().filter(|_| self.is_processing).map(|next| next.n_decoded).sum()
    }
}

/// Idle slots hold nothing but cache that can be reused.
fn of_slots(slots: &[Slot]) -> RankLoad {
    let busy = || slots.iter().filter(|slot| slot.is_processing);
    let total = slots.iter().fold(0, |tokens: u32, slot| tokens.saturating_add(slot.n_ctx));
    let used = busy().fold(0, |tokens: u32, slot| tokens.saturating_add(slot.n_prompt_tokens.min(slot.n_ctx)));
    RankLoad {
        running: Some(busy().count() as u32),
        max_running: Some(slots.len() as u32),
        kv_tokens_total: Some(total),
        kv_tokens_free: Some(total - used),
        ..RankLoad::default()
    }
}

#[derive(Deserialize)]
struct Props {
    total_slots: u32,
    default_generation_settings: SlotSettings,
}

#[derive(Deserialize)]
struct SlotSettings {
    n_ctx: u32,
}

fn of_props(props: &Props) -> RankLoad {
    let total = props.total_slots.saturating_mul(props.default_generation_settings.n_ctx);
    RankLoad { max_running: Some(props.total_slots), kv_tokens_total: Some(total), ..RankLoad::default() }
}

/// Output tokens are in the metrics once their request has ended; until then they are in its slot, as `decoded`.
fn with_metrics(load: &mut RankLoad, text: &[u8], decoded: u64, rates: &mut Rates, now: Instant) -> Result<(), Malformed> {
    for sample in samples(text) {
        let sample = sample?;
        match sample.name {
            "llamacpp:requests_processing" => load.running = sample.count(),
            "llamacpp:requests_deferred" => load.queued = sample.count(),
            "llamacpp:tokens_predicted_total" => {
                load.tokens_per_second = rates.rate(0, sample.value + decoded as f64, now);
            }
            _ => {}
        }
    }
    Ok(())
}
