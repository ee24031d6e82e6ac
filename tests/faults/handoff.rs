//! Hand-offs: engines that prefill and engines that decode, killed at random under streams; nothing is lost.
//!
//! At length it is what the project promises: four of each role, 64 streams, an engine of either role killed every 3 s and started
//! again 1 s later, for a minute.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::{
    engines::Engines,
    harness::{eventually, host::Host},
    load::{self, Ask, Expected},
    show::{Deed, Length, lasts, nothing_is_lost},
};

const ROLES: [&str; 8] = ["prefill", "prefill", "prefill", "prefill", "decode", "decode", "decode", "decode"];

/// 20 ms a token, 40 ms a prompt, and some 20 ms for the KV of one: 2 blocks of 16 tokens.
const PACE: [&str; 5] =
    ["decode_ms_base=20", "decode_ms_per_sequence=0", "prefill_ms_base=40", "kv_bytes_per_second=200e6", "kv_mismatch=die"];

fn length() -> Length {
    let ms = Duration::from_millis;
    match lasts() {
        Some(lasts) => Length { clients: 64, lasts, every: ms(3000), back_after: ms(1000) },
        None => Length { clients: 24, lasts: ms(6000), every: ms(1000), back_after: ms(500) },
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

#[tokio::test]
async fn no_token_is_lost_while_engines_of_either_role_are_killed() {
    let streams: &[_] = &[Ask::ChatStream, Ask::CompletionStream];
    for asks in if lasts().is_some() { vec![streams, &Ask::ALL] } else { vec![&Ask::ALL[..]] } {
        let mut engines = Engines::of_roles(&ROLES, &PACE).await;
        let host = engines.host("").await;
        all_can_hand_over(&host).await;
        let (report, killed) = nothing_is_lost(&mut engines, &host, Deed::Kill, length(), asks).await;
        let of_prefill = killed.iter().filter(|&&at| ROLES[at] == "prefill").count();
        let [remote, local, aggregated] = prefills(&host).await;
        println!(
            "  {of_prefill} of the faults were of prefill engines; \
             prefills remote {remote}, local {local}, at a prefill engine alone {aggregated}"
        );
        // Two of six ways of asking are of two choices, which are not handed over.
        assert!(remote > report.requests.len() as f64 / 4.0, "hand-offs are the rule: {remote} of {}", report.requests.len());
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
