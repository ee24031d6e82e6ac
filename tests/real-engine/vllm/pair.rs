//! A real vLLM that prefills and one that decodes, over NIXL, behind the host: what one says is what both say together, and when
//! either is killed, no request is lost.
//!
//! Two engines for all of it, killed and started again under their names: a start takes a minute. `cargo xtask real-engine --disagg`
//! runs this alone, and prints a table at its end.

mod engines;
mod table;

use std::time::Duration;

use hyper::HeaderMap;
use serde_json::Value;
use tokio::time::Instant;

use self::{
    engines::{DECODE, Engine, PREFILL},
    table::Row,
};
use crate::{
    engine::{chat, completion},
    harness::{client::Client, eventually, eventually_within, host::Host},
    killed::{Answer, counted, struck},
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
/// How often each way of asking is asked.
const PROMPTS: usize = 20;
/// Of a short answer, and of one that lives long enough to be interrupted.
const SHORT: u32 = 24;
const LONG: u32 = 300;
/// How long hand-offs may take to come back once an engine is there again: the host proves it before.
const BACK_WITHIN: Duration = Duration::from_secs(90);

/// A way of asking.
#[derive(Clone, Copy)]
struct Way {
    name: &'static str,
    path: &'static str,
    is_stream: bool,
}

const WAYS: [Way; 4] = [
    Way { name: "completion", path: COMPLETIONS, is_stream: false },
    Way { name: "completion, streamed", path: COMPLETIONS, is_stream: true },
    Way { name: "chat", path: CHAT, is_stream: false },
    Way { name: "chat, streamed", path: CHAT, is_stream: true },
];

impl Way {
    /// The request of this number: several blocks of a text that no other begins with.
    fn body(self, number: usize, tokens: u32) -> Value {
        let says = format!("{number} times {}: the router reads a prompt, and says where it goes. ", self.name).repeat(6);
        let mut body = if self.path == CHAT { chat(&says, tokens) } else { completion(says, tokens) };
        body["ignore_eos"] = true.into();
        if self.is_stream { counted(body) } else { body }
    }

    async fn ask(self, client: &Client, body: &Value) -> (Answer, HeaderMap) {
        if self.is_stream {
            let stream = client.stream(self.path, body).await;
            return (Answer::of(&stream, self.path), stream.headers);
        }
        let reply = client.ask(self.path, body).await;
        let answer = reply.json();
        let choice = &answer["choices"][0];
        let text = choice["text"].as_str().or(choice["message"]["content"].as_str()).unwrap().to_owned();
        let count = |name: &str| answer["usage"][name].as_u64().unwrap();
        let usage = [count("prompt_tokens"), count("completion_tokens")];
        (Answer { text, finish: choice["finish_reason"].as_str().unwrap().to_owned(), usage }, reply.headers)
    }
}

/// What one engine alone says, computing all of it.
async fn aggregated(engine: &Client, way: Way, body: &Value) -> Answer {
    let mut body = body.clone();
    // Nothing that it has cached is of this.
    body["cache_salt"] = "alone".into();
    way.ask(engine, &body).await.0
}

/// The host over two engines, and what came of it.
struct Pair {
    host: Host,
    prefill: Engine,
    decode: Engine,
    rows: Vec<Row>,
}

impl Pair {
    async fn start() -> Self {
        let (mut prefill, mut decode) = (Engine::new(PREFILL), Engine::new(DECODE));
        tokio::join!(prefill.alive(), decode.alive());
        let host = Host::start(&["--expose-worker", "--worker", &prefill.worker(), "--worker", &decode.worker()]).await;
        let pair = Self { host, prefill, decode, rows: Vec::new() };
        pair.handed_over_again().await;
        pair
    }

    /// Asks, and checks that both engines say what `alone` says by itself. Returns whether it was handed over, and how long it took.
    async fn ask(&self, way: Way, number: usize, alone: &Client) -> (bool, Duration) {
        let body = way.body(number, SHORT);
        let since = Instant::now();
        let (answer, headers) = way.ask(&self.host.http, &body).await;
        let took = since.elapsed();
        assert_eq!(answer, aggregated(alone, way, &body).await, "{} {number}", way.name);
        (headers.contains_key("x-dynamo-prefill-worker"), took)
    }

    /// Asks in each way, with one of the engines gone.
    async fn ask_each(&mut self, scene: &'static str, alone: &Client) {
        let mut row = Row::new(scene);
        for (number, way) in WAYS.into_iter().enumerate() {
            let (is_handed_over, took) = self.ask(way, 100 + number, alone).await;
            row.served(is_handed_over, took);
        }
        assert_eq!(row.handed_over, 0, "{scene}: there is nobody to hand over to");
        self.rows.push(row);
    }

    /// Waits until requests are handed over; returns how long that took.
    async fn handed_over_again(&self) -> Duration {
        let since = Instant::now();
        eventually_within(BACK_WITHIN, "requests are handed over", async || {
            let (_, headers) = WAYS[0].ask(&self.host.http, &WAYS[0].body(999, 2)).await;
            headers.contains_key("x-dynamo-prefill-worker").then_some(())
        })
        .await;
        since.elapsed()
    }

    /// Starts an engine that is gone again, while somebody goes on asking, until requests are handed over.
    async fn recovers(&mut self, scene: &'static str, name: &str) {
        let mut row = Row::new(scene);
        let (engine, survivor) = if name == PREFILL {
            (&mut self.prefill, self.decode.http.clone())
        } else {
            (&mut self.decode, self.prefill.http.clone())
        };
        let is_there = std::cell::Cell::new(false);
        let comes = async {
            engine.start(true);
            engine.alive().await;
            is_there.set(true);
        };
        let http = self.host.http.clone();
        let asks = async {
            let mut number = 200;
            while !is_there.get() {
                let body = WAYS[1].body(number, SHORT);
                let since = Instant::now();
                let (answer, headers) = WAYS[1].ask(&http, &body).await;
                row.served(headers.contains_key("x-dynamo-prefill-worker"), since.elapsed());
                assert_eq!(answer, aggregated(&survivor, WAYS[1], &body).await, "{scene}, {number}");
                number += 1;
            }
        };
        tokio::join!(comes, asks);
        row.back = Some(self.handed_over_again().await);
        self.rows.push(row);
    }

    /// Waits until a worker of the host's has a request.
    async fn has_a_request(&self, name: &str) {
        eventually(&format!("{name} has a request"), async || {
            let workers = self.host.admin.get_json("/v1/workers").await["workers"].take();
            let worker = workers.as_array().unwrap().iter().find(|worker| worker["name"] == name).cloned();
            (worker?["active_requests"].as_u64()? > 0).then_some(())
        })
        .await;
    }

    /// Requests that were to be handed over and failed in one of their legs.
    async fn fell_back(&self) -> f64 {
        let mut all = 0.0;
        for cause in ["prefill_failed", "decode_failed"] {
            all += self.host.admin.metric("dynamo_host_handoff_fallbacks_total", &[("cause", cause)]).await;
        }
        all
    }

    /// Requests whose KV was handed over.
    async fn handed_over(&self) -> f64 {
        self.host.admin.metric("dynamo_host_prefill_where_total", &[("where", "remote")]).await
    }

    /// Freezes an engine, waits until it has its part of a request, and kills it.
    async fn killed_within_its_leg(&mut self, scene: &'static str, name: &str) {
        let mut row = Row::new(scene);
        let (victim, survivor) = if name == PREFILL { (&self.prefill, &self.decode) } else { (&self.decode, &self.prefill) };
        let way = WAYS[1];
        let body = way.body(300, SHORT);
        let expected = aggregated(&survivor.http, way, &body).await;
        let before = self.fell_back().await;
        victim.signal("STOP");
        let since = Instant::now();
        let kill = async {
            self.has_a_request(name).await;
            victim.signal("KILL");
        };
        let ((answer, headers), ()) = tokio::join!(way.ask(&self.host.http, &body), kill);
        row.served(headers.contains_key("x-dynamo-prefill-worker"), since.elapsed());
        assert_eq!(answer, expected, "{scene}");
        assert!(self.fell_back().await > before, "{scene}: it was not within its leg");
        self.rows.push(row);
    }
}

/// The text is that of one engine, and the one that decodes has computed nothing of the prompts, by its own count.
async fn nothing_is_computed_twice(pair: &mut Pair) {
    let tokens = async |engine: &Engine, source: &str| {
        engine.http.metric("vllm:prompt_tokens_by_source_total", &[("source", source)]).await
    };
    for way in WAYS {
        let mut row = Row::new(way.name);
        let (decode, prefill) = (&pair.decode, &pair.prefill);
        let (computed, cached) = (tokens(decode, "local_compute").await, tokens(decode, "local_cache_hit").await);
        let fetched = tokens(decode, "external_kv_transfer").await;
        let prefilled = tokens(prefill, "local_compute").await;
        let mut answers = Vec::new();
        for number in 0..PROMPTS {
            let body = way.body(number, SHORT);
            let since = Instant::now();
            let (answer, headers) = way.ask(&pair.host.http, &body).await;
            row.served(headers.contains_key("x-dynamo-prefill-worker"), since.elapsed());
            answers.push((body, answer));
        }
        assert_eq!(row.handed_over, PROMPTS, "{}", way.name);
        let prompt: u64 = answers.iter().map(|(_, answer)| answer.usage[0]).sum();
        row.computed = Some((tokens(decode, "local_compute").await - computed) as u64);
        assert_eq!(row.computed, Some(0), "{}: the engine that decodes computed prompts", way.name);
        assert_eq!(tokens(decode, "local_cache_hit").await, cached, "{}: prompts were cached there", way.name);
        row.fetched = Some((tokens(decode, "external_kv_transfer").await - fetched) as u64);
        assert_eq!(row.fetched, Some(prompt), "{}: what came over is not the prompts", way.name);
        assert_eq!((tokens(prefill, "local_compute").await - prefilled) as u64, prompt, "{}", way.name);
        for (body, answer) in answers {
            let since = Instant::now();
            assert_eq!(answer, aggregated(&pair.decode.http, way, &body).await, "{body}");
            row.alone.push(since.elapsed());
        }
        pair.rows.push(row);
    }
}

#[tokio::test]
async fn a_real_pair_says_what_one_engine_says_and_loses_nothing_when_either_is_killed() {
    let mut pair = Pair::start().await;
    nothing_is_computed_twice(&mut pair).await;

    let alone = pair.decode.http.clone();
    pair.prefill.signal("KILL");
    pair.ask_each("prefill killed before its leg", &alone).await;
    pair.refuses_an_engine_without_a_connector("prefill started without a connector", PREFILL).await;
    pair.recovers("… and started again", PREFILL).await;

    pair.killed_within_its_leg("prefill killed within its leg", PREFILL).await;
    pair.recovers("… and started again", PREFILL).await;

    pair.killed_within_its_leg("decode killed before its first token", DECODE).await;
    let alone = pair.prefill.http.clone();
    pair.ask_each("… and asked while it is gone", &alone).await;
    pair.refuses_an_engine_without_a_connector("decode started without a connector", DECODE).await;
    pair.recovers("… and started again", DECODE).await;

    pair.decode_is_killed_within_a_stream().await;
    pair.recovers("… and started again", DECODE).await;
}

/// What there is by then is worth seeing, too, where something failed.
impl Drop for Pair {
    fn drop(&mut self) {
        table::print(&self.rows);
    }
}

impl Pair {
    async fn decode_is_killed_within_a_stream(&mut self) {
        for way in [WAYS[1], WAYS[3]] {
            let mut row =
                Row::new(if way.path == CHAT { "decode killed within a chat" } else { "decode killed within a completion" });
            let body = way.body(400, LONG);
            let expected = aggregated(&self.prefill.http, way, &body).await;
            let mut by = String::new();
            let strike = |worker: &str| {
                by = worker.to_owned();
                self.decode.signal("KILL");
            };
            let handed_over = self.handed_over().await;
            let since = Instant::now();
            let (before, answer) = struck(&self.host, way.path, &body, 100, strike).await;
            assert_eq!((answer, by.as_str()), (expected, DECODE), "killed after {before:?}");
            row.served(self.handed_over().await > handed_over, since.elapsed());
            assert_eq!(row.handed_over, 1, "it was not handed over before");
            self.rows.push(row);
            if way.path == COMPLETIONS {
                self.recovers("… and started again", DECODE).await;
            }
        }
    }

    /// Started without its connector, an engine says so only when it is asked, and one that decodes not even then: it answers, and
    /// has computed the prompt itself. Either gets no hand-offs, and the host says why.
    async fn refuses_an_engine_without_a_connector(&mut self, scene: &'static str, name: &str) {
        let (engine, alone) = if name == PREFILL {
            (&mut self.prefill, self.decode.http.clone())
        } else {
            (&mut self.decode, self.prefill.http.clone())
        };
        engine.start(false);
        engine.alive().await;
        let reason = eventually_within(BACK_WITHIN, "the host says that it hands nothing over", async || {
            let workers = self.host.admin.get_json("/v1/workers").await["workers"].take();
            let worker = workers.as_array().unwrap().iter().find(|worker| worker["name"] == name).cloned()?;
            (worker["handoff"]["state"] == "refused").then(|| worker["handoff"]["reason"].as_str().unwrap().to_owned())
        })
        .await;
        assert!(reason.contains("--kv-transfer-config"), "{reason}");
        println!("{name} without a connector: {reason}");
        self.ask_each(scene, &alone).await;
        let engine = if name == PREFILL { &self.prefill } else { &self.decode };
        engine.signal("KILL");
    }
}
