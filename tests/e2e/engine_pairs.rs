//! Hand-offs between engines of each kind, by doubles that are as strict as the real ones: through the host, as clients see them.
//!
//! Each test asks for answers whose text follows from the prompt alone, so that KV which is not the prompt's shows, and looks
//! at the end whether any double found fault with what it was asked.

mod parts;

use std::sync::Arc;

use dynamo_engine_api::Protocol;
use serde_json::{Value, json};

use crate::{
    doubles::{AT_ONCE, Network, Part, Sglang, Trtllm, Vllm, text_of},
    harness::{eventually, host::Host, host::streamed, soon},
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
/// Requests of each way of asking.
const REQUESTS: usize = 12;

fn completion(prompt: &str, max_tokens: u32) -> Value {
    json!({ "model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0 })
}

fn chat(says: &str, max_tokens: u32) -> Value {
    let messages = json!([{ "role": "system", "content": "Be brief." }, { "role": "user", "content": says }]);
    json!({ "model": "m", "messages": messages, "max_tokens": max_tokens, "temperature": 0 })
}

/// A host over these workers, once all of them can hand over.
async fn over(workers: &[String]) -> Host {
    with_arguments(&[], workers).await
}

/// The same with more arguments.
async fn with_arguments(more: &[&str], workers: &[String]) -> Host {
    let mut arguments = more.to_vec();
    arguments.extend(workers.iter().flat_map(|worker| ["--worker", worker]));
    let host = Host::start(&arguments).await;
    eventually("all workers can hand over", async || {
        let status = host.admin.get_json("/v1/status").await;
        let workers = status["workers"].as_array().unwrap_or_else(|| panic!("no workers in {status}"));
        workers.iter().all(|worker| worker["handoff"]["state"] == "ready").then_some(())
    })
    .await;
    host
}

/// Prompts that were computed there.
async fn prefilled(host: &Host, place: &str) -> f64 {
    host.http.metric("dynamo_host_prefill_where_total", &[("where", place)]).await
}

/// Asks in all ways, many at once, and finds each answer to be that of its prompt.
async fn all_say_what_they_should(host: &Host) {
    let one = async |number: usize| {
        let prompt = format!("number {number} of those that are carried from one to another");
        let whole = host.http.ask(COMPLETIONS, &completion(&prompt, 9)).await.json();
        assert_eq!(whole["choices"][0]["text"], text_of(&json!(prompt), 9));
        assert_eq!(whole["usage"]["completion_tokens"], 9);
        let stream = host.http.stream(COMPLETIONS, &streamed(completion(&prompt, 9))).await;
        assert_eq!((stream.text(), stream.finish_reasons()), (text_of(&json!(prompt), 9), vec!["length"]));
        let asked = chat(&prompt, 7);
        let whole = host.http.ask(CHAT, &asked).await.json();
        assert_eq!(whole["choices"][0]["message"]["content"], text_of(&asked["messages"], 7));
        let stream = host.http.stream(CHAT, &streamed(asked.clone())).await;
        assert_eq!((stream.text(), stream.finish_reasons()), (text_of(&asked["messages"], 7), vec!["length"]));
        let ids = json!([7, 8, 9, number]);
        let mut asked = completion("", 5);
        asked["prompt"] = ids.clone();
        assert_eq!(host.http.ask(COMPLETIONS, &asked).await.json()["choices"][0]["text"], text_of(&ids, 5));
    };
    futures_util::future::join_all((0..REQUESTS).map(one)).await;
    assert_eq!(prefilled(host, "remote").await, 5.0 * REQUESTS as f64, "all of them were handed over");
}

/// A client's own values for what is between engines.
fn meddling(mut body: Value) -> Value {
    let params = json!({ "do_remote_prefill": true, "remote_request_id": "another's", "transfer_id": "another's", "remote_block_ids": [[1]] });
    body["kv_transfer_params"] = params;
    body["bootstrap_host"] = "elsewhere".into();
    body["bootstrap_port"] = 1.into();
    body["bootstrap_room"] = 7.into();
    body["disagg_prefill_dp_rank"] = 3.into();
    body["disaggregated_params"] = json!({ "request_type": "generation_only", "ctx_request_id": 1 });
    body["rid"] = "another's".into();
    body
}

async fn meddling_changes_nothing(host: &Host) {
    for body in [meddling(completion("mine alone", 5)), streamed(meddling(completion("mine alone", 5)))] {
        let said = if body["stream"] == true {
            host.http.stream(COMPLETIONS, &body).await.text()
        } else {
            host.http.ask(COMPLETIONS, &body).await.json()["choices"][0]["text"].as_str().unwrap().to_owned()
        };
        assert_eq!(said, text_of(&json!("mine alone"), 5));
    }
}

fn worker(url: &str, name: &str, part: Part, more: &str) -> String {
    let role = if part == Part::Prefill { "prefill" } else { "decode" };
    format!("{url},name={name},model=m,role={role}{more}")
}

/// Two SGLang engines that prefill, two that decode.
async fn sglang() -> (Arc<Network<impl Default>>, [Sglang; 2], [Sglang; 2], Vec<String>) {
    let network = Network::new();
    let prefill = [Sglang::start(Part::Prefill, &network).await, Sglang::start(Part::Prefill, &network).await];
    let decode = [Sglang::start(Part::Decode, &network).await, Sglang::start(Part::Decode, &network).await];
    let prefills = prefill.iter().enumerate().map(|(at, engine)| {
        worker(&engine.url(), &format!("p{at}"), Part::Prefill, &format!(",bootstrap_port={}", engine.bootstrap_port()))
    });
    let decodes = decode.iter().enumerate().map(|(at, engine)| worker(&engine.url(), &format!("d{at}"), Part::Decode, ""));
    let workers = prefills.chain(decodes).collect();
    (network, prefill, decode, workers)
}

#[tokio::test]
async fn sglangs_legs_meet_in_a_room_of_their_own() {
    let (network, _prefill, _decode, workers) = sglang().await;
    let host = over(&workers).await;
    all_say_what_they_should(&host).await;
    meddling_changes_nothing(&host).await;
    assert_eq!(network.faults(), [""; 0]);
}

#[tokio::test]
async fn where_nobody_serves_whole_requests_one_answer_is_handed_over_whatever_it_is() {
    let (network, _prefill, _decode, workers) = sglang().await;
    let host = over(&workers).await;
    let one = host.http.ask(CHAT, &chat("a single token", 1)).await.json();
    assert_eq!(one["usage"]["completion_tokens"], 1);
    let mut seen = chat("", 3);
    seen["messages"][1]["content"] = json!([{ "type": "image_url", "image_url": { "url": "data:," } }]);
    assert_eq!(host.http.ask(CHAT, &seen).await.json()["usage"]["completion_tokens"], 3);
    assert_eq!(prefilled(&host, "remote").await, 2.0);
    let other = json!({ "model": "m", "input": "what no engine hands over" });
    let message = host.http.post("/v1/responses", other.to_string()).await.is_error(503, "no_worker");
    assert!(message.contains("chats and completions alone") && message.contains("role aggregated"), "{message}");
    assert_eq!(network.faults(), [""; 0]);
}

#[tokio::test]
async fn sglang_is_told_to_abort_when_a_client_leaves() {
    let (network, _prefill, decode, workers) = sglang().await;
    let host = over(&workers).await;
    let mut events = host.http.open(COMPLETIONS, &streamed(completion("never stop", 5000))).await;
    events.event().await;
    assert!(!decode.iter().any(Sglang::was_told_to_abort));
    drop(events);
    eventually("its decode is aborted by name", async || decode.iter().any(Sglang::was_told_to_abort).then_some(())).await;
    eventually("nobody works on it any more", async || (network.abandoned() > 0).then_some(())).await;
    assert_eq!(network.faults(), [""; 0]);
}

#[tokio::test]
async fn a_dead_sglang_prefill_costs_a_new_room_and_no_request() {
    let (network, prefill, _decode, workers) = sglang().await;
    let host = over(&workers).await;
    let [dead, alive] = prefill;
    drop(dead);
    let before = alive.asked();
    for number in 0..8 {
        let prompt = format!("number {number}");
        let whole = host.http.ask(COMPLETIONS, &completion(&prompt, 5)).await.json();
        assert_eq!(whole["choices"][0]["text"], text_of(&json!(prompt), 5));
    }
    assert!(alive.asked() >= before + 8);
    assert_eq!(network.faults(), [""; 0]);
}

#[tokio::test]
async fn an_sglang_that_was_started_for_whole_requests_gets_no_hand_offs_and_why_is_said() {
    for prefills_as in [Part::Prefill, Part::Whole] {
        let network = Network::new();
        let (prefill, decode) = (Sglang::start(prefills_as, &network).await, Sglang::start(Part::Whole, &network).await);
        let workers = [worker(&prefill.url(), "p", Part::Prefill, ""), worker(&decode.url(), "d", Part::Decode, "")];
        let arguments: Vec<&str> = workers.iter().flat_map(|worker| ["--worker", worker]).collect();
        let host = soon("a host", Host::start(&arguments)).await;
        let refused = if prefills_as == Part::Whole { 2 } else { 1 };
        eventually("why is said", async || {
            let status = host.admin.get_json("/v1/status").await;
            let workers = status["workers"].as_array().unwrap();
            let reasons = workers.iter().filter_map(|worker| worker["handoff"]["reason"].as_str());
            (reasons.filter(|reason| reason.contains("--disaggregation-mode")).count() == refused).then_some(())
        })
        .await;
        host.http.post(COMPLETIONS, completion("for nobody", 5).to_string()).await.is_error(503, "no_worker");
        assert_eq!((prefill.asked() + decode.asked(), network.handed_over()), (0, 0));
        assert_eq!(network.faults(), [""; 0]);
    }
}

#[tokio::test]
async fn tensorrt_llms_generation_goes_on_from_its_context_untouched() {
    let network = Network::new();
    let prefill = Trtllm::start(Part::Prefill, &network).await;
    let decode = Trtllm::start(Part::Decode, &network).await;
    let workers = [worker(&prefill.url(), "p", Part::Prefill, ""), worker(&decode.url(), "d", Part::Decode, "")];
    let host = over(&workers).await;
    all_say_what_they_should(&host).await;
    meddling_changes_nothing(&host).await;
    assert_eq!(network.faults(), [""; 0]);
    // What it does not know is refused by its first engine, in its own words, and asked of nobody else.
    let mut unknown = completion("what is new", 5);
    unknown["a_field_of_tomorrow"] = 1.into();
    let before = prefill.asked() + decode.asked();
    let reply = host.http.post(COMPLETIONS, unknown.to_string()).await;
    assert!(reply.status == 400 && reply.text().contains("extra_forbidden"), "{} {}", reply.status, reply.text());
    assert_eq!(prefill.asked() + decode.asked(), before + 1);
}

#[tokio::test]
async fn a_context_that_finished_is_the_clients_answer() {
    let network = Network::new();
    let prefill = Trtllm::start(Part::Prefill, &network).await;
    let decode = Trtllm::start(Part::Decode, &network).await;
    let workers = [worker(&prefill.url(), "p", Part::Prefill, ""), worker(&decode.url(), "d", Part::Decode, "")];
    let host = over(&workers).await;
    let decoded = decode.asked();
    let prompt = format!("it ends {AT_ONCE}");
    let whole = host.http.ask(COMPLETIONS, &completion(&prompt, 9)).await.json();
    assert_eq!(
        (&whole["choices"][0]["text"], &whole["choices"][0]["finish_reason"]),
        (&json!(text_of(&json!(prompt), 1)), &json!("stop"))
    );
    let stream = host.http.stream(COMPLETIONS, &streamed(completion(&prompt, 9))).await;
    assert_eq!((stream.text(), stream.finish_reasons()), (text_of(&json!(prompt), 1), vec!["stop"]));
    let asked = chat(&prompt, 9);
    let stream = host.http.stream(CHAT, &streamed(asked.clone())).await;
    assert_eq!((stream.text(), stream.finish_reasons()), (text_of(&asked["messages"], 1), vec!["stop"]));
    assert_eq!((decode.asked(), network.faults()), (decoded, vec![]));
}

#[tokio::test]
async fn mooncakes_legs_meet_under_a_name_of_their_own() {
    let network = Network::new();
    let connector = Some(Protocol::Mooncake);
    let prefill = Vllm::start(Part::Prefill, connector, &network).await;
    let decode = Vllm::start(Part::Decode, connector, &network).await;
    let at = format!(",handoff=mooncake,bootstrap_port={}", prefill.bootstrap_port());
    let workers =
        [worker(&prefill.url(), "p", Part::Prefill, &at), worker(&decode.url(), "d", Part::Decode, ",handoff=mooncake")];
    let host = over(&workers).await;
    all_say_what_they_should(&host).await;
    meddling_changes_nothing(&host).await;
    assert_eq!((network.faults(), network.kept()), (vec![], 0));
}

#[tokio::test]
async fn what_vllm_says_of_its_kv_arrives_byte_for_byte() {
    let network = Network::new();
    let connector = Some(Protocol::Nixl);
    let prefill = Vllm::start(Part::Prefill, connector, &network).await;
    let decode = Vllm::start(Part::Decode, connector, &network).await;
    let workers = [worker(&prefill.url(), "p", Part::Prefill, ""), worker(&decode.url(), "d", Part::Decode, "")];
    let host = over(&workers).await;
    all_say_what_they_should(&host).await;
    meddling_changes_nothing(&host).await;
    assert_eq!((network.faults(), network.kept()), (vec![], 0));
}

#[tokio::test]
async fn a_vllm_without_a_connector_gets_no_hand_offs_and_all_is_served() {
    let network = Network::new();
    let prefill = Vllm::start(Part::Prefill, None, &network).await;
    let decode = Vllm::start(Part::Decode, None, &network).await;
    let workers = [worker(&prefill.url(), "p", Part::Prefill, ""), worker(&decode.url(), "d", Part::Decode, "")];
    let arguments: Vec<&str> = workers.iter().flat_map(|worker| ["--worker", worker]).collect();
    let host = soon("a host", Host::start(&arguments)).await;
    let prompt = "served all the same";
    let whole = host.http.ask(COMPLETIONS, &completion(prompt, 5)).await.json();
    assert_eq!(whole["choices"][0]["text"], text_of(&json!(prompt), 5));
    eventually("why is said", async || {
        let status = host.admin.get_json("/v1/status").await.to_string();
        status.contains("--kv-transfer-config").then_some(())
    })
    .await;
    assert_eq!((prefilled(&host, "remote").await, network.handed_over()), (0.0, 0));
    assert!(prefill.asked() + decode.asked() > 0);
}
