//! Hand-offs: engines that prefill and engines that decode, killed at random under streams; nothing is lost.
//!
//! At length it is what the project promises: four of each role, 64 streams, an engine of either role killed every 3 s and started
//! again 1 s later, for a minute.

use std::{
    env,
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::time::sleep_until;

use crate::{
    engines::{Dice, Engines},
    footprint::Footprint,
    harness::{eventually, host::Host},
    load::{self, Ask, Expected, percentile},
    show::seed,
};

const ROLES: [&str; 8] = ["prefill", "prefill", "prefill", "prefill", "decode", "decode", "decode", "decode"];
const TOKENS: u32 = 60;

/// 20 ms a token, 40 ms a prompt, and some 20 ms for the KV of one: 2 blocks of 16 tokens.
const PACE: [&str; 5] =
    ["decode_ms_base=20", "decode_ms_per_sequence=0", "prefill_ms_base=40", "kv_bytes_per_second=200e6", "kv_mismatch=die"];

/// How long and hard.
struct Length {
    clients: usize,
    lasts: Duration,
    every: Duration,
    back_after: Duration,
}

fn length() -> Length {
    let ms = Duration::from_millis;
    match env::var("DYNAMO_HOST_TEST_FAULTS_SHOW_S") {
        Ok(seconds) => {
            let lasts = Duration::from_secs(seconds.parse().expect("seconds"));
            Length { clients: 64, lasts, every: ms(3000), back_after: ms(1000) }
        }
        Err(_) => Length { clients: 24, lasts: ms(6000), every: ms(1000), back_after: ms(500) },
    }
}

/// How many prompts were computed by another worker than the one that decoded, by that one, and where nobody is split.
async fn prefills(host: &Host) -> [f64; 3] {
    let mut prefills = [0.0; 3];
    for (count, place) in prefills.iter_mut().zip(["remote", "local", "aggregated"]) {
        *count = host.admin.metric("dynamo_host_prefill_where_total", &[("where", place)]).await;
    }
    prefills
}

async fn all_can_hand_over(host: &Host) {
    eventually("all workers can hand over", async || {
        let status = host.admin.get_json("/v1/status").await;
        let workers = status["workers"].as_array().unwrap_or_else(|| panic!("no workers in {status}"));
        workers.iter().all(|worker| worker["handoff"]["state"] == "ready").then_some(())
    })
    .await;
}

#[expect(clippy::print_stdout, reason = "figures are for whoever runs it with --nocapture")]
async fn nothing_is_lost(asks: &[Ask]) {
    let Length { clients, lasts, every, back_after } = length();
    let mut engines = Engines::of_roles(&ROLES, &PACE).await;
    let host = engines.host("").await;
    all_can_hand_over(&host).await;
    let expected = Expected::of(engines.http(0), TOKENS).await;
    let before = Footprint::of(&host).await;
    let begun = Instant::now();
    let until = begun + lasts;
    let mut dice = Dice(seed());
    let mut faults = Vec::new();
    let http = host.http.clone();
    let doing = async {
        let mut next = begun + every;
        while next < until {
            sleep_until(next.into()).await;
            let at = dice.below(ROLES.len());
            faults.push((Instant::now(), format!("e{at}")));
            engines.kill(at);
            sleep_until((next + back_after).into()).await;
            engines.restart(at).await;
            next += every;
        }
    };
    let (report, ()) = tokio::join!(load::run(&http, asks, clients, &expected, until), doing);
    let pauses = report.pauses(&faults);
    let [remote, local, aggregated] = prefills(&host).await;
    let of_prefill = faults.iter().filter(|(_, name)| ROLES[name[1..].parse::<usize>().unwrap()] == "prefill").count();
    println!(
        "killed {asks:?}: {} requests by {clients} clients in {:.0} s, {} faults ({of_prefill} of prefill engines), {} bad; \
         seams seen {}, pause p50 {} p99 {}; prefills remote {remote}, local {local}, at a prefill engine alone {aggregated} (seed {})",
        report.requests.len(),
        begun.elapsed().as_secs_f64(),
        faults.len(),
        report.bad().len(),
        pauses.len(),
        percentile(&pauses, 50),
        percentile(&pauses, 99),
        seed(),
    );
    report.is_good(&format!("killed (seed {})", seed()));
    assert!(!host.process.panicked(), "it panicked");
    // Two of six ways of asking are of two choices, which are not handed over.
    assert!(remote > report.requests.len() as f64 / 4.0, "hand-offs are the rule: {remote} of {}", report.requests.len());
    let after = Footprint::settled(&host, before).await;
    println!("  before: {before}\n  after:  {after}");
}

#[tokio::test]
async fn no_token_is_lost_while_engines_of_either_role_are_killed() {
    if env::var_os("DYNAMO_HOST_TEST_FAULTS_SHOW_S").is_none() {
        return nothing_is_lost(&Ask::ALL).await;
    }
    for asks in [&[Ask::ChatStream, Ask::CompletionStream][..], &Ask::ALL] {
        nothing_is_lost(asks).await;
    }
}

#[tokio::test]
async fn what_goes_wrong_in_a_hand_off_is_not_the_clients() {
    let mut engines = Engines::of_roles(&["prefill", "prefill", "decode", "decode"], &PACE).await;
    let host = engines.host("").await;
    let expected = Expected::of(engines.http(0), 10).await;
    for (at, fault) in [
        (0, json!({ "prefill_refuse": "busy" })),
        (0, json!({ "prefill_refuse": "dead_core" })),
        (0, json!({ "prefill_silent": true })),
        (0, json!({ "prefill_delay_ms": 500 })),
        (0, json!({ "fetch_cut": true })),
        (2, json!({ "error_event": 0 })),
        (0, json!({ "fetch_die": "within" })),
        (2, json!({ "fetch_die": "before" })),
    ] {
        all_can_hand_over(&host).await;
        let mut once = fault.clone();
        once["next"] = 1.into();
        engines.faults(at, once).await;
        let mut struck = 0;
        // Until it was: who is asked is a matter of load.
        for _ in 0..20 {
            load::run(&host.http, &[Ask::ChatStream, Ask::CompletionWhole], 4, &expected, Instant::now())
                .await
                .is_good(&fault.to_string());
            struck = if engines.is_gone(at).await { 1 } else { engines.struck(at).await };
            if struck > 0 {
                break;
            }
        }
        assert_eq!(struck, 1, "{fault}");
        if engines.is_gone(at).await {
            engines.kill(at);
            engines.restart(at).await;
        } else {
            engines.faults(at, json!({})).await;
        }
    }
}
