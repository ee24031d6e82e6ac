//! A real vLLM's KV events: a repeated prompt goes to it, and a restart is seen.

use std::ops::RangeInclusive;

use dynamo_engine_api::conformance::closed_port;
use dynamo_engine_openai::{OpenAiEngine, OpenAiOptions};
use serde_json::{Value, json};

use super::VllmServer;
use crate::{
    engine::MODEL,
    harness::{
        client::{Client, Reply},
        components, eventually,
        host::Host,
        process::{Process, dynamo_host},
    },
};

const COMPLETIONS: &str = "/v1/completions";
/// Six whole blocks of 32 tokens, and some.
const TOKENS: u32 = 200;
const WHOLE: u32 = 192;
const VLLM: &str = "vllm";
/// As good as vLLM, with nothing known: the policy's choice every other time.
const DECOY: &str = "decoy";
/// How often a prompt must go to its holder: by chance, it would one time in 256.
const TIMES: usize = 8;

fn prompt(number: u32) -> Value {
    let ids: Vec<u32> = (0..TOKENS).map(|at| 100 + (at * 7 + number * 31) % 150).collect();
    json!({ "model": MODEL, "prompt": ids, "max_tokens": 1, "temperature": 0 })
}

/// Who served it, and what the engine says that it had of the prompt.
async fn served(host: &Host, number: u32) -> (String, u64) {
    let reply: Reply = host.http.ask(COMPLETIONS, &prompt(number)).await;
    let cached = reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
    (reply.headers["x-dynamo-worker"].to_str().unwrap().to_owned(), cached)
}

/// Waits until vLLM is known to hold so many blocks.
async fn known(host: &Host, blocks: RangeInclusive<u64>) -> Value {
    eventually(&format!("the host knows {blocks:?} blocks of vLLM's"), async || {
        let workers = host.admin.get_json("/v1/workers").await["workers"].as_array().unwrap().clone();
        let kv = workers.into_iter().find(|worker| worker["name"] == VLLM).unwrap()["kv"].take();
        kv["blocks"].as_u64().is_some_and(|known| blocks.contains(&known)).then_some(kv)
    })
    .await
}

async fn alive(server: &mut VllmServer) {
    let adapter = OpenAiEngine::new(&server.url, OpenAiOptions::default()).unwrap();
    server.alive(&adapter).await;
}

#[tokio::test]
async fn a_repeated_prompt_goes_to_the_vllm_that_holds_it_and_a_restart_is_forgotten_and_learnt_again() {
    let (address, events, replay) = (closed_port().unwrap(), closed_port().unwrap().port(), closed_port().unwrap().port());
    let publishing = json!({
        "enable_kv_cache_events": true,
        "publisher": "zmq",
        // vLLM listens where there is a `::`, and connects elsewhere.
        "endpoint": format!("tcp://[::ffff:127.0.0.1]:{events}"),
        "replay_endpoint": format!("tcp://127.0.0.1:{replay}"),
        "topic": "kv",
    })
    .to_string();
    let flags = ["--enable-prefix-caching", "--enable-prompt-tokens-details", "--kv-events-config", &publishing];
    let mut server = VllmServer::start_at(address, &flags);
    alive(&mut server).await;
    let vllm = Client::new(&server.url);

    let mut decoy = Process::start("mock engine", &mut dynamo_host(&["mock-engine", "--http", "127.0.0.1:0", "--model", MODEL]));
    let decoy = format!("{},name={DECOY}", decoy.listener("mock engine listening on http://").await);
    let routing = components::guest("kv-cost");
    let worker = format!("{},name={VLLM},model={MODEL}", server.url);
    let host = Host::start(&["--expose-worker", "--routing", &routing, "--worker", &decoy, "--worker", &worker]).await;

    // Past the host: only events can tell it.
    vllm.ask(COMPLETIONS, &prompt(1)).await;
    let kv = known(&host, 6..=7).await;
    assert_eq!(kv["source"], "events", "{kv}");
    for _ in 0..TIMES {
        assert_eq!(served(&host, 1).await, (VLLM.to_owned(), WHOLE.into()));
    }

    server.signal("KILL");
    drop(server);
    known(&host, 0..=0).await;
    let mut server = VllmServer::start_at(address, &flags);
    alive(&mut server).await;
    host.workers_are("healthy").await;
    vllm.ask(COMPLETIONS, &prompt(3)).await;
    let kv = known(&host, 6..=7).await;
    for _ in 0..TIMES {
        assert_eq!(served(&host, 3).await, (VLLM.to_owned(), WHOLE.into()));
    }
    println!("after its restart: {kv}");
}
