//! Receipts: what was decided is on disk, says nothing of prompts, and can be decided again.

use std::{fs, path::Path};

use serde_json::{Value, json};

use crate::harness::{
    components, eventually,
    host::{Host, MockProcess, chat, completion, streamed},
    process::{run, serve},
    scripted::Scripted,
};

const CHAT: &str = "/v1/chat/completions";
/// A word that only a prompt has.
const MARKER: &str = "zanzibar-marker-7291";

/// Lines of one kind.
async fn lines(state: &Path, kind: &str) -> Vec<Value> {
    let all = run(&["receipts", "export", "--state-dir", state.to_str().unwrap()]).await;
    let lines = all.succeeded().lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["kind"] == kind).collect()
}

/// Waits until so many requests have ended, by their receipts.
async fn ended(state: &Path, count: usize) -> Vec<Value> {
    eventually(&format!("{count} outcomes are written"), async || {
        if !state.join("receipts").is_dir() {
            return None;
        }
        let outcomes = lines(state, "outcome").await;
        (outcomes.len() >= count).then_some(outcomes)
    })
    .await
}

/// A host with a state directory over three mock engines.
async fn host(state: &Path, arguments: &[&str]) -> Host {
    let state = ["--state-dir", state.to_str().unwrap()];
    Host::over_mocks(&["a", "b", "c"], "speedup=50", &[&state, arguments].concat()).await
}

/// Requests of all sorts at once, so that loads differ.
async fn traffic(host: &Host, count: usize) {
    let mut requests = tokio::task::JoinSet::new();
    for nth in 0..count {
        let http = host.http.clone();
        let mut body = chat(5 + nth as u32 % 20);
        body["messages"][0]["content"] = format!("{MARKER} {}", "word ".repeat(nth * 7 % 300)).into();
        let body = if nth % 2 == 0 { streamed(body) } else { body };
        requests.spawn(async move { http.post(CHAT, body.to_string()).await.status.as_u16() });
    }
    assert!(requests.join_all().await.into_iter().all(|status| status == 200));
}

fn replay(state: &Path, policy: &str) -> impl Future<Output = Value> {
    let arguments = ["policy", "replay", "--receipts", state.to_str().unwrap(), "--output", "json", "--policy", policy];
    let arguments = arguments.map(str::to_owned);
    async move {
        let finished = run(&arguments.each_ref().map(String::as_str)).await;
        serde_json::from_str(finished.succeeded()).unwrap()
    }
}

#[tokio::test]
async fn every_decision_is_written_with_what_it_read_and_what_became_of_it_and_nothing_of_the_prompt() {
    let directory = tempfile::tempdir().unwrap();
    let policy = components::policy("composed");
    let host = host(directory.path(), &["--routing", &policy]).await;
    traffic(&host, 30).await;
    let outcomes = ended(directory.path(), 30).await;
    let decisions = lines(directory.path(), "decision").await;
    assert_eq!((decisions.len(), outcomes.len()), (30, 30));
    for decision in &decisions {
        let outcome = outcomes.iter().find(|outcome| outcome["id"] == decision["id"]).unwrap();
        assert_eq!((&outcome["end"], &outcome["status"]), (&json!("done"), &json!(200)));
        assert_eq!(outcome["worker"], decision["done"]["place"][0]);
        assert_eq!((&decision["by"], &decision["model"], &decision["slot"]), (&json!("policy"), &json!("m"), &json!("routing")));
        assert_eq!(decision["workers"].as_array().unwrap().len(), 3, "{decision}");
        assert!(decision["columns"].get("active-requests").is_some(), "{decision}");
        assert!(
            decision["scores"].as_array().is_some_and(|terms| terms.iter().any(|term| term["term"] == "total")),
            "{decision}"
        );
        assert!(decision["fuel"].as_u64() > Some(0) && decision["digest"].as_str().is_some_and(|digest| digest.len() == 64));
        assert!(decision["facts"]["prompt_tokens"].as_u64() > Some(0));
    }
    assert!(outcomes.iter().all(|outcome| outcome["output_tokens"].as_u64() > Some(0)));

    let state = directory.path().to_str().unwrap().to_owned();
    let tail = run(&["receipts", "tail", "-n", "5", "--state-dir", &state]).await;
    assert_eq!(tail.succeeded().lines().count(), 5);
    assert!(
        tail.stdout.lines().all(|line| line.contains("composed@") && line.contains("→ ") && line.contains("done on")),
        "{}",
        tail.stdout
    );
    let table = run(&["receipts", "export", "--state-dir", &state, "--format", "csv", "--since", "1h"]).await;
    assert_eq!(table.succeeded().lines().count(), 31);
    let none = run(&["receipts", "export", "--state-dir", &state, "--until", "1h"]).await;
    assert_eq!(none.succeeded(), "");

    for file in fs::read_dir(directory.path().join("receipts")).unwrap().map(|entry| entry.unwrap().path()) {
        let text = fs::read_to_string(&file).unwrap();
        assert!(!text.contains("zanzibar") && !text.contains("word word"), "{} tells of a prompt", file.display());
    }
    // Stopped, it leaves nothing behind in a queue.
    host.http.post(CHAT, chat(3).to_string()).await;
    drop(host);
    assert!(lines(directory.path(), "decision").await.len() >= 30);
}

#[tokio::test]
async fn a_policy_that_decides_by_what_it_reads_agrees_with_itself_to_the_last_decision() {
    for name in ["least-loaded", "power-of-two", "composed", "native"] {
        let directory = tempfile::tempdir().unwrap();
        let policy = if name == "native" { name.to_owned() } else { components::policy(name) };
        let host = host(directory.path(), &["--routing", &policy]).await;
        traffic(&host, 40).await;
        ended(directory.path(), 40).await;
        let report = replay(directory.path(), &policy).await;
        assert_eq!((&report["total"]["decisions"], &report["own"]["same_first"]), (&json!(40), &json!(40)), "{name}: {report:#}");
        assert_eq!((&report["not_held"], &report["faults"]), (&json!({}), &json!({})), "{name}: {report:#}");
        drop(host);
    }
}

#[tokio::test]
async fn another_policy_is_compared_and_what_it_lacks_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let host = host(directory.path(), &["--routing", &components::policy("least-loaded")]).await;
    traffic(&host, 40).await;
    ended(directory.path(), 40).await;
    let witness = replay(directory.path(), &components::guest("witness")).await;
    assert!(witness["not_held"]["kv-tokens-free"] == 40 && witness["not_held"]["label \"zone\""] == 40, "{witness:#}");
    assert!(witness["notes"].to_string().contains("keeps state"), "{witness:#}");
    let other = replay(directory.path(), &components::policy("round-robin")).await;
    let total = &other["total"];
    let differing: u64 = total["differences"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum();
    assert_eq!(total["same_first"].as_u64().unwrap() + differing, 40, "{other:#}");
    assert_eq!(total["in_top"], 40, "there are three workers, and all of them were ranked: {other:#}");
    assert!(differing > 0 && !other["examples"].as_array().unwrap().is_empty(), "{other:#}");
    let state = directory.path().to_str().unwrap();
    let trapping = format!("{},{{\"mode\":\"trap\"}}", components::guest("hostile"));
    let failing = run(&["policy", "replay", "--receipts", state, "--policy", &trapping]).await;
    assert!(failing.succeeded().contains("least-loaded@"), "{}", failing.stdout);

    run(&["policy", "replay", "--receipts", "/nowhere", "--policy", "native"]).await.failed(1, &["/nowhere", "has no receipts"]);
    run(&["policy", "replay", "--receipts", state, "--policy", "none.wasm"]).await.failed(1, &["none.wasm", "cannot be read"]);
    run(&["receipts", "tail"]).await.failed(2, &["--state-dir"]);
    run(&["receipts", "export", "--state-dir", state, "--since", "yesterday"]).await.failed(1, &["--since", "2h"]);
}

#[tokio::test]
async fn who_decided_instead_and_every_attempt_are_told() {
    let directory = tempfile::tempdir().unwrap();
    let broken = Scripted::answering("").await;
    let state = directory.path().to_str().unwrap();
    let arguments = ["--worker", &broken.worker(), "--worker", "mock://a?model=m&speedup=50", "--state-dir", state];
    let host = Host::start(&arguments).await;
    host.activate(&components::guest("hostile"), &json!({ "mode": "trap" })).await;
    let trapping = 13;
    // Until one of them was given to the worker that breaks what it is given.
    let outcomes = eventually("a request is tried again", async || {
        host.http.ask("/v1/completions", &completion(trapping)).await;
        let outcomes = ended(directory.path(), 1).await;
        outcomes.iter().any(|outcome| outcome["end"] == "failed").then_some(outcomes)
    })
    .await;
    let decisions = lines(directory.path(), "decision").await;
    let first = &decisions[0];
    assert_eq!(
        (&first["by"], &first["policy"], &first["failed"]["cause"]),
        (&json!("fallback"), &json!("native"), &json!("trap")),
        "{first}"
    );
    let failed = outcomes.iter().find(|outcome| outcome["end"] == "failed").unwrap();
    assert_eq!(failed.get("status"), None, "the client got its answer from elsewhere: {failed}");
    let joined = |outcome: &Value| decisions.iter().any(|decision| decision["id"] == outcome["id"]);
    assert!(outcomes.iter().all(joined), "{outcomes:?}");
}

#[tokio::test]
async fn a_place_that_cannot_be_written_costs_receipts_and_no_request() {
    let directory = tempfile::tempdir().unwrap();
    // Where the folder should be, there is a file.
    fs::write(directory.path().join("receipts"), "").unwrap();
    let host = host(directory.path(), &[]).await;
    traffic(&host, 10).await;
    eventually("all lines are counted as lost", async || {
        (host.http.metric("dynamo_host_receipts_dropped_total", &[("cause", "disk")]).await == 20.0).then_some(())
    })
    .await;
    host.process.logs("receipts cannot be written").await;
    assert_eq!(host.process.log().matches("receipts cannot be written").count(), 1, "{}", host.process.log());
    // Once there is room again, they are written again.
    fs::remove_file(directory.path().join("receipts")).unwrap();
    traffic(&host, 3).await;
    ended(directory.path(), 3).await;
    host.process.logs("receipts are written again").await;
}

#[tokio::test]
async fn receipts_need_a_place_and_can_be_off() {
    run(&serve(&["--receipts", "on"])).await.failed(2, &["receipts are on", "--state-dir", "--receipts off"]);
    let directory = tempfile::tempdir().unwrap();
    let host = host(directory.path(), &["--receipts", "off"]).await;
    traffic(&host, 5).await;
    assert!(!directory.path().join("receipts").exists());
}

#[tokio::test]
async fn the_index_is_measured_by_what_engines_report() {
    let engine = MockProcess::start(&["speedup=50"]).await;
    let host = Host::start(&["--worker", &format!("{},model=m", engine.url())]).await;
    let body = json!({ "model": "m", "prompt": "long ".repeat(400), "max_tokens": 2 });
    for _ in 0..2 {
        host.http.ask("/v1/completions", &body).await;
    }
    eventually("the second one's cached tokens are counted", async || {
        (host.http.metric("dynamo_host_prefix_hit_tokens_total", &[("kind", "reported")]).await > 100.0).then_some(())
    })
    .await;
}
