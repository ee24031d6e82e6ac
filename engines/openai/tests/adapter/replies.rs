//! Whole replies: what passes, what is bounded, and what is sent to the engine.

use std::{sync::Arc, time::Duration};

use dynamo_engine_api::{Endpoint, Engine as _, EngineError, GenerateRequest};
use dynamo_engine_openai::OpenAiOptions;

use crate::scripted::{Scripted, ask, error_of, soon, whole_answer, whole_of};

const UNKNOWN_MODEL: &str = include_str!("../fixtures/vllm_unknown_model.json");

#[tokio::test]
async fn an_engines_refusal_passes_as_it_is() {
    let server = Scripted::answering(whole_answer("404 Not Found", UNKNOWN_MODEL)).await;
    let reply = whole_of(&server.engine()).await;
    assert_eq!((reply.status.as_u16(), &reply.body[..]), (404, UNKNOWN_MODEL.as_bytes()));
}

#[tokio::test]
async fn a_page_of_something_else_is_no_answer() {
    let page = "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 6\r\n\r\n<html>";
    let server = Scripted::answering(page).await;
    let error = error_of(&server.engine()).await;
    assert!(matches!(&error, EngineError::Unhealthy { reason, .. } if reason.contains("text/html")), "{error}");
    let unnamed = Scripted::answering("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await;
    assert_eq!(whole_of(&unnamed.engine()).await.body, "{}");
}

#[tokio::test]
async fn only_headers_that_concern_the_client_pass() {
    let head = "HTTP/1.1 429 Too Many Requests\r\ncontent-type: application/problem+json\r\nretry-after: 7\r\nserver: uvicorn\r\nset-cookie: a=b";
    let server = Scripted::answering(format!("{head}\r\ncontent-length: 2\r\n\r\n{{}}")).await;
    let reply = whole_of(&server.engine()).await;
    let mut headers: Vec<_> = reply.headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
    headers.sort_unstable();
    assert_eq!(headers, [("content-type", "application/problem+json"), ("retry-after", "7")]);
}

#[tokio::test]
async fn chunked_and_sized_bodies_are_the_same() {
    let body = r#"{"choices":[{"text":"größer"}]}"#;
    let (half, rest) = body.split_at(9);
    let chunked = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n{}{}0\r\n\r\n",
        crate::scripted::http_chunk(half),
        crate::scripted::http_chunk(rest),
    );
    for answer in [whole_answer("200 OK", body), chunked] {
        let server = Scripted::answering(answer).await;
        assert_eq!(whole_of(&server.engine()).await.body, body);
    }
}

#[tokio::test]
async fn the_engine_gets_the_clients_bytes_and_the_hosts_id() {
    let (report, mut received) = tokio::sync::mpsc::channel(1);
    let server = Scripted::start(move |mut connection| {
        let report = report.clone();
        async move {
            while let Some(request) = connection.request().await {
                report.send(request).await.unwrap();
                connection.write(whole_answer("200 OK", "{}")).await;
            }
        }
    })
    .await;
    let engine = server.engine();
    let body = r#"{ "model" : "m", "prompt":[1,2], "brand_new_field": 1.50 }"#;
    for (endpoint, stream, accept) in
        [(Endpoint::Completions, false, "application/json"), (Endpoint::ChatCompletions, true, "text/event-stream")]
    {
        let request = GenerateRequest::new(endpoint, body.into(), stream, Arc::from("id-7"));
        assert!(soon(engine.generate(request)).await.is_ok());
        let request = soon(received.recv()).await.unwrap();
        assert_eq!(request.body, body);
        let lines: Vec<_> = request.head.lines().collect();
        assert_eq!(lines[0], format!("post {} http/1.1", endpoint.path()));
        for line in [format!("accept: {accept}"), "content-type: application/json".into(), "x-request-id: id-7".into()] {
            assert!(lines.contains(&line.as_str()), "no `{line}` in {lines:?}");
        }
    }
}

#[tokio::test]
async fn a_body_over_its_bound_is_refused_whether_its_length_is_known_or_not() {
    let body = "x".repeat(1001);
    let chunked = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{}0\r\n\r\n", crate::scripted::http_chunk(&body));
    for answer in [whole_answer("200 OK", &body), chunked] {
        let server = Scripted::answering(answer).await;
        let error = error_of(&server.engine_with(OpenAiOptions { max_whole_body_bytes: 1000, ..Default::default() })).await;
        assert!(matches!(error, EngineError::Protocol { .. }), "{error}");
        assert!(error.to_string().contains("over 1000 bytes"), "{error}");
        let reply = whole_of(&server.engine_with(OpenAiOptions { max_whole_body_bytes: 1001, ..Default::default() })).await;
        assert_eq!(reply.body.len(), 1001);
    }
}

#[tokio::test]
async fn a_body_cut_short_is_broken() {
    let server = Scripted::start(|mut connection| async move {
        connection.request().await;
        connection.write("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{\"choices\":").await;
    })
    .await;
    let error = error_of(&server.engine()).await;
    assert!(matches!(error, EngineError::Broken { .. }), "{error}");
}

#[tokio::test]
async fn a_silent_engine_is_late_with_its_head_or_with_its_whole_body() {
    let options = OpenAiOptions { head_timeout: Duration::from_millis(60), ..Default::default() };
    for said in ["", "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"] {
        let server = Scripted::start(move |mut connection| async move {
            connection.request().await;
            connection.write(said).await;
            connection.stall().await;
        })
        .await;
        let engine = server.engine_with(options.clone());
        let error = soon(engine.generate(ask(true))).await.err().unwrap();
        assert_eq!(error.to_string(), format!("http://{} did not answer within 60 ms", server.address));
    }
}

#[tokio::test]
async fn what_is_not_http_is_broken() {
    let server = Scripted::answering("SSH-2.0-OpenSSH_9.2\r\n\r\n").await;
    let error = error_of(&server.engine()).await;
    assert!(matches!(error, EngineError::Broken { .. }), "{error}");
}
