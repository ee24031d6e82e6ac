//! Faults of an engine in process: the errors that an adapter makes of them.

use std::time::Duration;

use super::*;
use crate::faults::{Faults, Refusal};

/// The text of what came, and the error that ended it.
async fn told(engine: &MockEngine, body: Value) -> (String, Option<EngineError>) {
    let mut chunks = stream(engine, Endpoint::Completions, body).await;
    let mut text = String::new();
    while let Some(chunk) = chunks.next().await {
        let chunk = match chunk {
            Ok(chunk) => chunk,
            Err(error) => {
                assert!(chunks.next().await.is_none());
                return (text, Some(error));
            }
        };
        for frame in str::from_utf8(&chunk.bytes).unwrap().split_terminator("\n\n").filter(|frame| !frame.ends_with("[DONE]")) {
            let frame: Value = serde_json::from_str(frame.strip_prefix("data: ").unwrap()).unwrap();
            text.push_str(frame["choices"][0]["text"].as_str().unwrap());
        }
    }
    (text, None)
}

fn ten() -> Value {
    json!({"prompt": "x", "max_tokens": 10})
}

#[tokio::test]
async fn a_stream_breaks_after_the_tokens_that_it_was_told() {
    for (faults, expected) in [
        ("fault.cut=3", "connection to test broke"),
        ("fault.cut_character=3", "connection to test broke"),
        ("fault.end=3", "before a finish reason"),
        ("fault.error_event=3", "EngineCore encountered an issue"),
        ("fault.die=3", "the mock engine was stopped"),
    ] {
        let (text, error) = told(&engine(faults), ten()).await;
        assert_eq!(text, "t0 t1 t2", "{faults}");
        let error = error.unwrap().to_string();
        assert!(error.contains(expected), "{faults}: {error}");
    }
}

#[tokio::test]
async fn a_whole_reply_breaks_too() {
    for (faults, expected) in [
        ("fault.cut=3", "broke"),
        ("fault.end=3", "broke"),
        ("fault.die=3", "stopped"),
        ("fault.endless_headers=true", "protocol"),
    ] {
        let error = engine(faults).generate(request(Endpoint::Completions, ten())).await.err().unwrap().to_string();
        assert!(error.contains(expected), "{faults}: {error}");
    }
    let (status, body) = whole(&engine("fault.error_event=3"), Endpoint::Completions, ten()).await;
    assert_eq!((status.as_u16(), &body["error"]["type"]), (500, &json!("InternalServerError")));
}

#[tokio::test]
async fn requests_are_refused_in_vllms_words_until_it_is_healed() {
    let engine = engine("");
    for (refusal, status, message) in [
        (Refusal::DeadCore, 500, "EngineCore encountered an issue. See stack trace (above) for the root cause."),
        (Refusal::Draining, 500, "cannot schedule new futures after shutdown"),
        (Refusal::Busy, 503, "The engine is currently busy and cannot accept new requests."),
    ] {
        engine.switches().set(Faults { refuse: Some(refusal), ..Faults::default() });
        let (found, body) = whole(&engine, Endpoint::Completions, ten()).await;
        assert_eq!((found.as_u16(), &body["error"]["code"]), (status, &json!(status)));
        assert!(body["error"]["message"].as_str().unwrap().starts_with(message), "{body}");
    }
    engine.switches().set(Faults::default());
    assert_eq!(whole(&engine, Endpoint::Completions, ten()).await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_wedged_engine_answers_probes_and_goes_on_when_it_is_healed() {
    let engine = engine("fault.wedge=3&fault.next=1");
    let mut chunks = stream(&engine, Endpoint::Completions, ten()).await;
    for _ in 0..3 {
        chunks.next().await.unwrap().unwrap();
    }
    assert!(tokio::time::timeout(Duration::from_millis(100), chunks.next()).await.is_err(), "it generates nothing");
    let other = whole(&engine, Endpoint::Completions, ten());
    assert!(tokio::time::timeout(Duration::from_millis(100), other).await.is_err(), "for nobody");
    engine.probe().await.unwrap();
    engine.switches().set(Faults::default());
    assert_eq!(frames(chunks).await.len(), 7);
}

#[tokio::test]
async fn who_was_struck_before_it_was_healed_is_served_well() {
    let engine = engine("fault.wedge=3");
    let early = stream(&engine, Endpoint::Completions, ten()).await;
    engine.switches().set(Faults::default());
    assert_eq!(frames(early).await.len(), 10);
}

#[tokio::test]
async fn a_hung_engine_answers_nothing_until_it_is_healed() {
    let engine = engine("fault.hang=0");
    assert!(tokio::time::timeout(Duration::from_millis(100), engine.probe()).await.is_err());
    assert!(tokio::time::timeout(Duration::from_millis(100), whole(&engine, Endpoint::Completions, ten())).await.is_err());
    engine.switches().set(Faults::default());
    engine.probe().await.unwrap();
    assert_eq!(whole(&engine, Endpoint::Completions, ten()).await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_dead_engine_stays_dead_and_an_unhealthy_one_says_so() {
    let dead = engine("decode_ms_base=1e12");
    let mut chunks = stream(&dead, Endpoint::Completions, ten()).await;
    chunks.next().await.unwrap().unwrap();
    dead.switches().set(Faults { die: Some(0), ..Faults::default() });
    assert!(matches!(chunks.next().await, Some(Err(EngineError::Broken { .. }))));
    dead.switches().set(Faults::default());
    assert!(matches!(dead.probe().await, Err(EngineError::Broken { .. })));
    assert!(dead.generate(request(Endpoint::Completions, ten())).await.is_err());
    assert!(matches!(engine("fault.unhealthy=true").probe().await, Err(EngineError::Unhealthy { .. })));
}

#[tokio::test]
async fn only_the_requests_that_are_picked_are_struck() {
    let engine = engine("fault.cut=0&fault.next=1");
    assert_eq!(told(&engine, ten()).await.0, "");
    let (text, error) = told(&engine, ten()).await;
    assert!(text == "t0 t1 t2 t3 t4 t5 t6 t7 t8 t9" && error.is_none(), "{text} {error:?}");
}
