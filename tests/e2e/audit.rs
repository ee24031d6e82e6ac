//! The audit file: each change by an operator, on disk before it is answered, and no hindrance to any.

use std::{fs, path::Path};

use hyper::{Method, StatusCode, body::Bytes};
use serde_json::{Value, json};

use crate::harness::{
    components, eventually,
    host::{Host, chat},
};

const VERSION: &str = env!("CARGO_PKG_VERSION");
const PROVOCATION: u32 = 13;
const MOCK: &str = "mock://a?model=m&speedup=50";

async fn host_in(directory: &Path, more: &[&str]) -> Host {
    Host::start_anyhow(&[&["--worker", MOCK, "--state-dir", directory.to_str().unwrap()], more].concat()).await
}

fn entries(directory: &Path) -> Vec<Value> {
    let text = fs::read_to_string(directory.join("audit.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

/// What the newest entry says, and that it says all that each does.
#[track_caller]
fn newest(directory: &Path, what: &str) -> Value {
    let entry = entries(directory).pop().unwrap();
    assert_eq!(entry["what"], what, "{entry}");
    assert!(entry["at"].as_str().unwrap().ends_with('Z') && entry["unix_ms"].as_u64().unwrap() > 1_600_000_000_000, "{entry}");
    entry
}

#[tokio::test]
async fn each_change_is_in_the_file_when_it_is_answered() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path();
    let mut host = host_in(state, &["--admin-token", "secret"]).await;
    assert_eq!(newest(state, "start")["to"]["routing"]["policy"], "native");
    let admin = host.admin.with_token("secret");
    let cli = async |arguments: &[&str]| host.cli(&[arguments, &["--token", "secret"]].concat()).await;

    let policy = components::policy("round-robin");
    cli(&["policy", "activate", "routing", &policy]).await.succeeded();
    let entry = newest(state, "policy activate");
    let active = format!("round-robin@{VERSION}");
    assert_eq!(
        (&entry["of"], &entry["from"]["policy"], &entry["to"]["policy"]),
        (&json!("routing"), &json!("native"), &json!(active))
    );
    assert_eq!(entry["to"]["digest"].as_str().unwrap().len(), 64);
    let client = &entry["who"]["client"];
    assert!(client["peer"].as_str().unwrap().starts_with("127.0.0.1:") && client["token"] == true, "{entry}");

    // The kill switch.
    cli(&["policy", "bypass", "routing"]).await.succeeded();
    let entry = newest(state, "policy bypass");
    assert_eq!((&entry["from"]["bypass"], &entry["to"]["bypass"]), (&json!(false), &json!(true)));
    cli(&["policy", "bypass", "routing", "--off"]).await.succeeded();
    assert_eq!(newest(state, "policy bypass")["to"]["bypass"], false);

    cli(&["policy", "on-error", "routing", "closed"]).await.succeeded();
    let entry = newest(state, "policy on-error");
    assert_eq!((&entry["from"]["on_error"], &entry["to"]["on_error"]), (&json!("fallback"), &json!("closed")));
    cli(&["policy", "rollback", "routing"]).await.succeeded();
    assert_eq!(newest(state, "policy rollback")["to"]["policy"], "native");
    cli(&["policy", "rollback", "routing"]).await.failed(1, &["no"]);
    assert!(newest(state, "policy rollback")["refused"].is_string());

    cli(&["worker", "drain", "a"]).await.succeeded();
    let entry = newest(state, "worker drain");
    assert_eq!((&entry["of"], &entry["from"]["drained"], &entry["to"]["drained"]), (&json!("a"), &json!(false), &json!(true)));
    let before = entries(state).len();
    cli(&["worker", "drain", "a", "--wait", "5"]).await.succeeded();
    assert_eq!(entries(state).len(), before, "what is so already is no change");
    cli(&["worker", "resume", "a"]).await.succeeded();
    assert_eq!(newest(state, "worker resume")["to"]["drained"], false);
    // Who is not let in changes nothing, and fills no file.
    let refused = host.admin.send(Method::PUT, "/v1/slots/routing/bypass", &[], Bytes::new()).await;
    assert_eq!(refused.status, StatusCode::UNAUTHORIZED);
    assert_eq!(entries(state).len(), before + 1);

    // As the command tells it.
    let told = cli(&["audit", "--last", "3"]).await;
    let told: Vec<_> = told.succeeded().lines().collect();
    assert!(
        told.len() == 3 && told[2].contains("worker resume a: drained true → false") && told[2].contains("admin token"),
        "{told:?}"
    );
    let listed = admin.get_json("/v1/audit?last=1000").await;
    assert_eq!(listed["entries"].as_array().unwrap(), &entries(state));
    assert_eq!(admin.get("/v1/audit?lost=1").await.status, StatusCode::BAD_REQUEST);

    host.process.signal("TERM");
    assert_eq!(host.process.ended().await.code(), Some(0));
    assert_eq!(newest(state, "stop")["to"], "SIGTERM");
}

#[tokio::test]
async fn the_kill_switch_works_where_the_file_cannot_be_written_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path();
    let host = host_in(state, &[]).await;
    host.activate(&components::policy("round-robin"), &json!({})).await;
    let file = state.join("audit.jsonl");
    fs::remove_file(&file).unwrap();
    std::os::unix::fs::symlink("/dev/full", &file).unwrap();
    let on = host.cli(&["policy", "bypass", "routing"]).await;
    assert!(on.succeeded().contains("not in the audit file") && on.stdout.contains("audit.jsonl"), "{}", on.stdout);
    assert_eq!(host.serves(2).await.header("x-dynamo-policy"), "native; bypass");
    host.cli(&["policy", "bypass", "routing", "--off"]).await.succeeded();
    let drained = host.cli(&["worker", "drain", "a"]).await;
    assert!(drained.succeeded().contains("not in the audit file"), "{}", drained.stdout);
    host.cli(&["worker", "resume", "a"]).await.succeeded();
    assert_eq!(host.http.metric("dynamo_host_audit_failures_total", &[]).await, 4.0);
    // Mended, it goes on.
    fs::remove_file(&file).unwrap();
    let on = host.cli(&["policy", "bypass", "routing"]).await;
    assert!(!on.succeeded().contains("audit"), "{}", on.stdout);
    assert_eq!(newest(state, "policy bypass")["to"]["bypass"], true);
}

#[tokio::test]
async fn a_quarantine_is_written_down_when_it_begins() {
    let directory = tempfile::tempdir().unwrap();
    let host = host_in(directory.path(), &[]).await;
    host.activate(&components::guest("hostile"), &json!({ "mode": "trap" })).await;
    let entered = eventually("it is quarantined, and that is written down", async || {
        host.http.post("/v1/chat/completions", chat(PROVOCATION).to_string()).await;
        entries(directory.path()).into_iter().find(|entry| entry["what"] == "quarantine entered")
    })
    .await;
    assert_eq!((&entered["who"], &entered["of"], &entered["to"]["cause"]), (&json!("host"), &json!("routing"), &json!("trap")));
    assert!(entered["to"]["policy"].as_str().unwrap().starts_with("hostile@"), "{entered}");
}

#[tokio::test]
async fn a_host_without_a_state_directory_says_that_it_keeps_no_file() {
    let host = Host::start(&["--worker", MOCK]).await;
    host.cli(&["policy", "bypass", "routing"]).await.succeeded();
    host.cli(&["audit"]).await.failed(1, &["--state-dir"]);
    host.process.logs("policy bypass").await;
}
