//! What comes through the host is what the engine says; what the engine cannot do, the host does.

use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::{
    engine::{LlamaServer, chat, completion, host_over},
    harness::host::streamed,
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// Two engines and a host over them.
async fn two() -> (Vec<LlamaServer>, crate::harness::host::Host) {
    let engines = vec![LlamaServer::start().await, LlamaServer::start().await];
    let host = host_over(&engines).await;
    (engines, host)
}

fn text(answer: &Value) -> String {
    let choice = &answer["choices"][0];
    let text = choice["text"].as_str().or(choice["message"]["content"].as_str());
    text.unwrap_or_else(|| panic!("no text in {answer}")).to_owned()
}

#[tokio::test]
async fn a_chat_says_the_same_whole_streamed_and_without_the_host() {
    let (engines, host) = two().await;
    let asked = chat("Tell me about the sea.", 60);
    let direct = text(&engines[0].http.ask(CHAT, &asked).await.json());
    assert!(!direct.is_empty());
    let whole = host.http.ask(CHAT, &asked).await;
    assert_eq!(text(&whole.json()), direct);
    assert_eq!(whole.header("x-dynamo-policy"), format!("least-loaded@{}", env!("CARGO_PKG_VERSION")));
    let mut asked = streamed(asked);
    asked["stream_options"] = json!({ "include_usage": true });
    let stream = host.http.stream(CHAT, &asked).await;
    assert_eq!((stream.text(), stream.finish_reasons()), (direct, vec!["length"]));
    assert_eq!(stream.events.last().unwrap()["usage"]["completion_tokens"], 60);
}

#[tokio::test]
async fn a_prompt_may_be_text_or_the_token_ids_of_that_text() {
    let (engines, host) = two().await;
    let says = "The router reads a prompt";
    let ids = engines[0].http.post("/tokenize", json!({ "content": says }).to_string()).await.json()["tokens"].clone();
    let direct = text(&engines[1].http.ask(COMPLETIONS, &completion(says, 40)).await.json());
    for prompt in [json!(says), ids.clone()] {
        let answer = host.http.ask(COMPLETIONS, &completion(prompt.clone(), 40)).await.json();
        assert_eq!(text(&answer), direct, "{prompt}");
        assert_eq!(answer["usage"]["prompt_tokens"], ids.as_array().unwrap().len());
        assert_eq!(host.http.stream(COMPLETIONS, &streamed(completion(prompt, 40))).await.text(), direct);
    }
}

#[tokio::test]
async fn streams_at_once_say_what_they_say_alone_and_both_engines_work() {
    let (engines, host) = two().await;
    let prompt = |number: usize| completion(format!("Story number {number} begins"), 80);
    let mut alone = Vec::new();
    for number in 0..12 {
        alone.push(text(&engines[0].http.ask(COMPLETIONS, &prompt(number)).await.json()));
    }
    let mut streams = JoinSet::new();
    for number in 0..12 {
        let client = host.http.clone();
        streams.spawn(async move {
            let stream = client.stream(COMPLETIONS, &streamed(prompt(number))).await;
            (number, stream.text(), stream.header("x-dynamo-worker").to_owned())
        });
    }
    let mut workers = Vec::new();
    while let Some(stream) = streams.join_next().await {
        let (number, said, worker) = stream.unwrap();
        assert_eq!(said, alone[number], "stream {number}");
        workers.push(worker);
    }
    workers.sort();
    workers.dedup();
    assert_eq!(workers, ["a", "b"]);
}

#[tokio::test]
async fn a_client_that_leaves_its_stream_frees_the_slot() {
    let engines = vec![LlamaServer::start().await];
    let host = host_over(&engines).await;
    for _ in 0..10 {
        let mut stream = host.http.open(CHAT, &streamed(chat("Never stop", 3900))).await;
        stream.event().await;
        drop(stream);
        engines[0].runs(0).await;
    }
    // Ten streams to their ends would be ten times as many.
    let tokens = engines[0].http.metric("llamacpp:tokens_predicted_total", &[]).await;
    assert!(tokens < 3900.0, "the engine made {tokens} tokens for nobody");
}

#[tokio::test]
async fn the_engines_refusals_pass_and_what_is_broken_never_reaches_it() {
    let (_engines, host) = two().await;
    let too_long = vec![100; 5000];
    for asked in [completion(too_long.clone(), 4), streamed(completion(too_long, 4))] {
        let reply = host.http.post(COMPLETIONS, asked.to_string()).await;
        assert_eq!(reply.status, 400, "{}", reply.text());
        let error = &reply.json()["error"];
        assert_eq!((&error["type"], &error["n_ctx"]), (&json!("exceed_context_size_error"), &json!(4096)), "{error}");
    }
    let reply = host.http.post(COMPLETIONS, completion(vec![1_000_000], 4).to_string()).await;
    assert_eq!(reply.status, 400, "{}", reply.text());
    assert!(reply.text().contains("invalid tokens"), "{}", reply.text());

    // llama.cpp would answer these with 500 and with 200.
    host.http.post(CHAT, "{").await.is_error(400, "invalid_json");
    let mut asked = chat("Who are you?", 4);
    asked["model"] = "another".into();
    host.http.post(CHAT, asked.to_string()).await.is_error(404, "model_not_found");
    let mut asked = chat("Who decides?", 4);
    asked["kv_transfer_params"] = json!({ "do_remote_prefill": true });
    asked["a_field_of_tomorrow"] = json!([1, { "x": null }]);
    host.http.ask(CHAT, &asked).await;
}

#[tokio::test]
async fn when_an_engine_is_killed_its_stream_says_so_and_requests_go_to_the_other() {
    let (mut engines, host) = two().await;
    let mut stream = host.http.open(CHAT, &streamed(chat("Go on for long", 3900))).await;
    stream.event().await;
    let (victim, survivor) = if stream.headers["x-dynamo-worker"] == "a" { (0, "b") } else { (1, "a") };
    engines[victim].process.kill();
    let (events, end) = stream.rest().await;
    assert_eq!(end, Ok(()));
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "engine_broken", "{last}");
    assert!(!events.contains(&"[DONE]".to_owned()));
    for _ in 0..10 {
        let whole = host.http.ask(COMPLETIONS, &completion("Who is there?", 5)).await;
        assert_eq!(whole.header("x-dynamo-worker"), survivor);
        assert_eq!(host.http.stream(CHAT, &streamed(chat("And now?", 5))).await.header("x-dynamo-worker"), survivor);
    }
}
