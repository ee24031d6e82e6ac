//! The adapter straight at a real llama.cpp server: what it is found to be, what its load is, what else it answers.

use dynamo_engine_api::{Endpoint, Engine as _, GenerateRequest, RankLoad, Reply, WholeReply};
use dynamo_engine_openai::{OpenAiEngine, OpenAiOptions};
use futures_util::StreamExt as _;
use serde_json::{Value, json};

use crate::{
    engine::{LlamaServer, MODEL, chat, completion},
    harness::eventually,
};

/// An adapter that has seen its engine.
async fn found(engine: &LlamaServer) -> OpenAiEngine {
    let adapter = OpenAiEngine::new(engine.http.base(), OpenAiOptions::default()).unwrap();
    adapter.probe().await.unwrap();
    adapter
}

async fn whole(adapter: &OpenAiEngine, endpoint: Endpoint, body: &Value) -> WholeReply {
    let request = GenerateRequest::new(endpoint, body.to_string().into(), false, "real".into());
    match adapter.generate(request).await.unwrap() {
        Reply::Whole(reply) => reply,
        Reply::Stream(_) => panic!("a stream"),
    }
}

#[tokio::test]
async fn it_is_found_to_be_llama_cpp_with_its_model_and_context() {
    let engine = LlamaServer::start().await;
    let adapter = found(&engine).await;
    assert_eq!(adapter.kind(), "llamacpp");
    let models = adapter.models().await.unwrap();
    assert_eq!((models[0].id.as_str(), models[0].max_model_len, &models[0].parent), (MODEL, Some(4096), &None));
}

#[tokio::test]
async fn its_load_is_its_slots_idle_and_busy() {
    let engine = LlamaServer::start().await;
    let adapter = found(&engine).await;
    let idle = RankLoad {
        running: Some(0),
        queued: Some(0),
        max_running: Some(2),
        kv_tokens_total: Some(8192),
        kv_tokens_free: Some(8192),
        ..RankLoad::default()
    };
    assert_eq!(adapter.load().await.unwrap(), [idle]);
    // Three for two slots.
    let mut asked = completion("Go on", 3900);
    asked["stream"] = true.into();
    let mut streams = Vec::new();
    for _ in 0..2 {
        let request = GenerateRequest::new(Endpoint::Completions, asked.to_string().into(), true, "real".into());
        let Reply::Stream(mut chunks) = adapter.generate(request).await.unwrap() else { panic!("no stream") };
        chunks.next().await.unwrap().unwrap();
        streams.push(chunks);
    }
    let third = GenerateRequest::new(Endpoint::Completions, asked.to_string().into(), true, "real".into());
    let waits = adapter.generate(third);
    let looks = eventually("two run, one waits, and what they hold is not free", async || {
        let load = adapter.load().await.unwrap().remove(0);
        // Its tokens count as they are made, not when their request has ended.
        let held = load.kv_tokens_free? < load.kv_tokens_total?;
        let fast = load.tokens_per_second.is_some_and(|speed| speed > 0.0);
        ((load.running, load.queued) == (Some(2), Some(1)) && held && fast).then_some(())
    });
    tokio::select! {
        () = looks => {}
        _ = waits => panic!("there is no slot for it"),
    }
    drop(streams);
    eventually("all are gone", async || (adapter.load().await.unwrap()[0].running == Some(0)).then_some(())).await;
}

#[tokio::test]
async fn without_metrics_its_slots_tell() {
    let engine = LlamaServer::start_with(&[]).await;
    let load = found(&engine).await.load().await.unwrap().remove(0);
    assert_eq!((load.running, load.queued, load.max_running, load.kv_tokens_total), (Some(0), None, Some(2), Some(8192)));
    let engine = LlamaServer::start_with(&["--no-slots"]).await;
    let load = found(&engine).await.load().await.unwrap().remove(0);
    assert_eq!((load.running, load.max_running, load.kv_tokens_total), (None, Some(2), Some(8192)));
}

#[tokio::test]
async fn it_counts_a_prompt_as_it_computes_it() {
    let engine = LlamaServer::start().await;
    let adapter = found(&engine).await;
    for (endpoint, mut body) in [
        (Endpoint::ChatCompletions, chat("Tell me about the sea.", 1)),
        (Endpoint::Completions, completion("The router reads a prompt", 1)),
    ] {
        body["stream"] = false.into();
        let ids = adapter.tokenize(endpoint, body.to_string().into()).await.unwrap().unwrap();
        let reply: Value = serde_json::from_slice(&whole(&adapter, endpoint, &body).await.body).unwrap();
        assert_eq!(reply["usage"]["prompt_tokens"], ids.len(), "{body}");
    }
}

#[tokio::test]
async fn embeddings_come_from_one_that_was_started_for_them() {
    let engine = LlamaServer::start_with(&["--embeddings", "--pooling", "mean"]).await;
    let adapter = found(&engine).await;
    let asked = json!({ "model": MODEL, "input": ["a harbour", "a lighthouse"] });
    let reply = whole(&adapter, Endpoint::Embeddings, &asked).await;
    let answer: Value = serde_json::from_slice(&reply.body).unwrap();
    let lengths: Vec<_> =
        answer["data"].as_array().unwrap().iter().map(|item| item["embedding"].as_array().unwrap().len()).collect();
    assert!(lengths.len() == 2 && lengths[0] > 0 && lengths[0] == lengths[1], "{lengths:?}");

    let engine = LlamaServer::start().await;
    let reply = whole(&found(&engine).await, Endpoint::Embeddings, &asked).await;
    assert_eq!(reply.status, 501, "{:?}", reply.body);
}
