//! Roles of workers: who may hand KV to whom is found out before anybody's request is, and said where it cannot be.

use serde_json::Value;

use crate::harness::{
    eventually,
    host::{Host, MockProcess, completion, streamed},
};

const COMPLETIONS: &str = "/v1/completions";

/// An engine that was started for a role.
async fn start(role: &str, profile: &[&str]) -> MockProcess {
    MockProcess::start(&[&["speedup=20", &format!("role={role}")], profile].concat()).await
}

/// An engine as a worker of a role, `more` beside.
fn worker(engine: &MockProcess, role: &str, more: &str) -> String {
    format!("{},name={role},model=m,role={role}{more}", engine.url())
}

async fn over(workers: &[String]) -> Host {
    let arguments: Vec<&str> = workers.iter().flat_map(|worker| ["--worker", worker]).collect();
    Host::start(&arguments).await
}

/// The row of a worker, once it is so.
async fn row(host: &Host, name: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    eventually(what, async || {
        let workers = host.admin.get_json("/v1/workers").await;
        let rows = workers["workers"].as_array().cloned().unwrap_or_default();
        rows.into_iter().find(|row| row["name"] == name).filter(|row| is_so(row))
    })
    .await
}

async fn is_served_as(host: &Host, state: &str) -> bool {
    host.http.metric("dynamo_host_disaggregation", &[("model", "m"), ("state", state)]).await == 1.0
}

#[tokio::test]
async fn a_pair_is_tried_before_its_first_request_and_its_link_is_shown() {
    let [prefill, decode] = [start("prefill", &[]).await, start("decode", &[]).await];
    let host = over(&[worker(&prefill, "prefill", ""), worker(&decode, "decode", "")]).await;
    for name in ["prefill", "decode"] {
        let row = row(&host, name, "it can hand over", |row| row["handoff"]["state"] == "ready").await;
        assert_eq!((&row["handoff"]["protocol"], &row["trouble"]), (&"nixl".into(), &Value::Null));
    }
    assert!(is_served_as(&host, "split").await);
    assert_eq!(host.http.metric("dynamo_host_handoff_checks_total", &[("result", "ok")]).await, 1.0);
    let links = host.cli(&["worker", "list", "--links"]).await;
    assert!(links.succeeded().contains("no KV has gone between workers yet"), "{}", links.stdout);
    let mut asked = completion(3);
    asked["prompt"] = "word ".repeat(200).into();
    asked["stream"] = true.into();
    host.http.stream(COMPLETIONS, &asked).await;
    let links = host.cli(&["worker", "list", "--links"]).await;
    assert!(links.succeeded().contains("prefill -> decode"), "{}", links.stdout);
    assert!(links.stdout.contains("prefill and decode are apart"), "{}", links.stdout);
    let roles: Vec<Value> = host.admin.get_json("/v1/status").await["queue"]["pools"][0]["roles"].as_array().cloned().unwrap();
    assert_eq!((roles.len(), &roles[0]["role"]), (2, &"prefill".into()), "{roles:?}");
}

#[tokio::test]
async fn workers_of_mismatched_blocks_are_refused_and_requests_are_served_whole() {
    let prefill = start("prefill", &["block_size=16"]).await;
    let decode = start("decode", &["block_size=32"]).await;
    // A server that says how large its blocks are.
    let host = over(&[worker(&prefill, "prefill", ",kind=vllm"), worker(&decode, "decode", ",kind=vllm")]).await;
    let row = row(&host, "decode", "it is refused", |row| row["handoff"]["state"] == "refused").await;
    let reason = row["handoff"]["reason"].as_str().unwrap();
    assert!(reason.contains("mismatched block sizes") && reason.contains("start both with the same"), "{reason}");
    assert!(is_served_as(&host, "no_pair").await);
    assert_eq!(host.http.ask(COMPLETIONS, &completion(3)).await.status, 200);
    let list = host.cli(&["worker", "list"]).await;
    assert!(list.succeeded().contains("it gets no hand-offs: mismatched block sizes"), "{}", list.stdout);
    let status = host.cli(&["status"]).await;
    assert!(status.succeeded().contains("so requests are served whole"), "{}", status.stdout);
    assert_eq!(prefill.http.metric("vllm:request_success_total", &[]).await, 0.0, "nothing was tried");

    // Who decodes serves whole requests; where that fails one, who prefills can do so, too.
    decode.http.post("/mock/faults", r#"{"error_event":0}"#).await;
    let answer = host.http.stream(COMPLETIONS, &streamed(completion(3))).await;
    assert_eq!(answer.finish_reasons(), ["length"]);
    assert_eq!(prefill.http.metric("vllm:request_success_total", &[]).await, 1.0, "it served it");
}

#[tokio::test]
async fn a_role_that_no_worker_has_is_said_and_how_to_add_it() {
    let decode = start("decode", &[]).await;
    let host = over(&[worker(&decode, "decode", "")]).await;
    assert_eq!(host.http.ask(COMPLETIONS, &completion(3)).await.status, 200);
    assert!(is_served_as(&host, "no_prefill").await);
    let list = host.cli(&["worker", "list"]).await;
    assert!(
        list.succeeded().contains("no worker known to serve it has role prefill or both, so requests are served whole; add one"),
        "{}",
        list.stdout
    );
    row(&host, "decode", "nobody is there for it", |row| row["handoff"]["state"] == "alone").await;
}
