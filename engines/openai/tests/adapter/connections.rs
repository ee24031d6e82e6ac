//! Connections: kept, replaced, never used after a half-read answer, and requests sent again only if nothing was answered.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use dynamo_engine_api::EngineError;
use dynamo_engine_openai::{OpenAiEngine, OpenAiOptions};
use futures_util::{StreamExt as _, future::join_all};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};

use crate::scripted::{
    STREAM_HEAD, Scripted, error_of, http_chunk, read, soon, stream_answer, stream_of, whole_answer, whole_of,
};

const CHAT: &str = include_str!("../fixtures/vllm_chat.sse");

#[tokio::test]
async fn requests_after_one_another_share_a_connection() {
    let server = Scripted::answering(whole_answer("200 OK", "{}")).await;
    let engine = server.engine();
    for _ in 0..5 {
        whole_of(&engine).await;
    }
    assert_eq!(server.accepted(), 1);
}

#[tokio::test]
async fn a_stream_read_to_its_end_gives_its_connection_back() {
    let server = Scripted::answering(stream_answer(CHAT)).await;
    let engine = server.engine();
    for _ in 0..5 {
        assert_eq!(read(stream_of(&engine).await).await.1, "done");
    }
    assert_eq!(server.accepted(), 1);
}

#[tokio::test]
async fn a_connection_whose_answer_goes_on_after_done_is_not_used_again() {
    let server = Scripted::start(|mut connection| async move {
        connection.request().await;
        connection.write(STREAM_HEAD).await;
        connection.write(http_chunk(CHAT)).await;
        // Without the HTTP end; the next request on this connection would wait for ever.
        connection.hung_up().await;
    })
    .await;
    let engine = server.engine();
    for round in 1..=2 {
        assert_eq!(read(stream_of(&engine).await).await, (CHAT.to_owned(), "done"));
        assert_eq!(server.accepted(), round);
    }
}

#[tokio::test]
async fn a_dropped_stream_never_leaks_its_rest_into_the_next_answer() {
    let server = Scripted::start(|mut connection| async move {
        while connection.request().await.is_some() {
            connection.write(STREAM_HEAD).await;
            connection.write(http_chunk(CHAT.split_inclusive("\n\n").next().unwrap())).await;
            connection.hung_up().await;
        }
    })
    .await;
    let engine = server.engine();
    for round in 1..=3 {
        let mut chunks = stream_of(&engine).await;
        assert!(soon(chunks.next()).await.unwrap().is_ok());
        drop(chunks);
        assert_eq!(server.accepted(), round);
    }
}

#[tokio::test]
async fn streams_at_the_same_time_do_not_wait_for_each_other() {
    let server = Scripted::answering(stream_answer(CHAT)).await;
    let engine = server.engine();
    let ends = join_all((0..16).map(async |_| read(stream_of(&engine).await).await)).await;
    assert!(ends.iter().all(|(text, end)| text == CHAT && *end == "done"));
}

#[tokio::test]
async fn a_restarted_engine_is_found_again() {
    let server = Scripted::answering(whole_answer("200 OK", "{}")).await;
    let engine = server.engine();
    whole_of(&engine).await;
    let address = server.stop().await;
    // Until the end of its connection has arrived, a request may still go out on it, and is then broken.
    soon(async { while !matches!(error_of(&engine).await, EngineError::Connect { .. }) {} }).await;
    let server = Scripted::start_at(address, |mut connection| async move {
        connection.request().await;
        connection.write(whole_answer("200 OK", "{}")).await;
    })
    .await;
    whole_of(&engine).await;
    assert_eq!(server.accepted(), 1);
}

#[tokio::test]
async fn a_kept_connection_that_the_server_closed_is_replaced() {
    let (report, mut noticed) = mpsc::channel(8);
    let server = Scripted::start(move |mut connection| {
        let report = report.clone();
        async move {
            // Says keep-alive and closes all the same, as a server does when its idle time is over.
            connection.request().await;
            connection.write(whole_answer("200 OK", "{}")).await;
            connection.close_our_half().await;
            connection.hung_up().await;
            report.send(()).await.unwrap();
        }
    })
    .await;
    let engine = server.engine();
    for round in 1..=3 {
        whole_of(&engine).await;
        assert_eq!(server.accepted(), round);
        soon(noticed.recv()).await.unwrap();
    }
}

#[tokio::test]
async fn a_request_whose_connection_is_closed_before_any_answer_is_sent_once_more() {
    let requests = Arc::new(AtomicUsize::new(0));
    let count = requests.clone();
    let server = Scripted::start(move |mut connection| {
        let count = count.clone();
        async move {
            // Answers the first request; takes all further ones and dies without a word.
            while connection.request().await.is_some() {
                if count.fetch_add(1, Ordering::Relaxed) > 0 {
                    return;
                }
                connection.write(whole_answer("200 OK", "{}")).await;
            }
        }
    })
    .await;
    let engine = server.engine();
    whole_of(&engine).await;
    let error = error_of(&engine).await;
    assert!(matches!(error, EngineError::Broken { .. }), "{error}");
    assert_eq!((requests.load(Ordering::Relaxed), server.accepted()), (3, 2));
}

#[tokio::test]
async fn a_request_that_was_sent_and_cannot_be_sent_again_does_not_count_as_unsent() {
    let (gone, mut is_gone) = mpsc::channel::<()>(1);
    let (address_of, address) = oneshot::channel();
    // Answers one request, closes its port, takes the next request on the kept connection and dies.
    let mut server = JoinSet::new();
    server.spawn(async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        address_of.send(listener.local_addr().unwrap()).unwrap();
        let (mut stream, _) = listener.accept().await.unwrap();
        drop(listener);
        let mut read = [0; 4096];
        assert!(stream.read(&mut read).await.unwrap() > 0);
        stream.write_all(whole_answer("200 OK", "{}").as_bytes()).await.unwrap();
        gone.send(()).await.unwrap();
        assert!(stream.read(&mut read).await.unwrap() > 0, "the second request has come");
    });
    let engine = OpenAiEngine::new(&format!("http://{}", address.await.unwrap()), OpenAiOptions::default()).unwrap();
    whole_of(&engine).await;
    soon(is_gone.recv()).await.unwrap();
    let error = error_of(&engine).await;
    assert!(matches!(error, EngineError::Broken { .. }), "{error}");
    assert!(error.to_string().contains("cannot be connected to again"), "{error}");
    let error = error_of(&engine).await;
    assert!(matches!(error, EngineError::Connect { .. }), "nothing was sent of this one: {error}");
}

#[tokio::test]
async fn a_closed_port_is_said_once_and_plainly() {
    let address = Scripted::answering("").await.stop().await;
    let engine = OpenAiEngine::new(&format!("http://{address}/v1"), OpenAiOptions::default()).unwrap();
    let error = error_of(&engine).await;
    assert_eq!(error.to_string(), format!("cannot connect to http://{address}: Connection refused (os error 111)"));
}

#[tokio::test]
async fn a_host_that_does_not_answer_is_a_failed_connect() {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    // Once as many connections wait to be accepted as the system keeps, it lets further ones go unanswered.
    let mut waiting = Vec::new();
    while let Ok(connected) = timeout(Duration::from_millis(100), TcpStream::connect(address)).await {
        waiting.push(connected.unwrap());
    }
    let options = OpenAiOptions { connect_timeout: Duration::from_millis(50), ..Default::default() };
    let error = error_of(&OpenAiEngine::new(&format!("http://{address}"), options).unwrap()).await;
    assert_eq!(error.to_string(), format!("cannot connect to http://{address}: no connection within 50 ms"));
}

#[tokio::test]
async fn an_unknown_host_is_a_failed_connect() {
    let engine = OpenAiEngine::new("http://no-such-host.invalid:8000", OpenAiOptions::default()).unwrap();
    let error = error_of(&engine).await;
    assert!(matches!(error, EngineError::Connect { .. }), "{error}");
}
