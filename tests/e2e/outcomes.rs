//! What a policy learns of what it placed, and what it may say when a request comes again.

use serde_json::json;

use crate::harness::{
    components, eventually,
    host::{Host, chat, completion, streamed},
    scripted::{Scripted, whole_answer},
};

const CHAT: &str = "/v1/chat/completions";
const PROVOCATION: u32 = 13;

fn of_model(mut body: serde_json::Value, model: &str) -> serde_json::Value {
    body["model"] = model.into();
    body
}

#[tokio::test]
async fn a_policy_learns_how_each_request_has_ended() {
    let refusal = whole_answer("400 Bad Request", r#"{"error":{"message":"the prompt is too long"}}"#);
    let (refusing, breaking) = (Scripted::answering(refusal).await, Scripted::answering("").await);
    let workers = [format!("{},model=refusing", refusing.url()), format!("{},model=breaking", breaking.url())];
    let slow = "mock://slow?model=slow&decode_ms_base=1e12";
    let host =
        Host::start(&["--worker", &workers[0], "--worker", &workers[1], "--worker", slow, "--worker", "mock://a?model=m"]).await;
    host.activate(&components::guest("hostile"), &json!({})).await;

    host.http.ask("/v1/completions", &completion(2)).await;
    host.http.ask("/v1/completions", &completion(2)).await;
    let cancelled = host.http.open(CHAT, &of_model(streamed(chat(5)), "slow")).await;
    drop(cancelled);
    let failed = host.http.post(CHAT, of_model(streamed(chat(3)), "breaking").to_string()).await;
    failed.is_error(502, "engine_broken");
    let refused = host.http.post(CHAT, of_model(chat(3), "refusing").to_string()).await;
    assert_eq!(refused.status.as_u16(), 400, "{}", refused.text());

    for (name, count) in [("done", 2.0), ("cancelled", 1.0), ("failed", 1.0), ("refused", 1.0)] {
        let labels = [("name", format!("ended_{name}"))];
        let labels = labels.each_ref().map(|(key, value)| (*key, value.as_str()));
        eventually(&format!("{count} requests {name}"), async || {
            (host.http.metric("dynamo_host_policy_counter_total", &labels).await == count).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_policy_that_cannot_learn_decides_all_the_same_and_is_told_of_once() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    let policy = format!("hostile@{}", env!("CARGO_PKG_VERSION"));
    for (mode, cause) in [("trap-in-observe", "trap"), ("loop-in-observe", "fuel")] {
        host.activate(&components::guest("hostile"), &json!({ "mode": mode })).await;
        let slot = eventually("it fails to learn a few times", async || {
            // With its only instance away to learn, it may be busy.
            host.serves(3).await;
            let slot = host.slot().await;
            (slot["active"]["observe_failures"][cause].as_u64() >= Some(2)).then_some(slot)
        })
        .await;
        assert_eq!((&slot["active"]["state"], &slot["active"]["quarantines"]), (&json!("ready"), &json!(0)), "{mode}: {slot}");
        assert_eq!(host.serves(PROVOCATION).await.header("x-dynamo-policy"), policy, "{mode}");
    }
    host.process.logs("failed to learn").await;
    let log = host.process.log();
    assert_eq!(
        log.lines().filter(|line| line.contains("failed to learn") && line.contains("configured to panic")).count(),
        1,
        "{log}"
    );
    assert!(host.http.metric("dynamo_host_policy_observe_failures_total", &[("policy", &policy)]).await >= 4.0);
    assert!(host.cli(&["policy", "list"]).await.succeeded().contains("did not learn, fuel: "));
}

#[tokio::test]
async fn a_policy_may_reject_a_request_that_comes_again() {
    let (one, other) = (Scripted::answering("").await, Scripted::answering("").await);
    let host = Host::start(&["--worker", &one.worker(), "--worker", &other.worker()]).await;
    // One row at a time: when that one fails, it is asked again.
    let settings = json!({ "mode": "reject", "from_attempt": 1, "rows": 1 });
    host.activate(&components::guest("hostile"), &settings).await;
    let reply = host.http.post(CHAT, streamed(chat(PROVOCATION)).to_string()).await;
    let message = reply.is_error(429, "policy_rejected");
    assert!(message.contains("configured to reject"), "{message}");
    assert_eq!(reply.header("retry-after"), "2");
    let asked = [&one, &other].map(|engine| usize::from(!engine.received().is_empty()));
    assert_eq!(asked.iter().sum::<usize>(), 1, "the other worker was not asked");
    // Any other request is placed again, and fails everywhere.
    host.http.post(CHAT, streamed(chat(3)).to_string()).await.is_error(502, "engine_broken");
    assert!(!one.received().is_empty() && !other.received().is_empty());
}
