//! HTTP/1.1 as the doubles speak it: kept connections, whole answers, streams of events; a client that leaves ends its request.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::sleep,
};

/// What a double does. Its future is dropped when the client leaves.
pub(super) trait Manners: Send + Sync + 'static {
    fn answer(self: Arc<Self>, asked: Asked) -> impl Future<Output = Answer> + Send;
}

/// A request as it arrived.
pub(super) struct Asked {
    /// As `post /v1/completions`.
    pub(super) line: String,
    pub(super) body: String,
}

/// An answer.
pub(super) enum Answer {
    /// A status line's rest, and JSON.
    Whole(&'static str, String),
    /// The data of events, `[DONE]` apart, and the time between two of them. What is carried along is dropped at its end.
    Stream(Vec<String>, Duration, Box<dyn FnOnce() + Send>),
    /// The same, cut short.
    Cut(Vec<String>, Cut),
}

/// What comes after a stream's last event, where that is not its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// The connection ends.
    HangUp,
    /// Nothing any more.
    Silence,
}

/// A running double. It ends when it is dropped.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Server {
    pub(super) async fn start(manners: Arc<impl Manners>) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), manners).await
    }

    pub(super) async fn start_at(address: SocketAddr, manners: Arc<impl Manners>) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                connections.spawn(serve(stream, Arc::clone(&manners)));
                while connections.try_join_next().is_some() {}
            }
        });
        Self { address, _tasks: tasks }
    }
}

async fn serve(mut stream: TcpStream, manners: Arc<impl Manners>) {
    let mut read = Vec::new();
    while let Some(asked) = request(&mut stream, &mut read).await {
        let mut more = [0; 64];
        let answered = {
            let (mut reading, mut writing) = stream.split();
            let answering = async {
                match Arc::clone(&manners).answer(asked).await {
                    Answer::Whole(status, body) => writing.write_all(whole(status, &body).as_bytes()).await,
                    Answer::Cut(events, cut) => {
                        writing.write_all(STREAM_HEAD.as_bytes()).await?;
                        for event in events {
                            writing.write_all(chunk(&format!("data: {event}\n\n")).as_bytes()).await?;
                        }
                        if cut == Cut::Silence {
                            std::future::pending::<()>().await;
                        }
                        Err(std::io::ErrorKind::ConnectionAborted.into())
                    }
                    Answer::Stream(events, pace, at_the_end) => {
                        writing.write_all(STREAM_HEAD.as_bytes()).await?;
                        for event in events {
                            writing.write_all(chunk(&format!("data: {event}\n\n")).as_bytes()).await?;
                            if !pace.is_zero() {
                                sleep(pace).await;
                            }
                        }
                        at_the_end();
                        writing.write_all(format!("{}0\r\n\r\n", chunk("data: [DONE]\n\n")).as_bytes()).await
                    }
                }
            };
            tokio::select! {
                answered = answering => answered.is_ok(),
                // No client of ours sends a request before it has its answer.
                _ = reading.read(&mut more) => false,
            }
        };
        if !answered {
            return;
        }
    }
}

/// The next request; none if the client hung up.
async fn request(stream: &mut TcpStream, read: &mut Vec<u8>) -> Option<Asked> {
    loop {
        if let Some(end) = read.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&read[..end]).to_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let length = length.map_or(0, |length| length.parse::<usize>().unwrap());
            if read.len() >= end + 4 + length {
                let body = String::from_utf8(read[end + 4..end + 4 + length].to_vec()).unwrap();
                read.drain(..end + 4 + length);
                let line = head.lines().next().unwrap_or_default().trim_end_matches(" http/1.1").to_owned();
                return Some(Asked { line, body });
            }
        }
        if stream.read_buf(read).await.unwrap_or(0) == 0 {
            return None;
        }
    }
}

const STREAM_HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";

fn chunk(data: &str) -> String {
    format!("{:x}\r\n{data}\r\n", data.len())
}

fn whole(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}
