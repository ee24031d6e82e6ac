//! What the host asks apart from generation: is it alive, and which models does it serve.

use std::time::Duration;

use dynamo_engine_api::{Engine as _, EngineError, ModelCard};
use dynamo_engine_openai::{OpenAiEngine, OpenAiOptions};

use crate::scripted::{Scripted, soon, whole_answer};

const MODELS: &str = include_str!("../fixtures/vllm_models.json");

/// A server with these answers to `GET /health` and `GET /v1/models`.
async fn serving(health: String, models: String) -> (Scripted, OpenAiEngine) {
    let server = Scripted::start(move |mut connection| {
        let (health, models) = (health.clone(), models.clone());
        async move {
            while let Some(request) = connection.request().await {
                match request.head.lines().next() {
                    Some("get /health http/1.1") => connection.write(&health).await,
                    Some("get /v1/models http/1.1") => connection.write(&models).await,
                    other => panic!("an unexpected request: {other:?}"),
                }
            }
        }
    })
    .await;
    let engine = server.engine();
    (server, engine)
}

#[tokio::test]
async fn a_healthy_engine_is_alive() {
    let (_server, engine) = serving("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".into(), whole_answer("500 Error", "no")).await;
    soon(engine.probe()).await.unwrap();
}

#[tokio::test]
async fn an_engine_that_says_so_is_not_healthy() {
    let loading = r#"{"error":{"code":503,"message":"Loading model","type":"unavailable_error"}}"#;
    let (server, engine) = serving(whole_answer("503 Service Unavailable", loading), whole_answer("200 OK", MODELS)).await;
    let error = soon(engine.probe()).await.unwrap_err();
    let expected = "is not healthy: GET /health answered 503 Service Unavailable: Loading model";
    assert_eq!(error.to_string(), format!("http://{} {expected}", server.address));
}

#[tokio::test]
async fn without_health_the_list_of_models_is_the_sign_of_life() {
    let missing = || whole_answer("404 Not Found", r#"{"detail":"Not Found"}"#);
    let (_server, engine) = serving(missing(), whole_answer("200 OK", MODELS)).await;
    soon(engine.probe()).await.unwrap();
    let (_server, engine) = serving(missing(), "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n".into()).await;
    let error = soon(engine.probe()).await.unwrap_err().to_string();
    assert!(error.ends_with("is not healthy: GET /v1/models answered 503 Service Unavailable"), "{error}");
}

#[tokio::test]
async fn a_stalled_engine_is_late_with_its_sign_of_life() {
    let server = Scripted::start(|mut connection| async move {
        connection.request().await;
        connection.stall().await;
    })
    .await;
    let engine = server.engine_with(OpenAiOptions { probe_timeout: Duration::from_millis(60), ..Default::default() });
    let error = soon(engine.probe()).await.unwrap_err();
    assert!(matches!(error, EngineError::Timeout { after, .. } if after.as_millis() == 60), "{error}");
}

#[tokio::test]
async fn models_are_listed_with_their_lengths() {
    let (_server, engine) = serving(String::new(), whole_answer("200 OK", MODELS)).await;
    let card = |id: &str, max_model_len, parent: Option<&str>| ModelCard {
        id: id.into(),
        max_model_len,
        parent: parent.map(str::to_owned),
    };
    let expected = [card("tiny-qwen3", Some(4096), None), card("sql", None, Some("tiny-qwen3"))];
    assert_eq!(soon(engine.models()).await.unwrap(), expected);
}

#[tokio::test]
async fn no_list_of_models_is_an_error_that_says_what_came() {
    let (_server, engine) = serving(String::new(), whole_answer("500 Internal Server Error", "Internal Server Error")).await;
    let error = soon(engine.models()).await.unwrap_err();
    assert!(error.to_string().ends_with("answered 500 Internal Server Error: Internal Server Error"), "{error}");
    let (_server, engine) = serving(String::new(), whole_answer("200 OK", "<html>")).await;
    let error = soon(engine.models()).await.unwrap_err();
    assert!(error.to_string().contains("GET /v1/models is not a list of models"), "{error}");
}
