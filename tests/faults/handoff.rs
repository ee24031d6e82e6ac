//! Hand-offs: engines that prefill and engines that decode, killed at random under streams; nothing is lost.
//!
//! At length it is what the project promises: four of each role, 64 streams, an engine of either role killed every 3 s and started
//! again 1 s later, for a minute.

use std::{
    env,
    time::{Duration, Instant},
};

use tokio::time::sleep_until;

use crate::{
    engines::{Dice, Engines},
    footprint::Footprint,
    harness::host::Host,
    load::{self, Ask, Expected, percentile},
    show::seed,
};

const ROLES: [&str; 8] = ["prefill", "prefill", "prefill", "prefill", "decode", "decode", "decode", "decode"];
const PREFILLS: usize = 4;
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

/// Where prompts were computed, by all engines: here, and elsewhere. What those that were killed had counted is gone.
async fn sources(engines: &Engines) -> (f64, f64) {
    let (mut here, mut elsewhere) = (0.0, 0.0);
    for at in PREFILLS..engines.count() {
        let source = |source| ("source", source);
        let name = "vllm:prompt_tokens_by_source_total";
        here += engines.http(at).metric(name, &[source("local_compute")]).await;
        elsewhere += engines.http(at).metric(name, &[source("external_kv_transfer")]).await;
    }
    (here, elsewhere)
}

#[expect(clippy::print_stdout, reason = "figures are for whoever runs it with --nocapture")]
async fn nothing_is_lost(asks: &[Ask]) {
    let Length { clients, lasts, every, back_after } = length();
    let mut engines = Engines::of_roles(&ROLES, &PACE).await;
    let host: Host = engines.host("").await;
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
    let (here, elsewhere) = sources(&engines).await;
    let prefills = faults.iter().filter(|(_, name)| ROLES[name[1..].parse::<usize>().unwrap()] == "prefill").count();
    println!(
        "killed {asks:?}: {} requests by {clients} clients in {:.0} s, {} faults ({prefills} of prefill engines), {} bad; \
         seams seen {}, pause p50 {} p99 {}; at decode engines {here} prompt tokens computed, {elsewhere} fetched (seed {})",
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
    assert!(elsewhere > here, "hand-offs are the rule: {elsewhere} prompt tokens were fetched, {here} computed");
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
