//! Metrics: what was served, how quickly, what went wrong, and what the host itself cost.

use serde_json::json;

use crate::harness::{
    components,
    host::{Host, chat, completion, streamed},
};

#[tokio::test]
async fn what_was_served_is_counted() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    host.activate(&components::policy("least-loaded"), &json!({})).await;
    for _ in 0..3 {
        host.http.stream("/v1/chat/completions", &streamed(chat(20))).await;
    }
    host.http.ask("/v1/completions", &completion(5)).await;
    host.http.post("/v1/chat/completions", "{").await.is_error(400, "invalid_json");

    let count = async |name: &str, labels: &[(&str, &str)]| host.http.metric(&format!("dynamo_host_{name}"), labels).await;
    let chats = [("endpoint", "chat_completions"), ("model", "m"), ("code", "200")];
    assert_eq!(count("requests_total", &chats).await, 3.0);
    assert_eq!(count("requests_total", &[("endpoint", "completions"), ("model", "m"), ("code", "200")]).await, 1.0);
    assert_eq!(count("requests_total", &[("code", "400")]).await, 1.0);
    assert_eq!(count("errors_total", &[("kind", "invalid_json")]).await, 1.0);
    assert_eq!(count("output_tokens_total", &[]).await, 65.0);
    assert!(count("time_to_first_token_seconds_count", &[]).await >= 3.0);
    assert!(count("inter_token_latency_seconds_count", &[]).await >= 3.0 * 19.0);
    let policy = format!("least-loaded@{}", env!("CARGO_PKG_VERSION"));
    assert_eq!(count("policy_calls_total", &[("policy", &policy)]).await, 4.0);
    assert_eq!(count("policy_call_seconds_count", &[("policy", &policy)]).await, 4.0);
    assert_eq!(count("policy_call_fuel_count", &[("policy", &policy)]).await, 4.0);
}

#[tokio::test]
async fn each_stage_of_the_hosts_own_work_has_a_histogram_in_seconds() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    host.serves(4).await;
    let page = host.http.get("/metrics").await.text();
    let stages: Vec<_> = page.lines().filter(|line| line.starts_with("dynamo_host_stage_seconds_count{")).collect();
    assert!(stages.len() >= 3, "{stages:?}");
    assert!(stages.iter().all(|line| line.contains("stage=\"")), "{stages:?}");
    let fine = page.lines().any(|line| line.starts_with("dynamo_host_stage_seconds_bucket{") && line.contains("le=\"0.00"));
    assert!(fine, "buckets of microseconds: {page}");
}

#[tokio::test]
async fn names_that_clients_choose_do_not_become_labels() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    for i in 0..50 {
        let mut asked = chat(1);
        asked["model"] = format!("made-up-{i}").into();
        host.http.post("/v1/chat/completions", asked.to_string()).await.is_error(404, "model_not_found");
        host.http.get(&format!("/made-up-{i}")).await;
    }
    let page = host.http.get("/metrics").await.text();
    assert!(!page.contains("made-up"), "{page}");
}
