//! Outputs that go on where a prompt leaves off.

use super::*;
use crate::tokens::{self, VOCABULARY};

/// The first choice's text, and how it ended.
async fn said(engine: &MockEngine, endpoint: Endpoint, body: Value) -> (String, String) {
    let (status, reply) = whole(engine, endpoint, body).await;
    assert_eq!(status, StatusCode::OK, "{reply}");
    let choice = &reply["choices"][0];
    let text = choice["text"].as_str().or(choice["message"]["content"].as_str()).unwrap();
    (text.to_owned(), choice["finish_reason"].as_str().unwrap().to_owned())
}

fn and(left: &str, right: &str) -> (String, String) {
    (left.to_owned(), right.to_owned())
}

fn chat(last: Value, more: Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": "count" }, last], "max_tokens": 2 });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn a_prompt_of_ids_goes_on_with_each_cut_of_its_output() {
    let engine = engine("");
    for k in 0..6 {
        let ids: Vec<u32> = [5, 6].into_iter().chain(VOCABULARY..VOCABULARY + k).collect();
        let body = json!({ "prompt": ids, "max_tokens": 6 - k, "return_token_ids": true });
        let (_, reply) = whole(&engine, Endpoint::Completions, body).await;
        let rest = reply["choices"][0]["text"].as_str().unwrap();
        assert_eq!(tokens::text(k) + rest, tokens::text(6), "cut at {k}");
        assert_eq!(reply["choices"][0]["token_ids"], json!((VOCABULARY + k..VOCABULARY + 6).collect::<Vec<_>>()));
        assert_eq!(reply["usage"]["prompt_tokens"], 2 + k);
    }
}

#[tokio::test]
async fn each_prompt_and_choice_goes_on_by_itself() {
    let engine = engine("");
    let body = json!({ "prompt": [[5, 131_072], [5], [5, 131_072, 131_073]], "n": 2, "max_tokens": 2 });
    let (_, reply) = whole(&engine, Endpoint::Completions, body).await;
    let texts: Vec<_> = reply["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap()).collect();
    assert_eq!(texts, [" t1 t2", " t1 t2", "t0 t1", "t0 t1", " t2 t3", " t2 t3"]);
}

#[tokio::test]
async fn a_text_goes_on() {
    let engine = engine("");
    let goes_on = async |prompt: &str| said(&engine, Endpoint::Completions, json!({ "prompt": prompt, "max_tokens": 2 })).await.0;
    assert_eq!(goes_on("countt0 t1").await, " t2 t3");
    assert_eq!(goes_on("count: t0 t1 t2").await, " t3 t4");
    assert_eq!(goes_on("count: t0 t1 t2. Go on").await, "t0 t1");
}

#[tokio::test]
async fn a_chat_goes_on_with_its_last_message_if_it_is_told_to() {
    let engine = engine("");
    let last = json!({ "role": "assistant", "content": "t0 t1 t2" });
    let told = json!({ "continue_final_message": true, "add_generation_prompt": false });
    let on = said(&engine, Endpoint::ChatCompletions, chat(last.clone(), told.clone())).await;
    assert_eq!(on, and(" t3 t4", "length"));
    let empty = json!({ "role": "assistant", "content": "" });
    assert_eq!(said(&engine, Endpoint::ChatCompletions, chat(empty, told.clone())).await, and("t0 t1", "length"));
    let parts = json!({ "role": "assistant", "content": [{ "type": "text", "text": "Well: t0" }] });
    assert_eq!(said(&engine, Endpoint::ChatCompletions, chat(parts, told)).await, and(" t1 t2", "length"));
    assert_eq!(said(&engine, Endpoint::ChatCompletions, chat(last, json!({}))).await, and("t0 t1", "length"), "it is a turn");
}

#[tokio::test]
async fn a_finished_turn_is_not_gone_on_with() {
    let engine = engine("");
    let turns = json!([
        { "role": "user", "content": "count" }, { "role": "assistant", "content": "t0 t1" }, { "role": "user", "content": "again" },
    ]);
    let body = json!({ "messages": turns, "max_tokens": 2, "return_token_ids": true });
    assert_eq!(said(&engine, Endpoint::ChatCompletions, body.clone()).await.0, "t0 t1");
    let (_, reply) = whole(&engine, Endpoint::ChatCompletions, body).await;
    let mut ids = reply["prompt_token_ids"].as_array().unwrap().clone();
    ids.push(reply["choices"][0]["token_ids"][0].clone());
    assert_eq!(said(&engine, Endpoint::Completions, json!({ "prompt": ids, "max_tokens": 2 })).await.0, " t1 t2");
}

#[tokio::test]
async fn a_chat_that_goes_on_has_the_ids_that_it_had() {
    let engine = engine("block_size=1&max_model_len=1000");
    let whole_chat = json!({ "messages": [{ "role": "user", "content": "count" }], "max_tokens": 4 });
    let (_, first) = whole(&engine, Endpoint::ChatCompletions, whole_chat).await;
    let prompt = first["usage"]["prompt_tokens"].as_u64().unwrap();
    let told = json!({ "continue_final_message": true, "add_generation_prompt": false });
    let last = json!({ "role": "assistant", "content": "t0 t1 t2" });
    let (_, second) = whole(&engine, Endpoint::ChatCompletions, chat(last, told)).await;
    assert_eq!(second["usage"]["prompt_tokens"], prompt + 3);
    assert_eq!(second["usage"]["prompt_tokens_details"]["cached_tokens"], prompt + 2, "all but the last of what it had");
}

#[tokio::test]
async fn vllm_wants_no_new_turn_and_llama_cpp_needs_no_telling() {
    let last = json!({ "role": "assistant", "content": "t0 t1 t2" });
    let told = json!({ "continue_final_message": true });
    let (status, reply) = whole(&engine(""), Endpoint::ChatCompletions, chat(last.clone(), told)).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(reply["error"]["message"].as_str().unwrap().contains("are not compatible"), "{reply}");
    let llama = engine("assistant_prefill=true");
    assert_eq!(said(&llama, Endpoint::ChatCompletions, chat(last, json!({}))).await, and(" t3 t4", "length"));
}

#[tokio::test]
async fn a_chat_without_a_limit_stops_where_it_would_have() {
    let engine = engine("chat_tokens=8");
    let mut body = chat(
        json!({ "role": "assistant", "content": "t0 t1 t2 t3 t4" }),
        json!({ "continue_final_message": true, "add_generation_prompt": false }),
    );
    body.as_object_mut().unwrap().remove("max_tokens");
    assert_eq!(said(&engine, Endpoint::ChatCompletions, body.clone()).await, and(" t5 t6 t7", "stop"));
    body["min_tokens"] = json!(4);
    assert_eq!(said(&engine, Endpoint::ChatCompletions, body).await, and(" t5 t6 t7 t8", "stop"));
}

#[tokio::test]
async fn a_stop_string_is_met_in_what_is_new_only() {
    let engine = engine("");
    let stops = async |prompt: &str, stop: &str, more: Value| {
        let mut body = json!({ "prompt": prompt, "max_tokens": 6, "stop": stop });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        said(&engine, Endpoint::Completions, body).await
    };
    assert_eq!(stops("x: t0 t1", "t4", json!({})).await, and(" t2 t3 ", "stop"));
    assert_eq!(stops("x: t0 t1", "t1 t2", json!({})).await, and(" t2 t3 t4 t5 t6 t7", "length"));
    assert_eq!(stops("x: t0 t1", "t4", json!({ "include_stop_str_in_output": true })).await, and(" t2 t3 t4", "stop"));
    assert_eq!(stops("x: t0 t1", "t4", json!({ "min_tokens": 3 })).await, and(" t2 t3 t4 t5 t6 t7", "length"));
    assert_eq!(stops("x: t0 t1", "t4", json!({ "min_tokens": 2 })).await, and(" t2 t3 ", "stop"));
}

#[tokio::test]
async fn what_may_begin_a_stop_string_is_held_back_as_vllm_does() {
    let engine = engine("");
    let body = json!({ "prompt": "x", "max_tokens": 4, "stop": "12345", "return_token_ids": true });
    let frames = frames(stream(&engine, Endpoint::Completions, body).await).await;
    let texts: Vec<String> = frames
        .iter()
        .map(|frame| serde_json::from_str::<Value>(frame).unwrap()["choices"][0]["text"].as_str().unwrap().to_owned())
        .collect();
    // Four bytes stay behind what the ids say, until the end.
    assert_eq!(texts, ["", "t", "0 t", "1 t2 t3"]);
}

#[tokio::test]
async fn the_wide_script_goes_on_too() {
    let engine = engine("script=wide");
    let goes_on = async |prompt: &str| said(&engine, Endpoint::Completions, json!({ "prompt": prompt, "max_tokens": 2 })).await.0;
    assert_eq!(goes_on("count").await, "t0🌊t1");
    assert_eq!(goes_on("countt0🌊t1").await, "🌊t2🌊t3");
}
