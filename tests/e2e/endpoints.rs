//! Endpoints beside chats and completions: embeddings, responses, messages, token counts, one model.

use dynamo_engine_mock::tokens;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{
    client::Reply,
    components,
    host::{Host, MockProcess, completion},
    scripted::{STREAM_HEAD, Scripted, http_chunk, whole_answer},
};

const EMBEDDINGS: &str = "/v1/embeddings";
const RESPONSES: &str = "/v1/responses";
const MESSAGES: &str = "/v1/messages";
const COUNT: &str = "/v1/messages/count_tokens";

async fn host() -> Host {
    Host::over_mocks(&["a"], "speedup=50", &[]).await
}

/// Over an engine in process, and over one behind HTTP, which runs as long as the first is kept.
async fn hosts() -> (MockProcess, [Host; 2]) {
    let engine = MockProcess::start(&["speedup=50"]).await;
    let over_http = Host::start(&["--worker", engine.url()]).await;
    (engine, [host().await, over_http])
}

fn message(max_tokens: u32) -> Value {
    json!({ "model": "m", "max_tokens": max_tokens, "system": "be brief",
        "messages": [{ "role": "user", "content": [{ "type": "text", "text": "count" }] }] })
}

fn response(max_tokens: u32) -> Value {
    json!({ "model": "m", "max_output_tokens": max_tokens, "input": [{ "role": "user", "content": "count" }] })
}

/// The events of a stream with named events: each name says what its data says.
fn named_events(stream: &str) -> Vec<Value> {
    let event = |frame: &str| {
        let (name, data) =
            frame.strip_prefix("event: ").unwrap_or_else(|| panic!("no name: {frame}")).split_once("\ndata: ").unwrap();
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["type"], name);
        data
    };
    stream.trim_end().split("\n\n").map(event).collect()
}

/// Checks that this is an error in Anthropic's shape, and returns its message.
#[track_caller]
fn anthropic_error(reply: &Reply, status: u16, kind: &str) -> String {
    assert_eq!(reply.status.as_u16(), status, "status, with: {}", reply.text());
    let body = reply.json();
    assert_eq!((&body["type"], &body["error"]["type"]), (&json!("error"), &json!(kind)), "{body}");
    body["error"]["message"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn texts_and_token_ids_are_embedded_one_by_one_and_in_batches() {
    let (_engine, hosts) = hosts().await;
    for host in hosts {
        for (input, count) in
            [(json!("a text"), 1), (json!(["a", "b", "c"]), 3), (json!([1, 2, 3]), 1), (json!([[1, 2], [3]]), 2)]
        {
            let answer = host.http.ask(EMBEDDINGS, &json!({ "model": "m", "input": input })).await.json();
            let data = answer["data"].as_array().unwrap();
            assert_eq!(data.len(), count, "{input}");
            assert!(data.iter().all(|item| item["embedding"].as_array().is_some_and(|vector| vector.len() == 64)), "{answer}");
        }
        let wrong = host.http.post(EMBEDDINGS, r#"{"model":"m","input":[{}]}"#).await;
        assert!(wrong.is_error(400, "invalid_field").contains("token ids"));
        assert_eq!(host.http.metric("dynamo_host_requests_total", &[("endpoint", "embeddings"), ("code", "200")]).await, 4.0);
    }
}

#[tokio::test]
async fn a_response_is_answered_whole_and_streamed() {
    let (_engine, hosts) = hosts().await;
    for host in hosts {
        let whole = host.http.ask(RESPONSES, &response(12)).await.json();
        assert_eq!(tokens::count(whole["output"][0]["content"][0]["text"].as_str().unwrap()), Ok(12));
        let mut asked = response(12);
        asked["stream"] = true.into();
        let reply = host.http.ask(RESPONSES, &asked).await;
        assert!(reply.header("content-type").starts_with("text/event-stream"));
        let events = named_events(&reply.text());
        let said: String = events.iter().filter_map(|event| event["delta"].as_str()).collect();
        assert_eq!(tokens::count(&said), Ok(12));
        let last = events.last().unwrap();
        assert_eq!(last["type"], "response.completed");
        assert_eq!(last["response"]["output"][0]["content"], whole["output"][0]["content"]);
        assert_eq!(host.http.metric("dynamo_host_time_to_first_token_seconds_count", &[]).await, 1.0);
    }
}

#[tokio::test]
async fn what_one_engine_would_have_to_remember_is_refused_and_says_why() {
    let host = host().await;
    for (field, value) in
        [("previous_response_id", json!("resp_1")), ("background", json!(true)), ("conversation", json!("conv_1"))]
    {
        let mut asked = response(2);
        asked[field] = value;
        let reply = host.http.post(RESPONSES, asked.to_string()).await;
        let message = reply.is_error(400, "stateful_responses");
        assert!(message.contains(field) && message.contains("one engine"), "{message}");
        assert_eq!(reply.json()["error"]["param"], field);
    }
    for (method, path) in [
        (Method::GET, "/v1/responses/resp_1"),
        (Method::POST, "/v1/responses/resp_1/cancel"),
        (Method::DELETE, "/v1/responses/resp_1"),
    ] {
        host.http.send(method, path, &[], "").await.is_error(404, "stateful_responses");
    }
    let mut stored = response(2);
    stored["store"] = true.into();
    host.http.ask(RESPONSES, &stored).await;
}

#[tokio::test]
async fn a_message_is_answered_whole_streamed_and_counted() {
    let (_engine, hosts) = hosts().await;
    for host in hosts {
        let whole = host.http.ask(MESSAGES, &message(12)).await;
        assert_eq!(whole.header("request-id"), whole.header("x-request-id"));
        let answer = whole.json();
        assert_eq!(tokens::count(answer["content"][0]["text"].as_str().unwrap()), Ok(12));
        assert_eq!((&answer["stop_reason"], &answer["usage"]["output_tokens"]), (&json!("max_tokens"), &json!(12)));
        let mut asked = message(12);
        asked["stream"] = true.into();
        let events = named_events(&host.http.ask(MESSAGES, &asked).await.text());
        let said: String = events.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
        assert_eq!(tokens::count(&said), Ok(12));
        assert_eq!(events.last().unwrap()["type"], "message_stop");
        let counted = host.http.ask(COUNT, &message(12)).await.json();
        assert_eq!(counted["input_tokens"], answer["usage"]["input_tokens"]);
    }
}

#[tokio::test]
async fn errors_of_messages_have_anthropics_shape_everywhere() {
    let host = host().await;
    for path in [MESSAGES, COUNT] {
        let mut unknown = message(2);
        unknown["model"] = "gpt-17".into();
        assert!(anthropic_error(&host.http.post(path, unknown.to_string()).await, 404, "not_found_error").contains("gpt-17"));
        anthropic_error(&host.http.post(path, "{").await, 400, "invalid_request_error");
        anthropic_error(&host.http.get(path).await, 405, "invalid_request_error");
    }
    anthropic_error(&host.http.post("/v1/messages/batches", "{}").await, 404, "not_found_error");
    let nobody = Host::start_anyhow(&["--worker", "http://127.0.0.1:1,model=m"]).await;
    nobody.workers_are("unreachable").await;
    anthropic_error(&nobody.http.post(MESSAGES, message(2).to_string()).await, 503, "overloaded_error");
}

#[tokio::test]
async fn a_stream_that_breaks_says_so_in_its_clients_shape() {
    let engine = Scripted::start(|mut connection| async move {
        connection.write(STREAM_HEAD).await;
        connection.write(http_chunk("event: ping\ndata: {\"type\":\"ping\"}\n\n")).await;
    })
    .await;
    let host = Host::start(&["--worker", &engine.worker()]).await;
    for (path, mut asked) in [(MESSAGES, message(3)), (RESPONSES, response(3)), ("/v1/completions", completion(3))] {
        asked["stream"] = true.into();
        let text = host.http.post(path, asked.to_string()).await.text();
        let last = text.trim_end().rsplit("\n\n").next().unwrap();
        let data: Value = serde_json::from_str(last.split_once("data: ").unwrap().1).unwrap();
        assert!(data["error"]["message"].is_string(), "{path}: {text}");
        match path {
            MESSAGES => assert!(last.starts_with("event: error\n") && data["error"]["type"] == "api_error", "{text}"),
            RESPONSES => assert!(last.starts_with("event: error\n") && data["code"].is_string(), "{text}"),
            _ => assert!(last.starts_with("data: ") && data["error"]["code"].is_string(), "{text}"),
        }
        assert!(!text.contains("[DONE]") && !text.contains("message_stop"), "{text}");
    }
}

#[tokio::test]
async fn the_version_of_anthropics_api_goes_to_the_engine_and_the_key_does_not() {
    let engine = Scripted::answering(whole_answer("200 OK", r#"{"content":[]}"#)).await;
    let host = Host::start(&["--worker", &engine.worker()]).await;
    let headers = [("anthropic-version", "2023-06-01"), ("anthropic-beta", "a-b-c"), ("x-api-key", "my-secret")];
    host.http.send(Method::POST, MESSAGES, &headers, message(1).to_string()).await;
    let received = &engine.received()[0].head;
    assert!(received.starts_with("post /v1/messages http"), "{received}");
    assert!(received.contains("anthropic-version: 2023-06-01") && received.contains("anthropic-beta: a-b-c"), "{received}");
    assert!(!received.contains("my-secret"), "{received}");
}

#[tokio::test]
async fn an_engine_that_lacks_an_endpoint_says_so_itself() {
    let engine = Scripted::answering(whole_answer("404 Not Found", r#"{"detail":"Not Found"}"#)).await;
    let host = Host::start(&["--worker", &engine.worker()]).await;
    let reply = host.http.post(EMBEDDINGS, r#"{"model":"m","input":"x"}"#).await;
    assert_eq!((reply.status, reply.text().as_str()), (StatusCode::NOT_FOUND, r#"{"detail":"Not Found"}"#));
}

#[tokio::test]
async fn one_model_is_found_by_its_name_however_it_is_written() {
    let host = Host::start(&["--worker", "mock://a?model=org%2Fname-1&speedup=50"]).await;
    for path in ["/v1/models/org/name-1", "/v1/models/org%2Fname-1"] {
        let model = host.http.get_json(path).await;
        assert_eq!((&model["id"], &model["object"]), (&json!("org/name-1"), &json!("model")));
    }
    let message = host.http.get("/v1/models/org/other").await.is_error(404, "model_not_found");
    assert!(message.contains("org/other"), "{message}");
    host.http.post("/v1/models/org/name-1", "").await.is_error(405, "method_not_allowed");
    let anthropic = [("anthropic-version", "2023-06-01")];
    let list = host.http.send(Method::GET, "/v1/models", &anthropic, "").await.json();
    assert_eq!((&list["data"][0]["type"], &list["has_more"]), (&json!("model"), &json!(false)));
    anthropic_error(&host.http.send(Method::GET, "/v1/models/x", &anthropic, "").await, 404, "not_found_error");
}

#[tokio::test]
async fn a_policy_decides_on_all_of_them() {
    let host = host().await;
    host.activate(&components::guest("hostile"), &json!({ "mode": "gossip", "at_max_output_tokens": 13 })).await;
    for (path, body, endpoint) in [(RESPONSES, response(13), 3), (MESSAGES, message(13), 4)] {
        let reply = host.http.post(path, body.to_string()).await;
        assert!(reply.text().contains(&format!("nobody asks {endpoint} with priority 0")), "{}", reply.text());
    }
}

#[tokio::test]
async fn a_batch_of_prompts_with_several_choices_each_comes_complete() {
    let host = host().await;
    let asked = json!({ "model": "m", "prompt": ["one", "two"], "n": 2, "max_tokens": 5 });
    let answer = host.http.ask("/v1/completions", &asked).await.json();
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.iter().map(|choice| choice["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert!(choices.iter().all(|choice| tokens::count(choice["text"].as_str().unwrap()) == Ok(5)), "{answer}");
}
