//! Over mock engines as processes, two of each role: KV goes from one to the other, and all of it is counted.

use dynamo_engine_api::handoff::LEASE;
use serde_json::{Value, json};

use crate::harness::{
    components, eventually,
    host::{Host, MockProcess, chat, completion, streamed},
    process::run,
    sse::Streamed,
};

pub(super) const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// Two engines that prefill, and two that decode.
pub(super) struct Pools {
    prefill: Vec<MockProcess>,
    decode: Vec<MockProcess>,
}

impl Pools {
    pub(super) async fn start(profile: &[&str]) -> Self {
        let mut pools = Self { prefill: Vec::new(), decode: Vec::new() };
        for (role, pool) in [("role=prefill", &mut pools.prefill), ("role=decode", &mut pools.decode)] {
            for _ in 0..2 {
                pool.push(MockProcess::start(&[&[role], profile].concat()).await);
            }
        }
        pools
    }

    /// A host over them, once all can hand over.
    pub(super) async fn host(&self, more: &[&str]) -> Host {
        let worker = |(role, engine): (&str, &MockProcess)| format!("{},model=m,role={role}", engine.url());
        let prefill = self.prefill.iter().map(|engine| ("prefill", engine));
        let workers: Vec<String> = prefill.chain(self.decode.iter().map(|engine| ("decode", engine))).map(worker).collect();
        let mut arguments = vec!["--expose-worker"];
        arguments.extend(workers.iter().flat_map(|worker| ["--worker", worker]));
        arguments.extend(more);
        let host = Host::start(&arguments).await;
        eventually("all workers can hand over", async || {
            let status = host.admin.get_json("/v1/status").await;
            let workers = status["workers"].as_array().unwrap_or_else(|| panic!("no workers in {status}"));
            workers.iter().all(|worker| worker["handoff"]["state"] == "ready").then_some(())
        })
        .await;
        host
    }

    /// Waits until nobody works, and no KV is kept.
    async fn are_idle(&self) {
        for engine in self.prefill.iter().chain(&self.decode) {
            eventually("an engine is idle and keeps nothing", async || {
                let metric = async |name: &str| engine.http.metric(name, &[]).await;
                (metric("vllm:num_requests_running").await + metric("vllm:mock_held_requests").await == 0.0).then_some(())
            })
            .await;
        }
    }
}

/// Bounds a wait by less than the time for which KV is kept that nobody fetches.
async fn within_the_lease(wait: impl Future<Output = ()>) {
    tokio::time::timeout(LEASE / 2, wait).await.expect("KV is given up long before its lease is over");
}

/// Prompt tokens that engines computed themselves.
async fn computed(engines: &[MockProcess]) -> f64 {
    let mut tokens = 0.0;
    for engine in engines {
        tokens += engine.http.metric("vllm:prompt_tokens_by_source_total", &[("source", "local_compute")]).await;
    }
    tokens
}

pub(super) fn long(mut body: Value, number: usize) -> Value {
    let text = format!("{number} {}", "word ".repeat(300));
    if body.get("prompt").is_some() {
        body["prompt"] = text.into();
    } else {
        body["messages"][0]["content"] = text.into();
    }
    body
}

async fn prefilled(host: &Host, place: &str) -> f64 {
    host.http.metric("dynamo_host_prefill_where_total", &[("where", place)]).await
}

fn is_remote(stream: &Streamed) -> bool {
    stream.headers.contains_key("x-dynamo-prefill-worker")
}

#[tokio::test]
async fn answers_are_those_of_one_engine_and_decode_computes_no_prompt() {
    let pools = Pools::start(&["speedup=20"]).await;
    let host = pools.host(&[]).await;
    let whole = Host::over_mocks(&["a"], "speedup=20", &[]).await;
    let before = computed(&pools.decode).await;
    for number in 0..5 {
        for (path, asked, text) in [
            (CHAT, long(chat(9), number), "/choices/0/message/content"),
            (COMPLETIONS, long(completion(9), number), "/choices/0/text"),
        ] {
            let [here, there] = [host.http.ask(path, &asked).await, whole.http.ask(path, &asked).await];
            assert_eq!(here.json().pointer(text), there.json().pointer(text));
            assert_eq!(here.json()["usage"]["completion_tokens"], 9);
            assert!(here.headers.contains_key("x-dynamo-prefill-worker"));
            let stream = host.http.stream(path, &streamed(asked)).await;
            assert_eq!((Some(stream.text().as_str()), is_remote(&stream)), (there.json().pointer(text).unwrap().as_str(), true));
        }
    }
    assert_eq!(computed(&pools.decode).await, before, "decode engines were given the KV");
    assert_eq!(prefilled(&host, "remote").await, 20.0);
    assert_eq!(host.http.metric("dynamo_host_output_tokens_total", &[]).await, 180.0);
    assert_eq!(host.http.metric("dynamo_host_requests_total", &[("code", "200")]).await, 20.0);
    assert_eq!(host.http.metric("dynamo_host_handoff_fallbacks_total", &[]).await, 0.0);
    pools.are_idle().await;
}

#[tokio::test]
async fn a_prefill_pool_that_dies_costs_no_request_and_comes_back() {
    let mut pools = Pools::start(&["speedup=20"]).await;
    let host = pools.host(&[]).await;
    let ask = async |number: usize| host.http.stream(CHAT, &streamed(long(chat(9), number))).await;
    assert!(is_remote(&ask(0).await));
    pools.prefill[0].process.kill();
    for number in 1..5 {
        assert!(is_remote(&ask(number).await), "the other one is there");
    }
    pools.prefill[1].process.kill();
    // The first ones may still find it there, and fail over.
    eventually("requests are served whole", async || {
        assert_eq!(ask(5).await.text().split(' ').count(), 9);
        let causes = [("cause", "no_prefill_pool")];
        (host.http.metric("dynamo_host_handoff_fallbacks_total", &causes).await > 0.0).then_some(())
    })
    .await;
    assert!(prefilled(&host, "local").await > 0.0);
    let address = pools.prefill[0].url().strip_prefix("http://").unwrap().to_owned();
    pools.prefill[0] = MockProcess::start_at(&address, &["role=prefill", "speedup=20"]).await;
    eventually("it is handed over again", async || is_remote(&ask(9).await).then_some(())).await;
}

#[tokio::test]
async fn a_decode_engine_killed_within_the_stream_is_gone_on_from() {
    let mut pools = Pools::start(&["decode_ms_base=20"]).await;
    let host = pools.host(&[]).await;
    // It is within its stream for as long as it takes to kill it.
    for engine in &pools.decode {
        engine.http.ask("/mock/faults", &json!({ "slow": 10.0 })).await;
    }
    let mut stream = host.http.open(CHAT, &streamed(long(chat(40), 0))).await;
    let mut events = vec![stream.event().await, stream.event().await, stream.event().await];
    let worker = stream.headers["x-dynamo-worker"].to_str().unwrap().to_owned();
    let at = pools.decode.iter().position(|engine| engine.url().ends_with(&worker)).unwrap();
    pools.decode[at].process.kill();
    pools.decode[1 - at].http.ask("/mock/faults", &json!({})).await;
    let rest = stream.streamed().await.unwrap();
    events.extend(rest.events);
    let text: String = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(dynamo_engine_mock::tokens::count(&text), Ok(40));
    assert_eq!(host.http.metric("dynamo_host_migrations_total", &[("result", "continued")]).await, 1.0);
    assert_eq!(host.http.metric("dynamo_host_requests_total", &[("code", "200")]).await, 1.0);
}

#[tokio::test]
async fn a_client_that_leaves_leaves_nothing_behind() {
    let pools = Pools::start(&["prefill_ms_base=100", "decode_ms_base=20"]).await;
    let host = pools.host(&[]).await;
    // Within the prefill, which takes 3 s.
    for engine in &pools.prefill {
        engine.http.ask("/mock/faults", &json!({ "slow": 30.0 })).await;
    }
    let http = host.http.clone();
    let mut asked = tokio::task::JoinSet::new();
    asked.spawn(async move { http.try_open(CHAT, &streamed(long(chat(400), 1))).await });
    eventually("somebody prefills", async || {
        let mut running = 0.0;
        for engine in &pools.prefill {
            running += engine.http.metric("vllm:num_requests_running", &[]).await;
        }
        (running > 0.0).then_some(())
    })
    .await;
    asked.shutdown().await;
    for engine in &pools.prefill {
        engine.http.ask("/mock/faults", &json!({})).await;
    }
    // By the lease alone its KV would go later than that.
    within_the_lease(pools.are_idle()).await;
    // Within the stream.
    let mut stream = host.http.open(CHAT, &streamed(long(chat(4000), 2))).await;
    stream.event().await;
    drop(stream);
    within_the_lease(pools.are_idle()).await;
    eventually("nothing is in flight", async || {
        (host.http.metric("dynamo_host_requests_in_flight", &[]).await == 0.0).then_some(())
    })
    .await;
}

/// Lines of a host's receipts, of one kind.
async fn lines(state: &std::path::Path, kind: &str) -> Vec<Value> {
    let all = run(&["receipts", "export", "--state-dir", state.to_str().unwrap()]).await;
    let lines = all.succeeded().lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["kind"] == kind).collect()
}

#[tokio::test]
async fn a_policy_places_a_pair_at_once_or_is_asked_again_and_hears_of_both_legs() {
    let pools = Pools::start(&["speedup=20"]).await;
    for (policy, settings, decisions) in [
        (components::guest("hostile"), json!({ "mode": "pairs" }), 1),
        (components::policy("disagg-conditional"), json!({ "local_below_tokens": 100 }), 2),
        (components::policy("least-loaded"), json!({}), 2),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let host = pools.host(&["--state-dir", directory.path().to_str().unwrap()]).await;
        host.activate(&policy, &settings).await;
        let reply = host.http.ask(CHAT, &long(chat(13), 7)).await;
        let [prefill, decode] = ["x-dynamo-prefill-worker", "x-dynamo-worker"].map(|name| reply.header(name).to_owned());
        let outcomes = eventually("both outcomes are written", async || {
            if !directory.path().join("receipts").is_dir() {
                return None;
            }
            let outcomes = lines(directory.path(), "outcome").await;
            (outcomes.len() == 2).then_some(outcomes)
        })
        .await;
        let names: Vec<&str> = outcomes.iter().map(|outcome| outcome["name"].as_str().unwrap()).collect();
        assert_eq!(names, [&prefill, &decode], "{policy}");
        assert!(outcomes.iter().all(|outcome| outcome["end"] == "done"));
        assert_eq!((&outcomes[0]["status"], &outcomes[1]["status"]), (&Value::Null, &json!(200)));
        assert_eq!((&outcomes[0]["output_tokens"], &outcomes[1]["output_tokens"]), (&json!(0), &json!(13)));
        let written = lines(directory.path(), "decision").await;
        assert_eq!(written.len(), decisions, "{policy}: {written:?}");
        assert_eq!(outcomes[0]["id"] == outcomes[1]["id"], decisions == 1);
        assert_eq!(written.last().unwrap()["id"], outcomes[1]["id"]);
        assert!(host.http.metric("dynamo_host_policy_fallbacks_total", &[]).await < 1.0);
    }
}

#[tokio::test]
async fn a_policy_that_tells_roles_apart_chooses_where_each_prompt_is_computed() {
    let pools = Pools::start(&["speedup=20"]).await;
    let host = pools.host(&[]).await;
    host.activate(&components::policy("disagg-conditional"), &json!({ "local_below_tokens": 100, "local_below_ratio": 1.0 }))
        .await;
    let mut short = chat(5);
    short["messages"][0]["content"] = "word ".repeat(60).into();
    for number in 0..4 {
        assert!(is_remote(&host.http.stream(CHAT, &streamed(long(chat(5), number))).await));
        assert!(!is_remote(&host.http.stream(CHAT, &streamed(short.clone())).await));
    }
    assert_eq!((prefilled(&host, "remote").await, prefilled(&host, "local").await), (4.0, 4.0));
}
