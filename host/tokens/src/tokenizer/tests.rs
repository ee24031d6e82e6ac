//! Ids are those of Hugging Face's own library, with the cache and without; files that are no tokenizer are refused.

use std::{fs, path::PathBuf};

use dynamo_host_core::Endpoint;
use proptest::{collection::vec, prelude::*, sample::select};
use serde_json::{Value, json};

use super::*;

fn small() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/small")
}

fn tokenizer(bytes: u64) -> Tokenizer {
    Tokenizer::load(&small(), RunCache::new(bytes)).unwrap()
}

fn tokens(tokenizer: &Tokenizer, endpoint: Endpoint, body: &Value) -> Result<PromptTokens, PromptError> {
    let body = body.to_string();
    tokenizer.finish(tokenizer.begin(&Asked::of(endpoint, body.as_bytes()))?)
}

fn uncached(tokenizer: &Tokenizer, body: &Value) -> usize {
    tokenizer.begin(&Asked::of(Endpoint::ChatCompletions, body.to_string().as_bytes())).unwrap().uncached_bytes()
}

#[test]
fn ids_are_those_of_hugging_faces_own_library() {
    // Bodies as they are written: members of objects keep their order.
    let cases: Vec<std::collections::BTreeMap<String, Box<serde_json::value::RawValue>>> =
        serde_json::from_str(include_str!("../../tests/fixtures/small-expected.json")).unwrap();
    let tokenizer = tokenizer(1 << 20);
    assert!(cases.len() > 25);
    for round in 0..2 {
        for case in &cases {
            let endpoint =
                if case["endpoint"].get() == "\"completions\"" { Endpoint::Completions } else { Endpoint::ChatCompletions };
            let body = case["body"].get();
            let expected: Vec<u32> = serde_json::from_str(case["ids"].get()).unwrap();
            let begun = tokenizer.begin(&Asked::of(endpoint, body.as_bytes())).unwrap_or_else(|error| panic!("{body}: {error}"));
            assert!(round == 0 || begun.uncached_bytes() == 0);
            let found = tokenizer.finish(begun).unwrap();
            assert_eq!(*found.ids, *expected, "{body}");
            assert!(found.is_exact, "{body}");
        }
    }
}

#[test]
fn a_chats_new_turn_is_all_that_is_tokenized() {
    let tokenizer = tokenizer(1 << 20);
    let say = |number: usize| json!({ "role": if number.is_multiple_of(2) { "user" } else { "assistant" }, "content": format!("{number}: ").repeat(200) });
    let mut messages: Vec<Value> = (0..9).map(say).collect();
    tokens(&tokenizer, Endpoint::ChatCompletions, &json!({ "messages": messages })).unwrap();
    messages.extend([say(9), say(10)]);
    let more = json!({ "messages": messages });
    let new = uncached(&tokenizer, &more);
    assert!((1000..3000).contains(&new), "{new} bytes");
    tokens(&tokenizer, Endpoint::ChatCompletions, &more).unwrap();
    assert_eq!(uncached(&tokenizer, &more), 0);
}

#[test]
fn a_long_documents_next_question_is_all_that_is_tokenized() {
    let tokenizer = tokenizer(1 << 22);
    let document: String = (0..20_000).map(|number| format!("line {number} of it,\n and more ")).collect();
    let asks = |question: &str| json!({ "messages": [{ "role": "user", "content": format!("{document}\n\n{question}") }] });
    tokens(&tokenizer, Endpoint::ChatCompletions, &asks("What is it about?")).unwrap();
    assert!(uncached(&tokenizer, &asks("Who wrote it, and when was that?")) < 2048);
}

#[test]
fn what_is_uncertain_is_said_to_be_inexact() {
    let tokenizer = tokenizer(1 << 20);
    let exact = |endpoint, body: Value| tokens(&tokenizer, endpoint, &body).unwrap().is_exact;
    let hi = || json!([{ "role": "user", "content": "hi" }]);
    assert!(exact(Endpoint::ChatCompletions, json!({ "messages": hi(), "max_tokens": 3 })));
    assert!(!exact(Endpoint::ChatCompletions, json!({ "messages": hi(), "chat_template": "x" })));
    assert!(!exact(Endpoint::ChatCompletions, json!({ "messages": hi(), "truncate_prompt_tokens": 3 })));
    assert!(exact(Endpoint::Completions, json!({ "prompt": "hi" })));
    assert!(exact(Endpoint::Completions, json!({ "prompt": [1, 2, 3] })));
    assert!(!exact(Endpoint::Completions, json!({ "prompt": ["hi", "ho"] })));
    assert!(!exact(Endpoint::Completions, json!({ "prompt": [[1], [2]] })));
    assert!(!exact(Endpoint::Embeddings, json!({ "input": "hi" })));
    assert!(exact(Endpoint::Responses, json!({ "input": "hi", "instructions": "be brief" })));
    assert!(!exact(Endpoint::Responses, json!({ "input": "hi", "reasoning": { "effort": "low" } })));
    assert!(exact(Endpoint::Messages, json!({ "messages": hi(), "system": "be brief", "max_tokens": 3 })));
    assert!(!exact(Endpoint::Messages, json!({ "messages": hi(), "tools": [{ "name": "f", "input_schema": {} }] })));
}

#[test]
fn other_apis_have_the_tokens_of_the_same_chat() {
    let tokenizer = tokenizer(1 << 20);
    let ids = |endpoint, body: Value| tokens(&tokenizer, endpoint, &body).unwrap().ids;
    let chat = json!([{ "role": "system", "content": "be brief" }, { "role": "user", "content": "hi" }]);
    let expected = ids(Endpoint::ChatCompletions, json!({ "messages": chat }));
    assert_eq!(ids(Endpoint::Responses, json!({ "input": "hi", "instructions": "be brief" })), expected);
    let hi = json!([{ "role": "user", "content": [{ "type": "text", "text": "hi" }] }]);
    let system = json!([{ "type": "text", "text": "be " }, { "type": "text", "text": "brief" }]);
    assert_eq!(ids(Endpoint::Messages, json!({ "messages": hi, "system": system })), expected);
    let given = ids(Endpoint::Completions, json!({ "prompt": &*expected }));
    assert_eq!(given, expected);
}

#[test]
fn a_prompt_ends_at_what_is_not_text() {
    let tokenizer = tokenizer(1 << 20);
    let shown = |image: Value| {
        let parts = json!([{ "type": "text", "text": "look:" }, image, { "type": "text", "text": "well?" }]);
        let first = json!({ "role": "user", "content": "hello" });
        json!({ "messages": [first, { "role": "user", "content": parts }, { "role": "user", "content": "more" }] })
    };
    let body = shown(json!({ "type": "image_url", "image_url": { "url": "data:," } }));
    let found = tokens(&tokenizer, Endpoint::ChatCompletions, &body).unwrap();
    let before = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>user\n";
    assert_eq!((found.ids, found.is_exact), (tokenizer.encode(before).unwrap().into(), false));
}

#[test]
fn what_the_engine_would_refuse_has_no_tokens() {
    let tokenizer = tokenizer(1 << 20);
    let refused = |endpoint, body: Value| tokens(&tokenizer, endpoint, &body).unwrap_err().to_string();
    let wizard = json!({ "messages": [{ "role": "wizard", "content": "hi" }] });
    assert!(refused(Endpoint::ChatCompletions, wizard).contains("unknown role wizard"));
    assert!(refused(Endpoint::ChatCompletions, json!({ "messages": [] })).contains("messages"));
    assert!(refused(Endpoint::Completions, json!({ "prompt": [{}] })).contains("prompt"));
    let both = json!({ "messages": [{ "role": "user", "content": "hi" }], "continue_final_message": true });
    assert!(refused(Endpoint::ChatCompletions, both).contains("exclude"));
}

#[test]
fn a_directory_that_is_no_models_is_refused_with_its_file() {
    let directory = tempfile::tempdir().unwrap();
    let refused = |name: &str, text: &str| {
        for file in fs::read_dir(small()).unwrap().flatten() {
            fs::copy(file.path(), directory.path().join(file.file_name())).unwrap();
        }
        fs::write(directory.path().join(name), text).unwrap();
        let error = Tokenizer::load(directory.path(), RunCache::new(1)).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
        error
    };
    assert!(refused("tokenizer.json", "{\n\"model\": oops}").contains("line 2"));
    assert!(refused("tokenizer.json", "{\"model\": {\"type\": \"Magic\"}}").contains("take the tokenizer.json"));
    assert!(refused("tokenizer_config.json", "{").contains("EOF"));
    let moved = r#"{"added_tokens_decoder": {"7": {"content": "<|im_start|>", "special": true}}}"#;
    assert!(refused("tokenizer_config.json", moved).contains("added_tokens_decoder has \"<|im_start|>\" as 7"));
    assert!(refused("chat_template.jinja", "{% if %}").contains("line 1"));
    let error = Tokenizer::load(&directory.path().join("nowhere"), RunCache::new(1)).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json") && error.contains("Hugging Face"), "{error}");
}

#[test]
fn begin_and_end_tokens_are_added_where_the_configuration_says_so() {
    let directory = tempfile::tempdir().unwrap();
    fs::copy(small().join("tokenizer.json"), directory.path().join("tokenizer.json")).unwrap();
    let config = r#"{"add_bos_token": true, "bos_token": {"content": "<|endoftext|>"}, "chat_template": [
        {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"}]}"#;
    fs::write(directory.path().join("tokenizer_config.json"), config).unwrap();
    let tokenizer = Tokenizer::load(directory.path(), RunCache::new(1 << 20)).unwrap();
    let expected: Arc<[u32]> = tokenizer.encode("<|endoftext|>hi").unwrap().into();
    assert_eq!(tokens(&tokenizer, Endpoint::Completions, &json!({ "prompt": "hi" })).unwrap().ids, expected);
    let chat = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    assert_eq!(tokens(&tokenizer, Endpoint::ChatCompletions, &chat).unwrap().ids, expected);
    let bare = json!({ "prompt": "hi", "add_special_tokens": false });
    assert_eq!(*tokens(&tokenizer, Endpoint::Completions, &bare).unwrap().ids, expected[1..]);
}

proptest! {
    #[test]
    fn ids_with_the_cache_are_those_without(fragments in vec(vec(select(vec![
        "<|im_start|>", "<|im_end|>\n", "some words of a sentence ", "\n", "fn main() {\n", "你好。", "12 ", "'s", "a\u{301}", "😀 ", "\t",
    ]), 0..120), 1..6)) {
        thread_local!(static CACHED: Tokenizer = tokenizer(64 << 10));
        CACHED.with(|tokenizer| {
            let mut text = String::new();
            for more in fragments {
                text.push_str(&more.concat());
                let found = tokens(tokenizer, Endpoint::Completions, &json!({ "prompt": text })).unwrap();
                prop_assert_eq!(&*found.ids, &*tokenizer.encode(&text).unwrap());
            }
            Ok(())
        })?;
    }
}
