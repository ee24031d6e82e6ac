//! Over doubles of SGLang, whose engines serve nothing whole: what becomes of requests that lose one of them.
//!
//! Each word that a double says follows from all before it: a token that is lost, or comes twice, changes the rest.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::{
    doubles::{Cut, Fault, Network, Part, Rooms, Sglang, text_of},
    harness::{
        eventually,
        host::{Host, MockProcess, streamed},
        sse::Streamed,
    },
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const PROMPT: &str = "what is carried from one to another";
/// The name of a worker that hands nothing over.
const ALONE: &str = "alone";
/// Tokens of an answer, and those after which a stream is cut.
const TOKENS: u64 = 40;
const CUT_AFTER: u64 = 7;

/// One engine that prefills, and some that decode.
struct Pool {
    network: Arc<Network<Rooms>>,
    prefill: Sglang,
    decode: Vec<Sglang>,
}

impl Pool {
    async fn start(decode: usize) -> Self {
        let network = Network::new();
        let prefill = Sglang::start(Part::Prefill, &network).await;
        let mut pool = Self { network, prefill, decode: Vec::new() };
        for _ in 0..decode {
            pool.decode.push(Sglang::start(Part::Decode, &pool.network).await);
        }
        pool
    }

    /// A host over them, once all can hand over.
    async fn host(&self, config: &str) -> Host {
        self.host_beside(config, &[]).await
    }

    /// The same, with workers that hand nothing over.
    async fn host_beside(&self, config: &str, others: &[String]) -> Host {
        let prefill =
            format!("{},name=p,model=m,role=prefill,bootstrap_port={}", self.prefill.url(), self.prefill.bootstrap_port());
        let decode = self.decode.iter().enumerate();
        let decode = decode.map(|(at, engine)| format!("{},name=d{at},model=m,role=decode", engine.url()));
        let workers: Vec<String> = std::iter::once(prefill).chain(decode).chain(others.iter().cloned()).collect();
        let arguments = workers.iter().flat_map(|worker| ["--worker", worker]);
        let arguments: Vec<&str> = std::iter::once("--expose-worker").chain(arguments).collect();
        let host = Host::configured(config, &arguments).await;
        are_ready(&host).await;
        host
    }

    fn found_no_fault(&self) {
        assert_eq!(self.network.faults(), [""; 0]);
    }
}

async fn are_ready(host: &Host) {
    eventually("all workers can hand over", async || {
        let status = host.admin.get_json("/v1/status").await;
        let workers = status["workers"].as_array().unwrap_or_else(|| panic!("no workers in {status}"));
        let mut paired = workers.iter().filter(|worker| worker["name"] != ALONE);
        paired.all(|worker| worker["handoff"]["state"] == "ready").then_some(())
    })
    .await;
}

/// Both ways of asking, and what is answered.
fn questions() -> [(&'static str, Value, String); 2] {
    let messages = json!([{ "role": "user", "content": PROMPT }]);
    let chat = json!({ "model": "m", "messages": messages, "max_tokens": TOKENS });
    let completion = json!({ "model": "m", "prompt": PROMPT, "max_tokens": TOKENS });
    [(CHAT, chat, text_of(&messages, TOKENS)), (COMPLETIONS, completion, text_of(&json!(PROMPT), TOKENS))]
}

fn with_usage(body: Value) -> Value {
    let mut body = streamed(body);
    body["stream_options"] = json!({ "include_usage": true });
    body
}

fn is_whole(stream: &Streamed, text: &str) {
    assert_eq!((stream.text().as_str(), stream.finish_reasons()), (text, vec!["length"]));
    let usage = &stream.events.last().unwrap()["usage"];
    assert_eq!((&usage["completion_tokens"], usage["prompt_tokens"].as_u64() > Some(0)), (&json!(TOKENS), true), "{usage}");
}

async fn migrations(host: &Host, result: &str) -> f64 {
    host.http.metric("dynamo_host_migrations_total", &[("result", result)]).await
}

#[tokio::test]
async fn a_stream_that_breaks_off_goes_on_over_another_pair_in_a_room_of_its_own() {
    for (path, asked, text) in questions() {
        let pool = Pool::start(2).await;
        let host = pool.host("").await;
        let whole = host.http.ask(path, &asked).await.json();
        pool.decode[0].suffer([Fault::Cut(CUT_AFTER, Cut::HangUp)]);
        eventually("the engine whose stream breaks off was asked", async || {
            is_whole(&host.http.stream(path, &with_usage(asked.clone())).await, &text);
            (pool.decode[0].to_suffer() == 0).then_some(())
        })
        .await;
        let alone = host.http.stream(path, &with_usage(asked)).await;
        assert_eq!(alone.events.last().unwrap()["usage"], whole["usage"]);
        assert_eq!((migrations(&host, "continued").await, migrations(&host, "unsound").await), (1.0, 0.0));
        pool.found_no_fault();
    }
}

#[tokio::test]
async fn a_stream_whose_decode_engine_is_killed_goes_on_over_another_pair() {
    for (path, asked, text) in questions() {
        let mut pool = Pool::start(2).await;
        let host = pool.host("").await;
        pool.decode[0].suffer([Fault::Cut(CUT_AFTER, Cut::Silence)]);
        let (mut said, rest) = eventually("the engine that is to be killed has it", async || {
            let mut stream = host.http.open(path, &with_usage(asked.clone())).await;
            if stream.headers["x-dynamo-worker"] != "d0" {
                is_whole(&stream.streamed().await.unwrap(), &text);
                return None;
            }
            let mut said = String::new();
            while said.split_whitespace().count() < CUT_AFTER as usize {
                let choice = &stream.event().await["choices"][0];
                said += choice["text"].as_str().or(choice["delta"]["content"].as_str()).unwrap_or_default();
            }
            Some((said, stream))
        })
        .await;
        drop(pool.decode.remove(0));
        let rest = rest.streamed().await.unwrap();
        said += &rest.text();
        assert_eq!((said, rest.finish_reasons()), (text, vec!["length"]));
        assert_eq!(migrations(&host, "continued").await, 1.0);
        pool.found_no_fault();
    }
}

#[tokio::test]
async fn a_stream_outlives_as_many_losses_as_it_has_attempts_for() {
    let pool = Pool::start(1).await;
    let host = pool.host("[migration]\nmax_attempts = 3\n").await;
    let [(path, asked, text), _] = questions();
    pool.decode[0].suffer([Fault::Cut(CUT_AFTER, Cut::HangUp); 2]);
    is_whole(&host.http.stream(path, &with_usage(asked.clone())).await, &text);
    assert_eq!(migrations(&host, "continued").await, 2.0, "on the only pair, again and again");

    pool.decode[0].suffer([Fault::Cut(CUT_AFTER, Cut::HangUp); 3]);
    let (events, end) = host.http.open(path, &with_usage(asked)).await.rest().await;
    assert_eq!(end, Ok(()));
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert!(last["error"].is_object() && !events.contains(&"[DONE]".to_owned()), "{last}");
    let said = events.iter().map(|event| serde_json::from_str::<Value>(event).unwrap());
    let said: String = said.filter_map(|event| event["choices"][0]["delta"]["content"].as_str().map(str::to_owned)).collect();
    assert_eq!(said.split_whitespace().count() as u64, 3 * CUT_AFTER);
    assert!(text.starts_with(&said), "what came is the beginning of it");
    pool.found_no_fault();
}

#[tokio::test]
async fn a_message_whose_only_whole_worker_is_lost_goes_on_over_a_pair_as_the_chat_that_it_is() {
    let pool = Pool::start(1).await;
    let alone = MockProcess::start(&["decode_ms_base=2"]).await;
    let host = pool.host_beside("", &[format!("{},name={ALONE},model=m", alone.url())]).await;
    assert_eq!(alone.http.post("/mock/faults", json!({ "cut": 4, "next": 1 }).to_string()).await.status, 200);
    let messages = json!([{ "role": "user", "content": PROMPT }]);
    let asked = json!({ "model": "m", "max_tokens": 12, "stream": true, "messages": messages });
    let (events, end) = host.http.open("/v1/messages", &asked).await.rest().await;
    assert_eq!(end, Ok(()));
    let events: Vec<Value> = events.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let said: String = events.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
    assert!(said.starts_with("t0 t1") && !said.contains("t9"), "{said}");
    let stop = events.iter().find(|event| event["type"] == "message_delta").unwrap_or_else(|| panic!("no end in {events:?}"));
    assert_eq!((&stop["delta"]["stop_reason"], &stop["usage"]["output_tokens"]), (&json!("max_tokens"), &json!(12)));
    assert_eq!(events.last().unwrap()["type"], "message_stop");
    assert_eq!(migrations(&host, "continued").await, 1.0);
    assert_eq!(host.http.metric("dynamo_host_handoffs_total", &[("result", "answered")]).await, 1.0);
    pool.found_no_fault();
}

/// Asks in all ways, and finds each answer to be that of its prompt.
async fn all_are_answered(host: &Host, before: impl Fn()) {
    for (path, asked, text) in questions() {
        before();
        is_whole(&host.http.stream(path, &with_usage(asked.clone())).await, &text);
        before();
        let whole = host.http.ask(path, &asked).await.json();
        let choice = &whole["choices"][0];
        assert_eq!(choice["text"].as_str().or(choice["message"]["content"].as_str()), Some(text.as_str()));
    }
}

#[tokio::test]
async fn the_only_pair_is_asked_again_when_its_transfer_fails_and_then_no_more() {
    let pool = Pool::start(1).await;
    let host = pool.host("").await;
    all_are_answered(&host, || pool.decode[0].suffer([Fault::Transfer])).await;
    let fallbacks = [("cause", "decode_failed")];
    assert_eq!(host.http.metric("dynamo_host_handoff_fallbacks_total", &fallbacks).await, 4.0);
    all_are_answered(&host, || pool.prefill.suffer([Fault::Transfer])).await;
    let fallbacks = [("cause", "prefill_failed")];
    assert_eq!(host.http.metric("dynamo_host_handoff_fallbacks_total", &fallbacks).await, 4.0);

    let [(path, asked, _), _] = questions();
    for asked in [streamed(asked.clone()), asked] {
        pool.decode[0].suffer([Fault::Transfer; 3]);
        let reply = host.http.post(path, asked.to_string()).await;
        assert!(reply.status.is_server_error(), "{}: {}", reply.status, reply.text());
        assert_eq!(pool.decode[0].to_suffer(), 1, "twice, and not for as often as there are attempts");
        pool.decode[0].recover();
    }
    host.workers_are("healthy").await;
    pool.found_no_fault();
}

#[tokio::test]
async fn a_request_that_finds_the_only_decode_engine_gone_waits_for_it() {
    let mut pool = Pool::start(1).await;
    // Nobody but the request finds out.
    let host = pool.host("[health]\nprobe_every_ms = 60000\nhold_s = 30\n").await;
    let address = pool.decode[0].address();
    drop(pool.decode.remove(0));
    let [(path, asked, text), _] = questions();
    let stream = async { host.http.stream(path, &with_usage(asked)).await };
    let comes_back = async {
        eventually("it is seen to be gone", async || {
            let status = host.admin.get_json("/v1/status").await;
            (status["workers"][0]["state"] != "healthy" || status["workers"][1]["state"] != "healthy").then_some(())
        })
        .await;
        Sglang::start_at(address, Part::Decode, &pool.network).await
    };
    let (stream, _decode) = tokio::join!(stream, comes_back);
    is_whole(&stream, &text);
    assert_eq!(host.http.metric("dynamo_host_handoff_fallbacks_total", &[("cause", "decode_failed")]).await, 1.0);
    pool.found_no_fault();
}
