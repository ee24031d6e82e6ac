//! What a slot does when its policy fails: said by configuration, changed by command, kept, and seen in each answer.

use serde_json::json;

use crate::harness::{
    components, eventually,
    host::{Host, chat, streamed},
    process::{run, serve},
};

const VERSION: &str = env!("CARGO_PKG_VERSION");
const CHAT: &str = "/v1/chat/completions";
const PROVOCATION: u32 = 13;

#[tokio::test]
async fn the_last_good_version_decides_where_that_is_wanted() {
    let routing = components::policy("round-robin");
    let host = Host::over_mocks(&["a"], "speedup=50", &["--routing", &routing, "--routing-on-error", "last-good"]).await;
    host.activate(&components::guest("hostile"), &json!({ "mode": "duplicate" })).await;
    let expected = format!("round-robin@{VERSION}; fallback=answer-duplicate; policy=hostile@{VERSION}");
    eventually("its instances are there", async || {
        (host.serves(PROVOCATION).await.header("x-dynamo-policy") == expected).then_some(())
    })
    .await;
    let labels = [("decided_by", "last-good"), ("cause", "answer-duplicate")];
    assert!(host.http.metric("dynamo_host_policy_fallbacks_total", &labels).await >= 1.0);
    assert!(host.cli(&["policy", "list"]).await.succeeded().contains("when it fails: last-good"));
    // Streamed it is the same.
    let answer = host.http.stream(CHAT, &streamed(chat(PROVOCATION))).await;
    assert_eq!(answer.header("x-dynamo-policy"), expected);

    let changed = host.cli(&["policy", "on-error", "routing", "fallback"]).await;
    assert!(changed.succeeded().contains("fallback (the native fallback decides)"), "{}", changed.stdout);
    let said = host.serves(PROVOCATION).await.header("x-dynamo-policy").to_owned();
    assert!(said.starts_with("native; fallback=") && said.ends_with(&format!("; policy=hostile@{VERSION}")), "{said}");
}

#[tokio::test]
async fn requests_are_refused_where_the_slot_is_closed() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("host.toml");
    std::fs::write(&file, "[routing]\non_error = \"closed\"\n").unwrap();
    let host = Host::over_mocks(&["a"], "speedup=50", &["--config", file.to_str().unwrap()]).await;
    // Without a policy there is none that could fail.
    assert_eq!(host.serves(3).await.header("x-dynamo-policy"), "native");
    host.activate(&components::guest("hostile"), &json!({ "mode": "duplicate" })).await;
    for body in [chat(PROVOCATION), streamed(chat(PROVOCATION))] {
        let reply = host.http.post(CHAT, body.to_string()).await;
        let message = reply.is_error(503, "policy_failed");
        assert!(message.contains("try again") && !message.contains("hostile"), "{message}");
        assert_eq!((reply.header("retry-after"), reply.json()["error"]["type"].as_str()), ("1", Some("server_error")));
        let expected = format!("closed; fallback=answer-duplicate; policy=hostile@{VERSION}");
        assert_eq!(reply.header("x-dynamo-policy"), expected);
    }
    assert_eq!(host.serves(3).await.header("x-dynamo-policy"), format!("hostile@{VERSION}"));
    let labels = [("decided_by", "nobody"), ("cause", "answer-duplicate")];
    assert_eq!(host.http.metric("dynamo_host_policy_fallbacks_total", &labels).await, 2.0);
    assert_eq!(host.http.metric("dynamo_host_errors_total", &[("kind", "policy_failed")]).await, 2.0);
    // A rollback ends it.
    host.roll_back().await;
    host.is_well().await;
}

#[tokio::test]
async fn what_is_wrong_about_on_error_is_said() {
    run(&serve(&["--routing-on-error", "ajar"])).await.failed(2, &["ajar", "last-good or closed"]);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("host.toml");
    std::fs::write(&file, "[routing]\non_error = \"ajar\"\n").unwrap();
    run(&serve(&["--config", file.to_str().unwrap()])).await.failed(2, &["ajar", "last-good", "line 2"]);
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    host.cli(&["policy", "on-error", "routing", "ajar"]).await.failed(2, &["last-good or closed"]);
    host.cli(&["policy", "on-error", "rooting", "closed"]).await.failed(1, &["rooting", "routing"]);
    for (path, status) in
        [("routing/on-error?mode=ajar", 400), ("routing/on-error", 400), ("autoscaling/on-error?mode=closed", 404)]
    {
        let reply = host.admin.send(hyper::Method::PUT, &format!("/v1/slots/{path}"), &[], "").await;
        assert_eq!(reply.status.as_u16(), status, "{path}: {}", reply.text());
    }
    assert_eq!(host.slot().await["on_error"], "fallback");
}
