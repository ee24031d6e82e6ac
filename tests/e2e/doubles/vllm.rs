//! vLLM with a KV connector: NIXL after a real pair of 0.32, Mooncake after its source.
//!
//! With NIXL a prefill's answer says where its KV is, in words that are written here in a way that no JSON library writes, so that whoever
//! reads and writes them anew is found out. KV for another prompt, which kills the real engine, is a fault; so is fetching twice.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use dynamo_engine_api::Protocol;
use serde_json::{Value, json, value::RawValue};
use tokio::{sync::watch, time::timeout};

use super::{
    MODEL, Network, Part, UntilTheEnd,
    server::{Answer, Asked, Manners, Server},
    speech::Speech,
};

/// How long a decode waits for its prefill with Mooncake. It is 480 s there.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(20);

/// KV that is kept, by the name under which it is fetched; and Mooncake's engines by their bootstrap server.
#[derive(Default)]
pub(crate) struct Transfers {
    kept: HashMap<String, Kept>,
    engines: HashMap<String, String>,
    changed: watch::Sender<()>,
}

struct Kept {
    ids: Vec<u32>,
    said: String,
    fetched: bool,
}

impl Network<Transfers> {
    /// Prompts whose KV nobody has fetched.
    pub(crate) fn kept(&self) -> usize {
        self.here.lock().unwrap().kept.values().filter(|kept| !kept.fetched).count()
    }
}

/// A running double.
pub(crate) struct Vllm {
    server: Server,
    bootstrap: Option<Server>,
    manners: Arc<Engine>,
}

struct Engine {
    network: Arc<Network<Transfers>>,
    connector: Option<Protocol>,
    part: Part,
    id: String,
    asked: std::sync::atomic::AtomicUsize,
}

impl Vllm {
    /// Without a connector, it answers as an engine that was not started for hand-offs.
    pub(crate) async fn start(part: Part, connector: Option<Protocol>, network: &Arc<Network<Transfers>>) -> Self {
        let id = format!("engine-{:p}-{part:?}", Arc::as_ptr(network));
        let engine = Engine { network: Arc::clone(network), connector, part, id, asked: 0.into() };
        let manners = Arc::new(engine);
        let server = Server::start(Arc::clone(&manners)).await;
        let mut bootstrap = None;
        if part == Part::Prefill && connector == Some(Protocol::Mooncake) {
            let started = Server::start(Arc::clone(&manners)).await;
            let address = format!("http://{}", started.address);
            network.here.lock().unwrap().engines.insert(address, manners.id.clone());
            bootstrap = Some(started);
        }
        Self { server, bootstrap, manners }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.server.address)
    }

    /// The port of its bootstrap server, where it has one.
    pub(crate) fn bootstrap_port(&self) -> u16 {
        self.bootstrap.as_ref().unwrap().address.port()
    }

    /// Requests for tokens so far.
    pub(crate) fn asked(&self) -> usize {
        self.manners.asked.load(std::sync::atomic::Ordering::SeqCst)
    }
}

impl Manners for Engine {
    async fn answer(self: Arc<Self>, asked: Asked) -> Answer {
        let ok = |body: Value| Answer::Whole("200 OK", body.to_string());
        match asked.line.as_str() {
            "get /health" => ok(json!({})),
            "get /v1/models" => ok(
                json!({ "object": "list", "data": [{ "id": MODEL, "object": "model", "owned_by": "vllm", "max_model_len": 32_768 }] }),
            ),
            "get /metrics" => Answer::Whole("200 OK", METRICS.to_owned()),
            "get /query" => ok(json!({ "0": { "engine_id": self.id, "worker_addr": { "0": { "0": "tcp://127.0.0.1:1" } } } })),
            "post /v1/chat/completions" => self.generate(true, &asked.body).await,
            "post /v1/completions" => self.generate(false, &asked.body).await,
            _ => Answer::Whole("404 Not Found", r#"{"detail":"Not Found"}"#.to_owned()),
        }
    }
}

const METRICS: &str = "vllm:num_requests_running{engine=\"0\",model_name=\"m\"} 0.0\n\
    vllm:cache_config_info{block_size=\"16\",engine=\"0\",num_gpu_blocks=\"1000\"} 1.0\n";

impl Engine {
    async fn generate(&self, chat: bool, text: &str) -> Answer {
        self.asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let Ok(body) = serde_json::from_str::<Value>(text) else { return refusal("400 Bad Request", "the body is no JSON") };
        let raw: BTreeMap<String, Box<RawValue>> = serde_json::from_str(text).unwrap();
        let speech = Speech::read(chat, &body);
        if !speech.stream && !body["stream_options"].is_null() {
            return refusal("400 Bad Request", "Stream options can only be defined when `stream=True`.");
        }
        if body["min_tokens"].as_u64().unwrap_or(0) > speech.max_tokens {
            return refusal("400 Bad Request", "min_tokens must be less than or equal to max_tokens");
        }
        let params = raw.get("kv_transfer_params").map_or("null", |params| params.get());
        match (self.connector, &body["kv_transfer_params"]) {
            (_, Value::Null) | (None, _) => self.say(&speech, None),
            (Some(connector), wanted) if wanted["do_remote_decode"] == true => self.prefill(connector, &speech, &body, wanted),
            (Some(Protocol::Nixl), wanted) => match self.fetch(&speech, params, wanted) {
                Ok(()) => self.say(&speech, None),
                Err(reason) => refusal("500 Internal Server Error", &reason),
            },
            (Some(_), wanted) => {
                let end = UntilTheEnd::of(&self.network);
                let arrived = self.arrives(&speech, wanted).await;
                end.came();
                arrived.map_or_else(|reason| refusal("500 Internal Server Error", &reason), |()| self.say(&speech, None))
            }
        }
    }

    /// Keeps the prompt's KV, and says so.
    fn prefill(&self, connector: Protocol, speech: &Speech, body: &Value, wanted: &Value) -> Answer {
        if self.part != Part::Prefill {
            self.network.fault("the engine that decodes was asked to prefill");
        }
        if speech.stream || speech.max_tokens != 1 {
            self.network.fault("a prefill was asked for more than one token, or for a stream");
        }
        if body["ignore_eos"] != true || !body["stop"].is_null() {
            self.network.fault("a prefill may end before its length, and its KV with it");
        }
        let mut here = self.network.here.lock().unwrap();
        let name = match connector {
            Protocol::Mooncake => wanted["transfer_id"].as_str().unwrap_or_default().to_owned(),
            _ => format!("cmpl-{}", here.kept.len()),
        };
        // Spaces, an escape that need not be one, a number that is none of 53 bits.
        let said = format!(
            r#"{{ "do_remote_prefill":true,"do_remote_decode" : false,"remote_block_ids":[[4, 5,6]],"remote_engine_id":"{}","remote_request_id":"{name}","remote_host":"127.0.0\u002e1","remote_port":5611,"remote_num_tokens":{},"a_field_of_tomorrow":18446744073709551615,"transfer_mode":"pull","remote_prefill_cached_tokens":0}}"#,
            self.id,
            speech.ids.len(),
        );
        if name.is_empty()
            || here.kept.insert(name, Kept { ids: speech.ids.clone(), said: said.clone(), fetched: false }).is_some()
        {
            self.network.fault("a transfer has no name of its own");
        }
        here.changed.send_replace(());
        drop(here);
        let with_ids = body["return_token_ids"] == true;
        self.say(speech, Some((said, with_ids)).filter(|_| connector == Protocol::Nixl))
    }

    /// Fetches what the parameters are about.
    fn fetch(&self, speech: &Speech, said: &str, wanted: &Value) -> Result<(), String> {
        let mut here = self.network.here.lock().unwrap();
        let name = wanted["remote_request_id"].as_str().unwrap_or_default();
        let Some(kept) = here.kept.get_mut(name) else {
            self.network.fault(format!("nobody keeps {wanted}"));
            return Err("KV load failure".to_owned());
        };
        let fault = |what: &str| {
            self.network.fault(format!("{what}: {said}"));
            Err(what.to_owned())
        };
        match () {
            () if kept.said != said => fault("its parameters were changed"),
            () if kept.ids != speech.ids => fault("EngineDeadError: KV of another prompt"),
            () if std::mem::replace(&mut kept.fetched, true) => fault("the KV is fetched a second time"),
            () => {
                self.network.handed();
                Ok(())
            }
        }
    }

    /// Waits for a transfer, and fetches it.
    async fn arrives(&self, speech: &Speech, wanted: &Value) -> Result<(), String> {
        let address = wanted["remote_bootstrap_addr"].as_str().unwrap_or_default();
        let engine = self.network.here.lock().unwrap().engines.get(address).cloned();
        if engine.is_none() || engine.as_deref() != wanted["remote_engine_id"].as_str() {
            self.network.fault(format!("nobody prefills at {wanted}"));
            return Err("remote engine_id not found from bootstrap server".to_owned());
        }
        let name = wanted["transfer_id"].as_str().unwrap_or_default();
        let mut changed = self.network.here.lock().unwrap().changed.subscribe();
        let came = changed.wait_for(|()| self.network.here.lock().unwrap().kept.contains_key(name));
        if !matches!(timeout(TRANSFER_TIMEOUT, came).await, Ok(Ok(_))) {
            self.network.fault(format!("only the decode of transfer {name} came"));
            return Err("the transfer did not come".to_owned());
        }
        let said = self.network.here.lock().unwrap().kept[name].said.clone();
        self.fetch(speech, &said, &json!({ "remote_request_id": name }))
    }

    fn say(&self, speech: &Speech, kept: Option<(String, bool)>) -> Answer {
        if speech.stream {
            let end = UntilTheEnd::of(&self.network);
            return Answer::Stream(speech.events(speech.max_tokens), speech.pace(), Box::new(move || end.came()));
        }
        let mut answer = speech.whole(speech.max_tokens, "length");
        let (said, with_ids) = kept.unwrap_or(("null".to_owned(), false));
        if with_ids {
            let place = if speech.chat { &mut answer } else { &mut answer["choices"][0] };
            place["prompt_token_ids"] = json!(speech.ids);
        }
        let answer = answer.to_string();
        Answer::Whole("200 OK", format!("{},\"kv_transfer_params\":{said}}}", answer.strip_suffix('}').unwrap()))
    }
}

fn refusal(status: &'static str, message: &str) -> Answer {
    let error = json!({ "error": { "message": message, "type": "BadRequestError", "param": null, "code": &status[..3] } });
    Answer::Whole(status, error.to_string())
}
