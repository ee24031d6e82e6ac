//! Embeddings, responses and messages. What vLLM was seen to answer is the measure, member by member.

use super::*;

/// A message's stream as vLLM sent it.
const SEEN_EVENTS: &str = include_str!("vllm_messages_stream.txt");

async fn raw(chunks: dynamo_engine_api::ChunkStream) -> (Vec<Chunk>, String) {
    let chunks: Vec<Chunk> = chunks.map(Result::unwrap).collect().await;
    let bytes: Vec<u8> = chunks.iter().flat_map(|chunk| chunk.bytes.iter().copied()).collect();
    (chunks, String::from_utf8(bytes).unwrap())
}

/// The events of a stream: each a name and its data, which say the same.
fn events(stream: &str) -> Vec<Value> {
    let event = |frame: &str| {
        let (name, data) = frame.strip_prefix("event: ").unwrap().split_once("\ndata: ").unwrap();
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["type"], name);
        data
    };
    stream.trim_end().split("\n\n").map(event).collect()
}

/// A value with every leaf but the type's names taken away.
fn shape(value: &Value) -> Value {
    match value {
        Value::Object(members) => {
            let member = |(name, value): (&String, &Value)| match name.as_str() {
                "type" => (name.clone(), value.clone()),
                _ => (name.clone(), shape(value)),
            };
            members.iter().map(member).collect()
        }
        Value::Array(items) => items.iter().map(shape).collect(),
        _ => Value::Null,
    }
}

fn message() -> Value {
    json!({ "system": "be brief", "messages": [{ "role": "user", "content": [{ "type": "text", "text": "hi" }] }], "max_tokens": 3 })
}

#[tokio::test]
async fn a_message_streams_the_events_that_vllm_sends() {
    let engine = engine("");
    let (chunks, said) = raw(stream(&engine, Endpoint::Messages, message()).await).await;
    let (ours, seen) = (events(&said), events(SEEN_EVENTS));
    assert_eq!(ours.iter().map(shape).collect::<Vec<_>>(), seen.iter().map(shape).collect::<Vec<_>>());
    let texts: Vec<_> = ours.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
    assert_eq!(texts.concat(), "t0 t1 t2");
    assert_eq!(ours[ours.len() - 2]["delta"]["stop_reason"], "max_tokens");
    assert_eq!(chunks.iter().map(|chunk| chunk.summary.tokens).sum::<u32>(), 3);
    assert_eq!(chunks.iter().map(|chunk| chunk.summary.finishes).sum::<u32>(), 1);
    assert_eq!(chunks.iter().filter_map(|chunk| chunk.summary.usage).next_back().unwrap().completion_tokens, 3);
    assert!(chunks.iter().rposition(|chunk| chunk.summary.done) == Some(chunks.len() - 1), "{said}");
}

#[tokio::test]
async fn a_message_is_whole_and_its_tokens_are_counted() {
    let engine = engine("");
    let (status, answer) = whole(&engine, Endpoint::Messages, message()).await;
    assert_eq!((status, &answer["stop_reason"]), (StatusCode::OK, &json!("max_tokens")));
    assert_eq!(answer["content"], json!([{ "type": "text", "text": "t0 t1 t2" }]));
    let (_, counted) = whole(&engine, Endpoint::CountTokens, message()).await;
    assert_eq!(counted["input_tokens"], answer["usage"]["input_tokens"]);
    let stopped = json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 9, "stop_sequences": [" t4"] });
    let (_, answer) = whole(&engine, Endpoint::Messages, stopped).await;
    assert_eq!((&answer["stop_reason"], &answer["stop_sequence"]), (&json!("stop_sequence"), &json!(" t4")));
}

#[tokio::test]
async fn errors_of_messages_have_anthropics_shape_as_far_as_vllms_do() {
    let engine = engine("");
    let mut unknown = message();
    unknown["model"] = "nope".into();
    for endpoint in [Endpoint::Messages, Endpoint::CountTokens] {
        let (status, error) = whole(&engine, endpoint, unknown.clone()).await;
        assert_eq!(
            (status, &error["type"], &error["error"]["type"]),
            (StatusCode::NOT_FOUND, &json!("error"), &json!("NotFoundError"))
        );
    }
    let mut unlimited = message();
    unlimited.as_object_mut().unwrap().remove("max_tokens");
    let (status, error) = whole(&engine, Endpoint::Messages, unlimited).await;
    assert_eq!((status, &error["error"]["param"]), (StatusCode::BAD_REQUEST, &json!("body.max_tokens")));
}

#[tokio::test]
async fn a_response_streams_numbered_events_and_ends_with_itself_whole() {
    let engine = engine("");
    let body = json!({ "input": "hi", "instructions": "be brief", "max_output_tokens": 3 });
    let (chunks, said) = raw(stream(&engine, Endpoint::Responses, body.clone()).await).await;
    let events = events(&said);
    let kinds: Vec<_> = events.iter().map(|event| event["type"].as_str().unwrap().strip_prefix("response.").unwrap()).collect();
    let delta = "output_text.delta";
    let begins = ["created", "in_progress", "output_item.added", "content_part.added"];
    let ends = ["output_text.done", "content_part.done", "output_item.done", "completed"];
    assert_eq!(kinds, [&begins[..], &[delta; 3], &ends[..]].concat());
    assert!(events.iter().zip(0u64..).all(|(event, number)| event["sequence_number"] == number), "{said}");
    let last = &events.last().unwrap()["response"];
    assert_eq!((&last["status"], &last["usage"]["output_tokens"]), (&json!("incomplete"), &json!(3)));
    let (_, answer) = whole(&engine, Endpoint::Responses, body).await;
    assert_eq!(answer["output"], last["output"]);
    assert_eq!(answer["output"][0]["content"][0]["text"], "t0 t1 t2");
    assert_eq!(chunks.iter().map(|chunk| chunk.summary.tokens).sum::<u32>(), 3);
    assert!(chunks.last().unwrap().summary.done && chunks.last().unwrap().summary.usage.is_some());
}

#[tokio::test]
async fn embeddings_belong_to_their_inputs_in_either_encoding() {
    let engine = engine("");
    let (status, answer) = whole(&engine, Endpoint::Embeddings, json!({ "input": ["one", "two", "one"], "dimensions": 8 })).await;
    assert_eq!((status, &answer["object"]), (StatusCode::OK, &json!("list")));
    let of = |at: usize| answer["data"][at]["embedding"].as_array().unwrap();
    assert!(of(0).len() == 8 && of(0) == of(2) && of(0) != of(1), "{answer}");
    assert!(answer["usage"]["prompt_tokens"].as_u64().unwrap() >= 3);
    let (_, ids) = whole(&engine, Endpoint::Embeddings, json!({ "input": [[1, 2], [3]], "encoding_format": "base64" })).await;
    assert_eq!((ids["data"][0]["embedding"].as_str().unwrap().len(), &ids["usage"]["total_tokens"]), (344, &json!(3)));
    let (status, _) = whole(&engine, Endpoint::Embeddings, json!({ "input": "x", "stream": true })).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}
