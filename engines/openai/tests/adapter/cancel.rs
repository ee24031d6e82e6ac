//! Giving up is hanging up: the engine sees its socket close at once.

use dynamo_engine_api::Engine as _;
use futures_util::StreamExt as _;
use tokio::sync::mpsc;

use crate::scripted::{STREAM_HEAD, Scripted, ask, http_chunk, read, soon, stream_of};

const TOKEN: &str = "data: {\"choices\":[{\"index\":0,\"text\":\"a\",\"finish_reason\":null}]}\n\n";

/// What the engine saw, in order.
#[derive(Debug, PartialEq)]
enum Seen {
    Request,
    HangUp,
}

/// A server that takes a request, says `said`, and reports what it sees.
async fn watching(said: String) -> (Scripted, mpsc::Receiver<Seen>) {
    let (report, seen) = mpsc::channel(8);
    let server = Scripted::start(move |mut connection| {
        let (report, said) = (report.clone(), said.clone());
        async move {
            if connection.request().await.is_some() {
                report.send(Seen::Request).await.unwrap();
                connection.write(said).await;
                connection.hung_up().await;
                report.send(Seen::HangUp).await.unwrap();
            }
        }
    })
    .await;
    (server, seen)
}

#[tokio::test]
async fn dropping_a_stream_hangs_up_while_the_engine_is_silent() {
    let (server, mut seen) = watching(format!("{STREAM_HEAD}{}", http_chunk(TOKEN))).await;
    let engine = server.engine();
    let mut chunks = stream_of(&engine).await;
    assert_eq!(soon(chunks.next()).await.unwrap().unwrap().bytes, TOKEN);
    drop(chunks);
    assert_eq!((soon(seen.recv()).await, soon(seen.recv()).await), (Some(Seen::Request), Some(Seen::HangUp)));
}

#[tokio::test]
async fn dropping_an_unread_stream_hangs_up_while_the_engine_is_talking() {
    let (server, mut seen) = watching(format!("{STREAM_HEAD}{}", http_chunk(TOKEN).repeat(100_000))).await;
    let engine = server.engine();
    drop(stream_of(&engine).await);
    assert_eq!((soon(seen.recv()).await, soon(seen.recv()).await), (Some(Seen::Request), Some(Seen::HangUp)));
}

#[tokio::test]
async fn dropping_the_wait_for_an_answer_hangs_up() {
    // Before the head, and within a whole body.
    for said in ["", "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"] {
        let (server, mut seen) = watching(said.to_owned()).await;
        let engine = server.engine();
        tokio::select! {
            _ = engine.generate(ask(false)) => panic!("there is no answer"),
            request = soon(seen.recv()) => assert_eq!(request, Some(Seen::Request)),
        }
        assert_eq!(soon(seen.recv()).await, Some(Seen::HangUp));
    }
}

#[tokio::test]
async fn an_error_within_the_stream_hangs_up_although_the_engine_does_not() {
    let error = "data: {\"error\":{\"message\":\"dead\"}}\n\n";
    let (server, mut seen) = watching(format!("{STREAM_HEAD}{}{}", http_chunk(TOKEN), http_chunk(error))).await;
    let engine = server.engine();
    assert_eq!(read(stream_of(&engine).await).await, (TOKEN.to_owned(), "engine_in_stream"));
    assert_eq!((soon(seen.recv()).await, soon(seen.recv()).await), (Some(Seen::Request), Some(Seen::HangUp)));
}
