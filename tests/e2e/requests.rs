//! Requests that are served: both endpoints, whole and streamed, what passes through, what is kept back, what is said of it.

use std::collections::HashSet;

use dynamo_engine_mock::tokens;
use hyper::{Method, StatusCode};
use serde_json::json;
use tokio::sync::watch;

use crate::harness::{
    client::header,
    components, eventually,
    host::{Host, chat, completion, streamed},
    scripted::{STREAM_END, STREAM_HEAD, Scripted, end_events, http_chunk, stream_answer, token_event, whole_answer},
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

#[tokio::test]
async fn a_chat_is_streamed_complete_and_in_order() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    let answer = host.http.stream(CHAT, &streamed(chat(40))).await;
    assert_eq!(tokens::count(&answer.text()), Ok(40));
    assert_eq!(answer.finish_reasons(), ["length"]);
    let roles: Vec<_> = answer.choices().filter_map(|choice| choice["delta"]["role"].as_str()).collect();
    assert_eq!(roles, ["assistant"]);
    assert!(answer.header("content-type").starts_with("text/event-stream"), "{:?}", answer.headers);
}

#[tokio::test]
async fn a_chat_is_answered_whole_with_its_usage() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    let answer = host.http.ask(CHAT, &chat(12)).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(tokens::count(choice["message"]["content"].as_str().unwrap()), Ok(12));
    assert_eq!((&choice["message"]["role"], &choice["finish_reason"]), (&json!("assistant"), &json!("length")));
    assert_eq!(answer["usage"]["completion_tokens"], 12);
    assert!(answer["usage"]["prompt_tokens"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn a_completion_is_streamed_with_usage_when_asked_and_answered_whole() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    let mut asked = streamed(completion(40));
    let plain = host.http.stream(COMPLETIONS, &asked).await;
    assert_eq!(tokens::count(&plain.text()), Ok(40));
    assert!(plain.events.iter().all(|event| event["usage"].is_null()), "usage that nobody asked for");

    asked["stream_options"] = json!({ "include_usage": true });
    let counted = host.http.stream(COMPLETIONS, &asked).await;
    assert_eq!(tokens::count(&counted.text()), Ok(40));
    assert_eq!(counted.events.last().unwrap()["usage"]["completion_tokens"], 40);
    host.serves(7).await;
}

#[tokio::test]
async fn a_prompt_may_be_token_ids() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    let mut asked = completion(5);
    asked["prompt"] = json!([11, 22, 33, 44]);
    let answer = host.http.ask(COMPLETIONS, &asked).await.json();
    assert_eq!(answer["usage"]["prompt_tokens"], 4);
    assert_eq!(tokens::count(answer["choices"][0]["text"].as_str().unwrap()), Ok(5));
}

#[tokio::test]
async fn several_choices_come_each_complete() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    let mut asked = chat(6);
    asked["n"] = json!(3);
    let answer = host.http.ask(CHAT, &asked).await.json();
    let texts: Vec<_> = answer["choices"].as_array().unwrap().iter().map(|choice| &choice["message"]["content"]).collect();
    assert_eq!(texts.len(), 3);
    assert!(texts.iter().all(|text| tokens::count(text.as_str().unwrap()) == Ok(6)), "{texts:?}");
}

#[tokio::test]
async fn each_event_is_relayed_before_the_next_is_made() {
    // The engine sends a token only when the client has the one before it.
    let (seen, may_send) = watch::channel(0u32);
    let engine = Scripted::start(move |mut connection| {
        let mut may_send = may_send.clone();
        async move {
            connection.write(STREAM_HEAD).await;
            for index in 0..5 {
                if may_send.wait_for(|&seen| seen >= index).await.is_err() {
                    return;
                }
                connection.write(http_chunk(&token_event(index))).await;
            }
            connection.write(http_chunk(&end_events()) + STREAM_END).await;
        }
    })
    .await;
    let host = Host::start(&["--worker", &engine.worker()]).await;
    let mut events = host.http.open(CHAT, &streamed(chat(5))).await;
    for index in 0..5 {
        let event = events.event().await;
        assert!(event["choices"][0]["delta"]["content"].as_str().unwrap().ends_with(&format!("t{index}")), "{event}");
        seen.send_replace(index + 1);
    }
    assert_eq!(events.streamed().await.unwrap().finish_reasons(), ["length"]);
}

#[tokio::test]
async fn a_stream_arrives_byte_for_byte_however_the_engine_cuts_it() {
    let mut events = String::from(": a comment\n\nevent: message\n");
    (0..4).for_each(|index| events += &token_event(index));
    events += &end_events();
    for size in [1, 7, 100_000] {
        let pieces = events.as_bytes().chunks(size);
        let chunks: String = pieces.map(|piece| http_chunk(str::from_utf8(piece).unwrap())).collect();
        let engine = Scripted::answering(format!("{STREAM_HEAD}{chunks}{STREAM_END}")).await;
        let host = Host::start(&["--worker", &engine.worker()]).await;
        let reply = host.http.post(CHAT, streamed(chat(4)).to_string()).await;
        assert_eq!(reply.text(), events, "in pieces of {size}");
    }
}

#[tokio::test]
async fn unknown_fields_pass_and_the_hosts_own_are_stripped() {
    let answer = stream_answer(&(token_event(0) + &end_events()));
    let engine = Scripted::answering(answer).await;
    let host = Host::start(&["--worker", &engine.worker()]).await;
    // Written by hand: numbers that a parser would round, an escaped name, and a name twice.
    let body = r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true,"max_tokens":1,
        "a_field_of_tomorrow":{"priority":[1,2.50,null,12345678901234567890123]},
        "kv_transfer_params":{"do_remote_decode":true},"ec_transfer_params":{},"bootstrap_host":"evil","bootstrap_port":1,
        "bootstrap_room":2,"disaggregated_params":{},"data_parallel_rank":3,"routed_dp_rank":4,"temperature":0.70,
        "priority":5,"priority":6,"prior\u0069ty":7}"#;
    let reply = host.http.post(CHAT, body).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    let received = engine.received();
    let [received] = received.as_slice() else { panic!("one request expected: {received:?}") };
    let names: HashSet<_> = received.json().as_object().unwrap().keys().cloned().collect();
    let expected = ["model", "messages", "stream", "max_tokens", "a_field_of_tomorrow", "temperature"].map(str::to_owned);
    assert_eq!(names, HashSet::from(expected), "{}", received.body);
    assert!(received.body.contains(r#"{"priority":[1,2.50,null,12345678901234567890123]}"#), "{}", received.body);
    assert!(received.body.contains("0.70"), "{}", received.body);
}

#[tokio::test]
async fn a_request_keeps_its_id_from_client_to_engine_and_back() {
    let engine = Scripted::answering(whole_answer("200 OK", r#"{"choices":[]}"#)).await;
    let host = Host::start(&["--worker", &engine.worker()]).await;
    let mine = [("x-request-id", "mine-1"), ("x-dynamo-worker", "evil"), ("authorization", "Bearer secret")];
    let reply = host.http.send(Method::POST, CHAT, &mine, chat(1).to_string()).await;
    assert_eq!(reply.header("x-request-id"), "mine-1");
    let received = engine.received();
    assert!(received[0].head.contains("x-request-id: mine-1"), "{}", received[0].head);
    assert!(!received[0].head.contains("x-dynamo-"), "{}", received[0].head);
}

#[tokio::test]
async fn every_reply_has_an_id_of_its_own_errors_too() {
    let host = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    let mut ids = HashSet::new();
    for _ in 0..3 {
        ids.insert(host.http.post(CHAT, chat(1).to_string()).await.header("x-request-id").to_owned());
        ids.insert(host.http.post(CHAT, "{").await.header("x-request-id").to_owned());
        ids.insert(header(&host.http.stream(CHAT, &streamed(chat(1))).await.headers, "x-request-id").to_owned());
    }
    assert_eq!(ids.len(), 9, "{ids:?}");
    assert!(!ids.contains(""));
}

#[tokio::test]
async fn a_reply_names_the_policy_and_only_if_enabled_the_worker() {
    let quiet = Host::over_mocks(&["a"], "speedup=50", &[]).await;
    let reply = quiet.serves(2).await;
    assert_eq!((reply.header("x-dynamo-policy"), reply.header("x-dynamo-worker")), ("native", ""));

    let routing = components::policy("round-robin");
    let open = Host::over_mocks(&["a"], "speedup=50", &["--expose-worker", "--routing", &routing]).await;
    let reply = open.serves(2).await;
    assert_eq!(reply.header("x-dynamo-policy"), format!("round-robin@{}", env!("CARGO_PKG_VERSION")));
    assert_eq!(reply.header("x-dynamo-worker"), "a");
    let streamed = open.http.stream(CHAT, &streamed(chat(2))).await;
    assert_eq!(streamed.header("x-dynamo-worker"), "a");
}

#[tokio::test]
async fn a_request_goes_to_workers_of_its_model_and_models_are_listed_once() {
    let workers = ["mock://a?model=one&speedup=50", "mock://b?model=two&speedup=50", "mock://c?model=two&speedup=50"];
    let arguments: Vec<_> = workers.iter().flat_map(|worker| ["--worker", worker]).chain(["--expose-worker"]).collect();
    let host = Host::start(&arguments).await;
    let models = host.http.get_json("/v1/models").await;
    let mut ids: Vec<_> = models["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    ids.sort_unstable();
    assert_eq!((ids.as_slice(), &models["object"]), (["one", "two"].as_slice(), &json!("list")));
    for (model, served_by) in [("one", vec!["a"]), ("two", vec!["b", "c"])] {
        for _ in 0..6 {
            let mut asked = completion(1);
            asked["model"] = model.into();
            let reply = host.http.ask(COMPLETIONS, &asked).await;
            assert!(served_by.contains(&reply.header("x-dynamo-worker")), "{model}: {:?}", reply.headers);
        }
    }
}

#[tokio::test]
async fn it_is_live_at_once_and_ready_when_a_worker_is() {
    let host = Host::start_anyhow(&["--worker", "http://127.0.0.1:1,model=m"]).await;
    host.workers_are("unreachable").await;
    assert_eq!(host.http.get("/live").await.status, StatusCode::OK);
    assert_eq!(host.http.get("/ready").await.status, StatusCode::SERVICE_UNAVAILABLE);

    let host = Host::over_mocks(&["a"], "", &[]).await;
    for path in ["/live", "/ready", "/health"] {
        assert_eq!(host.http.get(path).await.status, StatusCode::OK, "{path}");
    }
}

#[tokio::test]
async fn what_a_worker_does_is_shown_while_it_does_it() {
    let host = Host::over_mocks(&["a"], "decode_ms_base=1e12", &[]).await;
    let mut stream = host.http.open(CHAT, &streamed(chat(9))).await;
    stream.event().await;
    let load = async |wanted: u64| {
        eventually("the worker's active requests are shown", async || {
            let status = host.admin.get_json("/v1/status").await;
            (status["workers"][0]["active_requests"] == wanted).then_some(())
        })
        .await;
    };
    load(1).await;
    drop(stream);
    load(0).await;
}
