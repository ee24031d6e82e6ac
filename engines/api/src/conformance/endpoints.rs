//! The checks of what is asked apart from chats and completions.

use http::{HeaderName, HeaderValue};
use serde_json::{Value, json};

use super::{
    Fixture,
    ask::{Asking, OUTPUT_TOKENS, ensure, request},
    checks::{Checked, applies},
};
use crate::Endpoint;

fn offered<F: Fixture>(on: &Asking<'_, F>, endpoint: Endpoint) -> Checked {
    applies(on.can.offers.contains(&endpoint), "the server under test does not offer it")
}

pub(super) async fn embeddings_are_answered<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    offered(on, Endpoint::Embeddings)?;
    let asked = on.body_for_model(json!({ "input": ["a harbour", "a lighthouse"] }));
    let answer = on.whole(Endpoint::Embeddings, &asked).await?;
    let vectors: Vec<_> = answer["data"].as_array().into_iter().flatten().map(|item| &item["embedding"]).collect();
    ensure(vectors.len() == 2, || format!("two texts have {} embeddings", vectors.len()))?;
    let numbers = |vector: &Value| vector.as_array().is_some_and(|all| !all.is_empty() && all.iter().all(Value::is_number));
    ensure(vectors.iter().all(|vector| numbers(vector)), || format!("an embedding is not a list of numbers: {}", vectors[0]))
}

pub(super) async fn a_message_is_answered_whole<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    offered(on, Endpoint::Messages)?;
    let answer = on.whole_with(anthropic(on, Endpoint::Messages, json!({ "max_tokens": OUTPUT_TOKENS }))).await?;
    ensure(answer["type"] == "message", || format!("its type is {}", answer["type"]))?;
    ensure(answer["content"][0]["text"].is_string(), || format!("its content is {}", answer["content"]))?;
    ensure(answer["stop_reason"].is_string(), || format!("its stop reason is {}", answer["stop_reason"]))?;
    counts_output(&answer)
}

pub(super) async fn tokens_are_counted<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    offered(on, Endpoint::CountTokens)?;
    let answer = on.whole_with(anthropic(on, Endpoint::CountTokens, json!({}))).await?;
    let counted = answer["input_tokens"].as_u64().is_some_and(|tokens| tokens > 0);
    ensure(counted, || format!("the answer is {answer}"))
}

pub(super) async fn a_response_is_answered_whole<F: Fixture>(on: &Asking<'_, F>) -> Checked {
    offered(on, Endpoint::Responses)?;
    let asked = on.body_for_model(json!({ "input": "Say something.", "max_output_tokens": OUTPUT_TOKENS, "temperature": 0 }));
    let answer = on.whole(Endpoint::Responses, &asked).await?;
    ensure(answer["object"] == "response", || format!("its object is {}", answer["object"]))?;
    let texts = answer["output"].as_array().into_iter().flatten().flat_map(|item| item["content"].as_array()).flatten();
    let says = texts.filter(|content| content["text"].is_string()).count();
    ensure(says > 0, || format!("its output is {}", answer["output"]))?;
    counts_output(&answer)
}

/// A request as clients of that API make it.
fn anthropic<F: Fixture>(on: &Asking<'_, F>, endpoint: Endpoint, mut body: Value) -> crate::GenerateRequest {
    body["messages"] = json!([{ "role": "user", "content": "Say something." }]);
    let mut request = request(endpoint, on.body_for_model(body).to_string(), false);
    request.headers.insert(HeaderName::from_static("anthropic-version"), HeaderValue::from_static("2023-06-01"));
    request
}

fn counts_output(answer: &Value) -> Checked {
    let usage = &answer["usage"];
    let counted = usage["output_tokens"].as_u64().is_some_and(|tokens| (1..=u64::from(OUTPUT_TOKENS)).contains(&tokens));
    ensure(counted && usage["input_tokens"].is_u64(), || format!("its usage is {usage}"))
}
