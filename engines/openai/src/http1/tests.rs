use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

use super::*;

const CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";

fn get() -> Request<Bytes> {
    Request::get("http://engine:8000/v1/models?x=1").header("accept", "*/*").body(Bytes::new()).unwrap()
}

/// What a server answers, in these writes; then the server ends if it shall.
async fn answered(writes: &[&[u8]], and_ends: bool) -> (Connection<DuplexStream>, DuplexStream, Result<Response<()>, Failure>) {
    let (client, mut server) = duplex(1 << 20);
    for write in writes {
        server.write_all(write).await.unwrap();
    }
    if and_ends {
        server.shutdown().await.unwrap();
    }
    let mut connection = Connection::new(client);
    let answer = connection.ask(&get()).await;
    (connection, server, answer)
}

async fn body(connection: &mut Connection<DuplexStream>) -> Result<Vec<u8>, Failure> {
    let mut all = Vec::new();
    while let Some(piece) = std::future::poll_fn(|context| connection.poll_body(context)).await {
        all.extend_from_slice(&piece?);
    }
    Ok(all)
}

#[track_caller]
fn check(answer: &str, expected: Result<(&str, bool), &str>) {
    let run = async {
        let (mut connection, _server, head) = answered(&[answer.as_bytes()], true).await;
        head?;
        let body = body(&mut connection).await?;
        Ok::<_, Failure>((String::from_utf8(body).unwrap(), connection.is_reusable()))
    };
    let got = tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(run);
    match (got, expected) {
        (Ok((text, reusable)), Ok(expected)) => assert_eq!((text.as_str(), reusable), expected, "{answer}"),
        (Err(failure), Err(says)) => assert!(failure.to_string().contains(says), "{answer}: {failure}"),
        (got, _) => panic!("{answer}: {got:?}"),
    }
}

#[tokio::test]
async fn a_request_is_written_as_it_should_be() {
    let (client, mut server) = duplex(1 << 16);
    let asked = tokio::join!(async { Connection::new(client).ask(&get()).await.map(drop) }, async {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(server.read_u8().await.unwrap());
        }
        server.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
        String::from_utf8(head).unwrap()
    });
    asked.0.unwrap();
    assert_eq!(asked.1, "GET /v1/models?x=1 HTTP/1.1\r\nhost: engine:8000\r\ncontent-length: 0\r\naccept: */*\r\n\r\n");
}

#[test]
fn bodies_end_where_they_say() {
    check("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nab", Ok(("ab", true)));
    check("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nabc", Ok(("ab", false)));
    check("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", Ok(("", true)));
    check("HTTP/1.1 204 No Content\r\n\r\n", Ok(("", true)));
    check("HTTP/1.1 200 OK\r\n\r\nall of it", Ok(("all of it", false)));
    check(&format!("{CHUNKED}2\r\nab\r\n1;x=y\r\nc\r\n0\r\n\r\n"), Ok(("abc", true)));
    check(&format!("{CHUNKED}2\r\nab\r\n0\r\nx-trailer: 1\r\n\r\n"), Ok(("ab", true)));
    check("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\na", Ok(("a", true)));
    check("HTTP/1.1 200 OK\r\nconnection: x, Close\r\ncontent-length: 1\r\n\r\na", Ok(("a", false)));
    check("HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\na", Ok(("a", false)));
    check("HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 1\r\n\r\na", Ok(("a", true)));
}

#[test]
fn what_is_cut_off_or_no_http_is_told_apart() {
    check("", Err("connection closed before an answer"));
    check("HTTP/1.1 200", Err("connection closed before an answer"));
    check("SSH-2.0-OpenSSH\r\n\r\n", Err("what is no HTTP/1.1"));
    check("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nab", Err("unexpected end of file"));
    check("HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\nab", Err("content-length that is no number"));
    check("HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nab", Err("content-length that is no number"));
    check("HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nab", Err("two content-lengths"));
    check("HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", Err("which was not asked for"));
    check("HTTP/1.1 101 Switching Protocols\r\n\r\n", Err("another protocol"));
    check(&"HTTP/1.1 100 Continue\r\n\r\n".repeat(17), Err("over 16 interim answers"));
    check(&format!("{CHUNKED}2\r\nab\r\n\r\n"), Err("a chunk without a size"));
    check(&format!("{CHUNKED}0\r\n{}", "x: y\r\n".repeat(2000)), Err("trailers without an end"));
    check("HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nab", Err("which was not asked for"));
    check(&format!("{CHUNKED}2\r\nab\r\n"), Err("unexpected end of file"));
    check(&format!("{CHUNKED}2\r\nabc\r\n"), Err("longer than its size"));
    check(&format!("{CHUNKED}zz\r\nab\r\n"), Err("a chunk without a size"));
    let endless = format!("HTTP/1.1 200 OK\r\nx: {}", "y".repeat(MAX_HEAD_BYTES));
    check(&endless, Err("over 65536 bytes"));
}

#[tokio::test]
async fn chunks_that_were_read_together_are_one_piece_in_place() {
    let text = format!("{CHUNKED}3\r\nabc\r\n3\r\ndef\r\n3\r\ng");
    let (mut connection, _server, head) = answered(&[text.as_bytes()], false).await;
    head.unwrap();
    let piece = std::future::poll_fn(|context| connection.poll_body(context)).await.unwrap().unwrap();
    assert_eq!(piece, "abcdefg");
}

#[tokio::test]
async fn a_connection_is_quiet_until_something_comes_or_it_ends() {
    let (mut connection, mut server, head) = answered(&[b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"], false).await;
    head.unwrap();
    assert!(connection.is_reusable() && connection.is_quiet());
    server.write_all(b"HTTP/1.1 408 Request Timeout\r\n\r\n").await.unwrap();
    assert!(!connection.is_quiet());
    let (mut connection, server, _) = answered(&[b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"], false).await;
    drop(server);
    assert!(!connection.is_quiet());
}

#[tokio::test]
async fn an_answer_before_the_request_was_read_is_the_answer() {
    let (client, mut server) = duplex(1 << 10);
    let large = Request::post("http://engine/").body(Bytes::from(vec![b'x'; 1 << 20])).unwrap();
    let mut connection = Connection::new(client);
    let (answer, ()) = tokio::join!(connection.ask(&large), async {
        server.read_exact(&mut [0; 100]).await.unwrap();
        server.write_all(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\n\r\n").await.unwrap();
    });
    assert_eq!(answer.unwrap().status(), 413);
    assert!(!connection.is_reusable());
}

proptest! {
    #[test]
    fn how_the_network_cuts_chunks_changes_nothing(
        chunks in prop::collection::vec("[a-z\r\n0]{1,40}", 0..12),
        cuts in prop::collection::vec(0usize..600, 0..30),
    ) {
        let mut wire: String = chunks.iter().map(|chunk| format!("{:x}\r\n{chunk}\r\n", chunk.len())).collect();
        wire.push_str("0\r\n\r\nrest");
        let (mut framing, mut read, mut all) = (Framing::chunked(), BytesMut::new(), Vec::new());
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(wire.len())).chain([0, wire.len()]).collect();
        cuts.sort_unstable();
        for pair in cuts.windows(2) {
            read.extend_from_slice(&wire.as_bytes()[pair[0]..pair[1]]);
            all.extend_from_slice(&framing.take(&mut read).unwrap());
        }
        prop_assert!(framing.is_over());
        prop_assert_eq!(all, chunks.concat().into_bytes());
        prop_assert_eq!(&read[..], b"rest");
    }
}
