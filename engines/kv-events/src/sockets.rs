//! ZeroMQ sockets: all that is known here of crate `zeromq`.
//!
//! Two of its ways are worked around. Its subscribers connect again by themselves and would hide that batches were lost: a
//! lost peer ends a [`Listening`], and the next connection is a new one. Its dealers wait for ever for a peer that is gone:
//! every wait is bounded here.
//!
//! What cannot be worked around: the crate knows no bound on a frame, and takes the memory that a frame announces. Whoever can
//! publish to us can thus end the process, which is one more reason to keep events on a network that is trusted.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use tokio::time::timeout;
use zeromq::{
    DealerSocket, PubSocket, RouterSocket, Socket, SocketEvent, SocketOptions, SocketRecv, SocketSend, SubSocket, ZmqMessage,
};

use crate::{continuity::Numbered, endpoint::Endpoint};

/// Longest wait for a connection.
const CONNECT_PATIENCE: Duration = Duration::from_secs(2);
/// Longest wait for the next part of a replay. An engine answers between two batches.
const REPLAY_PATIENCE: Duration = Duration::from_secs(5);
/// What ends a replay in place of a number.
pub(crate) const REPLAY_END: [u8; 8] = [0xff; 8];

fn options() -> SocketOptions {
    let mut options = SocketOptions::default();
    options.connect_timeout(CONNECT_PATIENCE);
    options
}

/// A subscription.
pub(crate) struct Listening {
    socket: SubSocket,
    monitor: Box<dyn Stream<Item = SocketEvent> + Send + Unpin>,
}

/// What a subscription hears.
pub(crate) enum Heard {
    /// A message's frames.
    Message(Vec<Bytes>),
    /// A publisher is gone.
    Lost(String),
}

impl Listening {
    pub(crate) async fn connect(endpoint: &Endpoint, topic: &str) -> Result<Self, String> {
        let mut listening = Self::new(topic).await?;
        let address = endpoint.to_string();
        let connect = listening.socket.connect(&address);
        let within = timeout(2 * CONNECT_PATIENCE, connect).await.map_err(|_| format!("no connection to {endpoint} in time"))?;
        within.map_err(|error| format!("no connection to {endpoint}: {error}"))?;
        Ok(listening)
    }

    /// Waits for publishers that connect.
    pub(crate) async fn bind(endpoint: &Endpoint, topic: &str) -> Result<Self, String> {
        let mut listening = Self::new(topic).await?;
        listening.socket.bind(&endpoint.to_string()).await.map_err(|error| format!("cannot listen on {endpoint}: {error}"))?;
        Ok(listening)
    }

    async fn new(topic: &str) -> Result<Self, String> {
        let mut socket = SubSocket::with_options(options());
        let monitor = Box::new(socket.monitor());
        socket.subscribe(topic).await.map_err(|error| error.to_string())?;
        Ok(Self { socket, monitor })
    }

    /// The next message, or that a publisher is gone.
    ///
    /// # Cancel safety
    /// Nothing is lost when it is dropped.
    pub(crate) async fn next(&mut self) -> Heard {
        loop {
            tokio::select! {
                biased;
                message = self.socket.recv() => return match message {
                    Ok(message) => Heard::Message(message.into_vec()),
                    Err(error) => Heard::Lost(error.to_string()),
                },
                event = self.monitor.next() => match event {
                    Some(SocketEvent::Disconnected(_)) => return Heard::Lost("the publisher closed the connection".to_owned()),
                    Some(_) => {}
                    None => return Heard::Lost("the connection is closed".to_owned()),
                },
            }
        }
    }
}

/// A replay that was asked for.
pub(crate) struct Replay {
    socket: DealerSocket,
    endpoint: Endpoint,
}

impl Replay {
    /// Asks for all batches from a number on.
    pub(crate) async fn ask(endpoint: &Endpoint, from: u64) -> Result<Self, String> {
        let mut socket = DealerSocket::with_options(options());
        let wrong = |error: String| format!("no replay from {endpoint}: {error}");
        let connect = timeout(2 * CONNECT_PATIENCE, socket.connect(&endpoint.to_string())).await;
        connect.map_err(|_| wrong("no connection in time".to_owned()))?.map_err(|error| wrong(error.to_string()))?;
        socket.send(message(vec![Bytes::new(), number(from)])).await.map_err(|error| wrong(error.to_string()))?;
        Ok(Self { socket, endpoint: endpoint.clone() })
    }

    /// The next batch; `None` after the last one.
    pub(crate) async fn next(&mut self) -> Result<Option<Numbered>, String> {
        let wrong = |error: &str| format!("the replay from {} broke: {error}", self.endpoint);
        let message = timeout(REPLAY_PATIENCE, self.socket.recv()).await.map_err(|_| wrong("no answer in time"))?;
        let mut frames = message.map_err(|error| wrong(&error.to_string()))?.into_vec();
        // An empty delimiter, then the topic since vLLM 0.26, then number and batch.
        let (Some(payload), Some(sequence)) = (frames.pop(), frames.pop()) else { return Err(wrong("too few frames")) };
        if payload.is_empty() || sequence.first_chunk() == Some(&REPLAY_END) {
            return Ok(None);
        }
        let topic = frames.pop().unwrap_or_default();
        Numbered::read(topic, &sequence, payload).map(Some).ok_or_else(|| wrong("a number of neither 8 nor 24 bytes"))
    }
}

/// The publisher's sockets.
pub(crate) struct Publishing {
    publisher: PubSocket,
    replays: RouterSocket,
}

impl Publishing {
    pub(crate) fn new() -> Self {
        Self { publisher: PubSocket::with_options(options()), replays: RouterSocket::with_options(options()) }
    }

    /// Listens; returns the endpoint with its port.
    pub(crate) async fn bind(&mut self, endpoint: &Endpoint) -> Result<Endpoint, String> {
        bound(self.publisher.bind(&endpoint.to_string()).await)
    }

    /// Connects to a subscriber that listens.
    pub(crate) async fn connect(&mut self, endpoint: &Endpoint) -> Result<(), String> {
        self.publisher.connect(&endpoint.to_string()).await.map_err(|error| error.to_string())
    }

    /// Listens for those who want a replay.
    pub(crate) async fn bind_replays(&mut self, endpoint: &Endpoint) -> Result<Endpoint, String> {
        bound(self.replays.bind(&endpoint.to_string()).await)
    }

    /// Publishes a batch. Subscribers who don't keep up miss it.
    pub(crate) async fn publish(&mut self, topic: &Bytes, at: u64, payload: Bytes) {
        let _ = self.publisher.send(message(vec![topic.clone(), number(at), payload])).await;
    }

    /// Who wants a replay, and from which number on.
    ///
    /// # Cancel safety
    /// Nothing is lost when it is dropped.
    pub(crate) async fn asked(&mut self) -> Option<(Bytes, u64)> {
        let mut frames = self.replays.recv().await.ok()?.into_vec();
        // As vLLM: anything else is ignored.
        if frames.len() != 3 || !frames[1].is_empty() {
            return None;
        }
        let from = u64::from_be_bytes(*frames[2].first_chunk()?);
        Some((frames.swap_remove(0), from))
    }

    /// Answers whoever asked for a replay.
    pub(crate) async fn answer(&mut self, peer: &Bytes, topic: &Bytes, at: Option<u64>, payload: Bytes) -> Result<(), String> {
        let sequence = at.map_or_else(|| Bytes::from_static(&REPLAY_END), number);
        let frames = vec![peer.clone(), Bytes::new(), topic.clone(), sequence, payload];
        self.replays.send(message(frames)).await.map_err(|error| error.to_string())
    }
}

fn bound(endpoint: Result<zeromq::Endpoint, zeromq::ZmqError>) -> Result<Endpoint, String> {
    let endpoint = endpoint.map_err(|error| error.to_string())?.to_string();
    endpoint.parse().map_err(|error: crate::EndpointError| error.to_string())
}

fn number(number: u64) -> Bytes {
    Bytes::copy_from_slice(&number.to_be_bytes())
}

fn message(frames: Vec<Bytes>) -> ZmqMessage {
    ZmqMessage::try_from(frames).expect("there is at least one frame")
}
