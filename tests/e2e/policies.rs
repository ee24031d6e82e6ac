//! Policies in a running host: they decide, they are swapped and rolled back, and a bad one costs nobody a request.

use std::collections::HashMap;

use hyper::StatusCode;
use serde_json::{Value, json};

use crate::harness::{
    components,
    host::{Host, chat, streamed},
};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What the hostile guest misbehaves at.
const PROVOCATION: u32 = 13;

/// How often a provocation is repeated at most: a call that the backstop ends, because its thread was pre-empted for
/// 50 ms on a busy machine, is counted as `host-stall` and not held against the policy.
const PROVOCATIONS: u32 = 10;

#[tokio::test]
async fn each_misbehaviour_is_served_natively_and_counted_under_its_own_name() {
    let host = Host::over_mocks(&["a", "b"], "speedup=50", &[]).await;
    let policy = format!("hostile@{VERSION}");
    for (mode, cause) in [
        ("trap", "trap"),
        ("loop", "fuel"),
        ("memory", "memory"),
        ("recursion", "stack"),
        ("bulk", "fuel"),
        ("host-calls", "fuel"),
        ("out-of-range", "answer-out-of-range"),
        ("duplicate", "answer-duplicate"),
        ("empty", "answer-empty"),
        ("too-many", "answer-too-many"),
        ("no-answer", "no-answer"),
        ("bad-status", "answer-status"),
        ("huge-answer", "argument-bytes"),
        ("hold", "hold-exhausted"),
    ] {
        host.activate(&components::guest("hostile"), &json!({ "mode": mode })).await;
        let counted = async || {
            let labels = [("slot", "routing"), ("policy", policy.as_str()), ("cause", cause)];
            host.http.metric("dynamo_host_policy_fallbacks_total", &labels).await
        };
        let before = counted().await;
        assert_eq!(host.serves(3).await.header("x-dynamo-policy"), policy, "before {mode}");

        let expected = format!("native; fallback={cause}; policy={policy}");
        let stalled = format!("native; fallback=host-stall; policy={policy}");
        let mut said = String::new();
        for _ in 0..PROVOCATIONS {
            said = host.serves(PROVOCATION).await.header("x-dynamo-policy").to_owned();
            if said != stalled {
                break;
            }
        }
        assert_eq!(said, expected, "{mode}");
        let slot = host.slot().await;
        assert!(slot["active"]["fallbacks"][cause].as_u64().unwrap() > 0, "{mode}: {slot}");
        assert!(slot["active"]["last_fault"].as_str().unwrap().starts_with(cause), "{mode}: {slot}");
        assert!(counted().await > before, "{mode} is not counted as {cause}");

        // Streamed it is the same, and the next good request is the policy's again.
        let answer = host.http.stream("/v1/chat/completions", &streamed(chat(PROVOCATION))).await;
        assert!(answer.header("x-dynamo-policy").starts_with("native; fallback="), "{mode}: {:?}", answer.headers);
        assert_eq!(host.serves(3).await.header("x-dynamo-policy"), policy, "after {mode}");
    }
    // The guest's own words are for the operator.
    host.process.logs("configured to panic").await;
    host.is_well().await;
}

#[tokio::test]
async fn a_flood_of_telemetry_is_cut_and_the_decision_stands() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    host.activate(&components::guest("hostile"), &json!({ "mode": "flood" })).await;
    for _ in 0..20 {
        let reply = host.serves(PROVOCATION).await;
        assert_eq!(reply.header("x-dynamo-policy"), format!("hostile@{VERSION}"));
    }
    let page = host.http.get("/metrics").await.text();
    assert!(page.lines().filter(|line| line.contains("flood_")).count() < 200, "{page}");
}

#[tokio::test]
async fn floods_of_names_and_state_and_what_is_no_number_harm_nobody() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    for mode in ["metric-flood", "state-flood", "not-finite"] {
        host.activate(&components::guest("hostile"), &json!({ "mode": mode })).await;
        for _ in 0..20 {
            assert_eq!(host.serves(PROVOCATION).await.header("x-dynamo-policy"), format!("hostile@{VERSION}"), "{mode}");
        }
    }
    let page = host.http.get("/metrics").await.text();
    // 64 names for the slot, a counter and a gauge of each.
    assert!((60..=128).contains(&page.lines().filter(|line| line.contains("flood_")).count()), "{page}");
    let of_policies = |line: &&str| line.starts_with("dynamo_host_policy_gauge{");
    assert!(page.lines().filter(of_policies).all(|line| !line.ends_with("NaN") && !line.ends_with("Inf")), "{page}");
    assert!(host.http.metric("dynamo_host_policy_telemetry_dropped_total", &[("what", "gauge")]).await >= 60.0);
    host.is_well().await;
}

#[tokio::test]
async fn a_start_that_takes_too_long_is_refused_and_a_slow_one_delays_nobody() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    let bytes = std::fs::read(components::guest("hostile")).unwrap();
    let message = host.put_policy(bytes, r#"{"mode":"loop-in-configure"}"#).await.is_error(422, "start");
    assert!(message.contains("fuel"), "{message}");
    let file = components::guest("hostile");
    let settings = json!({ "mode": "slow-configure" });
    let activated = host.activate(&file, &settings);
    tokio::pin!(activated);
    let mut served = 0;
    loop {
        tokio::select! {
            () = &mut activated => break,
            reply = host.serves(2) => {
                assert_eq!(reply.status, StatusCode::OK);
                served += 1;
            }
        }
    }
    assert!(served > 0, "requests are served while it starts");
    assert_eq!(host.active().await, format!("hostile@{VERSION}"));
}

#[tokio::test]
async fn a_component_of_200_mb_is_refused_by_api_and_command_in_bounded_memory() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    let mut bytes = std::fs::read(components::policy("round-robin")).unwrap();
    bytes.resize(200 << 20, 0);
    let before = host.process.peak_memory();
    let message = host.put_policy(bytes, "{}").await.is_error(422, "too-large");
    assert!(message.contains("209715200 bytes") && message.contains("16777216"), "{message}");
    let grown = host.process.peak_memory() - before;
    assert!(grown < 64 << 20, "it took {} MB", grown >> 20);
    assert_eq!(host.http.metric("dynamo_host_policy_load_failures_total", &[("cause", "too-large")]).await, 1.0);

    // Sparse, and more than this machine's memory: whoever reads it does not come back.
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("huge.wasm");
    std::fs::File::create(&file).unwrap().set_len(200 << 30).unwrap();
    let path = file.to_str().unwrap();
    crate::harness::process::run(&["policy", "check", path]).await.failed(1, &["214748364800 bytes", "strip it"]);
    host.cli(&["policy", "activate", "routing", path]).await.failed(1, &["214748364800 bytes"]);
    let seeded = Host::over_mocks(&["a"], "speedup=50", &["--routing", path]).await;
    seeded.process.logs("214748364800 bytes").await;
    host.is_well().await;
}

#[tokio::test]
async fn a_rejection_reaches_the_client_with_its_reason_and_when_to_come_again() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    host.activate(&components::guest("hostile"), &json!({ "mode": "reject" })).await;
    for body in [chat(PROVOCATION), streamed(chat(PROVOCATION))] {
        let reply = host.http.post("/v1/chat/completions", body.to_string()).await;
        let message = reply.is_error(429, "policy_rejected");
        assert!(message.contains("configured to reject"), "{message}");
        assert_eq!(reply.header("retry-after"), "2", "1.5 s, rounded up");
        assert_eq!(reply.header("x-dynamo-policy"), format!("hostile@{VERSION}"));
    }
    host.is_well().await;
}

#[tokio::test]
async fn round_robin_gives_every_worker_its_turn() {
    let routing = components::policy("round-robin");
    let host = Host::over_mocks(&["a", "b", "c"], "speedup=50", &["--routing", &routing, "--expose-worker"]).await;
    let mut served: HashMap<String, u32> = HashMap::new();
    for _ in 0..12 {
        *served.entry(host.serves(1).await.header("x-dynamo-worker").to_owned()).or_default() += 1;
    }
    assert_eq!(served, ["a", "b", "c"].map(|name| (name.to_owned(), 4)).into());
}

#[tokio::test]
async fn least_loaded_avoids_a_busy_worker() {
    let routing = components::policy("least-loaded");
    let arguments = [
        "--routing",
        &routing,
        "--expose-worker",
        "--worker",
        "mock://busy?model=m&decode_ms_base=1e12",
        "--worker",
        "mock://idle?model=m&speedup=50",
    ];
    let host = Host::start(&arguments).await;
    // Equal workers are taken at random: one of some streams sits on the busy one, and never ends there.
    let mut sits = None;
    for _ in 0..100 {
        let stream = host.http.open("/v1/chat/completions", &streamed(chat(2))).await;
        if stream.headers["x-dynamo-worker"] == "busy" {
            sits = Some(stream);
            break;
        }
    }
    assert!(sits.is_some(), "the busy worker was never chosen");
    for _ in 0..10 {
        assert_eq!(host.serves(2).await.header("x-dynamo-worker"), "idle");
    }
}

#[tokio::test]
async fn a_policy_is_rolled_back_step_by_step_to_native() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    host.activate(&components::policy("round-robin"), &json!({})).await;
    host.activate(&components::policy("least-loaded"), &json!({ "request": 7.5 })).await;
    host.activate(&components::guest("hostile"), &json!({ "mode": "trap" })).await;
    let slot = host.slot().await;
    let policies = |slot: &Value| -> Vec<String> {
        let previous = slot["previous"].as_array().unwrap().iter();
        [&slot["active"]].into_iter().chain(previous).map(|version| version["policy"].as_str().unwrap().to_owned()).collect()
    };
    let [hostile, least_loaded, round_robin] = ["hostile", "least-loaded", "round-robin"].map(|name| format!("{name}@{VERSION}"));
    assert_eq!(policies(&slot), [hostile.as_str(), &least_loaded, &round_robin, "native"]);

    assert_eq!(host.roll_back().await.status, StatusCode::OK);
    assert_eq!(host.slot().await["active"]["settings"], json!({ "request": 7.5 }));
    assert_eq!(host.serves(PROVOCATION).await.header("x-dynamo-policy"), least_loaded);
    host.cli(&["policy", "rollback", "routing"]).await.succeeded();
    assert_eq!(host.serves(2).await.header("x-dynamo-policy"), round_robin);
    assert_eq!(host.roll_back().await.status, StatusCode::OK);
    assert_eq!(host.serves(2).await.header("x-dynamo-policy"), "native");

    let refused = host.roll_back().await;
    assert_eq!(refused.status, StatusCode::CONFLICT, "{}", refused.text());
    assert!(refused.text().contains("policy activate routing"), "{}", refused.text());
    host.cli(&["policy", "rollback", "routing"]).await.failed(1, &["policy activate routing"]);
}

#[tokio::test]
async fn native_can_be_activated_and_rolled_back() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    let file = components::policy("round-robin");
    host.cli(&["policy", "activate", "routing", &file]).await.succeeded();
    host.cli(&["policy", "activate", "routing", "native"]).await.succeeded();
    assert_eq!(host.active().await, "native");
    host.cli(&["policy", "rollback", "routing"]).await.succeeded();
    assert_eq!(host.active().await, format!("round-robin@{VERSION}"));
    host.activate_native().await;
    assert_eq!(host.serves(2).await.header("x-dynamo-policy"), "native");
}

#[tokio::test]
async fn a_stream_outlives_the_policy_that_placed_it() {
    let host = Host::over_mocks(&["a"], "decode_ms_base=20&speedup=1", &[]).await;
    host.activate(&components::policy("round-robin"), &json!({})).await;
    let mut stream = host.http.open("/v1/chat/completions", &streamed(chat(40))).await;
    assert_eq!(stream.headers["x-dynamo-policy"], format!("round-robin@{VERSION}").as_str());
    stream.event().await;
    assert_eq!(host.roll_back().await.status, StatusCode::OK);
    host.activate(&components::policy("least-loaded"), &json!({})).await;
    let answer = stream.streamed().await.unwrap();
    assert_eq!(answer.finish_reasons(), ["length"]);
    assert!(answer.text().ends_with(" t39"), "{}", answer.text());
}

#[tokio::test]
async fn the_flag_seeds_the_slot_with_its_settings() {
    let routing = components::policy("least-loaded");
    let settings = r#"{"request": 3.0}"#;
    let host = Host::over_mocks(&["a"], "speedup=50", &["--routing", &routing, "--routing-settings", settings]).await;
    assert_eq!(host.active().await, format!("least-loaded@{VERSION}"));
    assert_eq!(host.slot().await["active"]["settings"], json!({ "request": 3.0 }));

    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("settings.json");
    std::fs::write(&file, settings).unwrap();
    let from_file = format!("@{}", file.display());
    let host = Host::over_mocks(&["a"], "speedup=50", &["--routing", &routing, "--routing-settings", &from_file]).await;
    assert_eq!(host.slot().await["active"]["settings"], json!({ "request": 3.0 }));
}
