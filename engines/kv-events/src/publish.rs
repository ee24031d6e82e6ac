//! A publisher, as an engine has it: for the mock engine, and for tests of the subscriber.
//!
//! Contract: batches are numbered from 0; the last of them are kept for replay, which is served between two batches. What
//! subscribers don't take in time they miss.

use std::{
    collections::VecDeque,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use dynamo_engine_api::KvEvent;
use tokio::{sync::mpsc, task::JoinSet, time::sleep};

use crate::{Endpoint, sockets::Publishing, wire::encode};

/// Batches that may wait for the publisher's task; what comes then is lost, and its number with it.
const QUEUE: usize = 1024;
/// Between tries to connect to a subscriber, each of which takes its time.
const CONNECT_PAUSE: Duration = Duration::from_millis(100);

/// How events are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// As maps with a `type`: vLLM since 0.24.
    #[default]
    Map,
    /// As arrays, by place: before that.
    Positional,
}

/// How a publisher publishes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublisherOptions {
    /// Where it listens; port 0 for any free one.
    pub endpoint: Endpoint,
    /// Whether it connects there instead, to a subscriber that listens. Once: if that goes, it is not found again.
    pub connects: bool,
    /// Where it replays, if it does.
    pub replay: Option<Endpoint>,
    /// The topic of all batches.
    pub topic: String,
    /// Batches that are kept for replay.
    pub buffer_steps: usize,
    /// How events are written.
    pub form: Form,
    /// Each batch with a number that this divides, after the first, is not sent: a fault, for tests.
    pub drop_every: Option<u64>,
}

/// Why a publisher does not start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("KV events cannot be published at {endpoint}: {reason}; choose another endpoint, port 0 for any free one")]
pub struct PublishError {
    /// Where.
    pub endpoint: Endpoint,
    /// What the system said.
    pub reason: String,
}

/// A publisher; dropping it closes its sockets.
#[derive(Debug)]
pub struct Publisher {
    batches: mpsc::Sender<Vec<KvEvent>>,
    endpoint: Endpoint,
    replay: Option<Endpoint>,
    _task: JoinSet<()>,
}

impl Publisher {
    /// Starts to listen.
    ///
    /// # Errors
    /// If an endpoint cannot be had.
    pub async fn start(options: PublisherOptions) -> Result<Self, PublishError> {
        let mut sockets = Publishing::new();
        let wrong = |endpoint: &Endpoint| {
            let endpoint = endpoint.clone();
            move |reason| PublishError { endpoint, reason }
        };
        let endpoint = if options.connects {
            options.endpoint.clone()
        } else {
            sockets.bind(&options.endpoint).await.map_err(wrong(&options.endpoint))?
        };
        let replay = match &options.replay {
            Some(replay) => Some(sockets.bind_replays(replay).await.map_err(wrong(replay))?),
            None => None,
        };
        let (batches, inbox) = mpsc::channel(QUEUE);
        let mut task = JoinSet::new();
        task.spawn(run(sockets, inbox, options));
        Ok(Self { batches, endpoint, replay, _task: task })
    }

    /// Where it publishes.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Where it replays.
    #[must_use]
    pub fn replay(&self) -> Option<&Endpoint> {
        self.replay.as_ref()
    }

    /// Publishes events as one batch.
    ///
    /// # Cancel safety
    /// Dropping the future publishes nothing.
    pub async fn publish(&self, events: Vec<KvEvent>) {
        // The task ends with this handle only.
        let _ = self.batches.send(events).await;
    }
}

async fn run(mut sockets: Publishing, mut inbox: mpsc::Receiver<Vec<KvEvent>>, options: PublisherOptions) {
    let mut log = Log { kept: VecDeque::new(), next: 0, options };
    let topic = Bytes::from(log.options.topic.clone().into_bytes());
    while log.options.connects {
        // What is published meanwhile has its number, and is kept for replay.
        tokio::select! {
            events = inbox.recv() => match events {
                Some(events) => drop(log.take(&events)),
                None => return,
            },
            connected = sockets.connect(&log.options.endpoint) => match connected {
                Ok(()) => break,
                Err(_) => sleep(CONNECT_PAUSE).await,
            },
        }
    }
    loop {
        tokio::select! {
            events = inbox.recv() => {
                let Some(events) = events else { return };
                let (number, payload) = log.take(&events);
                if number == 0 || log.options.drop_every.is_none_or(|nth| number % nth != 0) {
                    sockets.publish(&topic, number, payload).await;
                }
            }
            asked = sockets.asked(), if log.options.replay.is_some() => {
                let Some((peer, from)) = asked else { continue };
                for (number, payload) in log.kept.iter().filter(|(number, _)| *number >= from) {
                    if sockets.answer(&peer, &topic, Some(*number), payload.clone()).await.is_err() {
                        break;
                    }
                }
                let _ = sockets.answer(&peer, &Bytes::new(), None, Bytes::new()).await;
            }
        }
    }
}

/// Batches that were numbered, the last of them kept.
struct Log {
    kept: VecDeque<(u64, Bytes)>,
    next: u64,
    options: PublisherOptions,
}

impl Log {
    fn take(&mut self, events: &[KvEvent]) -> (u64, Bytes) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        let batch = (self.next, Bytes::from(encode(now, events, 0, self.options.form)));
        if self.options.replay.is_some() {
            self.kept.push_back(batch.clone());
            while self.kept.len() > self.options.buffer_steps {
                self.kept.pop_front();
            }
        }
        self.next += 1;
        batch
    }
}
