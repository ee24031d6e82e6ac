//! TensorRT-LLM: load from the statistics of its iterations; nothing may be added to its requests.
//!
//! `GET /metrics` hands out each iteration's statistics once, so that one reader alone learns all: reads are made one
//! after another, here and nowhere else, and the latest of each rank is kept. It waits up to 2 s for a first one.
//! `trtllm-serve` refuses a field that it does not know with 400; it has no field for a rank, and priorities are for its
//! scheduler's configuration. Hanging up cancels within a second. Read in its source; no server of that kind has been at hand.

use std::{collections::BTreeMap, time::Duration};

use dynamo_engine_api::{Continues, EngineError, KvUpdate, RankLoad};
use futures_core::future::BoxFuture;
use serde::Deserialize;
use tokio::sync::Mutex;

use super::{Dialect, succeeds, trtllm_kv::KvFolded};
use crate::{control::Control, kv::KvSources};

pub(super) const OWNED_BY: &str = "tensorrt_llm";
const METRICS: &str = "/metrics";
const KV_EVENTS: &str = "/kv_cache_events";
/// An idle server keeps the question for 2 s.
const METRICS_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, Default)]
pub(super) struct Trtllm {
    /// Held while reading: reads steal from each other.
    latest: Mutex<Folded>,
    /// The same: whoever reads events takes them from others.
    events: Mutex<KvFolded>,
}

impl Dialect for Trtllm {
    /// Nothing may be added to a chat.
    fn continues(&self) -> Continues {
        Continues { takes_ids: true, ..Continues::default() }
    }

    fn probe<'a>(&'a self, control: &'a Control) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(succeeds(control, "/health"))
    }

    fn load<'a>(&'a self, control: &'a Control) -> BoxFuture<'a, Result<Vec<RankLoad>, EngineError>> {
        Box::pin(async {
            let mut latest = self.latest.lock().await;
            let reply = control.get_within(control.timeout.max(METRICS_TIMEOUT), METRICS).await?;
            let Some(body) = control.offered(METRICS, reply)? else { return Ok(Vec::new()) };
            latest.fold(control.json(METRICS, &body)?);
            Ok(latest.ranks.values().cloned().collect())
        })
    }

    fn kv_sources<'a>(&'a self, control: &'a Control) -> BoxFuture<'a, Result<KvSources, EngineError>> {
        Box::pin(async {
            let mut events = self.events.lock().await;
            let reply = control.post(KV_EVENTS, "").await?;
            match control.offered(KV_EVENTS, reply)? {
                // What this question took is kept for the poll.
                Some(body) => events.fold(control.json(KV_EVENTS, &body)?),
                None => {
                    let reason = format!("POST {KV_EVENTS} is not there; start it with kv_cache_config.event_buffer_max_size");
                    return Ok(KvSources::None(reason));
                }
            }
            Ok(KvSources::Polled)
        })
    }

    fn poll_kv<'a>(&'a self, control: &'a Control) -> BoxFuture<'a, Result<Vec<KvUpdate>, EngineError>> {
        Box::pin(async {
            let mut events = self.events.lock().await;
            let reply = control.post(KV_EVENTS, "").await?;
            if let Some(body) = control.offered(KV_EVENTS, reply)? {
                events.fold(control.json(KV_EVENTS, &body)?);
            }
            Ok(events.take())
        })
    }

    fn forget(&self) {
        // A read under way is of the server that is forgotten, or of the new one; then the next one folds on.
        if let Ok(mut latest) = self.latest.try_lock() {
            *latest = Folded::default();
        }
    }
}

/// What is known of the ranks.
#[derive(Debug, Default)]
struct Folded {
    ranks: BTreeMap<u32, RankLoad>,
}

impl Folded {
    fn fold(&mut self, iterations: Vec<Iteration>) {
        if iterations.is_empty() {
            // The server waited for an iteration and there was none: it works on nothing.
            for rank in self.ranks.values_mut() {
                (rank.running, rank.queued) = (Some(0), Some(0));
                rank.kv_tokens_free = rank.kv_tokens_total;
            }
        }
        for iteration in iterations {
            let rank = iteration.rank.unwrap_or(0);
            self.ranks.insert(rank, iteration.load(rank));
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Iteration {
    #[serde(default, rename = "attentionDpRank")]
    rank: Option<u32>,
    #[serde(default)]
    num_active_requests: Option<u32>,
    #[serde(default)]
    num_queued_requests: Option<u32>,
    #[serde(default)]
    max_num_active_requests: Option<u32>,
    #[serde(default)]
    max_num_tokens_runtime: Option<u32>,
    #[serde(default)]
    kv_cache_stats: Option<KvCache>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct KvCache {
    #[serde(default)]
    max_num_blocks: Option<u32>,
    #[serde(default)]
    used_num_blocks: Option<u32>,
    #[serde(default)]
    tokens_per_block: Option<u32>,
}

impl Iteration {
    fn load(self, rank: u32) -> RankLoad {
        let positive = |number: Option<u32>| number.filter(|&number| number > 0);
        let cache = self.kv_cache_stats.as_ref();
        let block_size = cache.and_then(|cache| positive(cache.tokens_per_block));
        let tokens = |blocks: u32| block_size.map(|size| size.saturating_mul(blocks));
        let total = cache.and_then(|cache| positive(cache.max_num_blocks));
        let free = total.zip(cache.and_then(|cache| cache.used_num_blocks)).map(|(total, used)| total.saturating_sub(used));
        RankLoad {
            rank,
            running: self.num_active_requests,
            queued: self.num_queued_requests,
            max_running: positive(self.max_num_active_requests),
            max_batched_tokens: positive(self.max_num_tokens_runtime),
            kv_tokens_total: total.and_then(tokens),
            kv_tokens_free: free.and_then(tokens),
            block_size,
            tokens_per_second: None,
            fetched_tokens: None,
        }
    }
}
