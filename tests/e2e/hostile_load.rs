//! Every misbehaviour under load: one bad policy after the other decides for clients that never pause, and no request fails.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Acquire, Release},
        },
    },
    time::Instant,
};

use dynamo_engine_mock::tokens;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::harness::{
    client::Client,
    components, eventually,
    host::{Host, chat, streamed},
};

const VERSION: &str = env!("CARGO_PKG_VERSION");
const CLIENTS: usize = 16;
/// What hostile guests misbehave at, and what every client asks for while they do.
const PROVOCATION: u32 = 13;

/// Streams that each policy has to live through, at least; `DYNAMO_HOST_HOSTILE_STREAMS` asks for more.
fn streams_per_mode() -> u64 {
    std::env::var("DYNAMO_HOST_HOSTILE_STREAMS").map_or(60, |streams| streams.parse().unwrap())
}

/// Misbehaviours, the cause under which each is counted, and whether it leads to quarantine.
#[rustfmt::skip]
const MODES: &[(&str, Option<&str>, bool)] = &[
    ("trap", Some("trap"), true),
    ("loop", Some("fuel"), true),
    ("memory", Some("memory"), true),
    ("recursion", Some("stack"), true),
    ("bulk", Some("fuel"), true),
    ("host-calls", Some("fuel"), true),
    ("huge-answer", Some("argument-bytes"), true),
    ("out-of-range", Some("answer-out-of-range"), true),
    ("duplicate", Some("answer-duplicate"), true),
    ("empty", Some("answer-empty"), true),
    ("too-many", Some("answer-too-many"), true),
    ("bad-status", Some("answer-status"), true),
    ("hold", Some("hold-exhausted"), true),
    ("no-answer", Some("no-answer"), false),
    // A megabyte with each call: fewer than one in ten fails.
    ("leak", Some("memory"), false),
    ("flood", None, false),
    ("metric-flood", None, false),
    ("state-flood", None, false),
    ("not-finite", None, false),
    ("remember", None, false),
    ("slow-configure", None, false),
    ("trap-in-observe", None, false),
    ("loop-in-observe", None, false),
];

#[derive(Default)]
struct Progress {
    completed: AtomicU64,
    /// Clients ask for what no guest misbehaves at.
    is_harmless: AtomicBool,
    is_over: AtomicBool,
}

/// Streams by the header that says who decided.
type Served = BTreeMap<String, u64>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_whatever_a_policy_does() {
    let state = tempfile::tempdir().unwrap();
    let host = Host::over_mocks(&["a", "b", "c", "d"], "speedup=50", &["--state-dir", state.path().to_str().unwrap()]).await;
    let begun = Instant::now();
    let progress = Arc::<Progress>::default();
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(client(host.http.clone(), Arc::clone(&progress)));
    }
    let completed = |more: u64| {
        let (progress, due) = (Arc::clone(&progress), progress.completed.load(Acquire) + more);
        async move { eventually("streams go on", async || (progress.completed.load(Acquire) >= due).then_some(())).await }
    };

    let mut lines = Vec::new();
    for (mode, cause, is_quarantined) in MODES {
        host.activate(&components::guest("hostile"), &json!({ "mode": mode })).await;
        completed(streams_per_mode()).await;
        let slot = eventually(&format!("{mode} shows"), async || {
            let slot = host.slot().await;
            let active = &slot["active"];
            let is_counted = cause.is_none_or(|cause| active["fallbacks"][cause].as_u64() > Some(0));
            let is_judged = !is_quarantined || active["quarantines"].as_u64() > Some(0);
            let learns = !mode.ends_with("-in-observe") || !active["observe_failures"].as_object().unwrap().is_empty();
            (is_counted && is_judged && learns && active["calls"].as_u64() > Some(0)).then_some(slot)
        })
        .await;
        let active = &slot["active"];
        if !is_quarantined {
            assert_eq!(active["quarantines"], 0, "{mode}: {slot}");
        }
        lines.push(format!("{mode:<16} {:>7} calls, did not decide: {}", active["calls"], active["fallbacks"]));
    }

    recovers(&host, &progress).await;
    let good = format!("round-robin@{VERSION}");
    host.activate(&components::policy("round-robin"), &json!({})).await;
    completed(2 * CLIENTS as u64).await;
    progress.is_over.store(true, Release);
    let (mut served, mut failures) = (Served::new(), Vec::new());
    for (streams, failed) in clients.join_all().await {
        streams.into_iter().for_each(|(by, count)| *served.entry(by).or_default() += count);
        failures.extend(failed);
    }
    let total: u64 = served.values().sum();
    println!("{CLIENTS} clients, {total} streams in {:.1} s\n{}\n{served:#?}", begun.elapsed().as_secs_f64(), lines.join("\n"));
    assert_eq!(failures, Vec::<String>::new());
    assert!(served[&good] >= CLIENTS as u64, "the good one decides: {served:?}");
    each_fallback_is_counted(&host, &served).await;
    let peak = host.process.peak_memory();
    assert!(peak < 1 << 30, "it took {} MB", peak >> 20);
    host.is_well().await;
}

/// Under load, a policy that is bad for a while is quarantined, tried, and decides again.
async fn recovers(host: &Host, progress: &Progress) {
    host.activate(&components::guest("hostile"), &json!({ "mode": "trap" })).await;
    let is = async |state: &str| {
        eventually(&format!("it is {state}"), async || {
            let slot = host.slot().await;
            (slot["active"]["state"] == state && slot["active"]["quarantines"].as_u64() > Some(0)).then_some(slot)
        })
        .await
    };
    is("quarantined").await;
    progress.is_harmless.store(true, Release);
    let slot = is("ready").await;
    let calls = |slot: &Value| slot["active"]["calls"].as_u64().unwrap();
    let before = calls(&slot);
    eventually("it decides again", async || (calls(&host.slot().await) > before + CLIENTS as u64).then_some(())).await;
}

/// What clients were told, the host has counted.
async fn each_fallback_is_counted(host: &Host, served: &Served) {
    let mut by_cause = BTreeMap::<&str, u64>::new();
    for (by, count) in served {
        if let Some(cause) =
            by.strip_prefix("native; fallback=").and_then(|rest| rest.strip_suffix(&format!("; policy=hostile@{VERSION}")))
        {
            *by_cause.entry(cause).or_default() += count;
        } else {
            assert!(by.as_str() == "native" || !by.starts_with("native"), "{by}");
        }
    }
    for (cause, count) in by_cause {
        let counted = host.http.metric("dynamo_host_policy_fallbacks_total", &[("cause", cause)]).await;
        assert_eq!(counted, count as f64, "{cause}");
    }
}

/// Streams one after another until it is over.
async fn client(host: Client, progress: Arc<Progress>) -> (Served, Vec<String>) {
    let (mut served, mut failures) = (Served::new(), Vec::new());
    while !progress.is_over.load(Acquire) {
        let tokens = if progress.is_harmless.load(Acquire) { PROVOCATION - 1 } else { PROVOCATION };
        match one_stream(&host, tokens).await {
            Ok(by) => *served.entry(by).or_default() += 1,
            Err(failure) => failures.push(failure),
        }
        progress.completed.fetch_add(1, Release);
    }
    (served, failures)
}

async fn one_stream(host: &Client, count: u32) -> Result<String, String> {
    let answer = host.try_open("/v1/chat/completions", &streamed(chat(count))).await?.streamed().await?;
    if tokens::count(&answer.text())? != count || answer.finish_reasons() != ["length"] {
        return Err(format!("incomplete: {:?}", answer.events));
    }
    Ok(answer.header("x-dynamo-policy").to_owned())
}
