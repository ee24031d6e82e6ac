//! Engines that do one thing wrong, beside one that does not: no client sees it.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{
    engines::{Dice, Engines},
    harness::eventually,
    load::{self, Ask, Expected},
};

/// 5 ms a token.
const QUICK: [&str; 2] = ["decode_ms_base=5", "decode_ms_per_sequence=0"];
const TOKENS: u32 = 30;
const CLIENTS: usize = 12;
/// Clients begin requests for so long.
const LASTS: Duration = Duration::from_millis(1500);

/// Two engines of which one has these faults: every request in every way is answered as if it had none.
async fn is_not_seen(profile: &[&str], faults: Value) {
    let engines = Engines::start(2, &[&QUICK, profile].concat()).await;
    let host = engines.host("").await;
    let expected = Expected::of(engines.http(1), TOKENS).await;
    engines.faults(0, faults.clone()).await;
    let report = load::run(&host.http, &Ask::ALL, CLIENTS, &expected, Instant::now() + LASTS).await;
    report.is_good(&faults.to_string());
    assert!(engines.struck(0).await > 0, "the fault struck nobody: {faults}");
    assert!(!host.process.panicked(), "it panicked");
}

#[tokio::test]
async fn a_core_that_dies_within_a_stream_is_not_seen() {
    is_not_seen(&[], json!({ "error_event": 7, "share": 0.3 })).await;
}

#[tokio::test]
async fn a_core_that_died_before_the_first_token_is_not_seen() {
    is_not_seen(&[], json!({ "error_event": 0, "share": 0.3 })).await;
}

#[tokio::test]
async fn a_connection_that_is_cut_within_an_event_is_not_seen() {
    is_not_seen(&[], json!({ "cut": 7, "share": 0.3 })).await;
}

#[tokio::test]
async fn a_connection_that_is_cut_at_the_last_token_and_after_it_is_not_seen() {
    is_not_seen(&[], json!({ "cut": TOKENS - 1, "share": 0.3 })).await;
    is_not_seen(&[], json!({ "cut": TOKENS, "share": 0.3 })).await;
}

#[tokio::test]
async fn a_connection_that_is_cut_within_a_character_is_not_seen() {
    is_not_seen(&["script=wide"], json!({ "cut_character": 7, "share": 0.3 })).await;
}

#[tokio::test]
async fn a_stream_that_ends_without_a_finish_reason_is_not_seen() {
    is_not_seen(&[], json!({ "end": 7, "share": 0.3 })).await;
}

#[tokio::test]
async fn an_engine_that_refuses_is_not_seen() {
    for refusal in ["dead_core", "draining", "busy"] {
        is_not_seen(&[], json!({ "refuse": refusal, "share": 0.5 })).await;
    }
}

#[tokio::test]
async fn a_page_of_something_else_is_not_seen() {
    is_not_seen(&[], json!({ "content_type": "text/html", "next": 5 })).await;
}

#[tokio::test]
async fn a_head_that_does_not_end_is_not_seen() {
    is_not_seen(&[], json!({ "endless_headers": true, "next": 5 })).await;
}

#[tokio::test]
async fn an_engine_that_generates_no_more_while_its_probes_answer_is_not_seen() {
    is_not_seen(&[], json!({ "wedge": 7, "next": 1 })).await;
}

#[tokio::test]
async fn an_engine_that_hangs_is_not_seen() {
    is_not_seen(&[], json!({ "hang": 7, "next": 1 })).await;
}

#[tokio::test]
async fn an_engine_that_is_killed_by_a_request_is_not_seen() {
    let engines = Engines::start(2, &QUICK).await;
    let host = engines.host("").await;
    let expected = Expected::of(engines.http(1), TOKENS).await;
    engines.faults(0, json!({ "die": 7 })).await;
    let report = load::run(&host.http, &Ask::ALL, CLIENTS, &expected, Instant::now() + LASTS).await;
    report.is_good("an engine that dies");
    assert!(engines.http(0).try_send("GET".parse().unwrap(), "/health", &[], "").await.is_err(), "it did not die");
}

#[tokio::test]
async fn a_slow_engine_loses_nothing() {
    let engines = Engines::start(2, &QUICK).await;
    let host = engines.host("").await;
    let expected = Expected::of(engines.http(1), TOKENS).await;
    engines.faults(0, json!({ "slow": 10.0 })).await;
    let report = load::run(&host.http, &Ask::ALL, CLIENTS, &expected, Instant::now() + LASTS).await;
    report.is_good("a slow engine");
}

#[tokio::test]
async fn an_engine_that_is_told_to_stop_and_stalls_is_not_seen() {
    let engines = Engines::start(2, &QUICK).await;
    let host = engines.host("").await;
    let expected = Expected::of(engines.http(1), TOKENS).await;
    engines.faults(0, json!({ "stall_on_stop": true })).await;
    let until = Instant::now() + LASTS;
    let stop = async {
        tokio::time::sleep(LASTS / 3).await;
        engines.terminate(0);
    };
    let (report, ()) = tokio::join!(load::run(&host.http, &Ask::ALL, CLIENTS, &expected, until), stop);
    report.is_good("an engine that stalls when it is told to stop");
}

#[tokio::test]
async fn an_engine_that_comes_and_goes_is_not_seen() {
    let mut engines = Engines::start(2, &QUICK).await;
    let host = engines.host("").await;
    let expected = Expected::of(engines.http(1), TOKENS).await;
    let until = Instant::now() + LASTS * 2;
    let http = host.http.clone();
    let flapping = async {
        let mut dice = Dice(7);
        while Instant::now() < until {
            tokio::time::sleep(dice.between(50, 400)).await;
            engines.kill(0);
            tokio::time::sleep(dice.between(50, 400)).await;
            engines.restart(0).await;
        }
    };
    let (report, ()) = tokio::join!(load::run(&http, &Ask::ALL, CLIENTS, &expected, until), flapping);
    report.is_good("an engine that flaps");
    eventually("both are in service", async || {
        let status = host.admin.get_json("/v1/status").await;
        status["workers"].as_array().unwrap().iter().all(|worker| worker["state"] == "healthy").then_some(())
    })
    .await;
}
