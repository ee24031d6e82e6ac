//! Workers that fail, hang, slow down and come back, and what the host says of them meanwhile.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use hyper::StatusCode;
use serde_json::json;

use crate::{
    harness::{
        components, eventually,
        host::{Host, MockProcess, chat, completion, streamed},
        replace,
        scripted::{STREAM_END, STREAM_HEAD, Scripted, end_events, http_chunk, stream_answer, token_event, whole_answer},
        soon,
    },
    workers::{workers, workers_until},
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// Breakers and outliers that are tried again soon, so that a test does not wait.
const SOON: &str = "[health]\ncanary = 'off'\nhold_s = 50\n[health.breaker]\npause_ms = 200\nmax_pause_s = 1\n\
                    [health.outliers]\npause_s = 1\nmax_pause_s = 1\n";

async fn state_of(host: &Host, name: &str) -> String {
    let rows = workers(host).await;
    let row = rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no {name} in {rows:?}"));
    row["state"].as_str().unwrap().to_owned()
}

/// Waits until a worker is in one of these states, while requests come.
async fn becomes(host: &Host, name: &str, states: &[&str]) {
    eventually(&format!("{name} is {states:?}"), async || {
        host.http.post(CHAT, streamed(chat(6)).to_string()).await;
        states.contains(&state_of(host, name).await.as_str()).then_some(())
    })
    .await;
}

/// An engine that breaks what it begins while the switch is on, and serves well while it is off.
async fn breaking(is_broken: &Arc<AtomicBool>) -> Scripted {
    let is_broken = Arc::clone(is_broken);
    Scripted::start(move |mut connection| {
        let is_broken = is_broken.load(Relaxed);
        async move {
            let well = stream_answer(&(token_event(0) + &end_events()));
            let broken = whole_answer("500 Internal Server Error", r#"{"error":{"message":"the core is dead","code":500}}"#);
            connection.write(if is_broken { broken } else { well }).await;
        }
    })
    .await
}

#[tokio::test]
async fn with_all_workers_dead_it_is_not_ready_refuses_at_once_and_serves_when_they_are_back() {
    let mut engines = [MockProcess::start(&["speedup=50"]).await, MockProcess::start(&["speedup=50"]).await];
    let addresses = engines.each_ref().map(|engine| engine.url().strip_prefix("http://").unwrap().to_owned());
    let config: String = addresses.iter().map(|it| format!("[[worker]]\nurl = 'http://{it}'\nmodel = 'm'\n")).collect();
    let host = Host::configured(&format!("[health]\nhold_s = 55\n{config}"), &[]).await;
    assert_eq!(host.http.get("/ready").await.status, StatusCode::OK);
    engines.iter_mut().for_each(|engine| engine.process.kill());
    host.workers_are("unreachable").await;
    for path in ["/ready", "/health"] {
        let reply = host.http.get(path).await;
        assert_eq!((reply.status, &reply.json()["reason"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("no worker is ready")));
    }
    // Nobody is starting: nobody waits for the hold.
    for stream in [false, true] {
        let body = if stream { streamed(chat(3)) } else { chat(3) };
        let reply = soon("a refusal", host.http.post(CHAT, body.to_string())).await;
        reply.is_error(503, "no_worker");
        assert_eq!(reply.header("retry-after"), "1");
    }
    let _back = MockProcess::start_at(&addresses[1], &["speedup=50"]).await;
    eventually("it is ready", async || (host.http.get("/ready").await.status == StatusCode::OK).then_some(())).await;
    host.serves(3).await;
    let health = host.http.get_json("/health").await;
    assert_eq!(health["status"], "degraded", "{health}");
    let pool = &health["models"]["m"];
    assert_eq!((&pool["total"], &pool["ready"], &pool["unreachable"]), (&json!(2), &json!(1), &json!(1)), "{health}");
    let is_told = |address: &String| health.to_string().contains(address.split(':').next().unwrap());
    assert!(!addresses.iter().any(is_told), "anybody may ask: {health}");
}

#[tokio::test]
async fn requests_wait_for_a_worker_that_is_starting() {
    let engine = Scripted::answering(stream_answer(&(token_event(0) + &end_events()))).await;
    engine.loads(true);
    let config = format!("{SOON}[[worker]]\nurl = '{}'\nmodel = 'm'\nname = 'w'\n", engine.url());
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("host.toml");
    std::fs::write(&file, config.replace("hold_s = 50", "hold_s = 0")).unwrap();
    let host = Host::start_anyhow(&["--config", file.to_str().unwrap()]).await;
    host.workers_are("starting").await;
    assert_eq!(host.http.get("/ready").await.status, StatusCode::SERVICE_UNAVAILABLE);
    host.http.post(CHAT, chat(3).to_string()).await.is_error(503, "no_worker");
    // The hold counts as soon as the file is read again.
    replace(&file, &config);
    eventually("the file is read again", async || {
        (host.admin.get_json("/v1/status").await["config"]["reloads"] == 1).then_some(())
    })
    .await;
    let client = host.http.clone();
    let mut waiting = tokio::task::JoinSet::new();
    waiting.spawn(async move { client.stream(CHAT, &streamed(chat(1))).await.text() });
    assert!(tokio::time::timeout(Duration::from_millis(500), waiting.join_next()).await.is_err(), "it waits");
    engine.loads(false);
    assert_eq!(soon("it is served", waiting.join_next()).await.unwrap().unwrap(), "t0");
}

#[tokio::test]
async fn a_model_that_is_required_and_missing_makes_it_not_ready() {
    let host = Host::configured("[health]\nrequired_models = ['m', 'gone']\n", &["--worker", "mock://a?model=m"]).await;
    let reply = host.http.get("/ready").await;
    assert_eq!(reply.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(reply.json()["reason"], "no worker is ready for gone");
    let health = host.http.get("/health").await;
    assert_eq!((health.status, &health.json()["status"]), (StatusCode::OK, &json!("degraded")), "something can be served");
}

#[tokio::test]
async fn an_idle_engine_that_is_gone_is_noticed_by_its_load_before_its_probe() {
    let mut engine = MockProcess::start(&["speedup=50"]).await;
    let seldom = "[health]\ncanary = 'off'\nprobe_every_ms = 3600000\n";
    let host = Host::configured(seldom, &["--worker", &format!("{},model=m,kind=vllm", engine.url())]).await;
    engine.process.kill();
    host.workers_are("unreachable").await;
    assert_eq!(host.http.get("/ready").await.status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn an_engine_that_hangs_is_given_up_and_used_again_when_it_goes_on() {
    let engine = MockProcess::start(&["decode_ms_base=20"]).await;
    let host = Host::start(&["--worker", &format!("{},model=m", engine.url())]).await;
    let mut stream = host.http.open(COMPLETIONS, &streamed(completion(30_000))).await;
    stream.event().await;
    engine.process.signal("STOP");
    host.process.logs("worker is given up").await;
    assert_eq!(state_of(&host, engine.url().strip_prefix("http://").unwrap()).await, "unreachable");
    assert_eq!(host.http.metric("dynamo_host_given_up_total", &[("cause", "unresponsive")]).await, 1.0);
    host.http.post(CHAT, chat(3).to_string()).await.is_error(503, "no_worker");
    drop(stream);
    engine.process.signal("CONT");
    host.workers_are("healthy").await;
    host.serves(3).await;
}

#[tokio::test]
async fn a_worker_that_fails_its_requests_is_passed_over_and_comes_back_by_trials() {
    let is_broken = Arc::new(AtomicBool::new(true));
    let engine = breaking(&is_broken).await;
    let worker = format!("{},name=bad", engine.worker());
    let host = Host::configured(SOON, &["--worker", &worker, "--worker", "mock://good?model=m&speedup=50"]).await;
    // Its pauses are short: what is said of it is looked at with its state.
    let trouble = eventually("it is tripped", async || {
        host.http.post(CHAT, streamed(chat(6)).to_string()).await;
        let row = workers(&host).await.into_iter().find(|row| row["name"] == "bad")?;
        (row["state"] == "tripped").then(|| row["trouble"].as_str().unwrap().to_owned())
    })
    .await;
    assert!(trouble.contains("breaker is open") && trouble.contains("5xx"), "{trouble}");
    assert!(host.http.metric("dynamo_host_breaker_opens_total", &[("cause", "unhealthy")]).await >= 1.0);
    assert_eq!(host.http.get("/ready").await.status, StatusCode::OK);
    // Trials fail, and it is open again, for longer.
    eventually("it opened again", async || {
        host.http.post(CHAT, streamed(chat(6)).to_string()).await;
        (host.http.metric("dynamo_host_breaker_opens_total", &[]).await >= 2.0).then_some(())
    })
    .await;
    is_broken.store(false, Relaxed);
    becomes(&host, "bad", &["healthy"]).await;
    assert_eq!(host.http.metric("dynamo_host_worker_breaker", &[("worker", "bad")]).await, 0.0);
}

#[tokio::test]
async fn where_all_fail_they_are_tried_rather_than_refused() {
    let is_broken = Arc::new(AtomicBool::new(true));
    let engine = breaking(&is_broken).await;
    let host = Host::configured(SOON, &["--worker", &format!("{},name=only", engine.worker())]).await;
    for _ in 0..20 {
        let reply = host.http.post(CHAT, chat(3).to_string()).await;
        assert!(reply.status == 500 && reply.text().contains("the core is dead"), "{}: {}", reply.status, reply.text());
    }
    assert!(host.http.metric("dynamo_host_breaker_opens_total", &[]).await >= 1.0);
    assert_eq!(host.http.get_json("/health").await["status"], "degraded");
    is_broken.store(false, Relaxed);
    becomes(&host, "only", &["healthy"]).await;
}

/// An engine of tokens that take so many milliseconds each.
async fn paced(pace_ms: &Arc<AtomicU64>) -> Scripted {
    let pace_ms = Arc::clone(pace_ms);
    Scripted::start(move |mut connection| {
        let pace = Duration::from_millis(pace_ms.load(Relaxed));
        async move {
            connection.write(STREAM_HEAD).await;
            for token in 0..4 {
                connection.write(http_chunk(&token_event(token))).await;
                tokio::time::sleep(pace).await;
            }
            connection.write(http_chunk(&end_events()) + STREAM_END).await;
        }
    })
    .await
}

#[tokio::test]
async fn workers_much_slower_than_their_pool_are_left_out_one_in_four_at_most_and_taken_back() {
    let paces: Vec<Arc<AtomicU64>> = [5, 5, 400, 250].map(|pace| Arc::new(AtomicU64::new(pace))).into();
    let mut engines = Vec::new();
    for pace in &paces {
        engines.push(paced(pace).await);
    }
    let named: Vec<String> =
        engines.iter().zip(["a", "b", "slow", "slower"]).map(|(it, n)| format!("{},name={n}", it.worker())).collect();
    let arguments: Vec<&str> = named.iter().flat_map(|worker| ["--worker", worker]).collect();
    // One that is slow among three that are fast: the fourth is as they are for now.
    paces[3].store(5, Relaxed);
    let host = Host::configured(SOON, &arguments).await;
    let ask_all = async || {
        let mut asking = tokio::task::JoinSet::new();
        for _ in 0..16 {
            let client = host.http.clone();
            asking.spawn(async move { client.stream(CHAT, &streamed(chat(4))).await });
        }
        asking.join_all().await;
    };
    eventually("the slow one is left out", async || {
        ask_all().await;
        (state_of(&host, "slow").await == "ejected").then_some(())
    })
    .await;
    assert!(host.http.metric("dynamo_host_worker_ejections_total", &[("cause", "itl")]).await >= 1.0);
    let rows = workers(&host).await;
    assert!(rows.iter().filter(|row| row["name"] != "slow").all(|row| row["state"] == "healthy"), "{rows:?}");
    let trouble = rows.iter().find(|row| row["name"] == "slow").unwrap()["trouble"].as_str().unwrap().to_owned();
    assert!(trouble.contains("left out") && trouble.contains("pool"), "{trouble}");
    // A second one: there is room for one of four only.
    paces[3].store(250, Relaxed);
    for _ in 0..6 {
        ask_all().await;
        let rows = workers(&host).await;
        let out = rows.iter().filter(|row| row["state"] == "ejected").count();
        assert!(out <= 1, "{rows:?}");
    }
    paces[2].store(5, Relaxed);
    paces[3].store(5, Relaxed);
    eventually("all are in again", async || {
        ask_all().await;
        workers(&host).await.iter().all(|row| row["state"] == "healthy").then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_canary_finds_an_engine_that_answers_its_probe_and_makes_no_tokens() {
    let is_wedged = Arc::new(AtomicBool::new(false));
    let switch = Arc::clone(&is_wedged);
    let engine = Scripted::start(move |mut connection| {
        let is_wedged = switch.load(Relaxed);
        async move {
            if is_wedged {
                return connection.hung_up().await;
            }
            connection.write(whole_answer("200 OK", &json!({ "choices": [], "usage": null }).to_string())).await;
        }
    })
    .await;
    let config =
        "[health]\ncanary = 'on'\ncanary_idle_s = 1\ncanary_timeout_s = 1\n[health.breaker]\npause_ms = 200\nmax_pause_s = 1\n";
    let host = Host::configured(config, &["--worker", &format!("{},name=w", engine.worker())]).await;
    eventually("a canary has come back", async || {
        (host.http.metric("dynamo_host_canaries_total", &[("result", "token")]).await >= 1.0).then_some(())
    })
    .await;
    let asked = engine.received()[0].json();
    assert_eq!((&asked["max_tokens"], &asked["model"]), (&json!(1), &json!("m")), "{asked}");
    is_wedged.store(true, Relaxed);
    host.process.logs("answers its probe and makes no token").await;
    assert!(host.http.metric("dynamo_host_breaker_opens_total", &[("cause", "timeout")]).await >= 1.0);
    is_wedged.store(false, Relaxed);
    // With no traffic at all.
    host.workers_are("healthy").await;
    let rows = workers(&host).await;
    assert_eq!((&rows[0]["served"], &rows[0]["active_requests"]), (&json!(0), &json!(0)), "it is no traffic: {rows:?}");
    assert_eq!(host.http.metric("dynamo_host_requests_total", &[]).await, 0.0);
}

#[tokio::test]
async fn a_whole_answer_that_a_mute_engine_has_comes_from_another() {
    let mute = Scripted::start(|mut connection| async move { connection.hung_up().await }).await;
    let config =
        "[health]\ncanary = 'on'\ncanary_idle_s = 1\ncanary_timeout_s = 1\n[health.breaker]\npause_ms = 200\nmax_pause_s = 1\n";
    let routing = components::policy("round-robin");
    let arguments = ["--routing", &routing, "--worker", &mute.worker(), "--worker", "mock://well?model=m&speedup=50"];
    let host = Host::configured(config, &arguments).await;
    // Nothing was ever seen of the engine that has some of them, and it answers its probe. A canary may be there before the first.
    eventually("a request was taken from it", async || {
        let reply = host.http.ask(CHAT, &chat(3)).await;
        assert_eq!(reply.json()["usage"]["completion_tokens"], 3);
        (host.http.metric("dynamo_host_retries_total", &[("cause", "engine_unhealthy")]).await >= 1.0).then_some(())
    })
    .await;
    host.process.logs("answers its probe and makes no token").await;
    assert!(mute.received().iter().any(|request| request.json()["max_tokens"] == 1), "it was asked for a token");
}

#[tokio::test]
async fn what_an_engine_says_no_to_is_not_held_against_it() {
    let error = json!({ "error": { "message": "no such adapter", "code": 400 } });
    let refuses = Scripted::answering(stream_answer(&format!("data: {error}\n\ndata: [DONE]\n\n"))).await;
    let host = Host::configured("[health]\ncanary = 'off'", &["--worker", &refuses.worker()]).await;
    for _ in 0..8 {
        host.http.post(CHAT, streamed(chat(3)).to_string()).await.is_error(502, "engine_in_stream");
    }
    assert_eq!(workers(&host).await[0]["state"], "healthy");
    assert_eq!(host.http.metric("dynamo_host_breaker_opens_total", &[]).await, 0.0);
}

#[tokio::test]
async fn what_outlives_a_drains_grace_is_given_up_and_is_not_held_against_its_worker() {
    let strict = "[health]\ncanary = 'off'\n[health.breaker]\nfailures_in_a_row = 1\n";
    let mocks = ["mock://a?model=m&decode_ms_base=20", "mock://b?model=m&decode_ms_base=20"];
    let host = Host::configured(strict, &["--worker", mocks[0], "--worker", mocks[1]]).await;
    let mut streams = Vec::new();
    for _ in 0..2 {
        let mut stream = host.http.open(COMPLETIONS, &streamed(completion(30_000))).await;
        stream.event().await;
        streams.push(stream);
    }
    workers_until(&host, "each has a stream", |rows| rows.iter().all(|row| row["active_requests"] == 1)).await;
    host.cli(&["worker", "drain", "a"]).await.succeeded();
    assert!(!host.process.log().contains("given up"), "the grace is a minute");
    host.cli(&["worker", "drain", "a", "--grace", "0"]).await.succeeded();
    host.process.logs("worker is given up").await;
    assert_eq!(host.http.metric("dynamo_host_given_up_total", &[("cause", "drained")]).await, 1.0);
    workers_until(&host, "both streams are b's", |rows| {
        rows.iter().all(|row| row["active_requests"] == if row["name"] == "b" { 2 } else { 0 })
    })
    .await;
    for stream in &mut streams {
        stream.event().await;
    }
    assert_eq!(host.http.metric("dynamo_host_breaker_opens_total", &[]).await, 0.0);
    host.cli(&["worker", "resume", "a"]).await.succeeded();
    workers_until(&host, "it serves again", |rows| rows.iter().all(|row| row["state"] == "healthy")).await;
    let refused = host.admin.post("/v1/workers/a/drain?grace_s=soon", "").await;
    assert_eq!(refused.status, StatusCode::BAD_REQUEST, "{}", refused.text());
}

#[tokio::test]
async fn retries_have_a_budget() {
    let mut engines = Vec::new();
    for _ in 0..3 {
        engines.push(Scripted::answering("").await);
    }
    let named: Vec<String> = engines.iter().map(Scripted::worker).collect();
    let arguments: Vec<&str> = named.iter().flat_map(|worker| ["--worker", worker]).collect();
    let config = "[health]\ncanary = 'off'\n[health.retries]\nshare = 0.0\nleast_per_second = 0\n";
    let host = Host::configured(config, &arguments).await;
    host.http.post(CHAT, chat(3).to_string()).await.is_error(502, "engine_broken");
    assert_eq!(engines.iter().map(|engine| engine.received().len()).sum::<usize>(), 1);
    assert_eq!(host.http.metric("dynamo_host_retries_denied_total", &[]).await, 1.0);
}

#[tokio::test]
async fn a_process_that_comes_and_goes_costs_no_request_and_serves_each_time_it_is_there() {
    let mut flapping = MockProcess::start(&["speedup=50"]).await;
    let address = flapping.url().strip_prefix("http://").unwrap().to_owned();
    let worker = format!("http://{address},name=flaps,model=m");
    let host = Host::start(&["--worker", &worker, "--worker", "mock://stays?model=m&speedup=50", "--expose-worker"]).await;
    for _ in 0..3 {
        flapping.process.kill();
        for _ in 0..10 {
            assert_eq!(host.serves(3).await.header("x-dynamo-worker"), "stays");
        }
        becomes(&host, "flaps", &["unreachable"]).await;
        flapping = MockProcess::start_at(&address, &["speedup=50"]).await;
        eventually("it serves again", async || (host.serves(3).await.header("x-dynamo-worker") == "flaps").then_some(())).await;
    }
    let health = host.http.get_json("/health").await;
    assert!(health["troubles"].as_array().unwrap().is_empty(), "{health}");
}
