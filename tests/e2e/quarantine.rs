//! Quarantine in a running host: it begins, is told of, and ends by itself.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::harness::{components, eventually, host::Host};

const VERSION: &str = env!("CARGO_PKG_VERSION");
const PROVOCATION: u32 = 13;

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

/// Provokes the active policy until it is quarantined; the slot then.
async fn quarantined(host: &Host) -> Value {
    eventually("it is quarantined", async || {
        host.serves(PROVOCATION).await;
        let slot = host.slot().await;
        (slot["active"]["state"] == "quarantined").then_some(slot)
    })
    .await
}

#[tokio::test]
async fn a_policy_that_keeps_failing_is_left_alone_and_let_back_when_it_is_good_again() {
    let host = Host::over_mocks(&["a", "b"], "speedup=50", &[]).await;
    let policy = format!("hostile@{VERSION}");
    host.activate(&components::guest("hostile"), &json!({ "mode": "trap" })).await;
    let slot = quarantined(&host).await;
    let quarantine = &slot["active"]["quarantine"];
    assert_eq!(quarantine["cause"], "trap", "{slot}");
    assert_eq!(slot["active"]["quarantines"], 1, "{slot}");
    assert!(quarantine["faults"].as_u64() >= Some(8) && quarantine["since_unix_ms"].as_u64() <= Some(unix_ms()), "{slot}");
    assert!(quarantine["next_trial_in_s"].as_f64() <= Some(quarantine["backoff_s"].as_f64().unwrap()), "{slot}");
    // It would fail its trials too, the first of which is due after a second.
    let passed_over = format!("native; fallback=quarantined; policy={policy}");
    eventually("it is passed over", async || {
        (host.serves(PROVOCATION).await.header("x-dynamo-policy") == passed_over).then_some(())
    })
    .await;
    let labels = [("slot", "routing"), ("policy", policy.as_str())];
    assert_eq!(host.http.metric("dynamo_host_policy_quarantined", &labels).await, 1.0);
    let listed = host.cli(&["policy", "list"]).await;
    let listed = listed.succeeded();
    for part in ["quarantined for ", "cause trap", "trial", "did not decide, quarantined: ", "did not decide, trap: "] {
        assert!(listed.contains(part), "{part:?} is not in {listed}");
    }
    assert!(host.cli(&["status"]).await.succeeded().contains("quarantined for "));

    // Trials fail while it is bad; the first that it passes ends it.
    eventually("a trial fails", async || {
        host.serves(PROVOCATION).await;
        host.slot().await["active"]["quarantine"]["failed_trials"].as_u64().filter(|&trials| trials > 0)
    })
    .await;
    eventually("it decides again", async || (host.serves(3).await.header("x-dynamo-policy") == policy).then_some(())).await;
    let slot = host.slot().await;
    assert_eq!((&slot["active"]["state"], &slot["active"]["quarantine"]), (&json!("ready"), &Value::Null));
    assert_eq!(host.http.metric("dynamo_host_policy_quarantined", &labels).await, 0.0);
    assert_eq!(host.http.metric("dynamo_host_policy_quarantines_total", &[("cause", "trap")]).await, 1.0);
    let skipped = host.http.metric("dynamo_host_policy_fallbacks_total", &[("cause", "quarantined")]).await;
    assert_eq!(Some(skipped), slot["active"]["fallbacks"]["quarantined"].as_f64(), "each is counted, here and there");
    assert!(host.cli(&["policy", "list"]).await.succeeded().contains("was quarantined 1 time"));
    for said in ["policy is quarantined", "policy decides again", "policy failed"] {
        host.process.logs(said).await;
        let log = host.process.log();
        assert_eq!(log.lines().filter(|line| line.contains(said)).count(), 1, "{said:?} once: {log}");
    }
}

#[tokio::test]
async fn a_replaced_policy_is_no_alarm_and_a_new_version_begins_anew() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    let hostile = components::guest("hostile");
    host.activate(&hostile, &json!({ "mode": "duplicate" })).await;
    quarantined(&host).await;
    host.activate(&hostile, &json!({ "mode": "good" })).await;
    assert_eq!(host.http.metric("dynamo_host_policy_quarantined", &[]).await, 0.0);
    assert_eq!(host.serves(PROVOCATION).await.header("x-dynamo-policy"), format!("hostile@{VERSION}"));
    let slot = host.slot().await;
    assert_eq!((&slot["active"]["state"], &slot["previous"][0]["state"]), (&json!("ready"), &json!("quarantined")), "{slot}");
    // Back in its place it is what it was.
    host.roll_back().await;
    assert_eq!(host.slot().await["active"]["state"], "quarantined");
    assert_eq!(host.http.metric("dynamo_host_policy_quarantined", &[]).await, 1.0);
}
