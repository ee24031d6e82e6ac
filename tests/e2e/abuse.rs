//! Abuse of the front door: each is refused or borne, memory stays bounded, and others are served meanwhile.
//!
//! Sizes fit a small machine; `DYNAMO_HOST_TEST_SCALE=4` makes them four times as large. Figures are printed with
//! `--nocapture`; only bounds that are far from them are asserted.

use std::time::Instant;

use futures_util::{StreamExt as _, stream};
use hyper::body::Bytes;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::harness::{
    client::{Client, read_raw},
    eventually,
    host::{Host, MockProcess, chat, streamed},
    soon,
};

const CHAT: &str = "/v1/chat/completions";
const MOCK: &str = "mock://a?model=m&speedup=50";
const MB: u64 = 1 << 20;

fn scale() -> usize {
    std::env::var("DYNAMO_HOST_TEST_SCALE").map_or(1, |scale| scale.parse().expect("a whole number"))
}

/// Lets this process and its children have many connections.
fn allow_connections(wanted: usize) {
    let now = getrlimit(Resource::Nofile);
    let wanted = wanted as u64 + 200;
    if now.current.is_some_and(|current| current < wanted) {
        let raised = Rlimit { current: Some(wanted), maximum: now.maximum.map(|most| most.max(wanted)) };
        setrlimit(Resource::Nofile, raised).unwrap_or_else(|error| panic!("ulimit -n must be {wanted}: {error}"));
    }
}

/// Bytes of memory that a process holds.
fn resident(host: &Host) -> u64 {
    host.process.memory()
}

/// What was borne, and at what price.
struct Figures {
    what: String,
    before: u64,
    begun: Instant,
}

impl Figures {
    fn begin(host: &Host, what: impl Into<String>) -> Self {
        Self { what: what.into(), before: resident(host), begun: Instant::now() }
    }

    /// Checks that the host holds no more than so much more, and that it serves.
    #[expect(clippy::print_stdout, reason = "figures are for whoever runs it with --nocapture")]
    async fn bounded(&self, host: &Host, most: u64) {
        let now = resident(host);
        let asked = Instant::now();
        host.is_well().await;
        let served = asked.elapsed();
        let (before, mb) = (self.before / MB, now / MB);
        println!(
            "{}: {before} MB before, {mb} MB now, {:.1?} altogether, others served in {served:.1?}",
            self.what,
            self.begun.elapsed()
        );
        assert!(now < self.before + most, "{}: {before} MB grew to {mb} MB", self.what);
    }
}

async fn connect(client: &Client, count: usize) -> Vec<TcpStream> {
    // Few at a time: the system's backlog is not what is tested.
    stream::iter(0..count).map(|_| client.socket()).buffer_unordered(32).collect().await
}

#[tokio::test]
async fn slow_headers_from_many_are_cut_off_while_others_are_served() {
    let many = 300 * scale();
    allow_connections(many);
    let host = Host::configured("[limits]\nheader_timeout_s = 2\n", &["--worker", MOCK]).await;
    let figures = Figures::begin(&host, format!("{many} slow headers"));
    let mut sockets = connect(&host.http, many).await;
    for socket in &mut sockets {
        socket.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\nx-a: ").await.unwrap();
    }
    // A byte now and then does not help: the head has its time altogether.
    let drip = async {
        loop {
            for socket in &mut sockets {
                let _ = socket.write_all(b"a").await;
            }
            tokio::task::yield_now().await;
        }
    };
    let cut_off = eventually("all are cut off", async || {
        host.serves(1).await;
        (host.http.metric("dynamo_host_connections", &[("listener", "front door")]).await < 10.0).then_some(())
    });
    tokio::select! {
        () = drip => unreachable!("it goes on and on"),
        () = cut_off => {}
    }
    figures.bounded(&host, 128 * MB).await;
}

#[tokio::test]
async fn more_headers_than_there_may_be_are_refused_as_such() {
    let host = Host::start(&["--worker", MOCK]).await;
    let figures = Figures::begin(&host, "10,000 headers");
    let many: String = (0..10_000).map(|at| format!("x-{at}: {at}\r\n")).collect();
    let large = format!("x-large: {}\r\n", "x".repeat(1 << 20));
    let few_too_many: String = (0..101).map(|at| format!("x-{at}: {at}\r\n")).collect();
    for headers in [&many, &large, &few_too_many] {
        let mut socket = host.http.socket().await;
        // It may hang up before it has read all.
        let _ = socket.write_all(format!("GET /live HTTP/1.1\r\nhost: h\r\n{headers}\r\n").as_bytes()).await;
        let said = read_raw(&mut socket, "\r\n\r\n").await;
        assert!(said.starts_with("HTTP/1.1 431"), "{said}");
    }
    let enough: String = (0..90).map(|at| format!("x-{at}: {at}\r\n")).collect();
    let request = format!("GET /live HTTP/1.1\r\nhost: h\r\nconnection: close\r\n{enough}\r\n");
    assert!(host.http.raw(request.as_bytes(), "live").await.starts_with("HTTP/1.1 200"));
    figures.bounded(&host, 64 * MB).await;
}

#[tokio::test]
async fn a_body_of_300_mb_is_refused_however_it_is_sent_and_never_held() {
    let host = Host::start(&["--worker", MOCK]).await;
    let piece = Bytes::from(vec![b'x'; MB as usize]);
    for is_chunked in [false, true] {
        let how = if is_chunked { "chunked" } else { "with its length" };
        let figures = Figures::begin(&host, format!("a body of 300 MB {how}"));
        let (mut reads, mut writes) = host.http.socket().await.into_split();
        let framing = if is_chunked { "transfer-encoding: chunked".to_owned() } else { format!("content-length: {}", 300 * MB) };
        writes.write_all(format!("POST {CHAT} HTTP/1.1\r\nhost: h\r\n{framing}\r\n\r\n").as_bytes()).await.unwrap();
        let send = async {
            for _ in 0..300 {
                let head = if is_chunked { format!("{:x}\r\n", piece.len()) } else { String::new() };
                let end = if is_chunked { "\r\n" } else { "" };
                // It is hung up on when enough was thrown away.
                if writes.write_all(head.as_bytes()).await.is_err()
                    || writes.write_all(&piece).await.is_err()
                    || writes.write_all(end.as_bytes()).await.is_err()
                {
                    return;
                }
                host.http.get("/live").await;
            }
        };
        let mut said = Vec::new();
        let receive = async { while reads.read_buf(&mut said).await.is_ok_and(|length| length > 0) {} };
        soon("it is over", async { tokio::join!(send, receive) }).await;
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(said.starts_with("HTTP/1.1 413") && said.contains("body_too_large"), "{how}: {said}");
        // One that is as large as may be is held once while it is read.
        figures.bounded(&host, 96 * MB).await;
    }
}

#[tokio::test]
async fn idle_connections_cost_little_and_nobody_else_anything() {
    let many = 2000 * scale();
    allow_connections(many * 2);
    let config = format!("[limits]\nmax_connections = {}\n", many + 100);
    let host = Host::configured(&config, &["--worker", MOCK]).await;
    let figures = Figures::begin(&host, format!("{many} idle connections"));
    let mut sockets = connect(&host.http, many).await;
    for socket in &mut sockets {
        socket.write_all(b"GET /live HTTP/1.1\r\nhost: h\r\n\r\n").await.unwrap();
    }
    for socket in &mut sockets {
        assert!(read_raw(socket, "\"live\"").await.starts_with("HTTP/1.1 200"));
    }
    let open = host.http.metric("dynamo_host_connections", &[("listener", "front door")]).await;
    assert!(open >= many as f64, "{open} connections are open");
    figures.bounded(&host, many as u64 * MB / 20 + 64 * MB).await;
}

#[tokio::test]
async fn one_client_has_as_many_connections_as_it_may() {
    let host = Host::configured("[limits]\nmax_connections_per_client = 5\n", &["--worker", MOCK]).await;
    let mut sockets = Vec::new();
    let refused = eventually("one is refused", async || {
        let mut socket = host.http.socket().await;
        socket.write_all(b"GET /live HTTP/1.1\r\nhost: h\r\n\r\n").await.unwrap();
        let said = read_raw(&mut socket, "}").await;
        sockets.push(socket);
        said.contains("429").then_some(said)
    })
    .await;
    assert!(refused.starts_with("HTTP/1.1 429") && refused.contains("limits.max_connections_per_client"), "{refused}");
    assert!(sockets.len() <= 6);
    drop(sockets);
    eventually("it is let in again", async || {
        let mut socket = host.http.socket().await;
        socket.write_all(b"GET /live HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n").await.unwrap();
        read_raw(&mut socket, "}").await.starts_with("HTTP/1.1 200").then_some(())
    })
    .await;
}

#[tokio::test]
async fn clients_that_read_nothing_hold_little_and_nobody_else_up() {
    let many = 500 * scale();
    allow_connections(many * 4);
    let seats = format!("max_num_seqs={}", many + 50);
    let engine = MockProcess::start(&["speedup=200", &seats, "max_num_batched_tokens=100000", "kv_blocks=2000000"]).await;
    let host = Host::start(&["--worker", &format!("{},max_running={}", engine.url(), many + 50)]).await;
    let figures = Figures::begin(&host, format!("{many} streams that nobody reads"));
    let body = streamed(chat(20_000)).to_string();
    let request = format!("POST {CHAT} HTTP/1.1\r\nhost: h\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let mut sockets = connect(&host.http, many).await;
    for socket in &mut sockets {
        socket.write_all(request.as_bytes()).await.unwrap();
    }
    eventually("all streams have begun", async || {
        let served = host.http.metric("dynamo_host_time_to_first_token_seconds_count", &[]).await;
        (served >= many as f64).then_some(())
    })
    .await;
    // Many requests of others later, what is not read has filled what there is to fill.
    for _ in 0..50 {
        host.serves(3).await;
    }
    figures.bounded(&host, many as u64 * MB / 2 + 64 * MB).await;
    drop(sockets);
    engine.runs(0).await;
}
