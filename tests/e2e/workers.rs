//! Workers as operators see them: what engines report, ranks, and draining.

use dynamo_engine_mock::tokens;
use serde_json::{Value, json};

use crate::harness::{
    components, eventually,
    host::{Host, completion, streamed},
    process::{Process, dynamo_host},
};

const COMPLETIONS: &str = "/v1/completions";

/// The rows of `GET /v1/workers`.
pub(crate) async fn workers(host: &Host) -> Vec<Value> {
    host.admin.get_json("/v1/workers").await["workers"].as_array().unwrap().clone()
}

/// Waits until the rows are as they should be, and returns them.
pub(crate) async fn workers_until(host: &Host, what: &str, condition: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    eventually(what, async || Some(workers(host).await).filter(|workers| condition(workers))).await
}

fn names(workers: &[Value]) -> Vec<&str> {
    workers.iter().map(|worker| worker["name"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn what_an_engine_reports_is_shown_with_its_age() {
    // More than it runs at once, so that one waits in the engine and not in the host.
    let engine = "decode_ms_base=1e12&max_num_seqs=1&kv_blocks=4096&max_model_len=1000,max_running=2";
    let host = Host::over_mocks(&["a"], engine, &[]).await;
    let mut running = host.http.open(COMPLETIONS, &streamed(completion(9))).await;
    running.event().await;
    let (client, body) = (host.http.clone(), completion(9).to_string());
    let mut waiting = tokio::task::JoinSet::new();
    waiting.spawn(async move { client.post(COMPLETIONS, body).await });
    let rows = workers_until(&host, "a request waits in the engine", |rows| rows[0]["queued_requests"] == 1).await;
    let row = &rows[0];
    assert_eq!((&row["kv_tokens_total"], &row["active_requests"]), (&json!(4096 * 16), &json!(2)), "{row}");
    assert!(row["kv_tokens_free"].as_u64().unwrap() < 4096 * 16, "{row}");
    assert!(row["load_age_ms"].is_u64() && row["load_trouble"].is_null(), "{row}");
    let table = host.cli(&["worker", "list"]).await;
    for word in ["queued", "kv free", "load age", "healthy", "mock", "static"] {
        assert!(table.succeeded().contains(word), "{word}: {}", table.stdout);
    }
    waiting.shutdown().await;
    drop(running);
    workers_until(&host, "nothing waits", |rows| rows[0]["queued_requests"] == 0).await;
}

#[tokio::test]
async fn an_engine_of_several_ranks_is_several_workers() {
    // In turn: chance would leave one out, one time in twelve.
    let routing = components::policy("round-robin");
    let host = Host::start(&["--worker", "mock://a?model=m&speedup=50,ranks=3", "--routing", &routing]).await;
    for _ in 0..9 {
        host.serves(2).await;
    }
    let rows = workers(&host).await;
    let ranks: Vec<_> = rows.iter().map(|row| row["rank"].as_u64().unwrap()).collect();
    assert_eq!((names(&rows), ranks), (vec!["a"; 3], vec![0, 1, 2]));
    let served: u64 = rows.iter().map(|row| row["served"].as_u64().unwrap()).sum();
    assert!(served == 9 && rows.iter().all(|row| row["served"] != 0), "{rows:?}");
}

#[tokio::test]
async fn a_drained_worker_finishes_what_it_has_and_gets_nothing_new() {
    let host = Host::over_mocks(&["a", "b"], "speedup=1", &["--expose-worker"]).await;
    // One stream on each.
    let mut streams = Vec::new();
    for _ in 0..2 {
        streams.push(host.http.open(COMPLETIONS, &streamed(completion(250))).await);
    }
    workers_until(&host, "each has a stream", |rows| rows.iter().all(|row| row["active_requests"] == 1)).await;
    let drained: Value = serde_json::from_str(host.cli(&["worker", "drain", "a", "--output", "json"]).await.succeeded()).unwrap();
    assert_eq!(drained["workers"][0]["state"], "draining", "{drained}");
    for _ in 0..6 {
        assert_eq!(host.serves(1).await.header("x-dynamo-worker"), "b");
    }
    for stream in streams {
        assert_eq!(tokens::count(&stream.streamed().await.unwrap().text()), Ok(250));
    }
    let waited = host.cli(&["worker", "drain", "a", "--wait", "60"]).await;
    assert!(waited.succeeded().contains("draining"), "{}", waited.stdout);
    assert_eq!(host.http.metric("dynamo_host_workers", &[("state", "draining")]).await, 1.0);

    assert!(host.cli(&["worker", "resume", "a"]).await.succeeded().contains("healthy"));
    eventually("a serves again", async || (host.serves(1).await.header("x-dynamo-worker") == "a").then_some(())).await;
    host.cli(&["worker", "drain", "nobody"]).await.failed(1, &["nobody", "worker list"]);
    host.cli(&["worker", "resume", "nobody"]).await.failed(1, &["nobody"]);
}

#[tokio::test]
async fn when_all_workers_are_drained_requests_say_so_and_a_wait_is_bounded() {
    let host = Host::over_mocks(&["a"], "decode_ms_base=1e12", &[]).await;
    let mut stream = host.http.open(COMPLETIONS, &streamed(completion(9))).await;
    stream.event().await;
    host.cli(&["worker", "drain", "a", "--wait", "0"]).await.failed(1, &["is drained", "1 requests"]);
    host.http.post(COMPLETIONS, completion(1).to_string()).await.is_error(503, "no_worker");
}

#[tokio::test]
async fn a_drained_worker_is_drained_after_a_restart_with_a_state_directory() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().to_str().unwrap();
    let mut host = Host::over_mocks(&["a", "c"], "", &["--state-dir", state]).await;
    host.cli(&["worker", "drain", "a"]).await.succeeded();
    host.process.kill();
    drop(host);
    let workers = ["--worker", "mock://a?model=m", "--worker", "mock://c?model=m", "--state-dir", state];
    let host = Host::start_anyhow(&workers).await;
    let rows = workers_until(&host, "c is healthy", |rows| rows[1]["state"] == "healthy").await;
    assert_eq!((&rows[0]["name"], &rows[0]["state"]), (&json!("a"), &json!("draining")));
    host.cli(&["worker", "resume", "a"]).await.succeeded();
    host.workers_are("healthy").await;
}

#[tokio::test]
async fn thousands_of_workers_are_ready_at_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("host.toml");
    let workers: String = (0..3000).map(|i| format!("[[worker]]\nurl = \"mock://w{i}?model=m&speedup=50\"\n")).collect();
    std::fs::write(&file, workers).unwrap();
    let arguments = ["serve", "--http", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--config", file.to_str().unwrap()];
    let mut process = Process::start("dynamo-host serve", &mut dynamo_host(&arguments));
    let http = crate::harness::client::Client::new(&process.listener("front door listening on http://").await);
    eventually("all workers are ready", async || (http.get_json("/ready").await["ready_workers"] == 3000).then_some(())).await;
    http.ask(COMPLETIONS, &completion(3)).await;
}
