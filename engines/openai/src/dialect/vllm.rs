//! vLLM: load from its Prometheus metrics, lower priorities first, ranks by a header; hanging up cancels within 60 ms.
//!
//! Read in vLLM 0.32 and 0.33; `tests/fixtures/vllm_metrics.txt` is a scrape of 0.32.

use std::{collections::BTreeMap, sync::Mutex, time::Instant};

use bytes::Bytes;
use dynamo_engine_api::{ChatContinuation, Continues, Endpoint, EngineError, RankLoad};
use futures_core::future::BoxFuture;
use http::{HeaderName, HeaderValue};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{Additions, Dialect, Wish, rate::Rates, succeeds};
use crate::{
    control::Control,
    kv::{self, KvSources},
    prometheus::{Malformed, Sample, samples},
};

pub(super) const OWNED_BY: &str = "vllm";
const METRICS: &str = "/metrics";
const TOKENIZE: &str = "/tokenize";
/// Fields that change a chat's prompt and that `/tokenize` does not know.
const UNKNOWN_TO_TOKENIZE: [&str; 3] = ["reasoning_effort", "documents", "truncate_prompt_tokens"];
const RANK: HeaderName = HeaderName::from_static("x-data-parallel-rank");

#[derive(Debug, Default)]
pub(super) struct Vllm {
    rates: Mutex<Rates>,
}

impl Dialect for Vllm {
    /// 503 once the engine's core is dead.
    fn probe<'a>(&'a self, control: &'a Control) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(succeeds(control, "/health"))
    }

    fn load<'a>(&'a self, control: &'a Control) -> BoxFuture<'a, Result<Vec<RankLoad>, EngineError>> {
        Box::pin(async {
            let Some(text) = control.report(METRICS).await? else { return Ok(Vec::new()) };
            let mut rates = self.rates.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            read(&text, &mut rates, Instant::now()).map_err(|error| control.protocol(METRICS, error))
        })
    }

    fn kv_sources<'a>(&'a self, control: &'a Control) -> BoxFuture<'a, Result<KvSources, EngineError>> {
        Box::pin(kv::vllm_sources(control))
    }

    /// By `/tokenize`, which reads the fields of chats and completions and passes over the others.
    fn tokenize<'a>(
        &'a self,
        control: &'a Control,
        endpoint: Endpoint,
        body: Bytes,
    ) -> BoxFuture<'a, Result<Option<Vec<u32>>, EngineError>> {
        Box::pin(async move {
            if !is_tokenized(endpoint, &body) {
                return Ok(None);
            }
            // What it refuses here it will refuse there, in words for the client.
            let Some(body) = control.asked(TOKENIZE, body).await? else { return Ok(None) };
            control.json::<Tokens>(TOKENIZE, &body).map(|Tokens { tokens }| Some(tokens))
        })
    }

    fn additions(&self, wish: &Wish<'_>) -> Additions {
        let mut additions = Additions { header: wish.rank.map(|rank| (RANK, HeaderValue::from(rank))), ..Additions::default() };
        // Lower is sooner. Messages and embeddings have no such field.
        let takes_priority = matches!(wish.endpoint, Endpoint::ChatCompletions | Endpoint::Completions | Endpoint::Responses);
        if let Some(priority) = wish.priority.filter(|_| takes_priority) {
            additions.fields.number("priority", -i64::from(priority));
        }
        additions
    }

    fn continues(&self) -> Continues {
        Continues { gives_ids: true, takes_ids: true, chat: Some(ChatContinuation::FinalMessage) }
    }

    fn forget(&self) {
        self.rates.lock().unwrap_or_else(std::sync::PoisonError::into_inner).forget();
    }
}

#[derive(Deserialize)]
struct Tokens {
    tokens: Vec<u32>,
}

/// Whether `/tokenize` makes the same of a body as the endpoint does.
fn is_tokenized(endpoint: Endpoint, body: &[u8]) -> bool {
    let Ok(fields) = serde_json::from_slice::<BTreeMap<String, &RawValue>>(body) else { return false };
    let is_given = |name: &str| fields.get(name).is_some_and(|value| value.get() != "null");
    match endpoint {
        Endpoint::ChatCompletions => {
            // The older name of a message's `reasoning`, which the endpoint reads and `/tokenize` does not.
            let has_older_name = fields.get("messages").is_some_and(|messages| messages.get().contains("\"reasoning_content\""));
            !has_older_name && !UNKNOWN_TO_TOKENIZE.into_iter().any(is_given)
        }
        Endpoint::Completions => {
            fields.get("prompt").is_some_and(|prompt| prompt.get().starts_with('"')) && !is_given("messages")
        }
        _ => false,
    }
}

#[derive(Default)]
struct Rank {
    load: RankLoad,
    /// The share of KV blocks in use, 0 to 1, whatever the metric's name says. Cached blocks that can be reused are free.
    usage: Option<f64>,
    blocks: Option<u32>,
    generated: Option<f64>,
}

fn read(text: &[u8], rates: &mut Rates, now: Instant) -> Result<Vec<RankLoad>, Malformed> {
    let mut ranks: BTreeMap<u32, Rank> = BTreeMap::new();
    for sample in samples(text) {
        let sample = sample?;
        let Some(name) = sample.name.strip_prefix("vllm:") else { continue };
        // A single engine may leave the label out.
        let rank = sample.label("engine").map_or(Some(0), |label| label.parse().ok());
        let Some(rank) = rank else { continue };
        let rank = ranks.entry(rank).or_default();
        match name {
            "num_requests_running" => rank.load.running = sample.count(),
            "num_requests_waiting" => rank.load.queued = sample.count(),
            "kv_cache_usage_perc" => rank.usage = Some(sample.value),
            "generation_tokens_total" => rank.generated = Some(sample.value),
            "prompt_tokens_by_source_total" if sample.label("source").is_some_and(|source| source == "external_kv_transfer") => {
                rank.load.fetched_tokens = Some(sample.value as u64);
            }
            "cache_config_info" => capacity(&sample, rank),
            _ => {}
        }
    }
    // A rank is what works on requests; other metrics have labels of that name, too.
    ranks.retain(|_, rank| rank.load.running.is_some());
    rates.keep(|rank| ranks.contains_key(&rank));
    Ok(ranks.into_iter().map(|(number, rank)| rank.finish(number, rates, now)).collect())
}

/// The capacity is in the labels, and `None` before it is known.
fn capacity(sample: &Sample<'_>, rank: &mut Rank) {
    let number = |label| sample.label(label).and_then(|text| text.parse::<u32>().ok()).filter(|&number| number > 0);
    rank.load.block_size = number("block_size");
    rank.blocks = number("num_gpu_blocks");
}

impl Rank {
    fn finish(self, number: u32, rates: &mut Rates, now: Instant) -> RankLoad {
        let total = self.load.block_size.zip(self.blocks).map(|(size, blocks)| size.saturating_mul(blocks));
        let usage = self.usage.filter(|usage| (0.0..=1.0).contains(usage));
        RankLoad {
            rank: number,
            kv_tokens_total: total,
            kv_tokens_free: total.zip(usage).map(|(total, usage)| (f64::from(total) * (1.0 - usage)).round() as u32),
            tokens_per_second: self.generated.and_then(|generated| rates.rate(number, generated, now)),
            ..self.load
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const SCRAPE: &str = include_str!("../../tests/fixtures/vllm_metrics.txt");

    #[test]
    fn a_real_scrape_is_its_ranks_load() {
        let loads = read(SCRAPE.as_bytes(), &mut Rates::default(), Instant::now()).unwrap();
        let expected = RankLoad {
            rank: 0,
            running: Some(0),
            queued: Some(0),
            kv_tokens_total: Some(131_072),
            kv_tokens_free: Some(131_072),
            block_size: Some(32),
            fetched_tokens: Some(0),
            ..RankLoad::default()
        };
        assert_eq!(loads, [expected]);
    }

    #[test]
    fn ranks_are_told_apart_and_throughput_is_what_came_since() {
        let text = |tokens: u32| {
            format!(
                "vllm:num_requests_running{{engine=\"1\",model_name=\"m\"}} 3.0\n\
                 vllm:num_requests_waiting{{engine=\"1\",model_name=\"m\"}} 2.0\n\
                 vllm:kv_cache_usage_perc{{engine=\"1\",model_name=\"m\"}} 0.25\n\
                 vllm:generation_tokens_total{{engine=\"1\",model_name=\"m\"}} {tokens}\n\
                 vllm:cache_config_info{{block_size=\"16\",engine=\"1\",num_gpu_blocks=\"1000\"}} 1.0\n\
                 vllm:num_requests_running{{engine=\"0\",model_name=\"m\"}} 0.0\n\
                 vllm:cache_config_info{{block_size=\"16\",engine=\"0\",num_gpu_blocks=\"None\"}} 1.0\n"
            )
        };
        let (mut rates, start) = (Rates::default(), Instant::now());
        assert_eq!(read(text(100).as_bytes(), &mut rates, start).unwrap()[1].tokens_per_second, None);
        let loads = read(text(400).as_bytes(), &mut rates, start + Duration::from_secs(2)).unwrap();
        let busy = RankLoad {
            rank: 1,
            running: Some(3),
            queued: Some(2),
            kv_tokens_total: Some(16_000),
            kv_tokens_free: Some(12_000),
            block_size: Some(16),
            tokens_per_second: Some(150.0),
            ..RankLoad::default()
        };
        let idle = RankLoad { rank: 0, running: Some(0), block_size: Some(16), ..RankLoad::default() };
        assert_eq!(loads, [idle, busy]);
    }

    #[test]
    fn a_page_without_the_metrics_has_no_ranks_and_another_page_is_an_error() {
        assert_eq!(read(b"python_info{version=\"3\"} 1.0\n", &mut Rates::default(), Instant::now()).unwrap(), []);
        assert!(read(b"<html></html>", &mut Rates::default(), Instant::now()).is_err());
    }
}
