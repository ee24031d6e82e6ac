//! KV events of a server: where it publishes them, and following that.
//!
//! Contract: the server is asked where it publishes (vLLM `GET /kv_event_sources`, SGLang `GET /server_info`), and asked again
//! when it was away: it may publish elsewhere then, or not at all. Where it hands its events out itself (TensorRT-LLM), it is
//! asked for them again and again, here alone.

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use dynamo_engine_api::{EngineError, KvNote, KvUpdate, KvUpdates};
use dynamo_engine_kv_events::{Endpoint, Source, subscribe};
use futures_core::Stream;
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::Value;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep},
};

use crate::{
    control::Control,
    dialect::Dialects,
    options::{KvEvents, OpenAiOptions},
};

/// Updates that wait for the reader.
const UPDATES: usize = 16;
/// How often it is looked whether the server is known by now, or back.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often a server that does not tell is asked whether it does.
const ASK_AGAIN: Duration = Duration::from_secs(30);
/// How often events are asked for, where that is how they come: what they are late by.
const POLL_EVERY: Duration = Duration::from_millis(250);
/// How long polls may fail before what was told holds no more.
const POLL_GRACE: u32 = 40;
/// The first of the ports that a system chooses.
const FIRST_CHOSEN_PORT: u16 = 32_768;
const VLLM_SOURCES: &str = "/kv_event_sources";
const SGLANG_INFO: &str = "/server_info";

/// Where a server tells of its KV.
pub(crate) enum KvSources {
    /// Nowhere; why, and what would help.
    None(String),
    /// At publishers.
    Published(Vec<Source>),
    /// It is asked, by `Dialect::poll_kv`.
    Polled,
}

/// A server's KV events; `None` if they are not wanted.
pub(crate) fn events(control: &Arc<Control>, dialects: &Arc<Dialects>, options: &OpenAiOptions) -> Option<KvUpdates> {
    let told = match &options.kv_events {
        KvEvents::Off => return None,
        KvEvents::Asked => None,
        KvEvents::At(endpoint) => {
            Some((0..options.ranks).map(|rank| told(options, &endpoint.of_rank(rank), false, rank)).collect())
        }
        KvEvents::ConnectHere(endpoint) => Some(vec![told(options, endpoint, true, 0)]),
    };
    if let Some(sources) = told {
        return Some(subscribe(sources));
    }
    let (updates, reader) = mpsc::channel(UPDATES);
    let mut task = JoinSet::new();
    let teller = Teller { control: Arc::clone(control), dialects: Arc::clone(dialects), updates };
    task.spawn(async move { drop(teller.run().await) });
    Some(Box::pin(Updates { reader, _task: task }))
}

fn told(options: &OpenAiOptions, endpoint: &Endpoint, connects_to_us: bool, rank: u32) -> Source {
    let replay = options.kv_replay.as_ref().map(|replay| replay.of_rank(rank));
    Source { endpoint: endpoint.clone(), connects_to_us, replay, topic: options.kv_topic.clone(), rank }
}

struct Updates {
    reader: mpsc::Receiver<KvUpdate>,
    _task: JoinSet<()>,
}

impl Stream for Updates {
    type Item = KvUpdate;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<KvUpdate>> {
        self.reader.poll_recv(cx)
    }
}

/// Nobody reads any more.
struct Unread;

struct Teller {
    control: Arc<Control>,
    dialects: Arc<Dialects>,
    updates: mpsc::Sender<KvUpdate>,
}

impl Teller {
    async fn run(&self) -> Result<(), Unread> {
        let mut is_interrupted = false;
        loop {
            if self.dialects.is_unsure() {
                // The next probe finds out which server it is.
                sleep(LOOK_EVERY).await;
                continue;
            }
            match self.dialects.spoken().kv_sources(&self.control).await {
                Ok(KvSources::Published(sources)) => self.follow(sources).await?,
                Ok(KvSources::Polled) => self.poll().await?,
                Ok(KvSources::None(reason)) => {
                    self.note(KvNote::Silent { reason }).await?;
                    sleep(ASK_AGAIN).await;
                }
                Err(error) => {
                    if !std::mem::replace(&mut is_interrupted, true) {
                        self.note(KvNote::Interrupted { reason: error.to_string() }).await?;
                    }
                    sleep(LOOK_EVERY).await;
                    continue;
                }
            }
            is_interrupted = false;
        }
    }

    /// Follows publishers until the server says others.
    async fn follow(&self, sources: Vec<Source>) -> Result<(), Unread> {
        let mut updates = subscribe(sources.clone());
        let mut away = BTreeSet::new();
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                update = updates.next() => {
                    let Some(update) = update else { return Ok(()) };
                    match &update {
                        KvUpdate::Note { rank, note: KvNote::Interrupted { .. } } => {
                            away.insert(*rank);
                        }
                        KvUpdate::Note { rank, note: KvNote::Current } => {
                            away.remove(rank);
                        }
                        _ => {}
                    }
                    self.tell(update).await?;
                }
                _ = look.tick(), if !away.is_empty() => {
                    let is_same = match self.dialects.spoken().kv_sources(&self.control).await {
                        Ok(KvSources::Published(now)) => now == sources,
                        Ok(_) => false,
                        // Not back yet.
                        Err(_) => true,
                    };
                    if !is_same {
                        return self.tell(KvUpdate::Reset { rank: None, cause: "restart" }).await;
                    }
                }
            }
        }
    }

    /// Asks for events until the server has none to give.
    async fn poll(&self) -> Result<(), Unread> {
        self.note(KvNote::Current).await?;
        let mut failed = 0;
        loop {
            match self.dialects.spoken().poll_kv(&self.control).await {
                Ok(updates) => {
                    failed = 0;
                    for update in updates {
                        self.tell(update).await?;
                    }
                }
                Err(error) => {
                    failed += 1;
                    if failed == 1 {
                        self.note(KvNote::Interrupted { reason: error.to_string() }).await?;
                    }
                    if failed > POLL_GRACE || self.dialects.is_unsure() {
                        return self.tell(KvUpdate::Reset { rank: None, cause: "disconnected" }).await;
                    }
                }
            }
            sleep(POLL_EVERY).await;
        }
    }

    async fn note(&self, note: KvNote) -> Result<(), Unread> {
        self.tell(KvUpdate::Note { rank: None, note }).await
    }

    async fn tell(&self, update: KvUpdate) -> Result<(), Unread> {
        self.updates.send(update).await.map_err(|_| Unread)
    }
}

/// How a server was told to publish, in vLLM's words and SGLang's.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Publishing {
    enable_kv_cache_events: Option<bool>,
    publisher: Option<String>,
    endpoint: Option<String>,
    replay_endpoint: Option<String>,
    topic: Option<String>,
    bind: Option<bool>,
}

impl Publishing {
    /// The publisher of a rank; `None` if nothing is published.
    fn source(&self, host: &str, rank: u32, port_offset: u32) -> Result<Option<Source>, String> {
        let publisher = self.publisher.as_deref().unwrap_or("zmq");
        if self.enable_kv_cache_events == Some(false) || publisher == "null" {
            return Ok(None);
        }
        if publisher != "zmq" {
            return Err(format!("its publisher is {publisher:?}; only zmq is understood"));
        }
        let Some(endpoint) = &self.endpoint else { return Ok(None) };
        if !self.bind.unwrap_or_else(|| binds(endpoint)) {
            return Err(format!("its publisher connects to {endpoint}; set kv_events=bind:tcp://HOST:PORT for this worker"));
        }
        let seen = |text: &String| {
            let endpoint = text.parse::<Endpoint>().map_err(|error| error.to_string())?;
            Ok::<_, String>(endpoint.of_rank(port_offset).seen_from_outside(host))
        };
        let replay = self.replay_endpoint.as_ref().map(seen).transpose()?;
        let topic = self.topic.clone().unwrap_or_default();
        Ok(Some(Source { endpoint: seen(endpoint)?, connects_to_us: false, replay, topic, rank }))
    }
}

/// Whether a publisher that was not told so binds there: the rule of vLLM and SGLang. Of `tcp://*:0`, which binds, vLLM says the address
/// that became of it: the port tells, which the system chose.
fn binds(endpoint: &str) -> bool {
    let is_chosen = || endpoint.parse::<Endpoint>().is_ok_and(|endpoint| endpoint.port() >= FIRST_CHOSEN_PORT);
    endpoint.contains('*') || endpoint.contains("::") || !endpoint.starts_with("tcp:") || is_chosen()
}

/// What vLLM publishes, by rank, with ports as they are.
pub(crate) async fn vllm_sources(control: &Control) -> Result<KvSources, EngineError> {
    let reply = control.get(VLLM_SOURCES).await?;
    if reply.status.is_client_error() {
        return Ok(KvSources::None(format!(
            "GET {VLLM_SOURCES} is not there (vLLM before 0.26, or another server); set kv_events=tcp://HOST:PORT if it publishes"
        )));
    }
    let Some(body) = control.offered(VLLM_SOURCES, reply)? else { return Ok(KvSources::None("it does not publish".to_owned())) };
    Ok(of_vllm(&control.json(VLLM_SOURCES, &body)?, control.host()))
}

fn of_vllm(by_rank: &BTreeMap<String, Publishing>, host: &str) -> KvSources {
    let ranks = by_rank.iter().filter_map(|(rank, publishing)| Some((rank.parse().ok()?, publishing)));
    sources(ranks.map(|(rank, publishing)| publishing.source(host, rank, 0)))
}

/// What SGLang publishes: its own setting, with the ports of further ranks after that of the first.
pub(crate) async fn sglang_sources(control: &Control) -> Result<KvSources, EngineError> {
    let reply = control.get(SGLANG_INFO).await?;
    let Some(body) = control.offered(SGLANG_INFO, reply)? else {
        return Ok(KvSources::None(format!("GET {SGLANG_INFO} is not there; set kv_events=tcp://HOST:PORT if it publishes")));
    };
    let info: Value = control.json(SGLANG_INFO, &body)?;
    of_sglang(&info, control.host()).map_err(|reason| control.protocol(SGLANG_INFO, reason))
}

fn of_sglang(info: &Value, host: &str) -> Result<KvSources, &'static str> {
    let setting = ["kv_events", "kv_events_config"].iter().map(|key| &info[*key]).find(|setting| !setting.is_null());
    // A text of JSON as on its command line, or what that says.
    let publishing = match setting {
        Some(Value::String(text)) => serde_json::from_str::<Publishing>(text).ok(),
        Some(object) => serde_json::from_value(object.clone()).ok(),
        None => Some(Publishing::default()),
    };
    let publishing = publishing.ok_or("its kv_events_config is no object")?;
    let has_ranks = info["enable_dp_attention"].as_bool().unwrap_or(false);
    let ranks = info["dp_size"].as_u64().filter(|_| has_ranks).and_then(|ranks| u32::try_from(ranks).ok()).unwrap_or(1);
    Ok(sources((0..ranks.clamp(1, 1024)).map(|rank| publishing.source(host, rank, rank))))
}

fn sources(found: impl Iterator<Item = Result<Option<Source>, String>>) -> KvSources {
    match found.collect::<Result<Vec<_>, _>>() {
        Err(reason) => KvSources::None(reason),
        Ok(found) => {
            let published: Vec<Source> = found.into_iter().flatten().collect();
            if published.is_empty() {
                return KvSources::None("it does not publish KV events; start it with --kv-events-config".to_owned());
            }
            KvSources::Published(published)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// What is followed, as (rank, endpoint, replay, topic); or why nothing is.
    type Shown = Result<Vec<(u32, String, Option<String>, String)>, String>;

    fn shown(sources: KvSources) -> Shown {
        match sources {
            KvSources::None(reason) => Err(reason),
            KvSources::Polled => panic!("it is not asked for events"),
            KvSources::Published(sources) => Ok(sources
                .into_iter()
                .map(|source| {
                    (source.rank, source.endpoint.to_string(), source.replay.map(|replay| replay.to_string()), source.topic)
                })
                .collect()),
        }
    }

    fn vllm(answer: Value) -> Shown {
        shown(of_vllm(&serde_json::from_value(answer).unwrap(), "10.0.0.7"))
    }

    fn sglang(answer: &Value) -> Shown {
        shown(of_sglang(answer, "10.0.0.7").unwrap())
    }

    #[test]
    fn vllm_says_each_ranks_publisher() {
        // Captured from 0.32, and a second rank as its source has it.
        let answer = json!({
            "0": { "enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://[::ffff:127.0.0.1]:9131",
                   "replay_endpoint": "tcp://127.0.0.1:10131", "buffer_steps": 10000, "hwm": 100_000, "max_queue_size": 100_000, "topic": "kv" },
            "1": { "enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:9132", "replay_endpoint": null, "topic": "" },
        });
        let first = (0, "tcp://10.0.0.7:9131".to_owned(), Some("tcp://10.0.0.7:10131".to_owned()), "kv".to_owned());
        assert_eq!(vllm(answer), Ok(vec![first, (1, "tcp://10.0.0.7:9132".to_owned(), None, String::new())]));
        // Where it connects, it is not reached; where it binds, by its own choice of a port, it is.
        for connects in ["tcp://127.0.0.1:5557", "tcp://10.1.1.1:5557", "tcp://router:5557"] {
            let connects = json!({ "0": { "endpoint": connects } });
            assert!(vllm(connects).unwrap_err().contains("kv_events=bind:tcp://HOST:PORT"));
        }
        for binds in [json!({ "endpoint": "tcp://10.1.1.1:41234" }), json!({ "endpoint": "tcp://10.1.1.1:5557", "bind": true })] {
            assert!(vllm(json!({ "0": binds })).unwrap()[0].1.starts_with("tcp://10.1.1.1:"));
        }
        assert!(vllm(json!({})).unwrap_err().contains("--kv-events-config"));
        assert!(vllm(json!({ "0": { "enable_kv_cache_events": false, "endpoint": "tcp://*:1" } })).is_err());
        assert!(vllm(json!({ "0": { "endpoint": "ipc:///tmp/kv" } })).unwrap_err().contains("tcp://HOST:PORT"));
        assert!(vllm(json!({ "0": { "publisher": "kafka", "endpoint": "x" } })).unwrap_err().contains("only zmq"));
    }

    #[test]
    fn sglang_says_its_setting_and_further_ranks_count_on_from_there() {
        let setting =
            r#"{"publisher":"zmq","endpoint":"tcp://*:5557","replay_endpoint":"tcp://*:6557","bind":true,"topic":"kv"}"#;
        let info = json!({ "kv_events_config": setting, "page_size": 64, "dp_size": 2, "enable_dp_attention": true });
        let rank = |rank: u32| {
            let replay = Some(format!("tcp://10.0.0.7:{}", 6557 + rank));
            (rank, format!("tcp://10.0.0.7:{}", 5557 + rank), replay, "kv".to_owned())
        };
        assert_eq!(sglang(&info), Ok(vec![rank(0), rank(1)]));
        let object = json!({ "kv_events": serde_json::from_str::<Value>(setting).unwrap(), "dp_size": 2 });
        assert_eq!(sglang(&object), Ok(vec![rank(0)]));
        assert!(sglang(&json!({ "kv_events_config": null })).unwrap_err().contains("--kv-events-config"));
        let connects = json!({ "kv_events_config": { "endpoint": "tcp://10.1.1.1:5557", "bind": false } });
        assert!(sglang(&connects).unwrap_err().contains("kv_events=bind:tcp://HOST:PORT"));
        assert!(of_sglang(&json!({ "kv_events_config": "zmq" }), "h").is_err());
    }
}
