//! Our tokens beside a real vLLM's own: of the bodies that `host/tokens` has fixtures of, and of more.

use std::{fs, path::Path};

use dynamo_engine_api::{Endpoint, Engine};
use dynamo_host_tokens::{Asked, PromptTokens, RunCache, Tokenizer};
use serde_json::{Value, json};

use crate::{engine::MODEL, harness::client::Client};

/// Longest prompt that its model takes, less some for the answer.
const MAX_TOKENS: usize = 4000;

fn ours(tokenizer: &Tokenizer, endpoint: Endpoint, body: &str) -> PromptTokens {
    let begun = tokenizer.begin(&Asked::of(endpoint, body.as_bytes())).unwrap_or_else(|error| panic!("{body}: {error}"));
    tokenizer.finish(begun).unwrap()
}

/// Bodies as they are written, so that members keep their order.
fn bodies() -> Vec<(Endpoint, String)> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tokens/tests/fixtures/small-expected.json");
    let text = fs::read_to_string(fixtures).unwrap();
    let mut bodies = Vec::new();
    for line in text.lines().filter(|line| line.starts_with('{')) {
        let body = line.split_once("\"body\":").unwrap().1.rsplit_once(",\"ids\":").unwrap().0;
        let is_chat = line.contains("\"endpoint\":\"chat_completions\"");
        bodies.push((if is_chat { Endpoint::ChatCompletions } else { Endpoint::Completions }, with_model(body)));
    }
    let source = include_str!("vllm.rs");
    for size in [10, 100, 1000, 3000] {
        bodies.push((Endpoint::Completions, with_model(&json!({ "prompt": &source[..size] }).to_string())));
        let chat = json!({ "messages": [{ "role": "system", "content": &source[..size / 2] }, { "role": "user", "content": &source[size / 2..size] }] });
        bodies.push((Endpoint::ChatCompletions, with_model(&chat.to_string())));
    }
    assert!(bodies.len() > 35);
    bodies
}

/// With the newer name of what was reasoned: chats of either name are computed alike, and `/tokenize` knows this one only.
fn with_model(body: &str) -> String {
    let body = body.replace("\"reasoning_content\"", "\"reasoning\"");
    format!("{{\"model\":\"{MODEL}\",{}", body.strip_prefix('{').unwrap())
}

/// Our ids are those that the engine's `/tokenize` answers, twice: computed, and from the cache.
pub(crate) async fn assert_equal(directory: &Path, engine: &dyn Engine) {
    let tokenizer = Tokenizer::load(directory, RunCache::new(RunCache::DEFAULT_BYTES)).unwrap();
    for (endpoint, body) in bodies() {
        let found = ours(&tokenizer, endpoint, &body);
        assert!(found.is_exact, "{body}");
        let theirs = engine.tokenize(endpoint, body.clone().into()).await.unwrap();
        assert_eq!(theirs.as_deref(), Some(&*found.ids), "{body}");
        assert_eq!(ours(&tokenizer, endpoint, &body), found, "from the cache");
    }
}

/// What the engine says that it computed is what we have: at endpoints of which `/tokenize` does not speak.
pub(crate) async fn assert_equal_counts(directory: &Path, http: &Client) {
    let tokenizer = Tokenizer::load(directory, RunCache::new(RunCache::DEFAULT_BYTES)).unwrap();
    let check = async |endpoint: Endpoint, body: Value, usage: &str| {
        let found = ours(&tokenizer, endpoint, &body.to_string());
        let reply = http.ask(endpoint.path(), &body).await.json();
        assert!(found.is_exact && found.ids.len() < MAX_TOKENS, "{body}");
        assert_eq!(reply["usage"][usage], found.ids.len(), "{body}: {reply}");
        if let Some(ids) = reply["prompt_token_ids"].as_array() {
            assert!(ids.iter().map(|id| id.as_u64().unwrap() as u32).eq(found.ids.iter().copied()), "{body}");
        }
    };
    let hi = json!([{ "role": "user", "content": "Hello, wörld 😀" }, { "role": "assistant", "content": "Hi" }, { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] }]);
    let chat = |more: Value| {
        let mut body = json!({ "model": MODEL, "messages": hi, "max_tokens": 1, "return_token_ids": true });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    check(Endpoint::ChatCompletions, chat(json!({})), "prompt_tokens").await;
    check(Endpoint::ChatCompletions, chat(json!({ "reasoning_effort": "low" })), "prompt_tokens").await;
    check(Endpoint::ChatCompletions, chat(json!({ "add_special_tokens": true })), "prompt_tokens").await;
    check(Endpoint::Messages, json!({ "model": MODEL, "messages": hi, "system": "Be brief.", "max_tokens": 1 }), "input_tokens")
        .await;
    let blocks = json!([{ "type": "text", "text": "Be " }, { "type": "text", "text": "brief." }]);
    check(Endpoint::Messages, json!({ "model": MODEL, "messages": hi, "system": blocks, "max_tokens": 1 }), "input_tokens").await;
    check(
        Endpoint::Responses,
        json!({ "model": MODEL, "input": "Hello", "instructions": "Be brief.", "max_output_tokens": 1 }),
        "input_tokens",
    )
    .await;
    let items = json!([{ "role": "user", "content": "Hello" }, { "role": "assistant", "content": "Hi" }, { "role": "user", "content": "?" }]);
    check(Endpoint::Responses, json!({ "model": MODEL, "input": items, "max_output_tokens": 1 }), "input_tokens").await;
    let completion = json!({ "model": MODEL, "prompt": "Once upon\n a time", "max_tokens": 1, "return_token_ids": true });
    check(Endpoint::Completions, completion, "prompt_tokens").await;
}
