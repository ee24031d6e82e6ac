//! Streams over real sockets. The rules themselves are tested where they are, in `relay`.

use std::sync::Arc;

use dynamo_engine_api::{Engine as _, EngineError, Reply};
use futures_util::StreamExt as _;
use tokio::sync::Semaphore;

use crate::scripted::{STREAM_HEAD, Scripted, ask, http_chunk, read, soon, stream_answer, stream_of, whole_answer};

const VLLM_CHAT: &str = include_str!("../fixtures/vllm_chat.sse");
const VLLM_KILLED_CORE: &str = include_str!("../fixtures/vllm_killed_core.sse");
const VLLM_SIGTERM: &str = include_str!("../fixtures/vllm_sigterm.sse");
const LLAMA_CHAT: &str = include_str!("../fixtures/llama_chat.sse");
const TRANSFORMERS_CHAT: &str = include_str!("../fixtures/transformers_chat.sse");
const UTF8: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"größer 中文 🦀\"},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";

#[tokio::test]
async fn captured_streams_arrive_verbatim() {
    for stream in [VLLM_CHAT, LLAMA_CHAT, UTF8] {
        let server = Scripted::answering(stream_answer(stream)).await;
        assert_eq!(read(stream_of(&server.engine()).await).await, (stream.to_owned(), "done"));
    }
}

#[tokio::test]
async fn a_stream_that_ends_with_its_connection_arrives_too() {
    let server = Scripted::start(|mut connection| async move {
        connection.request().await;
        connection
            .write(format!("HTTP/1.1 200 OK\r\nContent-Type: Text/Event-Stream\r\nconnection: close\r\n\r\n{TRANSFORMERS_CHAT}"))
            .await;
    })
    .await;
    let expected = format!("{TRANSFORMERS_CHAT}data: [DONE]\n\n");
    assert_eq!(read(stream_of(&server.engine()).await).await, (expected, "done"));
}

#[tokio::test]
async fn a_stream_sent_byte_by_byte_is_the_same() {
    for stream in [VLLM_CHAT, UTF8] {
        let server = Scripted::start(move |mut connection| async move {
            connection.request().await;
            connection.write(STREAM_HEAD).await;
            for byte in stream.as_bytes() {
                connection.write([b"1\r\n".as_slice(), &[*byte], b"\r\n"].concat()).await;
            }
            connection.write("0\r\n\r\n").await;
        })
        .await;
        assert_eq!(read(stream_of(&server.engine()).await).await, (stream.to_owned(), "done"));
    }
}

#[tokio::test]
async fn each_event_is_relayed_before_the_next_one_is_sent() {
    let may_send = Arc::new(Semaphore::new(0));
    let pace = may_send.clone();
    let server = Scripted::start(move |mut connection| {
        let pace = pace.clone();
        async move {
            connection.request().await;
            connection.write(STREAM_HEAD).await;
            for event in VLLM_CHAT.split_inclusive("\n\n") {
                pace.acquire().await.unwrap().forget();
                connection.write(http_chunk(event)).await;
            }
            connection.write("0\r\n\r\n").await;
        }
    })
    .await;
    let engine = server.engine();
    let mut chunks = stream_of(&engine).await;
    for event in VLLM_CHAT.split_inclusive("\n\n") {
        may_send.add_permits(1);
        assert_eq!(soon(chunks.next()).await.unwrap().unwrap().bytes, event);
    }
    assert!(soon(chunks.next()).await.is_none());
}

#[tokio::test]
async fn a_dead_core_is_an_error_although_http_ends_well() {
    let server = Scripted::answering(stream_answer(VLLM_KILLED_CORE)).await;
    let (text, end) = read(stream_of(&server.engine()).await).await;
    assert_eq!(end, "engine_in_stream");
    assert!(VLLM_KILLED_CORE.starts_with(&text) && text.contains("offsets") && !text.contains("error"), "{text}");
}

#[tokio::test]
async fn an_early_end_is_incomplete() {
    let server = Scripted::answering(stream_answer(VLLM_SIGTERM)).await;
    assert_eq!(read(stream_of(&server.engine()).await).await.1, "engine_incomplete");
}

#[tokio::test]
async fn a_connection_that_ends_within_the_stream_is_broken() {
    let sent: String = VLLM_CHAT.split_inclusive("\n\n").take(3).collect();
    for reset in [true, false] {
        let events = sent.clone();
        let server = Scripted::start(move |mut connection| {
            let events = events.clone();
            async move {
                connection.request().await;
                connection.write(STREAM_HEAD).await;
                connection.write(http_chunk(&events)).await;
                if reset {
                    connection.reset();
                }
            }
        })
        .await;
        let engine = server.engine();
        let mut chunks = stream_of(&engine).await;
        // A reset may overtake what was sent before it.
        let mut last = soon(chunks.next()).await.unwrap();
        if let Ok(chunk) = last {
            assert_eq!(chunk.bytes, sent);
            last = soon(chunks.next()).await.unwrap();
        }
        let error = last.unwrap_err();
        assert!(matches!(error, EngineError::Broken { .. }), "{error}");
        assert!(soon(chunks.next()).await.is_none());
    }
}

#[tokio::test]
async fn what_is_no_stream_is_a_whole_reply() {
    // Refused, and by a server that knows no streams.
    for status in ["503 Service Unavailable", "200 OK"] {
        let server = Scripted::answering(whole_answer(status, "{}")).await;
        let reply = soon(server.engine().generate(ask(true))).await.unwrap();
        let Reply::Whole(whole) = reply else { panic!("a stream of what is none") };
        assert!(status.starts_with(whole.status.as_str()));
    }
}
