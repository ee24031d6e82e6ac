//! The adapter over pairs of engines, by strict doubles that the end-to-end suite has, too.

use std::sync::Arc;

use dynamo_engine_api::{
    Endpoint, Engine, EngineError, GenerateRequest, Leg, Prefilled, Protocol, Reply, Ticket, WholeReply,
    conformance::{Capabilities, Fixture, run},
};
use dynamo_engine_openai::{OpenAiEngine, OpenAiOptions};
use serde_json::{Value, json};

use crate::{
    scripted::{read, soon},
    split::{self, MODEL, Network, Part, text_of},
};

/// Two adapters, what they speak to, and what their servers complain of.
pub(crate) struct Pair {
    pub(crate) prefill: Arc<OpenAiEngine>,
    pub(crate) decode: Arc<OpenAiEngine>,
    faults: Box<dyn Fn() -> Vec<String> + Send + Sync>,
    handed_over: Box<dyn Fn() -> usize + Send + Sync>,
    _servers: Box<dyn std::any::Any + Send + Sync>,
}

impl Pair {
    async fn of<Here: Default + Send + 'static>(
        network: Arc<Network<Here>>,
        urls: [String; 2],
        options: OpenAiOptions,
        servers: impl Send + Sync + 'static,
    ) -> Self {
        let [prefill, decode] = urls.map(|url| Arc::new(OpenAiEngine::new(&url, options.clone()).unwrap()));
        // What they are is found by looking.
        soon(prefill.probe()).await.unwrap();
        soon(decode.probe()).await.unwrap();
        let (seen, counted) = (network.clone(), network);
        Self {
            prefill,
            decode,
            faults: Box::new(move || seen.faults()),
            handed_over: Box::new(move || counted.handed_over()),
            _servers: Box::new(servers),
        }
    }
}

pub(crate) async fn vllm(connector: Protocol) -> Pair {
    let network = Network::new();
    let prefill = split::Vllm::start(Part::Prefill, Some(connector), &network).await;
    let decode = split::Vllm::start(Part::Decode, Some(connector), &network).await;
    let mut options = OpenAiOptions::default();
    if connector == Protocol::Mooncake {
        (options.handoff, options.bootstrap_port) = (Some(connector), prefill.bootstrap_port());
    }
    let urls = [prefill.url(), decode.url()];
    Pair::of(network, urls, options, (prefill, decode)).await
}

pub(crate) async fn sglang() -> Pair {
    let network = Network::new();
    let prefill = split::Sglang::start(Part::Prefill, &network).await;
    let decode = split::Sglang::start(Part::Decode, &network).await;
    let options = OpenAiOptions { bootstrap_port: prefill.bootstrap_port(), ..Default::default() };
    let urls = [prefill.url(), decode.url()];
    Pair::of(network, urls, options, (prefill, decode)).await
}

pub(crate) async fn trtllm() -> Pair {
    let network = Network::new();
    let prefill = split::Trtllm::start(Part::Prefill, &network).await;
    let decode = split::Trtllm::start(Part::Decode, &network).await;
    let urls = [prefill.url(), decode.url()];
    Pair::of(network, urls, OpenAiOptions::default(), (prefill, decode)).await
}

/// Only what a pair does is asked; what an engine does alone, its kind's double shows.
struct OfPair<'a>(&'a Pair);

impl Fixture for OfPair<'_> {
    fn engine(&self) -> Arc<dyn Engine> {
        self.0.prefill.clone()
    }

    fn model(&self) -> &str {
        MODEL
    }

    async fn running(&self) -> Option<u32> {
        None
    }

    fn pair(&self) -> Option<(Arc<dyn Engine>, Arc<dyn Engine>)> {
        Some((self.0.prefill.clone(), self.0.decode.clone()))
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { unknown_fields: self.0.prefill.kind() != "trtllm", ..Capabilities::default() }
    }
}

fn request(body: &Value, leg: Leg) -> GenerateRequest {
    let mut request =
        GenerateRequest::new(Endpoint::Completions, body.to_string().into(), body["stream"] == true, "request-1".into());
    request.leg = leg;
    request
}

async fn whole(engine: &OpenAiEngine, body: &Value, leg: Leg) -> WholeReply {
    match soon(engine.generate(request(body, leg))).await {
        Ok(Reply::Whole(reply)) => reply,
        Ok(Reply::Stream(_)) => panic!("a stream"),
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn hand_offs_of_each_protocol_conform_and_no_engine_finds_fault() {
    for pair in [vllm(Protocol::Nixl).await, vllm(Protocol::Mooncake).await, sglang().await, trtllm().await] {
        let protocol = pair.prefill.handoff().unwrap();
        let report = run(&OfPair(&pair)).await;
        let failed: Vec<_> = report
            .failures()
            .filter(|outcome| outcome.check.contains("hand") || outcome.check.contains("left nothing"))
            .collect();
        assert!(failed.is_empty(), "{protocol}: {failed:#?}");
        assert_eq!((pair.faults)(), [""; 0], "{protocol}");
        assert_eq!((pair.handed_over)(), 2 + 2 + 16, "{protocol}: two chats, two completions, twice eight");
    }
}

#[tokio::test]
async fn a_context_that_finishes_is_all_of_the_answer() {
    let pair = trtllm().await;
    let body = json!({ "model": MODEL, "prompt": format!("end {}", split::AT_ONCE), "max_tokens": 9 });
    let reply = whole(&pair.prefill, &body, Leg::Prefill(None)).await;
    assert!(matches!(pair.prefill.prefilled(&reply), Ok(Prefilled::Final)));
    let said: Value = serde_json::from_slice(&reply.body).unwrap();
    assert_eq!(said["choices"][0]["text"], text_of(&body["prompt"], 1));
}

#[tokio::test]
async fn an_engine_without_a_connector_is_told_from_one_with_it() {
    let network = Network::new();
    let server = split::Vllm::start(Part::Prefill, None, &network).await;
    let engine = OpenAiEngine::new(&server.url(), OpenAiOptions::default()).unwrap();
    soon(engine.probe()).await.unwrap();
    let body =
        json!({ "model": MODEL, "prompt": "one two", "max_tokens": 9, "min_tokens": 5, "stream": true, "stream_options": {} });
    let reply = whole(&engine, &body, Leg::Prefill(None)).await;
    let error = engine.prefilled(&reply).unwrap_err();
    assert!(matches!(error, EngineError::Protocol { .. }) && error.to_string().contains("--kv-transfer-config"), "{error}");
}

#[tokio::test]
async fn kv_that_is_given_up_is_kept_no_longer() {
    let network = Network::new();
    let prefill = split::Vllm::start(Part::Prefill, Some(Protocol::Nixl), &network).await;
    let decode = split::Vllm::start(Part::Decode, Some(Protocol::Nixl), &network).await;
    let pair = Pair::of(network.clone(), [prefill.url(), decode.url()], OpenAiOptions::default(), ()).await;
    let body = json!({ "model": MODEL, "prompt": "one two", "max_tokens": 5000, "stream": true, "stream_options": {} });
    let reply = whole(&pair.prefill, &body, Leg::Prefill(None)).await;
    let Ok(Prefilled::Ready(ticket)) = pair.prefill.prefilled(&reply) else { panic!("it is ready") };
    assert_eq!(network.kept(), 1);
    soon(pair.decode.release(request(&body, Leg::Decode(ticket)))).await;
    assert_eq!((network.kept(), network.faults()), (0, vec![]));
}

#[tokio::test]
async fn both_legs_of_sglang_are_aborted_by_name_when_they_are_dropped() {
    let network = Network::new();
    let prefill = split::Sglang::start(Part::Prefill, &network).await;
    let options = OpenAiOptions { bootstrap_port: prefill.bootstrap_port(), ..Default::default() };
    let engine = OpenAiEngine::new(&prefill.url(), options).unwrap();
    soon(engine.probe()).await.unwrap();
    let ticket = soon(engine.ticket(None)).await.unwrap();
    let body = json!({ "model": MODEL, "prompt": "one two", "max_tokens": 5 });
    // Nobody decodes, so that it waits.
    let leg = engine.generate(request(&body, Leg::Prefill(Some(ticket))));
    let is_there = async {
        while prefill.asked() == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    };
    tokio::select! {
        _ = leg => panic!("there is nobody to hand over to"),
        () = soon(is_there) => {}
    }
    let is_told = async {
        while !prefill.was_told_to_abort() {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    };
    soon(is_told).await;
}

#[tokio::test]
async fn legs_that_cannot_be_are_refused_before_anything_is_sent() {
    let pair = sglang().await;
    let body = json!({ "model": MODEL, "prompt": "one two", "max_tokens": 5 });
    let state = serde_json::value::to_raw_value(&json!({})).unwrap();
    let foreign = Ticket { protocol: Protocol::Nixl, state: state.into(), prompt_ids: None, cached_tokens: None, bytes: None };
    for leg in [Leg::Prefill(None), Leg::Decode(foreign)] {
        let error = soon(pair.decode.generate(request(&body, leg))).await.err().unwrap();
        assert!(matches!(error, EngineError::Protocol { .. }), "{error}");
    }
    assert_eq!((pair.faults)(), [""; 0]);
    // Whole requests are not for these engines.
    assert_eq!(whole(&pair.prefill, &body, Leg::Whole).await.status, 400);
}

#[tokio::test]
async fn a_mooncake_transfer_has_a_name_of_its_own_and_a_missing_engine_is_an_error() {
    let pair = vllm(Protocol::Mooncake).await;
    let (first, second) = (soon(pair.prefill.ticket(None)).await.unwrap(), soon(pair.prefill.ticket(Some(0))).await.unwrap());
    assert_ne!(first.state.get(), second.state.get(), "a transfer has a name of its own");
    let error = soon(pair.prefill.ticket(Some(7))).await.unwrap_err().to_string();
    assert!(error.contains("it has no rank 7"), "{error}");
    let nowhere = dynamo_engine_api::conformance::closed_port().unwrap().port();
    let options = OpenAiOptions { handoff: Some(Protocol::Mooncake), bootstrap_port: nowhere, ..Default::default() };
    let engine = OpenAiEngine::new("http://127.0.0.1:1", options).unwrap();
    assert!(matches!(soon(engine.ticket(None)).await, Err(EngineError::Connect { .. })));
}

#[tokio::test]
async fn a_stream_of_the_one_that_decodes_is_relayed() {
    let pair = trtllm().await;
    let body = json!({ "model": MODEL, "prompt": "one two three", "max_tokens": 5, "stream": true });
    let reply = whole(&pair.prefill, &body, Leg::Prefill(None)).await;
    let Ok(Prefilled::Ready(ticket)) = pair.prefill.prefilled(&reply) else { panic!("it is ready") };
    assert_eq!(ticket.prompt_ids.as_ref().map(|ids| ids.len()), Some(3));
    let Ok(Reply::Stream(chunks)) = soon(pair.decode.generate(request(&body, Leg::Decode(ticket)))).await else {
        panic!("a stream")
    };
    let (events, end) = read(chunks).await;
    assert_eq!((end, events.matches("data: ").count()), ("done", 5 + 2));
}
