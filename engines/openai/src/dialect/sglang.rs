//! SGLang: load from `/v1/loads`, higher priorities first, ranks by a field; a stream is cancelled by name.
//!
//! Its `/health` generates a token and takes over a second: `/ready` is asked, and `/health` only of a server that is too
//! old to have that. A closed stream is aborted 2 s later, so that requests get an id of ours and `/abort_request` is
//! told of it. Read in SGLang 0.5.23; no server of that kind has been at hand.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use dynamo_engine_api::{ChatContinuation, Continues, Endpoint, EngineError, RankLoad};
use futures_core::future::BoxFuture;
use http::StatusCode;
use serde::Deserialize;

use super::{Additions, Dialect, Wish, judged};
use crate::{
    abort::Abort,
    control::Control,
    kv::{self, KvSources},
};

pub(super) const OWNED_BY: &str = "sglang";
const READY: &str = "/ready";
const HEALTH: &str = "/health";
/// A token is made, and looked for once a second.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(4);
const LOADS: &str = "/v1/loads?format=json";
const SERVER_INFO: &str = "/server_info";

#[derive(Debug, Default)]
pub(super) struct Sglang {
    /// What does not change while the server runs; asked once.
    settings: Mutex<Option<Settings>>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct Settings {
    #[serde(default)]
    page_size: Option<u32>,
    /// −1 without chunks.
    #[serde(default)]
    chunked_prefill_size: Option<i64>,
    #[serde(default)]
    disaggregation_mode: Option<Mode>,
}

/// What it was started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    /// Whole requests: it looks at no room, and answers as if none was named.
    #[serde(rename = "null")]
    Whole,
    #[serde(other)]
    OfPairs,
}

impl Dialect for Sglang {
    /// Its chats take `continue_final_message`; ids go by its own `/generate`.
    fn continues(&self) -> Continues {
        Continues { chat: Some(ChatContinuation::FinalMessage), ..Continues::default() }
    }

    fn probe<'a>(&'a self, control: &'a Control) -> BoxFuture<'a, Result<(), EngineError>> {
        Box::pin(async {
            let (mut path, mut reply) = (READY, control.get(READY).await?);
            if reply.status == StatusCode::NOT_FOUND {
                path = HEALTH;
                reply = control.get_within(control.timeout.max(HEALTH_TIMEOUT), path).await?;
            }
            judged(control, path, reply).await
        })
    }

    fn load<'a>(&'a self, control: &'a Control) -> BoxFuture<'a, Result<Vec<RankLoad>, EngineError>> {
        Box::pin(async {
            let Some(body) = control.report(LOADS).await? else { return Ok(Vec::new()) };
            let loads = control.json::<Loads>(LOADS, &body)?;
            let settings = self.settings(control).await;
            Ok(loads.loads.into_iter().map(|load| load.of_rank(settings)).collect())
        })
    }

    fn kv_sources<'a>(&'a self, control: &'a Control) -> BoxFuture<'a, Result<KvSources, EngineError>> {
        Box::pin(kv::sglang_sources(control))
    }

    fn no_part<'a>(&'a self, control: &'a Control) -> BoxFuture<'a, Option<String>> {
        Box::pin(async {
            // Behind a gateway it may have been started anew, and nobody saw it gone.
            let mode = self.look(control).await?.disaggregation_mode;
            (mode == Some(Mode::Whole)).then(|| {
                "its disaggregation_mode is null, so that it would compute each prompt itself; start it with \
                 --disaggregation-mode prefill or decode, or give it role=aggregated"
                    .to_owned()
            })
        })
    }

    fn additions(&self, wish: &Wish<'_>) -> Additions {
        let mut additions = Additions::default();
        // The other endpoints do not all know these fields.
        if !matches!(wish.endpoint, Endpoint::ChatCompletions | Endpoint::Completions) {
            return additions;
        }
        let id = (wish.id)();
        additions.fields.plain_text("rid", &id);
        if let Some(priority) = wish.priority {
            additions.fields.number("priority", priority);
        }
        if let Some(rank) = wish.rank {
            additions.fields.number("routed_dp_rank", rank);
        }
        additions.abort = Some(Abort { path: "/abort_request", body: format!(r#"{{"rid":"{id}","abort_all":false}}"#) });
        additions
    }

    fn forget(&self) {
        *self.known() = None;
    }
}

impl Sglang {
    /// Nothing of them is needed: a server that does not tell has no block size.
    async fn settings(&self, control: &Control) -> Settings {
        let known = *self.known();
        if known.is_some() { known } else { self.look(control).await }.unwrap_or_default()
    }

    /// What it says now; nothing if it is not there, or somebody else says so.
    async fn look(&self, control: &Control) -> Option<Settings> {
        let reply = control.get(SERVER_INFO).await.ok().filter(|reply| !reply.status.is_server_error())?;
        let settings = serde_json::from_slice(&reply.body).unwrap_or_default();
        *self.known() = Some(settings);
        Some(settings)
    }

    fn known(&self) -> MutexGuard<'_, Option<Settings>> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Deserialize)]
struct Loads {
    loads: Vec<Load>,
}

#[derive(Deserialize)]
struct Load {
    #[serde(default)]
    dp_rank: u32,
    #[serde(default)]
    num_running_reqs: Option<u32>,
    #[serde(default)]
    num_waiting_reqs: Option<u32>,
    #[serde(default)]
    max_running_requests: Option<u32>,
    /// Without cache that can be evicted.
    #[serde(default)]
    num_used_tokens: Option<u32>,
    #[serde(default)]
    max_total_num_tokens: Option<u32>,
    #[serde(default)]
    gen_throughput: Option<f32>,
}

impl Load {
    fn of_rank(self, settings: Settings) -> RankLoad {
        let capacity = self.max_total_num_tokens.filter(|&tokens| tokens > 0);
        RankLoad {
            rank: self.dp_rank,
            running: self.num_running_reqs,
            queued: self.num_waiting_reqs,
            max_running: self.max_running_requests.filter(|&requests| requests > 0),
            max_batched_tokens: settings.chunked_prefill_size.and_then(|size| u32::try_from(size).ok()).filter(|&size| size > 0),
            kv_tokens_total: capacity,
            kv_tokens_free: capacity.zip(self.num_used_tokens).map(|(total, used)| total.saturating_sub(used)),
            block_size: settings.page_size.filter(|&size| size > 0),
            tokens_per_second: self.gen_throughput,
            fetched_tokens: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_server_that_says_so_was_started_for_whole_requests() {
        let mode = |body: &str| serde_json::from_str::<Settings>(body).unwrap().disaggregation_mode;
        assert_eq!(mode(r#"{"page_size":64,"disaggregation_mode":"null"}"#), Some(Mode::Whole));
        for of_pairs in ["prefill", "decode", "a mode of tomorrow"] {
            assert_eq!(mode(&format!(r#"{{"disaggregation_mode":"{of_pairs}"}}"#)), Some(Mode::OfPairs));
        }
        assert_eq!((mode("{}"), mode(r#"{"disaggregation_mode":null}"#)), (None, None));
    }
}
