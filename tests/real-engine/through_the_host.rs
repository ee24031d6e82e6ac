//! What comes through the host is what the engine says; what the engine cannot do, the host does.

use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::{
    engine::{LlamaServer, chat, completion, host_over},
    harness::{host::streamed, sse::Streamed},
    killed::{Answer, counted, struck},
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

/// A stream whose engine was killed, over a host of two.
struct Killed {
    /// What the client had by then, and in the end.
    before: String,
    answer: Answer,
    /// What is said where nobody is killed.
    undisturbed: Streamed,
    /// Output tokens that the host had when another engine went on.
    told: usize,
    survivor: LlamaServer,
}

impl Killed {
    async fn after(path: &str, body: &Value, after: usize) -> Self {
        let (mut engines, host) = two().await;
        let undisturbed = engines[1].http.stream(path, body).await;
        let mut killed = 0;
        let kill = |worker: &str| {
            killed = usize::from(worker != "a");
            engines[killed].process.kill();
        };
        let (before, answer) = struck(&host, path, body, after, kill).await;
        // Nothing else is hurt.
        for _ in 0..5 {
            assert_eq!(host.http.ask(COMPLETIONS, &completion("Who is there?", 5)).await.status, 200);
        }
        engines.remove(killed);
        Self { before, answer, undisturbed, told: tokens_told(&host.process.log()), survivor: engines.remove(0) }
    }
}

/// What the host's log says that an engine was told of a stream, in tokens.
fn tokens_told(log: &str) -> usize {
    let lines: Vec<_> = log.lines().filter_map(|line| line.split_once("stream goes on")).collect();
    let [(_, fields)] = lines[..] else { panic!("it goes on once: {log}") };
    let (_, tokens) = fields.split_once(" tokens=").unwrap_or_else(|| panic!("no tokens in {fields}"));
    tokens.split(|other: char| !other.is_ascii_digit()).next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_completion_whose_engine_is_killed_says_what_it_would_have_said() {
    for (says, after) in [("The router reads a prompt", 9), ("Once upon a time", 60), ("Numbers", 150)] {
        let Killed { before, answer, undisturbed, .. } = Killed::after(COMPLETIONS, &counted(completion(says, 400)), after).await;
        let undisturbed = Answer::of(&undisturbed, COMPLETIONS);
        assert!(!before.is_empty() && undisturbed.text.starts_with(&before));
        assert_eq!(answer, undisturbed, "{says}, killed after {after} events, which were {before:?}");
    }
}

/// llama.cpp gives no token ids, so that a chat goes on behind its text. Where that is cut into other tokens than were made
/// (one fewer or more, in about half of the places of 400 tokens), the engine itself goes on with other words, also without
/// the host: what is compared is then what it says of that text. All else is as undisturbed: usage, finish, what was said.
#[tokio::test]
async fn a_chat_whose_engine_is_killed_says_what_another_says_behind_its_text() {
    let sea = "Tell me about the sea.";
    // The last one's text is cut into other tokens than were made.
    for (says, after) in [(sea, 9), ("Who are you?", 60), ("And now?", 150), (sea, 240)] {
        let killed = Killed::after(CHAT, &counted(chat(says, 400)), after).await;
        let undisturbed = Answer::of(&killed.undisturbed, CHAT);
        let deltas = killed.undisturbed.choices().filter_map(|choice| choice["delta"]["content"].as_str());
        let told: String = deltas.filter(|text| !text.is_empty()).take(killed.told).collect();
        assert!(!killed.before.is_empty() && told.starts_with(&killed.before), "{says}: {:?}, then {told:?}", killed.before);

        let mut asked = chat(says, 400 - killed.told as u32);
        asked["messages"].as_array_mut().unwrap().push(json!({ "role": "assistant", "content": told }));
        let direct = killed.survivor.http.stream(CHAT, &streamed(asked)).await.text();
        let rest = direct.strip_prefix(&told).unwrap_or(&direct);
        let expected = Answer { text: told.clone() + rest, ..undisturbed };
        assert_eq!(killed.answer, expected, "{says}, killed after {} tokens", killed.told);
        let is_same = killed.answer.text == killed.undisturbed.text();
        let how = if is_same { "as undisturbed" } else { "other words, as the engine's own behind that text" };
        println!("{says} killed after {} tokens: {how}", killed.told);
    }
}
