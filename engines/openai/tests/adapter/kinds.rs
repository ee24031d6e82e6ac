//! Each kind of server, by its double: what it is found to be, what its load is, what it is sent, how it is cancelled.

use std::{sync::Arc, time::Duration};

use dynamo_engine_api::{Endpoint, Engine as _, GenerateRequest, RankLoad};
use dynamo_engine_openai::{Kind, OpenAiEngine, OpenAiOptions};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{
    doubles::{Double, Llamacpp, MODEL, Manners, Sglang, Transformers, Trtllm, Vllm},
    scripted::{Scripted, read, soon, stream_answer, whole_answer},
};

async fn found(manners: impl Manners) -> (Double, OpenAiEngine) {
    let double = Double::start(manners).await;
    let engine = double.server.engine();
    soon(engine.probe()).await.unwrap();
    (double, engine)
}

fn ask(endpoint: Endpoint, body: &Value) -> GenerateRequest {
    GenerateRequest::new(endpoint, body.to_string().into(), body["stream"] == true, "request-1".into())
}

fn completion(max_tokens: u32, stream: bool) -> GenerateRequest {
    let body = json!({ "model": MODEL, "prompt": "Once", "max_tokens": max_tokens, "temperature": 0, "stream": stream });
    ask(Endpoint::Completions, &body)
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let level = async {
        while !holds() {
            sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(crate::scripted::PATIENCE, level).await.unwrap_or_else(|_| panic!("{what}"));
}

#[tokio::test]
async fn each_server_is_found_to_be_what_it_is() {
    assert_eq!(found(Vllm::default()).await.1.kind(), "vllm");
    assert_eq!(found(Sglang::default()).await.1.kind(), "sglang");
    assert_eq!(found(Trtllm::default()).await.1.kind(), "trtllm");
    assert_eq!(found(Llamacpp::default()).await.1.kind(), "llamacpp");
    assert_eq!(found(Transformers::default()).await.1.kind(), "openai");
}

#[tokio::test]
async fn a_server_is_looked_at_once_and_never_with_a_side_effect() {
    for (double, engine) in [found(Sglang::default()).await, found(Trtllm::default()).await, found(Vllm::default()).await] {
        soon(engine.probe()).await.unwrap();
        assert_eq!(double.at_work.times("/v1/models"), 1, "{}", engine.kind());
        assert_eq!(double.at_work.times("/metrics"), 0, "{}", engine.kind());
        let healths = if engine.kind() == "sglang" { 0 } else { 2 };
        assert_eq!(double.at_work.times("/health"), healths, "{}", engine.kind());
    }
}

#[tokio::test]
async fn what_is_told_is_not_looked_for() {
    let double = Double::start(Vllm::default()).await;
    let options = OpenAiOptions { kind: Some(Kind::Trtllm), ..Default::default() };
    let engine = double.server.engine_with(options);
    assert_eq!(engine.kind(), "trtllm");
    soon(engine.probe()).await.unwrap();
    assert_eq!((engine.kind(), double.at_work.times("/v1/models")), ("trtllm", 0));
}

#[tokio::test]
async fn another_server_behind_the_port_is_found_out() {
    let (double, engine) = found(Vllm::default()).await;
    let address = double.server.stop().await;
    soon(async { while soon(engine.probe()).await.is_ok() {} }).await;
    assert_eq!(engine.kind(), "vllm", "until something else is seen");
    let models = whole_answer("200 OK", include_str!("../fixtures/llama_models.json"));
    let _llama = Scripted::start_at(address, move |mut connection| {
        let models = models.clone();
        async move {
            while let Some(request) = connection.request().await {
                let answer =
                    if request.head.starts_with("get /v1/models") { models.clone() } else { whole_answer("200 OK", "{}") };
                connection.write(answer).await;
            }
        }
    })
    .await;
    soon(async { while soon(engine.probe()).await.is_err() {} }).await;
    assert_eq!(engine.kind(), "llamacpp");
}

#[tokio::test]
async fn only_an_old_sglang_is_asked_for_its_costly_health() {
    let (double, engine) = found(Sglang { ready: false, ..Sglang::default() }).await;
    assert_eq!((engine.kind(), double.at_work.times("/ready"), double.at_work.times("/health")), ("sglang", 1, 1));
}

#[tokio::test]
async fn vllm_is_asked_for_the_tokens_of_what_it_can_tokenize() {
    let server = Scripted::start(|mut connection| async move {
        while let Some(request) = connection.request().await {
            let answer = if !request.head.starts_with("post /tokenize") {
                whole_answer("200 OK", "{}")
            } else if request.body.contains("refuse") {
                whole_answer("400 Bad Request", "{}")
            } else {
                whole_answer("200 OK", r#"{"count":3,"max_model_len":9,"tokens":[7,8,9],"token_strs":null}"#)
            };
            connection.write(answer).await;
        }
    })
    .await;
    let engine = server.engine_with(OpenAiOptions { kind: Some(Kind::Vllm), ..Default::default() });
    let tokens = async |endpoint, body: Value| soon(engine.tokenize(endpoint, body.to_string().into())).await.unwrap();
    let chat = |more: &str| json!({ "messages": [{ "role": "user", "content": "hi" }], more: "low" });
    assert_eq!(tokens(Endpoint::ChatCompletions, chat("user")).await, Some(vec![7, 8, 9]));
    assert_eq!(tokens(Endpoint::ChatCompletions, chat("reasoning_effort")).await, None, "it would tokenize another prompt");
    assert_eq!(tokens(Endpoint::Completions, json!({ "prompt": "hi" })).await, Some(vec![7, 8, 9]));
    assert_eq!(tokens(Endpoint::Completions, json!({ "prompt": "refuse" })).await, None);
    assert_eq!(tokens(Endpoint::Completions, json!({ "prompt": ["hi", "ho"] })).await, None);
    assert_eq!(tokens(Endpoint::Responses, json!({ "input": "hi" })).await, None);
}

#[tokio::test]
async fn llama_cpp_is_asked_for_a_chats_text_and_then_for_its_tokens() {
    let server = Scripted::start(|mut connection| async move {
        while let Some(request) = connection.request().await {
            let answer = if request.body.contains("refuse") {
                whole_answer("400 Bad Request", "{}")
            } else if request.head.starts_with("post /apply-template") {
                whole_answer("200 OK", r#"{"prompt":"<user>hi<assistant>"}"#)
            } else if request.head.starts_with("post /tokenize") {
                assert!(request.body.contains("\"add_special\":true"), "{}", request.body);
                let is_templated = request.body.contains("<user>hi<assistant>");
                whole_answer("200 OK", if is_templated { r#"{"tokens":[7,8,9]}"# } else { r#"{"tokens":[8]}"# })
            } else {
                whole_answer("200 OK", "{}")
            };
            connection.write(answer).await;
        }
    })
    .await;
    let engine = server.engine_with(OpenAiOptions { kind: Some(Kind::Llamacpp), ..Default::default() });
    let tokens = async |endpoint, body: Value| soon(engine.tokenize(endpoint, body.to_string().into())).await.unwrap();
    let chat = |says: &str| json!({ "messages": [{ "role": "user", "content": says }] });
    assert_eq!(tokens(Endpoint::ChatCompletions, chat("hi")).await, Some(vec![7, 8, 9]));
    assert_eq!(tokens(Endpoint::ChatCompletions, chat("refuse")).await, None);
    assert_eq!(tokens(Endpoint::Completions, json!({ "prompt": "hi" })).await, Some(vec![8]));
    assert_eq!(tokens(Endpoint::Completions, json!({ "prompt": ["hi", "ho"] })).await, None);
    assert_eq!(tokens(Endpoint::Responses, json!({ "input": "hi" })).await, None);
}

#[tokio::test]
async fn vllms_load_is_read_from_its_metrics() {
    let (double, engine) = found(Vllm::default()).await;
    let before = soon(engine.load()).await.unwrap();
    let expected = RankLoad {
        running: Some(0),
        queued: Some(0),
        kv_tokens_total: Some(131_072),
        kv_tokens_free: Some(131_072),
        block_size: Some(32),
        fetched_tokens: Some(0),
        ..RankLoad::default()
    };
    assert_eq!(before, [expected]);
    soon(engine.generate(completion(20, false))).await.unwrap();
    let after = soon(engine.load()).await.unwrap();
    assert!(after[0].tokens_per_second.is_some_and(|speed| speed > 0.0), "{after:?}");
    assert_eq!(double.at_work.times("/metrics"), 2);
}

#[tokio::test]
async fn sglangs_load_is_told_rank_by_rank() {
    let (double, engine) = found(Sglang::default()).await;
    soon(engine.generate(completion(20, false))).await.unwrap();
    let expected = |rank| RankLoad {
        rank,
        running: Some(0),
        queued: Some(0),
        max_running: Some(256),
        max_batched_tokens: Some(8192),
        kv_tokens_total: Some(524_288),
        kv_tokens_free: Some(524_288),
        block_size: Some(64),
        tokens_per_second: Some(20.0),
        ..RankLoad::default()
    };
    for _ in 0..2 {
        assert_eq!(soon(engine.load()).await.unwrap(), [expected(0), expected(1)]);
    }
    assert_eq!(double.at_work.times("/server_info"), 1, "what does not change is asked once");
}

#[tokio::test]
async fn what_an_sglang_was_started_for_is_what_it_says_now() {
    let sglang = Sglang::default();
    let info = Arc::clone(&sglang.info);
    let (_double, engine) = found(sglang).await;
    let says = |status, mode: &str| {
        *info.lock().unwrap() = (status, json!({ "page_size": 64, "disaggregation_mode": mode }).to_string());
    };
    let block_size = async || soon(engine.load()).await.unwrap()[0].block_size;
    // A gateway says that it is not there yet.
    *info.lock().unwrap() = ("502 Bad Gateway", "{}".to_owned());
    assert_eq!((block_size().await, soon(engine.no_part()).await), (None, None));
    says("200 OK", "null");
    let reason = soon(engine.no_part()).await.unwrap();
    assert!(reason.contains("--disaggregation-mode"), "{reason}");
    assert_eq!(block_size().await, Some(64));
    // Behind a gateway nobody sees that it was started anew.
    says("200 OK", "prefill");
    assert_eq!(soon(engine.no_part()).await, None);
}

#[tokio::test]
async fn trtllms_statistics_are_folded_as_they_are_handed_out() {
    let (_double, engine) = found(Trtllm::default()).await;
    assert_eq!(soon(engine.load()).await.unwrap(), [], "nothing is known before its first step");
    let Ok(stream) = soon(engine.generate(completion(2000, true))).await else { panic!("no stream") };
    let busy = RankLoad {
        running: Some(1),
        queued: Some(3),
        max_running: Some(64),
        max_batched_tokens: Some(8192),
        kv_tokens_total: Some(32_000),
        kv_tokens_free: Some(31_968),
        block_size: Some(32),
        ..RankLoad::default()
    };
    assert_eq!(soon(engine.load()).await.unwrap(), std::slice::from_ref(&busy));
    // No step since: it works on nothing, and its capacity is still known.
    let idle = RankLoad { running: Some(0), queued: Some(0), kv_tokens_free: Some(32_000), ..busy };
    assert_eq!(soon(engine.load()).await.unwrap(), [idle]);
    drop(stream);
}

#[tokio::test]
async fn llama_cpps_load_is_read_from_what_is_turned_on() {
    let all = RankLoad {
        running: Some(0),
        queued: Some(0),
        max_running: Some(4),
        kv_tokens_total: Some(8192),
        kv_tokens_free: Some(8192),
        ..RankLoad::default()
    };
    let (_double, engine) = found(Llamacpp::default()).await;
    assert_eq!(soon(engine.load()).await.unwrap(), std::slice::from_ref(&all));
    let (_double, engine) = found(Llamacpp { metrics: false, ..Llamacpp::default() }).await;
    assert_eq!(soon(engine.load()).await.unwrap(), [RankLoad { queued: None, ..all.clone() }]);
    let (_double, engine) = found(Llamacpp { metrics: false, slots: false, ..Llamacpp::default() }).await;
    assert_eq!(soon(engine.load()).await.unwrap(), [RankLoad { running: None, queued: None, kv_tokens_free: None, ..all }]);
}

#[tokio::test]
async fn what_a_busy_slot_holds_is_not_free() {
    let (double, engine) = found(Llamacpp::default()).await;
    let stream = soon(engine.generate(completion(2000, true))).await.unwrap();
    until("it works", || double.at_work.running() == 1).await;
    let load = soon(engine.load()).await.unwrap().remove(0);
    assert_eq!((load.running, load.kv_tokens_free), (Some(1), Some(8192 - 48)));
    drop(stream);
}

#[tokio::test]
async fn a_server_without_a_report_has_no_load() {
    let (_double, engine) = found(Transformers::default()).await;
    assert_eq!(soon(engine.load()).await.unwrap(), []);
    // vLLM's metrics behind a gateway that hides them.
    let server = Scripted::answering(whole_answer("404 Not Found", "{}")).await;
    let engine = server.engine_with(OpenAiOptions { kind: Some(Kind::Vllm), ..Default::default() });
    assert_eq!(soon(engine.load()).await.unwrap(), []);
}

#[tokio::test]
async fn a_report_that_cannot_be_read_is_an_error_that_names_it() {
    for (kind, path) in
        [(Kind::Vllm, "/metrics"), (Kind::Sglang, "/v1/loads"), (Kind::Trtllm, "/metrics"), (Kind::Llamacpp, "/slots")]
    {
        let server = Scripted::answering(whole_answer("200 OK", "<html>busy</html>")).await;
        let engine = server.engine_with(OpenAiOptions { kind: Some(kind), ..Default::default() });
        let error = soon(engine.load()).await.unwrap_err().to_string();
        assert!(error.contains(&format!("GET {path}")) && error.contains("cannot be read"), "{kind}: {error}");
    }
}

#[tokio::test]
async fn a_report_without_end_is_not_read_to_it() {
    let server = Scripted::answering(whole_answer("200 OK", &"# \n".repeat(3 << 20))).await;
    let engine = server.engine_with(OpenAiOptions { kind: Some(Kind::Vllm), ..Default::default() });
    let error = soon(engine.load()).await.unwrap_err();
    assert!(error.to_string().contains("over 8388608 bytes"), "{error}");
}

#[tokio::test]
async fn bodies_without_need_of_a_field_stay_as_they_are() {
    for (double, engine) in [found(Vllm::default()).await, found(Trtllm::default()).await, found(Llamacpp::default()).await] {
        let body = format!(r#"{{ "model":"{MODEL}", "prompt" : [1,2],"max_tokens":2 }}"#);
        let mut request = GenerateRequest::new(Endpoint::Completions, body.clone().into(), false, "r".into());
        // Said to no engine unless the operator wants it.
        request.priority = 5;
        soon(engine.generate(request)).await.unwrap();
        assert_eq!(double.at_work.bodies("/v1/completions"), [body], "{}", engine.kind());
    }
}

#[tokio::test]
async fn priorities_and_ranks_arrive_in_each_engines_words() {
    let options = || OpenAiOptions { forward_priority: true, ..Default::default() };
    let mut request = completion(2, false);
    (request.priority, request.rank) = (5, Some(1));

    let vllm = Double::start(Vllm::default()).await;
    let engine = vllm.server.engine_with(options());
    soon(engine.probe()).await.unwrap();
    soon(engine.generate(request.clone())).await.unwrap();
    let asked = vllm.at_work.asked.lock().unwrap().last().unwrap().clone();
    assert!(asked.head.contains("\r\nx-data-parallel-rank: 1"), "{}", asked.head);
    assert!(asked.body.starts_with(r#"{"priority":-5,"#), "{}", asked.body);

    let sglang = Double::start(Sglang::default()).await;
    let engine = sglang.server.engine_with(options());
    soon(engine.probe()).await.unwrap();
    for _ in 0..2 {
        soon(engine.generate(request.clone())).await.unwrap();
    }
    let bodies = sglang.at_work.bodies("/v1/completions");
    let bodies: Vec<Value> = bodies.iter().map(|body| serde_json::from_str(body).unwrap()).collect();
    assert_eq!((&bodies[0]["priority"], &bodies[0]["routed_dp_rank"]), (&json!(5), &json!(1)));
    let ids: Vec<_> = bodies.iter().map(|body| body["rid"].as_str().unwrap()).collect();
    assert!(ids[0] != ids[1] && ids.iter().all(|id| id.len() == 32), "ids are unique and of one length: {ids:?}");
}

#[tokio::test]
async fn an_abandoned_stream_of_sglang_is_aborted_by_name_and_only_that() {
    let (double, engine) = found(Sglang::default()).await;
    let kept = soon(engine.generate(completion(60, true))).await.unwrap();
    let dropped = soon(engine.generate(completion(2000, true))).await.unwrap();
    drop(dropped);
    until("it is aborted", || double.at_work.times("/abort_request") == 1).await;
    let dynamo_engine_api::Reply::Stream(kept) = kept else { panic!("no stream") };
    assert_eq!(read(kept).await.1, "done");
    soon(engine.generate(completion(2, false))).await.unwrap();
    // Those that ended are aborted by nobody: one more shows that the line is quiet.
    drop(soon(engine.generate(completion(2000, true))).await.unwrap());
    until("it is aborted, too", || double.at_work.times("/abort_request") == 2).await;
    let bodies = double.at_work.bodies("/v1/completions");
    let id = |at: usize| serde_json::from_str::<Value>(&bodies[at]).unwrap()["rid"].as_str().unwrap().to_owned();
    assert_eq!(*double.at_work.aborted.lock().unwrap(), [id(1), id(3)]);
}

#[tokio::test]
async fn no_other_server_is_told_to_abort() {
    let (double, engine) = found(Vllm::default()).await;
    drop(soon(engine.generate(completion(2000, true))).await.unwrap());
    until("it stops", || double.at_work.running() == 0).await;
    assert_eq!(double.at_work.times("/abort_request"), 0);
}

#[tokio::test]
async fn a_bearer_token_goes_with_every_request() {
    let double = Double::start(Vllm::default()).await;
    let bearer = Some(dynamo_engine_openai::Bearer::new("sk-1").unwrap());
    let engine = double.server.engine_with(OpenAiOptions { bearer, ..Default::default() });
    soon(engine.probe()).await.unwrap();
    soon(engine.load()).await.unwrap();
    soon(engine.generate(completion(2, false))).await.unwrap();
    let asked = double.at_work.asked.lock().unwrap();
    assert_eq!(asked.len(), 4);
    assert!(asked.iter().all(|request| request.head.contains("\r\nauthorization: bearer sk-1")), "{asked:?}");
}

#[tokio::test]
async fn a_refused_token_is_said_with_what_to_do() {
    let refused = || whole_answer("401 Unauthorized", r#"{"error":"Unauthorized"}"#);
    let server = Scripted::answering(refused()).await;
    let error = soon(server.engine().models()).await.unwrap_err().to_string();
    assert!(error.ends_with("answered 401 Unauthorized: Unauthorized (set its bearer token)"), "{error}");
}

#[tokio::test]
async fn what_goes_with_a_message_arrives() {
    let (double, engine) = found(Vllm::default()).await;
    let body = json!({ "model": MODEL, "max_tokens": 4, "messages": [{ "role": "user", "content": "hi" }] });
    let mut request = ask(Endpoint::Messages, &body);
    request.headers.insert("anthropic-version", http::HeaderValue::from_static("2023-06-01"));
    let Ok(dynamo_engine_api::Reply::Whole(reply)) = soon(engine.generate(request)).await else { panic!("no whole reply") };
    assert_eq!(&reply.body[..], include_bytes!("../fixtures/vllm_message.json"));
    let asked = double.at_work.asked.lock().unwrap().last().unwrap().clone();
    assert!(asked.head.starts_with("post /v1/messages http/1.1") && asked.head.contains("\r\nanthropic-version: 2023-06-01"));
    assert_eq!(asked.body, body.to_string());
}

#[tokio::test]
async fn a_stream_of_an_unknown_kind_needs_no_probe() {
    let server = Scripted::answering(stream_answer(include_str!("../fixtures/llama_chat.sse"))).await;
    assert_eq!(read(crate::scripted::stream_of(&server.engine()).await).await.1, "done");
}
