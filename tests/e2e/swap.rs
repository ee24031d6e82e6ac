//! Swaps under load: policies change under 64 streams, and no stream notices.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicUsize,
            Ordering::{Acquire, Release},
        },
    },
    time::{Duration, Instant},
};

use dynamo_engine_mock::tokens;
use serde_json::json;
use tokio::task::JoinSet;

use crate::harness::{
    client::Client,
    components, eventually,
    host::{Host, chat, streamed},
};

const CLIENTS: usize = 64;
const TOKENS: u32 = 40;
const SWAPS: usize = 50;
/// Streams that are completed between two swaps: the load is about this many streams per client, and lasts as long as the
/// swaps. `cargo xtask bench swap` asks for more.
fn streams_per_swap() -> usize {
    let per_client = std::env::var("DYNAMO_HOST_SWAP_STREAMS").map_or(10, |streams| streams.parse().unwrap());
    CLIENTS * per_client / SWAPS
}

/// A stream that was served: which policy placed it, and when.
struct Served {
    policy: String,
    sent: Instant,
    head: Instant,
}

/// A time in which a policy may have been active: from when its activation was sent to when the next one was answered.
struct Active {
    policy: String,
    from: Instant,
    until: Instant,
}

#[derive(Default)]
struct Progress {
    completed: AtomicUsize,
    swaps_are_done: AtomicBool,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn policies_are_swapped_under_load_without_a_failed_or_mixed_stream() {
    // Slow enough that a stream lives through several swaps.
    let state = tempfile::tempdir().unwrap();
    let arguments = ["--state-dir", state.path().to_str().unwrap()];
    let host = Host::over_mocks(&["a", "b", "c", "d"], "speedup=0.6", &arguments).await;
    let version = env!("CARGO_PKG_VERSION");
    let policies = [
        (format!("round-robin@{version}"), components::policy("round-robin"), json!({})),
        (format!("least-loaded@{version}"), components::policy("least-loaded"), json!({ "request": 32.0 })),
        (format!("hostile@{version}"), components::guest("hostile"), json!({ "mode": "good" })),
        (format!("kv-cost@{version}"), components::guest("kv-cost"), json!({})),
    ];
    let streams_per_swap = streams_per_swap();
    let begin = Instant::now();
    host.activate(&policies[0].1, &policies[0].2).await;

    let progress = Arc::<Progress>::default();
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS {
        // Out of step from the first stream on: otherwise all would begin, and end, at the same moments.
        let first_tokens = 1 + TOKENS * number as u32 / CLIENTS as u32;
        clients.spawn(client(host.http.clone(), first_tokens, Arc::clone(&progress)));
    }
    let mut active = vec![Active { policy: policies[0].0.clone(), from: begin, until: begin }];
    let mut swaps = Vec::with_capacity(SWAPS);
    for swap in 1..=SWAPS {
        let due = swap * streams_per_swap;
        eventually("streams go on", async || (progress.completed.load(Acquire) >= due || clients.is_empty()).then_some(())).await;
        let (policy, file, settings) = &policies[swap % policies.len()];
        let from = Instant::now();
        host.activate(file, settings).await;
        let until = Instant::now();
        swaps.push(until - from);
        active.last_mut().unwrap().until = until;
        active.push(Active { policy: policy.clone(), from, until });
    }
    progress.swaps_are_done.store(true, Release);
    let mut served = Vec::new();
    let mut failures = Vec::new();
    for (streams, failed) in clients.join_all().await {
        served.extend(streams);
        failures.extend(failed);
    }
    active.last_mut().unwrap().until = Instant::now();

    println!("{}", report(served.len(), &mut swaps, begin.elapsed()));
    assert_eq!(failures, Vec::<String>::new());
    assert!(served.len() >= SWAPS * streams_per_swap);
    for Served { policy, sent, head } in &served {
        let could_be = active.iter().any(|active| active.policy == *policy && active.from <= *head && active.until >= *sent);
        assert!(could_be, "{policy:?} placed a stream while it was not active");
    }
    // Each stream was decided once, by the version that its head names: the policies' own counts say the same.
    let mut by_policy: BTreeMap<&str, u32> = BTreeMap::new();
    served.iter().for_each(|served| *by_policy.entry(&served.policy).or_default() += 1);
    assert_eq!(by_policy.len(), policies.len(), "every policy had its turn: {by_policy:?}");
    for (policy, count) in by_policy {
        let calls = host.http.metric("dynamo_host_policy_calls_total", &[("policy", policy)]).await;
        assert_eq!(calls, f64::from(count), "decisions of {policy}");
    }
    let fallbacks = host.http.metric("dynamo_host_policy_fallbacks_total", &[]).await;
    assert_eq!(fallbacks, host.http.metric("dynamo_host_policy_fallbacks_total", &[("cause", "host-stall")]).await);
}

/// Streams one after another until the swaps are done.
async fn client(host: Client, first_tokens: u32, progress: Arc<Progress>) -> (Vec<Served>, Vec<String>) {
    let (mut served, mut failures) = (Vec::new(), Vec::new());
    let mut tokens = first_tokens;
    while !progress.swaps_are_done.load(Acquire) {
        match one_stream(&host, tokens).await {
            Ok(stream) => served.push(stream),
            Err(failure) => failures.push(failure),
        }
        progress.completed.fetch_add(1, Release);
        tokens = TOKENS;
    }
    (served, failures)
}

async fn one_stream(host: &Client, count: u32) -> Result<Served, String> {
    let sent = Instant::now();
    let events = host.try_open("/v1/chat/completions", &streamed(chat(count))).await?;
    let head = Instant::now();
    let answer = events.streamed().await?;
    if tokens::count(&answer.text())? != count {
        return Err(format!("incomplete: {}", answer.text()));
    }
    if answer.finish_reasons() != ["length"] {
        return Err(format!("finish reasons: {:?}", answer.finish_reasons()));
    }
    // A policy whose thread was pre-empted for too long on a busy machine was asked all the same.
    let decided_by = answer.header("x-dynamo-policy");
    let policy = decided_by.strip_prefix("native; fallback=host-stall; policy=").unwrap_or(decided_by);
    Ok(Served { policy: policy.to_owned(), sent, head })
}

fn report(streams: usize, swaps: &mut [Duration], elapsed: Duration) -> String {
    swaps.sort_unstable();
    let at = |percent: usize| swaps[(swaps.len() * percent).div_ceil(100) - 1].as_secs_f64() * 1000.0;
    let (count, seconds, p50, p99) = (swaps.len(), elapsed.as_secs_f64(), at(50), at(99));
    format!(
        "{CLIENTS} clients, {streams} streams of {TOKENS} tokens, {count} swaps in {seconds:.1} s: p50 {p50:.1} ms, p99 {p99:.1} ms"
    )
}
