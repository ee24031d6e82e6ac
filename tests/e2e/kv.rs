//! Where prefixes are: engines tell what they hold, and requests go there.
//!
//! What an engine holds is made by asking the engine itself, past the host: only its events can tell the host of it.

use serde_json::{Value, json};

use crate::{
    harness::{
        components, eventually,
        host::{Host, MockProcess},
    },
    workers::{workers, workers_until},
};

const COMPLETIONS: &str = "/v1/completions";
/// Blocks of 16 tokens.
const BLOCKS: u32 = 20;
const PUBLISHES: &str = "kv_events=tcp://127.0.0.1:0";

/// A completion of a long prompt, by its token ids; another number is another prompt from its first token on.
fn long(number: u32) -> Value {
    let ids: Vec<u32> = (0..BLOCKS * 16 + 5).map(|at| number * 10_000 + at).collect();
    json!({ "model": "m", "prompt": ids, "max_tokens": 1 })
}

/// Has an engine compute prompts without the host.
async fn fill(engine: &MockProcess, prompts: impl IntoIterator<Item = u32>) {
    for prompt in prompts {
        engine.http.ask(COMPLETIONS, &long(prompt)).await;
    }
}

/// At 127.0.0.1, where it publishes too.
async fn engine(profile: &[&str]) -> MockProcess {
    MockProcess::start_at("127.0.0.1:0", &[&["speedup=100"], profile].concat()).await
}

/// A host over engines `a`, `b`, …, with a policy that goes by what is cached; of equals it takes any.
async fn over(engines: &[&MockProcess], options: &str, arguments: &[&str]) -> Host {
    let policy = components::guest("kv-cost");
    let worker = |(at, engine): (usize, &&MockProcess)| format!("{},name={}{options}", engine.url(), char::from(b'a' + at as u8));
    let workers: Vec<String> = engines.iter().enumerate().map(worker).collect();
    let mut all = vec!["--expose-worker", "--routing", &policy];
    all.extend(workers.iter().flat_map(|worker| ["--worker", worker]));
    all.extend(arguments);
    Host::start(&all).await
}

/// Who serves a request.
async fn server_of(host: &Host, body: &Value) -> String {
    host.http.ask(COMPLETIONS, body).await.headers["x-dynamo-worker"].to_str().unwrap().to_owned()
}

/// Waits until a worker is known to hold so many blocks at least, or none.
async fn knows(host: &Host, worker: &str, blocks: std::ops::RangeInclusive<u64>) -> Value {
    let row = |rows: &[Value]| rows.iter().find(|row| row["name"] == worker).cloned().unwrap();
    let is_known = |rows: &[Value]| row(rows)["kv"]["blocks"].as_u64().is_some_and(|known| blocks.contains(&known));
    row(&workers_until(host, &format!("{worker} is known to hold {blocks:?} blocks"), is_known).await)
}

async fn row(host: &Host, worker: &str) -> Value {
    workers(host).await.into_iter().find(|row| row["name"] == worker).unwrap()
}

#[tokio::test]
async fn a_repeated_prompt_goes_to_the_engine_that_holds_it() {
    for form in ["kv_form=map", "kv_form=positional"] {
        let (a, b) = (engine(&[PUBLISHES, form]).await, engine(&[PUBLISHES, form]).await);
        // One before the host is there, to be replayed.
        fill(&b, [1]).await;
        let host = over(&[&a, &b], "", &[]).await;
        knows(&host, "b", BLOCKS.into()..=u64::MAX).await;
        assert_eq!(server_of(&host, &long(1)).await, "b", "{form}");
        fill(&b, [2]).await;
        fill(&a, [3]).await;
        knows(&host, "b", u64::from(2 * BLOCKS)..=u64::MAX).await;
        let report = knows(&host, "a", BLOCKS.into()..=u64::MAX).await;
        assert_eq!((&report["kv"]["source"], &report["kv"]["stale"]), (&json!("events"), &json!(false)), "{report}");
        for (prompt, worker) in [(2, "b"), (3, "a"), (1, "b"), (2, "b")] {
            assert_eq!(server_of(&host, &long(prompt)).await, worker, "{form}");
        }
        let table = host.cli(&["worker", "list"]).await;
        assert!(table.succeeded().contains("events "), "{}", table.stdout);
        assert!(host.admin.metric("dynamo_host_kv_events_total", &[("kind", "stored"), ("result", "applied")]).await > 0.0);
    }
}

#[tokio::test]
async fn an_engine_that_restarts_is_forgotten_and_learnt_again() {
    let a = engine(&[PUBLISHES]).await;
    let mut b = engine(&[PUBLISHES]).await;
    let host = over(&[&a, &b], "", &[]).await;
    // As long as both hold it, either serves it.
    fill(&a, [1]).await;
    fill(&b, [1]).await;
    for engine in ["a", "b"] {
        knows(&host, engine, BLOCKS.into()..=u64::MAX).await;
    }
    // At another port than before for its events, and then at the same.
    for round in 0..2 {
        let address = b.url().trim_start_matches("http://").to_owned();
        let sources = b.http.get_json("/kv_event_sources").await;
        b.process.kill();
        let told = |key: &str| sources["0"][key].as_str().unwrap().to_owned();
        let same = [
            format!("kv_events={}", told("endpoint")),
            format!("kv_replay={}", told("replay_endpoint")),
            "speedup=100".to_owned(),
        ];
        let same: Vec<&str> = same.iter().map(String::as_str).collect();
        b = MockProcess::start_at(&address, if round == 0 { &[PUBLISHES, "speedup=100"] } else { &same }).await;
        // It says more than the one before had said, so that numbers alone would not tell.
        fill(&b, [2, 4, 5, 6, 7]).await;
        let row = knows(&host, "b", u64::from(5 * BLOCKS)..=u64::from(5 * BLOCKS + 15)).await;
        assert_eq!(row["kv"]["resets"], round + 1, "{row}");
        host.workers_are("healthy").await;
        assert_eq!(server_of(&host, &long(2)).await, "b");
        assert_eq!(server_of(&host, &long(1)).await, "a", "what it held is forgotten");
        fill(&b, [1]).await;
    }
}

#[tokio::test]
async fn what_is_lost_on_the_way_is_replayed() {
    let (a, b) = (engine(&[PUBLISHES]).await, engine(&[PUBLISHES, "kv_drop_every=2"]).await);
    let host = over(&[&a, &b], "", &[]).await;
    knows(&host, "b", 0..=0).await;
    for prompt in 1..=8 {
        fill(&b, [prompt]).await;
    }
    let row = knows(&host, "b", u64::from(8 * BLOCKS)..=u64::MAX).await;
    assert_eq!(row["kv"]["resets"], 0, "{row}");
    for prompt in 1..=8 {
        assert_eq!(server_of(&host, &long(prompt)).await, "b", "{prompt}");
    }
    assert!(host.admin.metric("dynamo_host_kv_replays_total", &[("result", "done")]).await > 0.0);
}

#[tokio::test]
async fn what_is_lost_and_never_replayed_voids_what_was_told() {
    let b = engine(&[PUBLISHES, "kv_replay=off", "kv_drop_every=3"]).await;
    let host = over(&[&b], "", &[]).await;
    let mut prompt = 0;
    eventually("a gap is seen", async || {
        prompt += 1;
        fill(&b, [prompt]).await;
        (row(&host, "a").await["kv"]["resets"].as_u64() > Some(0)).then_some(())
    })
    .await;
    assert!(host.admin.metric("dynamo_host_kv_resets_total", &[("cause", "gap")]).await > 0.0);
    host.is_well().await;
}

#[tokio::test]
async fn events_of_another_model_or_block_size_are_left_out_and_shown() {
    let a = engine(&[PUBLISHES, "kv_topic=kv@a@another"]).await;
    let host = over(&[&a], "", &[]).await;
    let left_out = |rows: &[Value]| rows[0]["kv"]["left_out"].as_u64() > Some(0);
    // What is replayed has no topic that would name a model.
    eventually("it is heard", async || {
        fill(&a, [1]).await;
        host.admin.post("/v1/nothing", "").await;
        a.http.post("/reset_prefix_cache", "").await;
        left_out(&workers(&host).await).then_some(())
    })
    .await;
    let row = row(&host, "a").await;
    assert!(row["kv"]["trouble"].as_str().unwrap().contains("\"another\""), "{row}");

    let b = engine(&[PUBLISHES]).await;
    let host = over(&[&b], ",block_size=32", &[]).await;
    fill(&b, [1]).await;
    let rows = workers_until(&host, "they are left out", left_out).await;
    assert!(rows[0]["kv"]["trouble"].as_str().unwrap().contains("blocks of 16 tokens"), "{}", rows[0]);
    assert_eq!(rows[0]["kv"]["blocks"], 0);
    let table = host.cli(&["worker", "list"]).await;
    assert!(table.succeeded().contains("blocks of 16 tokens"), "{}", table.stdout);
    host.is_well().await;
}

#[tokio::test]
async fn an_engine_that_connects_to_the_host_is_heard() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let a = engine(&[PUBLISHES]).await;
    let b = engine(&[&format!("kv_events=connect:tcp://127.0.0.1:{port}"), "kv_replay=off"]).await;
    let policy = components::guest("kv-cost");
    let workers = [format!("{},name=a", a.url()), format!("{},name=b,kv_events=bind:tcp://127.0.0.1:{port}", b.url())];
    let host = Host::start(&["--expose-worker", "--routing", &policy, "--worker", &workers[0], "--worker", &workers[1]]).await;
    let blocks = async || row(&host, "b").await["kv"]["blocks"].as_u64();
    let mut prompt = 0;
    let heard = eventually("it is heard", async || {
        prompt += 1;
        fill(&b, [prompt]).await;
        blocks().await.filter(|&blocks| blocks > 0)
    })
    .await;
    // What is heard by now may be of a prompt before.
    fill(&b, [prompt + 1]).await;
    eventually("the next is heard", async || blocks().await.filter(|&blocks| blocks > heard)).await;
    eventually("it goes where its blocks are", async || (server_of(&host, &long(prompt + 1)).await == "b").then_some(())).await;
}

#[tokio::test]
async fn engines_that_do_not_tell_are_expected_to_hold_what_they_were_sent() {
    let (a, b) = (engine(&[]).await, engine(&[]).await);
    let host = over(&[&a, &b], "", &[]).await;
    let text = |number: u32| json!({ "model": "m", "prompt": format!("{number} ").repeat(300), "max_tokens": 1 });
    host.activate(&components::policy("round-robin"), &json!({})).await;
    let prompts = [text(1), text(2), long(3), long(4)];
    let mut servers = Vec::new();
    for prompt in &prompts {
        servers.push(server_of(&host, prompt).await);
    }
    assert!(servers.contains(&"a".to_owned()) && servers.contains(&"b".to_owned()), "{servers:?}");
    host.activate(&components::guest("kv-cost"), &json!({})).await;
    for _ in 0..2 {
        for (prompt, server) in prompts.iter().zip(&servers) {
            assert_eq!(&server_of(&host, prompt).await, server);
        }
    }
    let row = row(&host, "a").await;
    assert_eq!(row["kv"]["source"], "approximate", "{row}");
    assert!(row["kv"]["blocks"].as_u64() > Some(0) && row["kv"]["trouble"].is_string(), "{row}");
    let table = host.cli(&["worker", "list"]).await;
    assert!(table.succeeded().contains("approximate "), "{}", table.stdout);
}

#[tokio::test]
async fn expectations_can_be_switched_off() {
    let a = engine(&[PUBLISHES]).await;
    let text = format!("[kv]\napproximate = false\n[[worker]]\nurl = '{}'\nname = 'a'\nkv_events = 'off'\n", a.url());
    let host = Host::configured(&text, &[]).await;
    host.http.ask(COMPLETIONS, &long(1)).await;
    let row = row(&host, "a").await;
    assert_eq!((&row["kv"]["source"], &row["kv"]["blocks"]), (&json!("none"), &json!(0)), "{row}");
}

#[tokio::test]
async fn mock_engines_in_the_hosts_process_tell_too() {
    let routing = components::policy("round-robin");
    let host = Host::over_mocks(&["a", "b"], "speedup=100", &["--expose-worker", "--routing", &routing]).await;
    let servers = [server_of(&host, &long(1)).await, server_of(&host, &long(2)).await];
    assert_ne!(servers[0], servers[1]);
    for worker in ["a", "b"] {
        let row = knows(&host, worker, BLOCKS.into()..=u64::MAX).await;
        assert_eq!(row["kv"]["source"], "events", "{row}");
    }
    host.activate(&components::guest("kv-cost"), &json!({})).await;
    for prompt in [2, 1, 2] {
        assert_eq!(server_of(&host, &long(prompt)).await, servers[prompt as usize - 1]);
    }
}
