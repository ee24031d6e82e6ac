//! The kill switch: at once, whatever else is under way or broken.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use serde_json::json;
use tokio::{sync::watch, task::JoinSet};

use crate::harness::{
    components, eventually,
    host::{Host, chat},
    scripted::{Connection, Scripted, whole_answer},
};

const VERSION: &str = env!("CARGO_PKG_VERSION");
const PROVOCATION: u32 = 13;

#[tokio::test]
async fn the_native_fallback_decides_from_the_next_decision_on_and_the_policy_after_it() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    host.activate(&components::policy("round-robin"), &json!({})).await;
    let on = host.cli(&["policy", "bypass", "routing"]).await;
    assert!(on.succeeded().contains("the native fallback decides"), "{}", on.stdout);
    assert!(on.stdout.contains("a restart will forget that: this host has no --state-dir"), "{}", on.stdout);
    assert_eq!(host.serves(2).await.header("x-dynamo-policy"), "native; bypass");
    assert_eq!(host.slot().await["bypass"], true);
    assert_eq!(host.active().await, format!("round-robin@{VERSION}"), "it is in its place");
    for command in [&["policy", "list"][..], &["status"]] {
        assert!(host.cli(command).await.succeeded().contains("bypassed: the native fallback decides"));
    }
    assert_eq!(host.http.metric("dynamo_host_policy_bypass", &[("slot", "routing")]).await, 1.0);
    assert_eq!(host.http.metric("dynamo_host_policy_bypassed_total", &[("slot", "routing")]).await, 1.0);

    // A change goes on beneath it.
    host.activate(&components::policy("least-loaded"), &json!({})).await;
    assert_eq!(host.serves(2).await.header("x-dynamo-policy"), "native; bypass");
    host.cli(&["policy", "bypass", "routing", "--off"]).await.succeeded();
    assert_eq!(host.serves(2).await.header("x-dynamo-policy"), format!("least-loaded@{VERSION}"));
    assert_eq!(host.http.metric("dynamo_host_policy_bypass", &[]).await, 0.0);
    host.cli(&["policy", "bypass", "rooting"]).await.failed(1, &["rooting", "routing"]);
}

#[tokio::test]
async fn it_beats_a_closed_slot_and_a_request_that_keeps_its_version() {
    // The first worker that is asked keeps the request until the switch is on, and breaks; what comes then is answered.
    let (switch, switched) = watch::channel(false);
    let asked = Arc::<AtomicUsize>::default();
    let script = move |mut connection: Connection| {
        let (mut switched, number) = (switched.clone(), asked.fetch_add(1, Relaxed));
        async move {
            match number {
                0 => drop(switched.wait_for(|&is_on| is_on).await),
                _ => connection.write(whole_answer("200 OK", r#"{"choices":[]}"#)).await,
            }
        }
    };
    let (one, other) = (Scripted::start(script.clone()).await, Scripted::start(script).await);
    let host = Host::start(&["--worker", &one.worker(), "--worker", &other.worker(), "--routing-on-error", "closed"]).await;
    host.activate(&components::guest("hostile"), &json!({ "mode": "duplicate", "from_attempt": 1, "rows": 1 })).await;
    let client = host.http.clone();
    let mut pending = JoinSet::new();
    pending.spawn(async move { client.post("/v1/chat/completions", chat(PROVOCATION).to_string()).await });
    eventually("a worker has the request", async || (one.received().len() + other.received().len() > 0).then_some(())).await;
    host.cli(&["policy", "bypass", "routing"]).await.succeeded();
    switch.send(true).unwrap();
    let reply = pending.join_next().await.unwrap().unwrap();
    assert_eq!((reply.status.as_u16(), reply.header("x-dynamo-policy")), (200, "native; bypass"), "{}", reply.text());
    assert_eq!(host.slot().await["active"]["calls"], 1, "it was asked for the first placing only");
}
