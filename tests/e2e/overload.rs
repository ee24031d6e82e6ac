//! Three times as much work as the engines can do, from three tenants in two classes: who is served how much, how soon, and what
//! becomes of the rest.
//!
//! In its short form it is a test with generous bounds. `cargo xtask overload` runs it for a minute and more and holds it to the
//! figures in `docs/benchmarks.md`.

use std::{fmt::Write as _, fs, time::Duration};

use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval},
};

use crate::harness::{
    components, eventually,
    host::{Host, MockProcess},
    load::{Sample, Source, Tally, send},
    process::run,
};

/// The engines: four of them with four places each, a token each 10 ms.
const ENGINES: usize = 4;
const PLACES: u32 = 4;
const STEP_MS: f64 = 10.0;
/// Output tokens of requests, in turn.
const OUTPUTS: [u32; 3] = [16, 48, 32];
/// What a request takes of its engine: its tokens and its prompt's step.
const SECONDS_EACH: f64 = (32.0 + 2.0) * STEP_MS / 1000.0;
/// Requests that may wait.
const ROOM: u32 = 150;

const TENANTS: [(&str, f64); 3] = [("one", 1.0), ("two", 2.0), ("four", 4.0)];
/// The target of the high class.
const TTFT_MS: f64 = 500.0;

/// What is asked of the host, as shares of what the engines can do.
#[derive(Clone, Copy)]
struct Scene {
    name: &'static str,
    /// Admission policies, the first of them from the start; several are swapped in turn.
    policies: &'static [&'static str],
    swaps: u32,
    /// Whether the configuration says the tenants' weights, or the policy does.
    is_configured: bool,
    /// Tier and weight of the high class and the low one.
    classes: [(u32, f64); 2],
    /// What each class asks for.
    offered: [f64; 2],
}

/// The high class goes first and asks for less than there is; the low one shares what is left.
const TIERS: Scene = Scene {
    name: "native, by tiers",
    policies: &[],
    swaps: 0,
    is_configured: true,
    classes: [(0, 1.0), (1, 1.0)],
    offered: [0.6, 2.4],
};
/// Both in one tier, the high class with three times the weight, both asking for more than they get.
const WEIGHTS: Scene = Scene { name: "native, by weights", classes: [(0, 3.0), (0, 1.0)], offered: [1.8, 1.2], ..TIERS };

const FAIR: &str = r#"fair-share {"tenants":{"one":1,"two":2,"four":4}}"#;
/// Much less than comes, and more than each tenant's share.
const LIMITED: &str = r#"token-bucket {"requests_per_minute":900,"request_burst":30}"#;
const SHED: &str =
    r#"slo-shed {"class_ttft_ms":{"high":500,"low":4000},"classes":[{"name":"high","tier":0},{"name":"low","tier":1}]}"#;

/// What was seen of the host meanwhile.
#[derive(Default)]
struct Watched {
    most_queued: f64,
    most_in_engine: f64,
    resident_early: u64,
    resident_most: u64,
    swaps: u32,
}

struct Report {
    scene: Scene,
    sent: usize,
    /// By class, then tenant.
    tallies: [[Tally; 3]; 2],
    watched: Watched,
    /// What the host says that it answered.
    counted: f64,
    seconds: f64,
}

#[tokio::test]
async fn in_overload_tenants_share_by_weight_the_high_class_goes_first_and_all_are_answered() {
    let seconds = std::env::var("DYNAMO_HOST_OVERLOAD_SECONDS").ok().map(|seconds| seconds.parse().expect("seconds"));
    let Some(seconds) = seconds else {
        let report = overload(TIERS, 10.0).await;
        return report.holds(0.35);
    };
    let wanted = std::env::var("DYNAMO_HOST_OVERLOAD_SCENES").unwrap_or_default();
    for scene in scenes().into_iter().filter(|scene| wanted.is_empty() || wanted.split(',').any(|want| scene.name.contains(want)))
    {
        overload(scene, seconds).await.holds(0.05);
    }
}

fn scenes() -> Vec<Scene> {
    let with = |name, policies| Scene { name, policies, ..TIERS };
    vec![
        TIERS,
        WEIGHTS,
        Scene { is_configured: false, ..with("fair-share", &[FAIR]) },
        with("token-bucket", &[LIMITED]),
        with("slo-shed", &[SHED]),
        Scene { swaps: 20, ..with("swaps of native, fair-share and slo-shed", &["native", FAIR, SHED]) },
    ]
}

/// Runs a scene.
async fn overload(scene: Scene, seconds: f64) -> Report {
    let mut engines = Vec::new();
    for _ in 0..ENGINES {
        let places = format!("max_num_seqs={PLACES}");
        let step = format!("decode_ms_base={STEP_MS}");
        let profile = [&*places, &*step, "decode_ms_per_sequence=0", "decode_ms_per_context_token=0", "prefill_ms_base=2"];
        engines.push(MockProcess::start(&profile).await);
    }
    let directory = tempfile::tempdir().unwrap();
    let (config, keys) = configuration(&scene).await;
    let keys_file = directory.path().join("keys.toml");
    fs::write(&keys_file, keys.iter().map(|(_, lines)| lines.as_str()).collect::<String>()).unwrap();
    let file = directory.path().join("host.toml");
    fs::write(&file, format!("{config}\n[auth]\nkeys_file = {keys_file:?}\n")).unwrap();
    let workers: Vec<_> = engines.iter().map(|engine| format!("{},model=m,max_running={PLACES}", engine.url())).collect();
    let arguments: Vec<_> = workers.iter().flat_map(|worker| ["--worker", worker]).collect();
    let host = Host::start(&[&["--config", file.to_str().unwrap()], &arguments[..]].concat()).await;
    for policy in scene.policies.iter().take(1) {
        activate(&host, policy).await;
    }

    let sources = sources(&scene, &host, &keys);
    let (over, is_over) = watch::channel(false);
    let begin = Instant::now();
    let length = Duration::from_secs_f64(seconds);
    let sending = async {
        let samples = send(&sources, 7, length).await;
        over.send_replace(true);
        samples
    };
    let (samples, watched) = tokio::join!(sending, watch(&host, &engines, &scene, begin, length, is_over));
    // What came first found empty engines.
    let window = [begin + length / 6, begin + length];
    let tallies = [0, 1].map(|class| [0, 1, 2].map(|tenant| Tally::of(&samples, class * 3 + tenant, window)));
    let counted = settled(&host, &engines, &samples).await;
    let report = Report { scene, sent: samples.len(), tallies, watched, counted, seconds };
    println_report(&report);
    report
}

/// The configuration but the keys' file, and for each class and tenant a key and its lines in that file.
async fn configuration(scene: &Scene) -> (String, Vec<(String, String)>) {
    let mut config = format!("[queue]\nmax_requests = {ROOM}\n[slo.classes.high]\nttft_ms = {TTFT_MS}\n");
    let mut keys = Vec::new();
    for (class, (tier, weight)) in ["high", "low"].into_iter().zip(scene.classes) {
        writeln!(config, "[queue.classes.{class}]\ntier = {tier}\nweight = {weight:?}").unwrap();
        for (tenant, _) in TENANTS {
            let made = run(&["key", "new", tenant, "--class", class]).await;
            let key = made.stderr.split_whitespace().find(|word| word.starts_with("dh-")).unwrap().to_owned();
            keys.push((key, made.succeeded().to_owned()));
        }
    }
    for (tenant, weight) in TENANTS.into_iter().filter(|_| scene.is_configured) {
        writeln!(config, "[queue.tenants.{tenant}]\nweight = {weight:?}").unwrap();
    }
    (config, keys)
}

fn sources(scene: &Scene, host: &Host, keys: &[(String, String)]) -> Vec<Source> {
    let capacity = f64::from(PLACES) * ENGINES as f64 / SECONDS_EACH;
    let body = |tokens: &u32| {
        let messages = json!([{ "role": "user", "content": "count" }]);
        json!({ "model": "m", "messages": messages, "max_tokens": tokens, "stream": true, "stream_options": { "include_usage": true } })
            .to_string()
    };
    let mut sources = Vec::new();
    for offered in scene.offered {
        for _ in TENANTS {
            let (key, _) = &keys[sources.len()];
            sources.push(Source {
                client: host.http.with_token(key),
                headers: Vec::new(),
                rate: capacity * offered / 3.0,
                bodies: OUTPUTS.iter().map(body).collect(),
            });
        }
    }
    sources
}

/// Looks at the host while it is under load, and changes its policy.
async fn watch(
    host: &Host,
    engines: &[MockProcess],
    scene: &Scene,
    begin: Instant,
    length: Duration,
    mut is_over: watch::Receiver<bool>,
) -> Watched {
    let mut watched = Watched::default();
    let mut ticks = interval(Duration::from_millis(250));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = is_over.wait_for(|over| *over) => return watched,
        }
        let queued = host.http.metric("dynamo_host_queue_requests", &[]).await;
        watched.most_queued = watched.most_queued.max(queued);
        for engine in engines {
            let inside = engine.http.metric("vllm:num_requests_waiting", &[]).await;
            watched.most_in_engine = watched.most_in_engine.max(inside);
        }
        let resident = host.process.memory();
        if begin.elapsed() < length / 3 {
            watched.resident_early = watched.resident_early.max(resident);
        }
        watched.resident_most = watched.resident_most.max(resident);
        let due = begin.elapsed().as_secs_f64() / length.as_secs_f64() * f64::from(scene.swaps + 1);
        if scene.policies.len() > 1 && watched.swaps < scene.swaps && due >= f64::from(watched.swaps + 1) {
            watched.swaps += 1;
            activate(host, scene.policies[watched.swaps as usize % scene.policies.len()]).await;
        }
    }
}

async fn activate(host: &Host, policy: &str) {
    let (name, settings) = policy.split_once(' ').unwrap_or((policy, "{}"));
    let file = if name == "native" { name.to_owned() } else { components::policy(name) };
    let more: &[&str] = if name == "native" { &[] } else { &["--settings", settings] };
    host.cli(&[&["policy", "activate", "admission", &file], more].concat()).await.succeeded();
}

/// Waits until nothing runs any more; what the host says that it answered.
async fn settled(host: &Host, engines: &[MockProcess], samples: &[Sample]) -> f64 {
    for engine in engines {
        engine.runs(0).await;
    }
    for gauge in ["dynamo_host_requests_in_flight", "dynamo_host_queue_requests", "dynamo_host_queue_tokens"] {
        eventually(&format!("{gauge} is 0"), async || (host.http.metric(gauge, &[]).await == 0.0).then_some(())).await;
    }
    let mut counted = 0.0;
    let all = format!("{} requests are counted", samples.len());
    eventually(&all, async || {
        counted = host.http.metric("dynamo_host_requests_total", &[("endpoint", "chat_completions")]).await;
        (counted >= samples.len() as f64).then_some(())
    })
    .await;
    assert!(!host.process.panicked());
    counted
}

impl Report {
    /// Shares of a class's work by tenant, each with what its weight makes of it.
    fn tenants(&self, class: usize) -> [(f64, f64); 3] {
        let all: f64 = self.tallies[class].iter().map(|tally| tally.tokens as f64).sum();
        let weights: f64 = TENANTS.iter().map(|(_, weight)| weight).sum();
        [0, 1, 2].map(|tenant| (self.tallies[class][tenant].tokens as f64 / all, TENANTS[tenant].1 / weights))
    }

    /// The high class's share of the work, and what its weight makes of it.
    fn high(&self) -> (f64, f64) {
        let of = |class: usize| self.tallies[class].iter().map(|tally| tally.tokens as f64).sum::<f64>();
        let [(_, high), (_, low)] = self.scene.classes;
        (of(0) / (of(0) + of(1)), high / (high + low))
    }

    fn all(&self) -> impl Iterator<Item = &Tally> {
        self.tallies.iter().flatten()
    }

    /// Whether the high class has a tier of its own, in which it asks for less than there is.
    fn is_by_tiers(&self) -> bool {
        self.scene.classes[0].0 < self.scene.classes[1].0
    }

    /// Holds it to what is promised; shares may be off by this part of themselves.
    fn holds(&self, off: f64) {
        let failed: Vec<_> = self.all().flat_map(|tally| &tally.failed).collect();
        assert!(failed.is_empty(), "{} requests failed, such as: {}", failed.len(), failed[0]);
        for tally in self.all() {
            assert_eq!(tally.served + tally.refused(), tally.sent);
            for (status, code) in tally.refused.keys() {
                assert!([429, 503, 504].contains(status), "{status} {code}");
            }
        }
        assert_eq!(self.counted, self.sent as f64, "each request is counted once");
        let Watched { most_queued, most_in_engine, resident_early, resident_most, swaps } = self.watched;
        // The classes' gauges are read one after the other, and one may take a place that another had.
        assert!(most_queued <= f64::from(ROOM) + 2.0, "{most_queued} waited");
        // What comes while a step is computed waits for the next one.
        assert!(most_in_engine <= f64::from(PLACES), "{most_in_engine} requests waited inside engines");
        assert!(resident_most < resident_early + (48 << 20), "{resident_early} bytes grew to {resident_most}");
        assert_eq!(swaps, self.scene.swaps);
        // Policies that shed have their own mind of who is served how much.
        let sheds = |name| self.scene.policies.iter().any(|policy: &&str| policy.starts_with(name));
        let classes = match self.is_by_tiers() {
            _ if sheds("token-bucket") => 0..0,
            true => 1..2,
            false => 0..2,
        };
        for class in classes {
            for (share, due) in self.tenants(class) {
                assert!((share - due).abs() <= off * due, "a tenant had {share:.3} of its class, due were {due:.3}");
            }
        }
        if self.is_by_tiers() {
            let ttft = |class: usize, share| self.tallies[class].iter().map(|tally| tally.ttft(share)).max().unwrap();
            // Within its own limits, nobody waits long enough for it to show.
            assert!(sheds("token-bucket") || ttft(0, 0.99) < ttft(1, 0.5), "the high class does not go first");
            let refused: usize = self.tallies[0].iter().map(Tally::refused).sum();
            assert!(refused == 0 || sheds("token-bucket"), "the high class was refused {refused}");
        } else {
            let (share, due) = self.high();
            assert!((share - due).abs() <= off * due, "the high class had {share:.3} of the work, due were {due:.3}");
        }
    }
}

#[expect(clippy::print_stdout, reason = "figures are for whoever runs it with --nocapture")]
fn println_report(report: &Report) {
    let Report { scene, sent, watched, counted, seconds, .. } = report;
    println!("\n{}, {seconds} s: {sent} requests sent, {counted} counted by the host, {} swaps", scene.name, watched.swaps);
    println!(
        "{:<14} {:>6} {:>6} {:>7} {:>6} {:>8} {:>8} {:>8} {:>8}  share of its class",
        "class, tenant", "sent", "served", "refused", "failed", "tokens", "ttft p50", "p99 (ms)", "queue ms"
    );
    for (class, name) in ["high", "low"].into_iter().enumerate() {
        for (tenant, (share, due)) in report.tenants(class).into_iter().enumerate() {
            let label = format!("{name}, {}", TENANTS[tenant].0);
            println!("{label:<14} {}  {share:.3}, by weight {due:.3}", report.tallies[class][tenant]);
        }
    }
    let mut refused = std::collections::BTreeMap::new();
    for (why, times) in report.all().flat_map(|tally| &tally.refused) {
        *refused.entry(why).or_insert(0) += times;
    }
    let refused: Vec<Value> = refused.iter().map(|((status, code), times)| json!(format!("{status} {code}: {times}"))).collect();
    let (share, due) = report.high();
    println!("high class: {share:.3} of the work, by weight {due:.3}; refused: {}", Value::from(refused));
    println!(
        "most that waited: {} here of {ROOM}, {} inside engines; memory {} MB in the first third, at most {} MB",
        watched.most_queued,
        watched.most_in_engine,
        watched.resident_early >> 20,
        watched.resident_most >> 20
    );
}
