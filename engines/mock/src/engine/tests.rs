//! The engine in process. Times are sped up; nothing here depends on how long anything takes.

use std::time::Duration;

use dynamo_engine_api::{Endpoint, sse};
use futures_util::StreamExt;
use serde_json::{Value, json};

use super::*;

mod continuation;
mod dialects;
mod faults;

fn engine(parameters: &str) -> MockEngine {
    MockEngine::from_url(&format!("mock://test?model=m&speedup=100&{parameters}")).unwrap()
}

fn request(endpoint: Endpoint, body: Value) -> GenerateRequest {
    let stream = body["stream"] == true;
    GenerateRequest::new(endpoint, body.to_string().into(), stream, "r1".into())
}

async fn whole(engine: &MockEngine, endpoint: Endpoint, body: Value) -> (StatusCode, Value) {
    match engine.generate(request(endpoint, body)).await.unwrap() {
        Reply::Whole(reply) => (reply.status, serde_json::from_slice(&reply.body).unwrap()),
        Reply::Stream(_) => panic!("asked for a whole reply"),
    }
}

async fn stream(engine: &MockEngine, endpoint: Endpoint, mut body: Value) -> dynamo_engine_api::ChunkStream {
    body["stream"] = true.into();
    match engine.generate(request(endpoint, body)).await.unwrap() {
        Reply::Stream(chunks) => chunks,
        Reply::Whole(reply) => panic!("asked for a stream, got {reply:?}"),
    }
}

/// The JSON of a stream's frames; checks its end and the summaries on the way.
async fn frames(chunks: dynamo_engine_api::ChunkStream) -> Vec<String> {
    let chunks: Vec<Chunk> = chunks.map(Result::unwrap).collect().await;
    for chunk in &chunks {
        assert_eq!(chunk.summary, sse::summarize(&chunk.bytes), "{:?}", chunk.bytes);
    }
    let text: Vec<u8> = chunks.iter().flat_map(|chunk| chunk.bytes.iter().copied()).collect();
    let text = String::from_utf8(text).unwrap();
    let mut frames: Vec<_> =
        text.split_terminator("\n\n").map(|frame| frame.strip_prefix("data: ").unwrap().to_owned()).collect();
    assert_eq!(frames.pop().as_deref(), Some("[DONE]"));
    frames
}

/// Replaces the one value that differs between runs.
fn without_time(frame: &str) -> String {
    let (before, after) = frame.split_once("\"created\":").unwrap();
    format!("{before}\"created\":0{}", after.trim_start_matches(|c: char| c.is_ascii_digit()))
}

async fn eventually(engine: &MockEngine, what: &str, condition: impl Fn(&Snapshot) -> bool) {
    for _ in 0..6000 {
        if condition(&engine.snapshot().await.unwrap()) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 60 s: {what}; {:?}", engine.snapshot().await);
}

#[tokio::test]
async fn a_chat_streams_as_vllm_does() {
    let engine = engine("");
    let body =
        json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream_options": {"include_usage": true}});
    let frames: Vec<_> =
        frames(stream(&engine, Endpoint::ChatCompletions, body).await).await.iter().map(|frame| without_time(frame)).collect();
    let head = r#"{"id":"chatcmpl-r1","object":"chat.completion.chunk","created":0,"model":"m","choices":["#;
    assert_eq!(
        frames,
        [
            format!(
                r#"{head}{{"index":0,"delta":{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}],"prompt_token_ids":null,"prompt_text":null}}"#
            ),
            format!(r#"{head}{{"index":0,"delta":{{"content":"t0"}},"logprobs":null,"finish_reason":null,"token_ids":null}}]}}"#),
            format!(
                r#"{head}{{"index":0,"delta":{{"content":" t1"}},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}}]}}"#
            ),
            format!(
                r#"{head}],"usage":{{"prompt_tokens":4,"total_tokens":6,"completion_tokens":2,"prompt_tokens_details":{{"cached_tokens":0,"created_cache_tokens":0}}}},"system_fingerprint":"{}"}}"#,
                concat!("dynamo-mock-", env!("CARGO_PKG_VERSION"))
            ),
        ]
    );
}

#[tokio::test]
async fn a_completion_streams_as_vllm_does() {
    let engine = engine("");
    let body = json!({"prompt": [5, 6], "max_tokens": 2, "return_token_ids": true});
    let frames: Vec<_> =
        frames(stream(&engine, Endpoint::Completions, body).await).await.iter().map(|frame| without_time(frame)).collect();
    let head = r#"{"id":"cmpl-r1","object":"text_completion","created":0,"model":"m","choices":["#;
    assert_eq!(
        frames,
        [
            format!(
                r#"{head}{{"index":0,"text":"t0","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":[5,6],"token_ids":[131072]}}]}}"#
            ),
            format!(
                r#"{head}{{"index":0,"text":" t1","logprobs":null,"finish_reason":"length","stop_reason":null,"prompt_token_ids":null,"token_ids":[131073]}}]}}"#
            ),
        ]
    );
}

#[tokio::test]
async fn whole_replies_have_vllms_members() {
    let engine = engine("");
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "return_token_ids": true});
    let (status, chat) = whole(&engine, Endpoint::ChatCompletions, body).await;
    assert_eq!((status, &chat["choices"][0]["message"]["content"]), (StatusCode::OK, &json!("t0 t1 t2")));
    assert_eq!(chat["choices"][0]["token_ids"], json!([131_072, 131_073, 131_074]));
    let usage = json!({"prompt_tokens": 4, "total_tokens": 7, "completion_tokens": 3, "completion_tokens_details": null,
        "prompt_tokens_details": {"cached_tokens": 0, "created_cache_tokens": 0, "multimodal_tokens": null}});
    assert_eq!(chat["usage"], usage);
    assert_eq!(chat["prompt_token_ids"].as_array().unwrap().len(), 4);
    let (_, completion) = whole(&engine, Endpoint::Completions, json!({"prompt": ["a", "b"], "n": 2, "max_tokens": 2})).await;
    let choices = completion["choices"].as_array().unwrap();
    assert_eq!(choices.iter().map(|choice| choice["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert!(choices.iter().all(|choice| choice["text"] == "t0 t1" && choice["finish_reason"] == "length"));
    assert_eq!((&completion["usage"]["prompt_tokens"], &completion["usage"]["completion_tokens"]), (&json!(2), &json!(8)));
}

#[tokio::test]
async fn a_repeated_prompt_reports_its_cached_tokens() {
    let engine = engine("");
    let body = json!({"prompt": (0..100).collect::<Vec<_>>(), "max_tokens": 1});
    let cached = |reply: (StatusCode, Value)| reply.1["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert_eq!(cached(whole(&engine, Endpoint::Completions, body.clone()).await), 0);
    assert_eq!(cached(whole(&engine, Endpoint::Completions, body.clone()).await), 96);
    assert!(engine.reset_prefix_cache().await.unwrap());
    assert_eq!(cached(whole(&engine, Endpoint::Completions, body).await), 0);
}

#[tokio::test]
async fn a_stop_string_is_not_shown() {
    let engine = engine("");
    let body = json!({"prompt": "x", "max_tokens": 9, "stop": "2 t3"});
    let (_, reply) = whole(&engine, Endpoint::Completions, body.clone()).await;
    let choice = &reply["choices"][0];
    assert_eq!(
        (&choice["text"], &choice["finish_reason"], &choice["stop_reason"]),
        (&json!("t0 t1 t"), &json!("stop"), &json!("2 t3"))
    );
    let frames = frames(stream(&engine, Endpoint::Completions, body).await).await;
    let texts = frames
        .iter()
        .map(|frame| serde_json::from_str::<Value>(frame).unwrap()["choices"][0]["text"].as_str().unwrap().to_owned());
    assert_eq!(texts.collect::<String>(), "t0 t1 t");
}

#[tokio::test]
async fn continuous_usage_is_in_every_frame_and_summary() {
    let engine = engine("");
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "n": 2,
        "stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let frames = frames(stream(&engine, Endpoint::ChatCompletions, body).await).await;
    assert_eq!(frames.len(), 7, "two roles, four tokens, the usage");
    assert!(frames.iter().all(|frame| frame.contains("\"usage\":{")));
}

#[tokio::test]
async fn a_refused_request_is_a_whole_reply_even_for_a_stream() {
    let engine = engine("");
    let reply = whole(&engine, Endpoint::ChatCompletions, json!({"model": "other", "messages": [], "stream": true})).await;
    assert_eq!((reply.0, &reply.1["error"]["type"]), (StatusCode::NOT_FOUND, &json!("NotFoundError")));
}

#[tokio::test]
async fn many_streams_are_each_complete_and_in_order() {
    let engine = Arc::new(engine("max_num_seqs=16&kv_blocks=200&max_model_len=512"));
    let mut readers = tokio::task::JoinSet::new();
    for i in 0..64 {
        let engine = Arc::clone(&engine);
        readers.spawn(async move {
            let body = json!({"prompt": format!("prompt number {i}, and some more"), "max_tokens": 20 + i});
            let frames = frames(stream(&engine, Endpoint::Completions, body).await).await;
            let text =
                |frame: &String| serde_json::from_str::<Value>(frame).unwrap()["choices"][0]["text"].as_str().unwrap().to_owned();
            assert_eq!(crate::tokens::count(&frames.iter().map(text).collect::<String>()), Ok(20 + i));
        });
    }
    while let Some(reader) = readers.join_next().await {
        reader.unwrap();
    }
    let snapshot = engine.snapshot().await.unwrap();
    assert_eq!((snapshot.running, snapshot.waiting, snapshot.kv_blocks_used), (0, 0, 0));
    assert_eq!(snapshot.stats.generation_tokens, (20..84).sum::<u64>());
}

#[tokio::test]
async fn a_reader_that_does_not_read_holds_up_nobody() {
    let engine = engine("");
    let idle = stream(&engine, Endpoint::Completions, json!({"prompt": "x", "max_tokens": 2000})).await;
    let (status, _) = whole(&engine, Endpoint::Completions, json!({"prompt": "y", "max_tokens": 50})).await;
    assert_eq!(status, StatusCode::OK);
    eventually(&engine, "the unread stream is generated all the same", |snapshot| snapshot.stats.finished_length == 2).await;
    assert_eq!(frames(idle).await.len(), 2000);
}

#[tokio::test]
async fn dropping_a_reply_cancels_it_even_in_a_step_of_hours() {
    let engine = engine("decode_ms_base=1e12&max_num_seqs=1");
    let mut running = stream(&engine, Endpoint::Completions, json!({"prompt": "x", "n": 1})).await;
    running.next().await.unwrap().unwrap();
    let waiting = stream(&engine, Endpoint::Completions, json!({"prompt": "y", "n": 3})).await;
    eventually(&engine, "all are there", |snapshot| (snapshot.running, snapshot.waiting) == (1, 3)).await;
    drop(running);
    eventually(&engine, "the running one is gone", |snapshot| (snapshot.running, snapshot.kv_blocks_used) == (0, 0)).await;
    drop(waiting);
    eventually(&engine, "those that waited are gone", |snapshot| snapshot.waiting == 0).await;
    assert_eq!(engine.snapshot().await.unwrap().stats.cancelled, 4);
}

#[tokio::test]
async fn a_request_that_is_dropped_before_it_was_taken_never_waits() {
    let engine = engine("decode_ms_base=1e12&max_num_seqs=1");
    let mut running = stream(&engine, Endpoint::Completions, json!({"prompt": "x"})).await;
    running.next().await.unwrap().unwrap();
    eventually(&engine, "it decodes", |snapshot| snapshot.running == 1).await;
    // On this runtime of one thread the engine's task gets its turn only at the next await.
    drop(stream(&engine, Endpoint::Completions, json!({"prompt": "y"})).await);
    assert_eq!(engine.snapshot().await.unwrap().waiting, 0);
}

#[tokio::test]
async fn dropping_a_pending_request_cancels_it() {
    let engine = engine("decode_ms_base=1e12");
    let pending = whole(&engine, Endpoint::Completions, json!({"prompt": "x"}));
    let timeout = tokio::time::timeout(Duration::from_millis(200), pending).await;
    assert!(timeout.is_err());
    eventually(&engine, "it is gone", |snapshot| snapshot.running == 0).await;
}

#[tokio::test]
async fn a_stream_of_a_dropped_engine_ends_with_an_error() {
    let engine = engine("decode_ms_base=1e12");
    let mut chunks = stream(&engine, Endpoint::Completions, json!({"prompt": "x"})).await;
    chunks.next().await.unwrap().unwrap();
    drop(engine);
    assert!(matches!(chunks.next().await, Some(Err(EngineError::Broken { .. }))));
    assert!(chunks.next().await.is_none());
}

#[tokio::test]
async fn it_describes_itself() {
    let engine = engine("max_model_len=777");
    assert_eq!((engine.kind(), engine.probe().await.is_ok()), ("mock", true));
    assert_eq!(engine.models().await.unwrap(), [ModelCard { id: "m".to_owned(), max_model_len: Some(777), parent: None }]);
}

#[tokio::test]
async fn the_tokens_of_a_prompt_are_those_that_it_would_compute() {
    let engine = engine("");
    let chat = json!({ "model": "m", "messages": [{ "role": "user", "content": "one two three" }], "max_tokens": 1 });
    let tokens = engine.tokenize(Endpoint::ChatCompletions, chat.to_string().into()).await.unwrap().unwrap();
    let (_, reply) = whole(&engine, Endpoint::ChatCompletions, chat).await;
    assert_eq!(reply["usage"]["prompt_tokens"], tokens.len());
    assert_eq!(engine.tokenize(Endpoint::ChatCompletions, "{}".into()).await.unwrap(), None);
}
