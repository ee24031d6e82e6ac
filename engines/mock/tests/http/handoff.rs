//! Hand-offs: one engine computes the prompt, another one goes on, both over HTTP.

use dynamo_engine_mock::{MockEngine, MockOptions, tokens};
use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{Server, client, streamed_text, within_60_s};

/// An engine of a role, with more of its parameters.
async fn start(role: &str, parameters: &[(&str, &str)]) -> Server {
    let mut options = MockOptions::default();
    for (key, value) in [("model", "m"), ("speedup", "100"), ("block_size", "4"), ("role", role)].iter().chain(parameters) {
        options.set(key, value).unwrap();
    }
    Server::serve(MockEngine::start(options).unwrap()).await
}

/// 30 tokens of some prompt.
fn prompt(first: u32) -> Vec<u32> {
    (first..first + 30).collect()
}

fn prefill(prompt: &[u32]) -> Value {
    json!({ "prompt": prompt, "max_tokens": 1, "stream": false, "return_token_ids": true,
            "kv_transfer_params": { "do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null } })
}

fn decode(prompt: &[u32], params: &Value) -> Value {
    json!({ "prompt": prompt, "max_tokens": 10, "kv_transfer_params": params })
}

async fn post(server: &Server, body: &Value) -> client::Reply {
    server.client().await.post("/v1/completions", &[], body.to_string()).await
}

/// Has a prompt computed; returns what whoever decodes is to be told.
async fn prefilled(server: &Server, prompt: &[u32]) -> Value {
    let reply = post(server, &self::prefill(prompt)).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.body);
    reply.json()["kv_transfer_params"].clone()
}

async fn metric(server: &Server, name: &str) -> f64 {
    let text = server.client().await.get("/metrics").await.body;
    let line = text.lines().find(|line| line.strip_prefix("vllm:").is_some_and(|line| line.starts_with(name)));
    line.unwrap_or_else(|| panic!("no {name}: {text}")).rsplit_once(' ').unwrap().1.parse().unwrap()
}

async fn set(server: &Server, faults: Value) {
    let reply = server.client().await.post("/mock/faults", &[], faults.to_string()).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.body);
}

#[tokio::test]
async fn a_prefill_keeps_its_kv_and_says_where_as_vllm_does() {
    let server = start("prefill", &[]).await;
    let reply = post(&server, &prefill(&prompt(0))).await.json();
    assert_eq!(reply["choices"][0]["prompt_token_ids"].as_array().unwrap().len(), 30);
    let params = &reply["kv_transfer_params"];
    assert_eq!(params["remote_block_ids"].as_array().unwrap()[0].as_array().unwrap().len(), 8);
    assert_eq!(params["remote_port"], server.address.port());
    assert_eq!(params["remote_engine_id"].as_str().unwrap().len(), 36);
    let mut rest = params.clone();
    for name in ["remote_block_ids", "remote_port", "remote_engine_id", "remote_request_id"] {
        rest.as_object_mut().unwrap().remove(name).unwrap();
    }
    let expected = json!({
        "do_remote_prefill": true, "do_remote_decode": false, "remote_host": "127.0.0.1", "tp_size": 1, "dcp_size": 1, "pp_size": 1,
        "remote_num_tokens": 30, "remote_blocks_expiry_time": null, "transfer_mode": "pull", "remote_prefill_cached_tokens": 0,
    });
    assert_eq!(rest, expected);
    assert_eq!(metric(&server, "mock_held_blocks").await, 8.0);
    let again = prefilled(&server, &prompt(0)).await;
    assert_eq!(again["remote_prefill_cached_tokens"], 28);
    assert_ne!(again["remote_request_id"], params["remote_request_id"]);
}

#[tokio::test]
async fn another_engine_goes_on_without_computing_the_prompt() {
    let (from, to) = (start("prefill", &[]).await, start("decode", &[]).await);
    let params = prefilled(&from, &prompt(0)).await;
    let reply = post(&to, &decode(&prompt(0), &params)).await.json();
    assert_eq!(tokens::count(reply["choices"][0]["text"].as_str().unwrap()), Ok(10), "{reply}");
    assert_eq!(reply["usage"]["prompt_tokens_details"]["cached_tokens"], 0, "fetched is not cached");
    from.eventually("the KV is freed", |snapshot| snapshot.held == 0 && snapshot.kv_blocks_used == 0).await;
    let params = prefilled(&from, &prompt(1000)).await;
    let mut streamed = decode(&prompt(1000), &params);
    streamed["stream"] = true.into();
    assert_eq!(tokens::count(&streamed_text(&post(&to, &streamed).await.body)), Ok(10));
    for (source, tokens) in [("local_compute", 0.0), ("local_cache_hit", 0.0), ("external_kv_transfer", 60.0)] {
        assert_eq!(metric(&to, &format!("prompt_tokens_by_source_total{{source=\"{source}\"")).await, tokens);
    }
    // What it has of a prompt is not fetched again.
    let params = prefilled(&from, &prompt(0)).await;
    let reply = post(&to, &decode(&prompt(0), &params)).await.json();
    assert_eq!(reply["usage"]["prompt_tokens_details"]["cached_tokens"], 28);
    assert_eq!(metric(&to, "prompt_tokens_by_source_total{source=\"external_kv_transfer\"").await, 62.0);
}

#[tokio::test]
async fn chats_are_handed_over() {
    let (from, to) = (start("both", &[]).await, start("both", &[]).await);
    let mut chat = json!({ "messages": [{ "role": "user", "content": "Count to ten, please." }], "max_tokens": 1,
                           "kv_transfer_params": { "do_remote_decode": true } });
    let mut client = from.client().await;
    let reply = client.post("/v1/chat/completions", &[], chat.to_string()).await.json();
    (chat["kv_transfer_params"], chat["max_tokens"]) = (reply["kv_transfer_params"].clone(), 10.into());
    let reply = to.client().await.post("/v1/chat/completions", &[], chat.to_string()).await.json();
    assert_eq!(tokens::count(reply["choices"][0]["message"]["content"].as_str().unwrap()), Ok(10));
    assert_eq!(metric(&to, "prompt_tokens_by_source_total{source=\"local_compute\"").await, 0.0);
}

#[tokio::test]
async fn kv_of_another_prompt_is_an_error_or_its_death() {
    let (from, to) = (start("prefill", &[]).await, start("decode", &[]).await);
    let params = prefilled(&from, &prompt(0)).await;
    for wrong in [prompt(1), prompt(0)[..29].to_vec()] {
        let reply = post(&to, &decode(&wrong, &params)).await;
        assert_eq!(reply.status, StatusCode::INTERNAL_SERVER_ERROR, "{}", reply.body);
    }
    let dies = start("decode", &[("kv_mismatch", "die")]).await;
    post(&dies, &decode(&prompt(1), &params)).await;
    assert_eq!(dies.client().await.get("/health").await.status, StatusCode::SERVICE_UNAVAILABLE);
    let reply = post(&to, &decode(&prompt(0), &params)).await;
    assert_eq!(reply.status, StatusCode::OK, "nobody has fetched it yet: {}", reply.body);
    let reply = post(&to, &decode(&prompt(0), &params)).await;
    assert_eq!(reply.status, StatusCode::INTERNAL_SERVER_ERROR, "once");
}

#[tokio::test]
async fn kv_that_is_gone_is_an_error_or_computed() {
    let from = start("prefill", &[("kv_lease_seconds", "0.02")]).await;
    let params = prefilled(&from, &prompt(0)).await;
    from.eventually("the lease ends", |snapshot| snapshot.held == 0 && snapshot.kv_blocks_used == 0).await;
    assert_eq!(metric(&from, "nixl_num_kv_expired_reqs_total").await, 1.0);
    check_gone(&params).await;
    // Of another run of it, and of nobody at all.
    let mut other = params.clone();
    other["remote_engine_id"] = "0".into();
    check_gone(&other).await;
    drop(from);
    check_gone(&params).await;
}

async fn check_gone(params: &Value) {
    let (fails, computes) = (start("decode", &[]).await, start("both", &[("kv_load_failure", "recompute")]).await);
    let whole = decode(&prompt(0), params);
    let mut streamed = whole.clone();
    streamed["stream"] = true.into();
    assert_eq!(post(&fails, &whole).await.status, StatusCode::INTERNAL_SERVER_ERROR);
    let reply = post(&fails, &streamed).await;
    assert_eq!(reply.status, StatusCode::OK);
    assert!(reply.body.starts_with("data: {\"error\": ") && reply.body.ends_with("data: [DONE]\n\n"), "{}", reply.body);
    assert_eq!(metric(&fails, "nixl_num_failed_transfers_total").await, 2.0);
    fails.eventually("nothing stays", |snapshot| snapshot.waiting == 0 && snapshot.kv_blocks_used == 0).await;
    assert_eq!(tokens::count(&streamed_text(&post(&computes, &streamed).await.body)), Ok(10));
    assert_eq!(metric(&computes, "prompt_tokens_by_source_total{source=\"local_compute\"").await, 30.0);
}

#[tokio::test]
async fn a_client_that_leaves_frees_what_is_on_its_way() {
    // A second and more for each token: 1000 bytes in 10 ms of this time.
    let (from, to) = (start("prefill", &[("kv_bytes_per_second", "1000")]).await, start("decode", &[]).await);
    let params = prefilled(&from, &prompt(0)).await;
    let mut client = to.client().await;
    let mut streamed = decode(&prompt(0), &params);
    streamed["stream"] = true.into();
    let reply = client.send(Method::POST, "/v1/completions", &[], streamed.to_string()).await;
    to.eventually("it waits for its KV", |snapshot| snapshot.fetching == 1 && snapshot.kv_blocks_used == 8).await;
    drop((reply, client));
    to.eventually("it is gone", |snapshot| snapshot.waiting == 0 && snapshot.kv_blocks_used == 0).await;
    assert_eq!(metric(&from, "mock_held_requests").await, 1.0, "another may fetch it");
    // Who leaves before its prefill is answered leaves nothing.
    set(&from, json!({ "wedge": 0 })).await;
    let mut client = from.client().await;
    let body = prefill(&prompt(1000)).to_string();
    let sent =
        tokio::time::timeout(std::time::Duration::from_millis(50), client.send(Method::POST, "/v1/completions", &[], body));
    assert!(sent.await.is_err());
    drop(client);
    set(&from, json!({})).await;
    from.eventually("only the first holds", |snapshot| snapshot.running + snapshot.waiting == 0 && snapshot.held == 1).await;
}

#[tokio::test]
async fn what_a_prefill_does_wrong() {
    let from = start("prefill", &[]).await;
    set(&from, json!({ "prefill_refuse": "busy", "next": 1 })).await;
    assert_eq!(post(&from, &prefill(&prompt(0))).await.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(post(&from, &prefill(&prompt(0))).await.status, StatusCode::OK);
    let plain = json!({ "prompt": prompt(0), "max_tokens": 1 });
    set(&from, json!({ "prefill_refuse": "busy" })).await;
    assert_eq!(post(&from, &plain).await.status, StatusCode::OK, "what is for nobody else is not struck");
    set(&from, json!({ "prefill_silent": true })).await;
    assert_eq!(prefilled(&from, &prompt(1000)).await, Value::Null);
    assert_eq!(metric(&from, "mock_held_requests").await, 1.0);
    set(&from, json!({ "prefill_delay_ms": 100 })).await;
    let begun = std::time::Instant::now();
    assert_ne!(prefilled(&from, &prompt(0)).await, Value::Null);
    assert!(begun.elapsed().as_millis() >= 100);
}

#[tokio::test]
async fn what_a_fetch_does_wrong() {
    let (from, to) = (start("prefill", &[]).await, start("decode", &[]).await);
    let params = prefilled(&from, &prompt(0)).await;
    set(&from, json!({ "fetch_cut": true, "next": 1 })).await;
    assert_eq!(post(&to, &decode(&prompt(0), &params)).await.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(post(&to, &decode(&prompt(0), &params)).await.status, StatusCode::OK, "the KV was kept");
    let params = prefilled(&from, &prompt(1000)).await;
    set(&from, json!({ "fetch_die": "within" })).await;
    assert_eq!(from.client().await.get("/health").await.status, StatusCode::OK);
    // In this process it stops, and cannot cut its connections.
    let mut client = to.client().await;
    let fetches = client.post("/v1/completions", &[], decode(&prompt(1000), &params).to_string());
    let stops = async {
        while from.engine.snapshot().await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        reply = fetches => panic!("{}", reply.body),
        () = within_60_s(stops) => {}
    }
}

#[tokio::test]
async fn who_has_no_part_in_it_says_so() {
    let (from, to, neither) = (start("prefill", &[]).await, start("decode", &[]).await, start("aggregated", &[]).await);
    let reply = post(&to, &prefill(&prompt(0))).await;
    assert_eq!(reply.status, StatusCode::BAD_REQUEST);
    assert!(reply.body.contains("role=decode: it computes no prompts for others"), "{}", reply.body);
    let params = prefilled(&from, &prompt(0)).await;
    let reply = post(&from, &decode(&prompt(0), &params)).await;
    assert!(reply.body.contains("role=prefill: it does not go on from prompts of others"), "{}", reply.body);
    assert_eq!(prefilled(&neither, &prompt(0)).await, Value::Null);
    let reply = post(&neither, &decode(&prompt(0), &params)).await.json();
    assert_eq!(tokens::count(reply["choices"][0]["text"].as_str().unwrap()), Ok(10), "it does not hear of it");
    let whole = json!({ "prompt": prompt(0), "max_tokens": 10 });
    for server in [&from, &to] {
        assert_eq!(post(server, &whole).await.status, StatusCode::OK, "whole requests are for all");
    }
}
