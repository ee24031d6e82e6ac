//! The queue in front of engines: nothing waits inside them, who is next, and what becomes of those who cannot wait.

use http::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::harness::{
    client::{Client, Reply},
    components, eventually,
    host::{Host, MockProcess, chat, completion, streamed},
    process::run,
    replace, soon,
    sse::Events,
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// A host over one engine that runs one request at a time, configured so.
async fn host_of_one_place(config: &str) -> Host {
    let host = Host::configured(config, &["--worker", "mock://a?model=m&max_num_seqs=1&decode_ms_base=5"]).await;
    eventually("the engine's places are known", async || (pool(&host).await["free"] == 1).then_some(())).await;
    host
}

async fn pool(host: &Host) -> Value {
    host.admin.get_json("/v1/queue").await["pools"][0].clone()
}

async fn until_waiting(host: &Host, requests: u64) {
    let what = format!("{requests} requests wait");
    eventually(&what, async || (pool(host).await["queued"] == requests).then_some(())).await;
}

/// A stream that has begun, and goes on until it is dropped.
async fn occupy(client: &Client) -> Events {
    let mut events = client.open(CHAT, &streamed(chat(30_000))).await;
    events.event().await;
    events
}

/// Asks for a short answer under these headers.
async fn ask(client: Client, headers: Vec<(&'static str, &'static str)>) -> Reply {
    client.send(Method::POST, COMPLETIONS, &headers, completion(3).to_string()).await
}

/// Requests that an engine has.
async fn inside(engine: &MockProcess) -> f64 {
    let page = engine.http.get("/metrics").await.text();
    let value = |line: &str| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap();
    let of = |name: &str| page.lines().filter(|line| line.starts_with(name)).map(value).sum::<f64>();
    of("vllm:num_requests_running{") + of("vllm:num_requests_waiting{")
}

async fn count(host: &Host, name: &str, labels: &[(&str, &str)]) -> f64 {
    host.http.metric(&format!("dynamo_host_{name}"), labels).await
}

#[tokio::test]
async fn nothing_waits_inside_engines_and_all_are_served() {
    let mut engines = Vec::new();
    for _ in 0..2 {
        engines.push(MockProcess::start(&["max_num_seqs=2", "decode_ms_base=5"]).await);
    }
    // Engines of this kind do not say how many requests they run.
    let workers: Vec<String> = engines.iter().map(|engine| format!("{},model=m,max_running=2", engine.url())).collect();
    let host = Host::start(&["--worker", &workers[0], "--worker", &workers[1]]).await;
    let mut asked = JoinSet::new();
    for _ in 0..40 {
        let client = host.http.clone();
        asked.spawn(async move { client.ask(COMPLETIONS, &completion(20)).await });
    }
    let (mut served, mut most_inside) = (0, 0.0_f64);
    while served < 40 {
        for engine in &engines {
            // One that came within a step waits for the next one, be there room or not. The page is of one moment.
            most_inside = most_inside.max(inside(engine).await);
        }
        while let Some(done) = asked.try_join_next() {
            done.unwrap();
            served += 1;
        }
    }
    assert!(most_inside <= 2.0, "{most_inside} in one engine");
    assert_eq!(count(&host, "admission_total", &[("verdict", "admit"), ("class", "default")]).await, 40.0);
    assert_eq!(count(&host, "queue_wait_seconds_count", &[("class", "default")]).await, 40.0);
    assert!(count(&host, "queue_wait_seconds_sum", &[]).await > 0.0);
    assert_eq!((count(&host, "queue_requests", &[]).await, count(&host, "queue_tokens", &[]).await), (0.0, 0.0));
    for stage in ["admission", "queue"] {
        assert_eq!(count(&host, "stage_seconds_count", &[("stage", stage)]).await, 40.0, "{stage}");
    }
}

#[tokio::test]
async fn a_request_that_finds_room_does_not_wait_and_one_that_does_not_says_how_long_it_did() {
    let host = host_of_one_place("").await;
    assert_eq!(host.serves(3).await.header("x-dynamo-queue-ms"), "0.000");
    let first = occupy(&host.http).await;
    let mut second = JoinSet::new();
    second.spawn(ask(host.http.clone(), vec![]));
    until_waiting(&host, 1).await;
    assert_eq!(count(&host, "queue_requests", &[("model", "m"), ("class", "default")]).await, 1.0);
    let status = host.cli(&["status"]).await;
    assert!(status.stdout.contains("1 wait") && status.stdout.contains("waiting by classes: default 1"), "{}", status.stdout);
    drop(first);
    let reply = soon("the second is served", second.join_next()).await.unwrap().unwrap();
    let waited: f64 = reply.header("x-dynamo-queue-ms").parse().unwrap();
    assert!(reply.status.is_success() && waited > 0.0, "{waited}");
}

#[tokio::test]
async fn a_full_queue_is_said_at_once_and_when_to_come_back() {
    let host = host_of_one_place("[queue]\nmax_requests = 1").await;
    let _first = occupy(&host.http).await;
    let mut second = JoinSet::new();
    second.spawn(ask(host.http.clone(), vec![]));
    until_waiting(&host, 1).await;
    let third = host.http.post(CHAT, chat(3).to_string()).await;
    let message = third.is_error(503, "queue_full");
    assert!(message.contains("queue.max_requests"), "{message}");
    let retry_after: u64 = third.header("retry-after").parse().unwrap();
    assert!((1..=60).contains(&retry_after) && !third.header("x-dynamo-queue-ms").is_empty());
    let body = json!({ "model": "m", "max_tokens": 3, "messages": [{ "role": "user", "content": "count" }] });
    let messages = host.http.post("/v1/messages", body.to_string()).await;
    assert_eq!((messages.status.as_u16(), &messages.json()["error"]["type"]), (503, &json!("overloaded_error")));
    // Counting tokens takes no place in an engine.
    host.http.ask("/v1/messages/count_tokens", &body).await;
    assert_eq!(count(&host, "shed_total", &[("reason", "requests")]).await, 2.0);
}

#[tokio::test]
async fn prompts_that_are_too_long_to_wait_are_refused_and_short_ones_are_not() {
    let host = host_of_one_place("[queue]\nmax_tokens = 100").await;
    let _first = occupy(&host.http).await;
    let long = json!({ "model": "m", "prompt": "count ".repeat(200), "max_tokens": 3 });
    let message = host.http.post(COMPLETIONS, long.to_string()).await.is_error(503, "queue_full");
    assert!(message.contains("more than 100 tokens") && message.contains("queue.max_tokens"), "{message}");
    let mut short = JoinSet::new();
    short.spawn(ask(host.http.clone(), vec![]));
    until_waiting(&host, 1).await;
}

#[tokio::test]
async fn who_has_waited_for_too_long_is_told_so() {
    let host = host_of_one_place("[queue]\ntimeout_s = 1").await;
    let _first = occupy(&host.http).await;
    let second = host.http.post(CHAT, streamed(chat(3)).to_string()).await;
    second.is_error(504, "queue_timeout");
    let waited: f64 = second.header("x-dynamo-queue-ms").parse().unwrap();
    assert!(waited >= 1000.0, "{waited}");
    assert_eq!(count(&host, "shed_total", &[("reason", "timeout")]).await, 1.0);
    assert_eq!(count(&host, "admission_total", &[("verdict", "shed")]).await, 1.0);
}

#[tokio::test]
async fn a_clients_own_deadline_is_kept_and_one_that_is_over_is_said_at_once() {
    let host = host_of_one_place("").await;
    for over in ["0", "-5"] {
        ask(host.http.clone(), vec![("x-request-timeout-ms", over)]).await.is_error(504, "queue_timeout");
    }
    for wrong in ["soon", "1.5", ""] {
        let message = ask(host.http.clone(), vec![("x-request-timeout-ms", wrong)]).await.is_error(400, "invalid_header");
        assert!(message.contains("x-request-timeout-ms") && message.contains("milliseconds"), "{message}");
    }
    let more = ask(host.http.clone(), vec![("x-request-timeout-ms", "999999999999999")]).await;
    assert!(more.status.is_success(), "more time than the host gives is no mistake");
    let long = host.http.send(Method::POST, COMPLETIONS, &[("x-request-timeout-ms", "300")], completion(30_000).to_string());
    let message = long.await.is_error(504, "request_timeout");
    assert!(message.contains("0.3 s"), "{message}");
    let _first = occupy(&host.http).await;
    ask(host.http.clone(), vec![("x-request-timeout-ms", "50")]).await.is_error(504, "queue_timeout");
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_place() {
    let host = host_of_one_place("[queue]\nmax_requests = 1").await;
    let first = occupy(&host.http).await;
    for _ in 0..3 {
        let mut second = JoinSet::new();
        second.spawn(ask(host.http.clone(), vec![]));
        until_waiting(&host, 1).await;
        second.shutdown().await;
        until_waiting(&host, 0).await;
    }
    assert_eq!(count(&host, "shed_total", &[("reason", "left")]).await, 3.0);
    assert_eq!(count(&host, "queue_requests", &[]).await, 0.0);
    drop(first);
    host.serves(3).await;
}

#[tokio::test]
async fn an_admission_policy_refuses_a_tenant_its_own_limit_and_is_heard_before_the_queue() {
    let host = Host::configured("[auth]\ntenant_header = 'x-tenant'", &["--worker", "mock://a?model=m&speedup=50"]).await;
    let settings = json!({ "requests_per_minute": 2, "request_burst": 2, "per": "tenant" }).to_string();
    let policy = components::policy("token-bucket");
    let activated = host.cli(&["policy", "activate", "admission", &policy, "--settings", &settings]).await;
    assert_eq!(activated.code, Some(0), "{}", activated.stderr);
    let of = async |tenant: &'static str| ask(host.http.clone(), vec![("x-tenant", tenant)]).await;
    for _ in 0..2 {
        assert!(of("ann").await.status.is_success());
    }
    let third = of("ann").await;
    third.is_error(429, "rate_limit_exceeded");
    assert_eq!(third.json()["error"]["type"], "rate_limit_error");
    let retry_after: u64 = third.header("retry-after").parse().unwrap();
    assert!((1..=60).contains(&retry_after), "{retry_after}");
    assert!(!third.header("x-dynamo-queue-ms").is_empty());
    assert!(of("bob").await.status.is_success(), "another tenant has a limit of its own");
    assert_eq!(count(&host, "shed_total", &[("reason", "policy")]).await, 1.0);
    host.cli(&["policy", "bypass", "admission"]).await;
    assert!(of("ann").await.status.is_success(), "the kill switch lets everything in");
}

const TENANTS: &str = "[auth]\ntenant_header = 'x-tenant'\n[queue.classes.interactive]\ntier = 0\n[queue.classes.batch]\ntier = 1\n\
                       [queue.tenants.ann]\nclass = 'interactive'\n[queue.tenants.bob]\nclass = 'batch'";

#[tokio::test]
async fn a_lower_tier_is_served_first_whoever_came_before() {
    let host = host_of_one_place(TENANTS).await;
    let first = occupy(&host.http).await;
    let mut asked = JoinSet::new();
    for (nth, tenant) in ["bob", "bob", "bob", "ann", "ann"].into_iter().enumerate() {
        let client = host.http.clone();
        asked.spawn(async move { (tenant, ask(client, vec![("x-tenant", tenant)]).await) });
        until_waiting(&host, nth as u64 + 1).await;
    }
    let waiting = pool(&host).await;
    assert_eq!(waiting["classes"], json!({ "batch": 3, "interactive": 2 }), "{waiting}");
    assert_eq!(waiting["tenants"].as_object().unwrap().len(), 2, "{waiting}");
    drop(first);
    let mut waits: Vec<(f64, &str)> = Vec::new();
    while let Some(done) = soon("all are served", asked.join_next()).await {
        let (tenant, reply) = done.unwrap();
        assert!(reply.status.is_success(), "{}", reply.text());
        waits.push((reply.header("x-dynamo-queue-ms").parse().unwrap(), tenant));
    }
    // Those who came last waited least, or they would not have been served first.
    waits.sort_by(|a, b| a.0.total_cmp(&b.0));
    assert_eq!(waits[0].1, "ann", "{waits:?}");
    assert_eq!(count(&host, "admission_total", &[("class", "interactive"), ("verdict", "admit")]).await, 2.0);
    assert_eq!(count(&host, "admission_total", &[("class", "batch"), ("verdict", "admit")]).await, 3.0);
}

#[tokio::test]
async fn who_waits_for_a_worker_that_does_not_come_back_is_told_within_the_hold() {
    let engine = MockProcess::start(&["decode_ms_base=5"]).await;
    let worker = format!("{},model=m,max_running=1,name=a", engine.url());
    let host = Host::configured("[health]\nhold_s = 1", &["--worker", &worker]).await;
    let _first = occupy(&host.http).await;
    let mut second = JoinSet::new();
    second.spawn(ask(host.http.clone(), vec![]));
    until_waiting(&host, 1).await;
    assert_eq!(host.cli(&["worker", "drain", "a"]).await.code, Some(0));
    let reply = soon("it is told", second.join_next()).await.unwrap().unwrap();
    reply.is_error(503, "no_worker");
    assert!(!reply.header("retry-after").is_empty());
    assert_eq!(count(&host, "shed_total", &[("reason", "no_worker")]).await, 1.0);
}

#[tokio::test]
async fn a_drained_workers_requests_make_no_room_on_others() {
    let host = Host::configured(
        "",
        &[
            "--worker",
            "mock://a?model=m&decode_ms_base=5,max_running=1",
            "--worker",
            "mock://b?model=m&decode_ms_base=5,max_running=1",
        ],
    )
    .await;
    let on = [occupy(&host.http).await, occupy(&host.http).await];
    assert_eq!(host.cli(&["worker", "drain", "a"]).await.code, Some(0));
    let mut third = JoinSet::new();
    third.spawn(ask(host.http.clone(), vec![]));
    until_waiting(&host, 1).await;
    let workers = host.admin.get_json("/v1/workers").await;
    let active = |name: &str| {
        let rows = workers["workers"].as_array().unwrap();
        rows.iter().find(|row| row["name"] == name).unwrap()["active_requests"].clone()
    };
    assert_eq!((active("a"), active("b")), (json!(1), json!(1)), "each has one");
    drop(on);
    let reply = soon("the third is served", third.join_next()).await.unwrap().unwrap();
    assert!(reply.status.is_success());
}

#[tokio::test]
async fn bounds_change_in_a_running_host_and_impossible_ones_change_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("host.toml");
    std::fs::write(&file, "[queue]\nmax_requests = 7").unwrap();
    let host = Host::start(&["--config", file.to_str().unwrap(), "--worker", "mock://a?model=m"]).await;
    let bound = async |bound: u64| {
        let is_so = async || (host.admin.get_json("/v1/queue").await["max_requests"] == bound).then_some(());
        eventually(&format!("{bound} may wait"), is_so).await;
    };
    bound(7).await;
    replace(&file, "[queue]\nmax_requests = 8");
    bound(8).await;
    replace(&file, "[queue]\nmax_requests = 0");
    let trouble = eventually("it is said", async || {
        host.admin.get_json("/v1/status").await["config"]["trouble"].as_str().map(str::to_owned)
    })
    .await;
    assert!(trouble.contains("queue.max_requests is 0; use 1 to 1000000"), "{trouble}");
    bound(8).await;
    run(&["config", "check", file.to_str().unwrap()]).await.failed(1, &["queue.max_requests is 0; use 1 to 1000000"]);
}
