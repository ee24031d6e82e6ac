//! Tokens of prompts: what a policy is told of them, how the metrics say they were got, and which tokenizers are refused.

use std::{fs, path::PathBuf};

use serde_json::{Value, json};

use crate::harness::{
    components,
    host::{Host, completion},
    process::{run, serve},
};

const CHATS: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// A tokenizer, with what Hugging Face's own library makes of prompts with it beside it.
fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tokens/tests/fixtures")
}

fn small() -> String {
    format!("m={}", fixtures().join("small").display())
}

/// A host over one engine of model `m`, with a policy that says what it is told.
async fn witnessed(arguments: &[&str]) -> Host {
    witnessed_over("", arguments).await
}

/// The same, with options of the worker's.
async fn witnessed_over(options: &str, arguments: &[&str]) -> Host {
    let host = Host::over_mocks(&["a"], &format!("speedup=1000&max_model_len=250000{options}"), arguments).await;
    host.activate(&components::guest("witness"), &json!({})).await;
    host
}

/// What the policy was last told: tokens, and whether they are exact.
async fn told(host: &Host) -> (f64, f64) {
    let gauge = async |name: &str| host.http.metric("dynamo_host_policy_gauge", &[("name", name)]).await;
    (gauge("prompt_tokens").await, gauge("prompt_tokens_exact").await)
}

async fn counted(host: &Host, how: &str) -> (f64, f64) {
    let count = async |name: &str| host.http.metric(&format!("dynamo_host_prompts_tokenized{name}"), &[("how", how)]).await;
    (count("_total").await, count("_tokens_total").await)
}

fn asked(body: &Value) -> Value {
    let mut body = body.clone();
    body["model"] = "m".into();
    body["max_tokens"] = 1.into();
    body
}

#[tokio::test]
async fn a_policy_is_told_the_very_count_of_the_models_own_tokenizer() {
    let host = witnessed(&["--model", &small()]).await;
    let cases: Vec<Value> = serde_json::from_str(&fs::read_to_string(fixtures().join("small-expected.json")).unwrap()).unwrap();
    let mut tokens = 0;
    for (number, case) in cases.iter().filter(|case| case["body"]["tools"].is_null() && case["body"]["prompt"] != "").enumerate()
    {
        let path = if case["endpoint"] == "completions" { COMPLETIONS } else { CHATS };
        host.http.ask(path, &asked(&case["body"])).await;
        let expected = case["ids"].as_array().unwrap().len();
        assert_eq!(told(&host).await, (expected as f64, 1.0), "{case}");
        tokens += expected;
        assert_eq!(counted(&host, "tokenizer").await, (number as f64 + 1.0, tokens as f64));
    }
    let stage = [("stage", "tokenize")];
    assert!(host.http.metric("dynamo_host_stage_seconds_count", &stage).await >= 20.0);
}

#[tokio::test]
async fn a_model_without_a_tokenizer_has_approximate_prompts_and_says_so() {
    let host = witnessed_over(",kv_events=off", &[]).await;
    host.http.ask(COMPLETIONS, &completion(1)).await;
    assert_eq!((told(&host).await.1, counted(&host, "approximate").await.0), (0.0, 1.0));
    // Whoever sends ids needs none.
    host.http.ask(COMPLETIONS, &asked(&json!({ "prompt": [5, 6, 7] }))).await;
    assert_eq!((told(&host).await, counted(&host, "given").await), ((3.0, 1.0), (1.0, 3.0)));
    assert_eq!(counted(&host, "tokenizer").await.0, 0.0);
}

#[tokio::test]
async fn an_engine_is_asked_where_the_configuration_says_so_and_where_it_tells_of_its_kv() {
    for (options, arguments) in [(",kv_events=off", &["--model", "m=engine"][..]), ("", &[])] {
        let host = witnessed_over(options, arguments).await;
        let body = asked(&json!({ "messages": [{ "role": "user", "content": "one two three four" }] }));
        let reply = host.http.ask(CHATS, &body).await;
        let expected = reply.json()["usage"]["prompt_tokens"].as_f64().unwrap();
        assert_eq!((told(&host).await, counted(&host, "engine").await), ((expected, 1.0), (1.0, expected)), "{options}");
    }
}

#[tokio::test]
async fn a_long_documents_next_question_costs_its_own_tokens() {
    let host = witnessed(&["--model", &small()]).await;
    let document = "A line of a long document, with some words in it.\n".repeat(8000);
    let ask = async |question: &str| {
        let content = format!("{document}\n{question}");
        host.http.ask(CHATS, &asked(&json!({ "messages": [{ "role": "user", "content": content }] }))).await;
        let bytes = async |from: &str| host.http.metric("dynamo_host_tokenize_text_bytes_total", &[("from", from)]).await;
        (bytes("tokenizer").await, bytes("cache").await)
    };
    assert!(ask("What is it about?").await.0 > 390_000.0);
    let (first, cached) = ask("Who wrote it?").await;
    let (second, more) = ask("And when was that?").await;
    assert!(second - first < 2048.0, "{first} {second}");
    assert!(more - cached > 390_000.0, "{cached} {more}");
    assert_eq!(counted(&host, "tokenizer").await.0, 3.0);
}

#[tokio::test]
async fn what_the_template_refuses_is_the_engines_to_answer_and_is_counted() {
    let host = witnessed(&["--model", &small()]).await;
    host.http.ask(CHATS, &asked(&json!({ "messages": [{ "role": "wizard", "content": "hi" }] }))).await;
    assert_eq!(counted(&host, "approximate").await.0, 1.0);
    assert_eq!(host.http.metric("dynamo_host_tokenize_failures_total", &[("cause", "prompt")]).await, 1.0);
}

#[tokio::test]
async fn a_tokenizer_that_cannot_be_read_is_refused_with_its_model_and_file() {
    let directory = tempfile::tempdir().unwrap();
    let model = format!("m={}", directory.path().display());
    let refuses = async |says: &[&str]| {
        run(&serve(&["--worker", "mock://a?model=m", "--model", &model])).await.failed(2, says);
        let file = directory.path().join("host.toml");
        fs::write(&file, format!("[models]\nm = {{ tokenizer = {:?} }}\n", directory.path())).unwrap();
        run(&["config", "check", file.to_str().unwrap()]).await.failed(1, says);
    };
    refuses(&["\"m\"", "tokenizer.json", "Hugging Face"]).await;
    fs::write(directory.path().join("tokenizer.json"), "{\n  \"model\": nothing\n}").unwrap();
    refuses(&["\"m\"", "tokenizer.json", "line 2", "take the tokenizer.json"]).await;
    fs::copy(fixtures().join("small/tokenizer.json"), directory.path().join("tokenizer.json")).unwrap();
    fs::write(directory.path().join("chat_template.jinja"), "{% for %}").unwrap();
    refuses(&["\"m\"", "chat_template.jinja", "line 1"]).await;
    run(&serve(&["--worker", "mock://a?model=m", "--model", "m"])).await.failed(2, &["--model", "NAME=DIR"]);
}
