//! The slot `admission`: its policies in a running host, changed like those that route, and kept like them.

use http::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{
    client::Reply,
    components::{guest, policy},
    host::{Host, completion},
    process::run,
};

const VERSION: &str = env!("CARGO_PKG_VERSION");
const COMPLETIONS: &str = "/v1/completions";

/// What the slot says of itself.
async fn slot(host: &Host) -> Value {
    let all = host.admin.get_json("/v1/slots").await;
    all["slots"].as_array().unwrap().iter().find(|slot| slot["slot"] == "admission").unwrap().clone()
}

async fn ask(host: &Host) -> Reply {
    host.http.send(Method::POST, COMPLETIONS, &[], completion(2).to_string()).await
}

#[track_caller]
fn is_shed(reply: &Reply, status: u16, code: &str) {
    assert_eq!(reply.status.as_u16(), status, "{}", reply.text());
    assert_eq!(reply.json()["error"]["code"], code, "{}", reply.text());
}

/// One request, and then none for a minute.
const ONE: &str = r#"{"requests_per_minute": 1, "per": "all"}"#;

#[tokio::test]
async fn a_policy_is_activated_rolled_back_and_bypassed_in_a_running_host() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    let file = policy("token-bucket");
    host.cli(&["policy", "activate", "admission", &file, "--settings", ONE]).await.succeeded();
    let label = format!("token-bucket@{VERSION}");
    assert!(host.cli(&["policy", "list"]).await.succeeded().contains(&label));

    assert_eq!(ask(&host).await.status, StatusCode::OK);
    let refused = ask(&host).await;
    is_shed(&refused, 429, "rate_limit_exceeded");
    let after: u32 = refused.header("retry-after").parse().unwrap();
    assert!((1..=60).contains(&after), "{after}");
    assert!(refused.text().contains("1 requests per minute"), "{}", refused.text());
    let labels = [("slot", "admission"), ("policy", label.as_str())];
    assert!(host.http.metric("dynamo_host_policy_calls_total", &labels).await >= 2.0);
    assert_eq!(host.http.metric("dynamo_host_policy_calls_total", &[("slot", "routing")]).await, 0.0);

    host.cli(&["policy", "bypass", "admission"]).await.succeeded();
    assert_eq!(ask(&host).await.status, StatusCode::OK, "the kill switch lets everything in");
    host.cli(&["policy", "bypass", "admission", "--off"]).await.succeeded();
    is_shed(&ask(&host).await, 429, "rate_limit_exceeded");

    // The same limit after a swap: the buckets are the slot's.
    host.cli(&["policy", "activate", "admission", &file, "--settings", ONE]).await.succeeded();
    is_shed(&ask(&host).await, 429, "rate_limit_exceeded");
    for _ in 0..2 {
        host.cli(&["policy", "rollback", "admission"]).await.succeeded();
    }
    assert_eq!(slot(&host).await["active"]["policy"], "native");
    assert_eq!(ask(&host).await.status, StatusCode::OK);
    assert_eq!(host.active().await, "native", "the slot routing was not touched");
}

#[tokio::test]
async fn the_slot_and_its_switches_survive_kill_9_and_the_configuration_seeds_it() {
    let directory = tempfile::tempdir().unwrap();
    let file = policy("token-bucket");
    let arguments = ["--state-dir", directory.path().to_str().unwrap(), "--admission", &file, "--admission-settings", ONE];
    let mut host = Host::over_mocks(&["a"], "speedup=50", &arguments).await;
    assert_eq!(slot(&host).await["active"]["settings"], json!({ "requests_per_minute": 1, "per": "all" }));
    host.cli(&["policy", "activate", "admission", &policy("fair-share")]).await.succeeded();
    host.cli(&["policy", "on-error", "admission", "closed"]).await.succeeded();
    host.cli(&["policy", "bypass", "admission"]).await.succeeded();
    host.activate(&policy("round-robin"), &json!({})).await;
    host.process.kill();

    let host = Host::over_mocks(&["a"], "speedup=50", &arguments).await;
    let slot = slot(&host).await;
    assert_eq!(slot["active"]["policy"], format!("fair-share@{VERSION}"), "{slot}");
    assert_eq!((&slot["on_error"], &slot["bypass"]), (&json!("closed"), &json!(true)), "{slot}");
    assert_eq!(slot["previous"][0]["policy"], format!("token-bucket@{VERSION}"), "{slot}");
    assert_eq!(host.active().await, format!("round-robin@{VERSION}"));
    host.is_well().await;
}

#[tokio::test]
async fn what_a_slot_does_not_take_is_refused_and_changes_nothing() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    let (router, admission) = (policy("round-robin"), guest("witness-admission"));
    host.cli(&["policy", "activate", "admission", &router]).await.failed(1, &["router", "policy activate routing FILE"]);
    host.cli(&["policy", "activate", "routing", &admission]).await.failed(1, &["policy activate admission FILE"]);
    let bad = r#"{"requests_per_minute": -5}"#;
    let file = policy("token-bucket");
    host.cli(&["policy", "activate", "admission", &file, "--settings", bad]).await.failed(1, &["requests_per_minute is -5"]);
    assert_eq!(slot(&host).await["active"]["policy"], "native");
    host.is_well().await;
}

#[tokio::test]
async fn check_bench_and_inspect_know_the_world() {
    for name in ["token-bucket", "slo-shed", "fair-share"] {
        let file = policy(name);
        let told = run(&["policy", "check", &file, "--output", "json"]).await;
        let told: Value = serde_json::from_str(told.succeeded()).unwrap();
        assert_eq!((&told["ok"], &told["policy"]["world"]), (&json!(true), &json!("admission")), "{told}");
        assert!(told["decisions"].as_array().unwrap().iter().all(|decided| decided["pools"].is_u64()), "{told}");
    }
    let file = policy("fair-share");
    assert!(run(&["policy", "inspect", &file]).await.succeeded().contains("admission of dynamo:policy@0.1.3"));
    let bench = run(&["policy", "bench", &file, "--candidates", "1", "--output", "json"]).await;
    assert!(bench.succeeded().contains("\"pools\": 1"), "{}", bench.stdout);
}
