//! Over scripted engines, which do what mock engines cannot be told, and keep what they were asked.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering::Relaxed},
};

use serde_json::{Value, json};

use crate::harness::{
    eventually,
    host::{Host, chat, completion, streamed},
    scripted::{Connection, Received, Scripted, end_events, stream_answer, token_event, whole_answer},
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// The part of a request that an engine is asked for, as vLLM is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leg {
    Whole,
    Prefill,
    Decode,
}

pub(super) fn leg(asked: &Received) -> Leg {
    let params = &asked.json()["kv_transfer_params"];
    match (&params["do_remote_decode"], &params["do_remote_prefill"]) {
        (Value::Bool(true), _) => Leg::Prefill,
        (_, Value::Bool(true)) => Leg::Decode,
        _ => Leg::Whole,
    }
}

/// What an engine does with a part of a request.
type Does = fn(&Received, u32) -> String;

/// An engine that does so with the parts of requests, and serves whole ones.
async fn engine(prefill: Does, decode: Does) -> Scripted {
    let count = Arc::new(AtomicU32::new(0));
    Scripted::start(move |mut connection: Connection| {
        let number = count.fetch_add(1, Relaxed);
        async move {
            let asked = connection.asked().clone();
            let answer = match leg(&asked) {
                Leg::Whole => tokens(&asked, number),
                Leg::Prefill => prefill(&asked, number),
                Leg::Decode => decode(&asked, number),
            };
            connection.write(answer).await;
        }
    })
    .await
}

/// Two tokens.
pub(super) fn tokens(asked: &Received, _: u32) -> String {
    if asked.json()["stream"] == true {
        return stream_answer(&(token_event(0) + &token_event(1) + &end_events()));
    }
    let choice = json!({ "index": 0, "message": { "role": "assistant", "content": "t0 t1" }, "finish_reason": "length" });
    let usage = json!({ "prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9 });
    whole_answer("200 OK", &json!({ "id": "x", "object": "chat.completion", "choices": [choice], "usage": usage }).to_string())
}

/// A prompt's KV, kept under a number.
pub(super) fn keeps(asked: &Received, number: u32) -> String {
    let body = asked.json();
    assert_eq!((&body["stream"], &body["max_tokens"]), (&json!(false), &json!(1)), "{body}");
    let params = json!({ "do_remote_prefill": true, "do_remote_decode": false, "remote_block_ids": [[number]] });
    let choice = json!({ "index": 0, "message": { "role": "assistant", "content": "t0" }, "finish_reason": "length" });
    let usage = json!({ "prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8 });
    let answer = json!({
        "id": "x", "object": "chat.completion", "choices": [choice], "usage": usage, "prompt_token_ids": [5, 6, 7],
        "kv_transfer_params": params,
    });
    whole_answer("200 OK", &answer.to_string())
}

fn keeps_nothing(_: &Received, _: u32) -> String {
    let choice = json!({ "index": 0, "message": { "role": "assistant", "content": "t0" }, "finish_reason": "length" });
    whole_answer("200 OK", &json!({ "id": "x", "choices": [choice], "kv_transfer_params": null }).to_string())
}

fn is_busy(_: &Received, _: u32) -> String {
    whole_answer("503 Service Unavailable", r#"{"error":{"message":"all slots are taken"}}"#)
}

fn refuses(_: &Received, _: u32) -> String {
    whole_answer("400 Bad Request", r#"{"error":{"message":"the prompt is too long"}}"#)
}

fn breaks(_: &Received, _: u32) -> String {
    String::new()
}

/// As vLLM says it that it could not fetch the KV.
fn cannot_fetch(asked: &Received, _: u32) -> String {
    let error = json!({ "error": { "message": "Internal server error", "type": "InternalServerError", "code": 500 } });
    match &asked.json()["stream"] {
        Value::Bool(true) => stream_answer(&format!("data: {error}\n\ndata: [DONE]\n\n")),
        _ => whole_answer("500 Internal Server Error", &error.to_string()),
    }
}

/// A host over engines of these roles, without proofs that they can hand over.
async fn over(engines: &[(&Scripted, &str)]) -> Host {
    let workers: Vec<String> =
        engines.iter().map(|(engine, role)| format!("{},role={role},handoff=nixl", engine.worker())).collect();
    let mut arguments = vec!["--expose-worker"];
    arguments.extend(workers.iter().flat_map(|worker| ["--worker", worker]));
    Host::configured("[health]\ncheck_handoffs = false\n", &arguments).await
}

pub(super) fn legs(engine: &Scripted) -> Vec<Leg> {
    engine.received().iter().map(leg).collect()
}

async fn fallbacks(host: &Host, cause: &str) -> f64 {
    host.http.metric("dynamo_host_handoff_fallbacks_total", &[("cause", cause)]).await
}

/// Asks for a chat, streamed or whole, and checks that it is answered.
async fn is_answered(host: &Host, stream: bool) {
    if stream {
        return streams(host).await;
    }
    assert_eq!(host.http.ask(CHAT, &chat(2)).await.json()["choices"][0]["message"]["content"], "t0 t1");
}

/// Streams a chat of two tokens, which must be whole.
async fn streams(host: &Host) {
    let stream = host.http.stream(CHAT, &streamed(chat(2))).await;
    assert_eq!(stream.text(), "t0 t1");
}

#[tokio::test]
async fn what_a_prefill_says_goes_to_who_decodes_and_nothing_of_it_to_the_client() {
    let (prefill, decode) = (engine(keeps, breaks).await, engine(breaks, tokens).await);
    let host = over(&[(&prefill, "prefill"), (&decode, "decode")]).await;
    let mut asked = chat(2);
    asked["kv_transfer_params"] = json!({ "do_remote_prefill": true, "remote_block_ids": [[666]] });
    asked["KV_Transfer_Params"] = asked["kv_transfer_params"].clone();
    asked["vllm_xargs"] = json!({ "kv_transfer_params": asked["kv_transfer_params"], "mine": 1 });
    asked["bootstrap_room"] = 1.into();
    let reply = host.http.ask(CHAT, &asked).await;
    assert_eq!(reply.json()["choices"][0]["message"]["content"], "t0 t1");
    let [prefill_address, decode_address] = [&prefill, &decode].map(|engine| engine.address.to_string());
    assert_eq!(reply.header("x-dynamo-prefill-worker"), prefill_address);
    assert_eq!(reply.header("x-dynamo-worker"), decode_address);
    streams(&host).await;

    assert_eq!((legs(&prefill), legs(&decode)), (vec![Leg::Prefill; 2], vec![Leg::Decode; 2]));
    for (number, asked) in (0u32..).zip(decode.received()) {
        assert_eq!(asked.json()["kv_transfer_params"]["remote_block_ids"], json!([[number]]));
    }
    let all = [prefill.received(), decode.received()].concat();
    assert!(all.iter().all(|asked| !asked.body.contains("666") && !asked.body.contains("bootstrap_room")));
    let metric = async |name: &str| host.http.metric(name, &[]).await;
    assert_eq!(metric("dynamo_host_requests_total").await, 2.0, "each is one request");
    assert_eq!(metric("dynamo_host_output_tokens_total").await, 4.0, "the first token is counted once");
    assert_eq!(host.http.metric("dynamo_host_prefill_where_total", &[("where", "remote")]).await, 2.0);
    let answered = [("protocol", "nixl"), ("result", "answered")];
    assert_eq!(host.http.metric("dynamo_host_handoffs_total", &answered).await, 2.0);
    assert_eq!(metric("dynamo_host_handoff_seconds_count").await, 1.0, "of a whole answer nobody knows");
    assert_eq!(metric("dynamo_host_time_to_first_token_seconds_count").await, 1.0);
    assert_eq!(metric("dynamo_host_requests_in_flight").await, 0.0);
}

#[tokio::test]
async fn what_cannot_be_handed_over_is_served_by_one_worker() {
    let (prefill, decode) = (engine(keeps, breaks).await, engine(breaks, tokens).await);
    let host = over(&[(&prefill, "prefill"), (&decode, "decode")]).await;
    let mut two = chat(2);
    two["n"] = 2.into();
    let mut batch = completion(2);
    batch["prompt"] = json!(["a", "b"]);
    let image = json!([{ "type": "image_url", "image_url": { "url": "data:," } }]);
    let mut seen = chat(2);
    seen["messages"][0]["content"] = image;
    let with = |mut asked: Value, field: &str, value: Value| {
        asked[field] = value;
        asked
    };
    let (echo, logprobs) = (with(completion(2), "echo", true.into()), with(chat(2), "prompt_logprobs", 0.into()));
    let cases = [(CHAT, chat(1)), (CHAT, two), (COMPLETIONS, batch), (CHAT, seen), (COMPLETIONS, echo), (CHAT, logprobs)];
    for (path, asked) in cases {
        host.http.ask(path, &asked).await;
    }
    assert_eq!((legs(&prefill), legs(&decode)), (vec![], vec![Leg::Whole; 6]), "the decode pool serves whole requests");
    assert_eq!(host.http.metric("dynamo_host_prefill_where_total", &[("where", "local")]).await, 6.0);
}

#[tokio::test]
async fn a_prefill_that_fails_is_tried_elsewhere_and_then_not_at_all() {
    for (fails, cause) in [(is_busy as Does, "prefill_failed"), (breaks, "prefill_failed"), (keeps_nothing, "not_handed_over")] {
        let (bad, decode) = (engine(fails, breaks).await, engine(breaks, tokens).await);
        let host = over(&[(&bad, "prefill"), (&decode, "decode")]).await;
        streams(&host).await;
        assert_eq!((legs(&bad), legs(&decode)), (vec![Leg::Prefill], vec![Leg::Whole]), "{cause}");
        assert_eq!(fallbacks(&host, cause).await, 1.0);

        let good = engine(keeps, breaks).await;
        let host = over(&[(&bad, "prefill"), (&good, "prefill"), (&decode, "decode")]).await;
        eventually("both prefill workers were asked", async || {
            streams(&host).await;
            (fallbacks(&host, cause).await > 0.0 && !good.received().is_empty()).then_some(())
        })
        .await;
        assert!(!legs(&good).contains(&Leg::Whole));
        assert_eq!(legs(&decode).iter().filter(|leg| **leg == Leg::Whole).count(), 1, "that was the other host");
    }
}

#[tokio::test]
async fn an_engines_no_is_the_answer_and_staged_kv_is_given_up() {
    let (prefill, decode) = (engine(refuses, breaks).await, engine(breaks, tokens).await);
    let host = over(&[(&prefill, "prefill"), (&decode, "decode")]).await;
    let reply = host.http.post(CHAT, streamed(chat(2)).to_string()).await;
    assert_eq!((reply.status.as_u16(), reply.text().contains("too long")), (400, true), "{}", reply.text());
    assert_eq!((legs(&prefill), legs(&decode)), (vec![Leg::Prefill], vec![]));

    let (prefill, decode) = (engine(keeps, breaks).await, engine(breaks, refuses).await);
    let host = over(&[(&prefill, "prefill"), (&decode, "decode")]).await;
    let reply = host.http.post(CHAT, streamed(chat(2)).to_string()).await;
    assert_eq!(reply.status.as_u16(), 400);
    eventually("the KV is given up", async || (legs(&decode) == [Leg::Decode; 2]).then_some(())).await;
    assert_eq!(decode.received()[1].json()["max_tokens"], 1, "it is fetched, for one token that nobody reads");
    assert_eq!(legs(&prefill), [Leg::Prefill]);
}

#[tokio::test]
async fn a_decode_that_fails_before_its_first_token_is_prefilled_anew_and_given_to_another() {
    for (fails, stream) in [(cannot_fetch as Does, true), (cannot_fetch, false), (breaks, true), (is_busy, false)] {
        let (prefill, bad) = (engine(keeps, breaks).await, engine(breaks, fails).await);
        let good = engine(breaks, tokens).await;
        let host = over(&[(&prefill, "prefill"), (&bad, "decode"), (&good, "decode")]).await;
        eventually("the bad one was asked", async || {
            is_answered(&host, stream).await;
            (!bad.received().is_empty()).then_some(())
        })
        .await;
        assert_eq!(fallbacks(&host, "decode_failed").await, 1.0);
        let tickets: Vec<Value> = [bad.received(), good.received()]
            .concat()
            .iter()
            .filter(|asked| leg(asked) == Leg::Decode)
            .map(|asked| asked.json()["kv_transfer_params"]["remote_block_ids"].clone())
            .collect();
        let different: std::collections::BTreeSet<String> = tickets.iter().map(Value::to_string).collect();
        assert_eq!(different.len(), tickets.len(), "no ticket is used twice: {tickets:?}");
        assert!(host.http.metric("dynamo_host_errors_total", &[]).await < 1.0);
    }
}

#[tokio::test]
async fn a_decode_worker_that_cannot_be_reached_leaves_the_ticket_to_another() {
    let (prefill, good) = (engine(keeps, breaks).await, engine(breaks, tokens).await);
    let gone = engine(breaks, tokens).await;
    let host = over(&[(&prefill, "prefill"), (&gone, "decode"), (&good, "decode")]).await;
    drop(gone);
    for _ in 0..8 {
        streams(&host).await;
    }
    assert_eq!(legs(&prefill), vec![Leg::Prefill; 8], "nothing is prefilled twice");
    assert_eq!(legs(&good), vec![Leg::Decode; 8]);
    assert_eq!(fallbacks(&host, "decode_failed").await, 0.0);
}

#[tokio::test]
async fn a_link_that_keeps_failing_is_left_alone_and_its_workers_are_not() {
    let (prefill, decode) = (engine(keeps, breaks).await, engine(breaks, cannot_fetch).await);
    let host = over(&[(&prefill, "prefill"), (&decode, "decode")]).await;
    eventually("the link is left alone", async || {
        // Each is served, by the decode worker alone if need be.
        streams(&host).await;
        (fallbacks(&host, "no_link").await > 0.0).then_some(())
    })
    .await;
    assert!(legs(&decode).iter().filter(|leg| **leg == Leg::Decode).count() >= 3);
    host.workers_are("healthy").await;
}

#[tokio::test]
async fn without_a_pool_requests_are_served_whole_and_it_comes_back_with_it() {
    let (prefill, decode) = (engine(keeps, breaks).await, engine(breaks, tokens).await);
    let host = over(&[(&prefill, "prefill"), (&decode, "decode")]).await;
    streams(&host).await;
    prefill.loads(true);
    eventually("it is served by the decode worker alone", async || {
        streams(&host).await;
        (fallbacks(&host, "no_prefill_pool").await > 0.0).then_some(())
    })
    .await;
    prefill.loads(false);
    let before = legs(&prefill).len();
    eventually("it is handed over again", async || {
        streams(&host).await;
        (legs(&prefill).len() > before).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_decode_that_waits_past_the_lease_is_ended_and_the_prompt_computed_anew() {
    for stream in [true, false] {
        let prefill = engine(keeps, breaks).await;
        // Takes the request into a queue, out of which it does not come.
        let full = Scripted::start(|mut connection: Connection| async move { connection.hung_up().await }).await;
        let good = engine(breaks, tokens).await;
        let host = over(&[(&prefill, "prefill"), (&full, "decode"), (&good, "decode")]).await;
        eventually("the full one was asked", async || {
            is_answered(&host, stream).await;
            (fallbacks(&host, "lease_lost").await > 0.0).then_some(())
        })
        .await;
        assert_eq!(host.http.metric("dynamo_host_handoff_leases_lost_total", &[]).await, 1.0);
        assert!(host.http.metric("dynamo_host_errors_total", &[]).await < 1.0);
        host.workers_are("healthy").await;
    }
}
