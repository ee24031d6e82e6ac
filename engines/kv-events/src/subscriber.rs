//! A subscriber: follows publishers, closes gaps by replay, and says when what was told holds no more.
//!
//! With a replay endpoint, each connection begins with what the publisher still has, from the last batch that is known on:
//! that also tells whether it is the same publisher. The same is asked after a quiet while, since what was lost last shows
//! by nothing else. Without one, whatever may have been missed is a reset.
//!
//! Bounds: every wait has one; a publisher that is away is tried again with a growing pause, and after [`GRACE`] what it told
//! holds no more. Updates wait for the reader in a short queue, behind it in the sockets, and then at the publisher, which
//! drops what nobody takes: a gap.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use dynamo_engine_api::{KvNote, KvUpdate, KvUpdates};
use futures_core::Stream;
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    continuity::{Continuity, Numbered, Step},
    endpoint::Endpoint,
    sockets::{Heard, Listening, Replay},
    wire::Decoder,
};

/// Updates that wait for the reader.
const UPDATES: usize = 64;
/// Pauses between tries to connect.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// For how long a publisher may be away before what it told holds no more.
const GRACE: Duration = Duration::from_secs(10);
/// After how much silence it is asked whether something was missed: at first, and then.
const FIRST_CHECK: Duration = Duration::from_millis(500);
const CHECK_EVERY: Duration = Duration::from_secs(10);
/// Largest batch that is read.
const MAX_PAYLOAD_BYTES: usize = 64 << 20;

/// One publisher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Where it publishes, or where we listen for it.
    pub endpoint: Endpoint,
    /// Whether the publisher connects to us: then there may be several, each of the rank that its batches say.
    pub connects_to_us: bool,
    /// Where it replays, if it does.
    pub replay: Option<Endpoint>,
    /// The beginning of its topics.
    pub topic: String,
    /// Its rank.
    pub rank: u32,
}

/// Follows publishers for as long as the stream is there.
///
/// # Panics
/// Outside of a tokio runtime.
#[must_use]
pub fn subscribe(sources: Vec<Source>) -> KvUpdates {
    let (updates, reader) = mpsc::channel(UPDATES);
    let mut tasks = JoinSet::new();
    for source in sources {
        let mut follower = Follower { source, updates: updates.clone(), ranks: BTreeMap::new(), is_interrupted: false };
        tasks.spawn(async move { drop(follower.follow().await) });
    }
    Box::pin(Updates { reader, _tasks: tasks })
}

struct Updates {
    reader: mpsc::Receiver<KvUpdate>,
    _tasks: JoinSet<()>,
}

impl Stream for Updates {
    type Item = KvUpdate;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<KvUpdate>> {
        self.reader.poll_recv(cx)
    }
}

/// Nobody reads any more.
struct Unread;

struct Follower {
    source: Source,
    updates: mpsc::Sender<KvUpdate>,
    ranks: BTreeMap<u32, Publisher>,
    /// Whether it was said that it is not heard.
    is_interrupted: bool,
}

/// What is known of the publisher of a rank.
#[derive(Default)]
struct Publisher {
    continuity: Continuity,
    decoder: Decoder,
}

impl Follower {
    async fn follow(&mut self) -> Result<(), Unread> {
        let mut pause = FIRST_PAUSE;
        let mut last_heard = Instant::now();
        self.ranks.entry(self.source.rank).or_default();
        loop {
            let Source { endpoint, topic, connects_to_us, .. } = &self.source;
            let opened =
                if *connects_to_us { Listening::bind(endpoint, topic).await } else { Listening::connect(endpoint, topic).await };
            let reason = match opened {
                Ok(listening) => {
                    let reason = self.attend(listening).await?;
                    (pause, last_heard) = (FIRST_PAUSE, Instant::now());
                    reason
                }
                Err(reason) => reason,
            };
            if !std::mem::replace(&mut self.is_interrupted, true) {
                self.note(None, KvNote::Interrupted { reason }).await?;
            }
            if last_heard.elapsed() > GRACE {
                self.reset_all("disconnected").await?;
            }
            sleep(pause).await;
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }

    /// Follows one connection to its end; returns why it ended.
    async fn attend(&mut self, mut listening: Listening) -> Result<String, Unread> {
        if self.source.replay.is_some() {
            self.ranks.values_mut().for_each(|publisher| publisher.continuity.reconnected());
            self.catch_up_all().await?;
        } else {
            self.reset_all("disconnected").await?;
        }
        self.is_interrupted = false;
        self.note(None, KvNote::Current).await?;
        let mut quiet = FIRST_CHECK;
        loop {
            match timeout(quiet, listening.next()).await {
                Ok(Heard::Message(frames)) => self.hear(frames).await?,
                Ok(Heard::Lost(_)) if self.source.connects_to_us => {
                    if self.source.replay.is_none() {
                        self.reset_all("disconnected").await?;
                    }
                }
                Ok(Heard::Lost(reason)) => return Ok(reason),
                Err(_) => {
                    quiet = CHECK_EVERY;
                    self.catch_up_all().await?;
                }
            }
        }
    }

    async fn hear(&mut self, mut frames: Vec<Bytes>) -> Result<(), Unread> {
        let batch = match (frames.len(), frames.pop()) {
            (3, Some(payload)) => Numbered::read(std::mem::take(&mut frames[0]), &frames[1], payload),
            _ => None,
        };
        let Some(batch) = batch else { return self.left_out(self.source.rank, "frames", 1).await };
        let rank = self.rank_of(&batch);
        match self.publisher(rank).continuity.live(&batch) {
            Step::Next => self.apply(rank, &batch, true).await,
            Step::Known => Ok(()),
            step => {
                if step == Step::Restart {
                    self.reset(rank, "restart").await?;
                }
                self.catch_up(rank).await?;
                match self.publisher(rank).continuity.live(&batch) {
                    Step::Known => return Ok(()),
                    Step::Next => {}
                    Step::Gap => self.reset(rank, "gap").await?,
                    Step::Restart => self.reset(rank, "restart").await?,
                }
                self.apply(rank, &batch, true).await
            }
        }
    }

    /// Who publishes at an address of ours says its rank; at its own address it is known.
    fn rank_of(&self, batch: &Numbered) -> u32 {
        if !self.source.connects_to_us {
            return self.source.rank;
        }
        Decoder::default().decode(&batch.payload).ok().and_then(|batch| batch.rank).unwrap_or(self.source.rank)
    }

    async fn apply(&mut self, rank: u32, batch: &Numbered, is_live: bool) -> Result<(), Unread> {
        let publisher = self.publisher(rank);
        publisher.continuity.took(batch, is_live);
        if batch.payload.len() > MAX_PAYLOAD_BYTES {
            return self.left_out(rank, "too_large", 1).await;
        }
        let Ok(read) = publisher.decoder.decode(&batch.payload) else { return self.left_out(rank, "no_batch", 1).await };
        for (cause, events) in read.left_out {
            self.left_out(rank, cause.label(), events).await?;
        }
        if read.events.is_empty() {
            return Ok(());
        }
        let lag = is_live.then(|| lag(read.timestamp)).flatten();
        let model = model_of_topic(&batch.topic);
        self.tell(KvUpdate::Events { rank, model, events: read.events, lag }).await
    }

    async fn catch_up_all(&mut self) -> Result<(), Unread> {
        let ranks: Vec<u32> = self.ranks.keys().copied().collect();
        for rank in ranks {
            self.catch_up(rank).await?;
        }
        Ok(())
    }

    /// Has told again what was missed, if there is somebody to tell. If that fails, nothing is known any more.
    async fn catch_up(&mut self, rank: u32) -> Result<(), Unread> {
        let Some(replay) = &self.source.replay else { return Ok(()) };
        let endpoint = if self.source.connects_to_us { replay.of_rank(rank) } else { replay.clone() };
        let mut batches = 0;
        let failed = match self.replay(rank, &endpoint, &mut batches).await {
            Ok(done) => done.err(),
            Err(unread) => return Err(unread),
        };
        if batches > 0 {
            self.note(Some(rank), KvNote::Replayed { batches }).await?;
        }
        if let Some(reason) = failed {
            self.reset(rank, "gap").await?;
            self.note(Some(rank), KvNote::ReplayFailed { reason }).await?;
        }
        Ok(())
    }

    async fn replay(&mut self, rank: u32, endpoint: &Endpoint, batches: &mut u64) -> Result<Result<(), String>, Unread> {
        macro_rules! or_fail {
            ($told:expr) => {
                match $told {
                    Ok(told) => told,
                    Err(reason) => return Ok(Err(reason)),
                }
            };
        }
        let mut replay = or_fail!(Replay::ask(endpoint, self.publisher(rank).continuity.last().unwrap_or(0)).await);
        let mut next = or_fail!(replay.next().await);
        match self.publisher(rank).continuity.replayed_first(next.as_ref()) {
            Step::Next | Step::Known => {}
            Step::Gap => self.reset(rank, "gap").await?,
            Step::Restart => {
                self.reset(rank, "restart").await?;
                replay = or_fail!(Replay::ask(endpoint, 0).await);
                next = or_fail!(replay.next().await);
            }
        }
        while let Some(batch) = next {
            let last = self.publisher(rank).continuity.last();
            if last.is_none_or(|last| batch.number > last) {
                if last.is_some_and(|last| batch.number > last + 1) {
                    self.reset(rank, "gap").await?;
                }
                self.apply(rank, &batch, false).await?;
                *batches += 1;
            }
            next = or_fail!(replay.next().await);
        }
        Ok(Ok(()))
    }

    async fn reset_all(&mut self, cause: &'static str) -> Result<(), Unread> {
        let ranks: Vec<u32> = self.ranks.keys().copied().collect();
        for rank in ranks {
            self.reset(rank, cause).await?;
        }
        Ok(())
    }

    /// Says that nothing of a rank holds any more, if anything was told of it.
    async fn reset(&mut self, rank: u32, cause: &'static str) -> Result<(), Unread> {
        let publisher = self.publisher(rank);
        if publisher.continuity.last().is_none() {
            return Ok(());
        }
        *publisher = Publisher::default();
        self.tell(KvUpdate::Reset { rank: Some(rank), cause }).await
    }

    fn publisher(&mut self, rank: u32) -> &mut Publisher {
        self.ranks.entry(rank).or_default()
    }

    async fn left_out(&self, rank: u32, cause: &'static str, events: u32) -> Result<(), Unread> {
        self.note(Some(rank), KvNote::LeftOut { cause, events }).await
    }

    async fn note(&self, rank: Option<u32>, note: KvNote) -> Result<(), Unread> {
        // One publisher's state is its rank's.
        let rank = rank.or_else(|| (!self.source.connects_to_us).then_some(self.source.rank));
        self.tell(KvUpdate::Note { rank, note }).await
    }

    async fn tell(&self, update: KvUpdate) -> Result<(), Unread> {
        self.updates.send(update).await.map_err(|_| Unread)
    }
}

/// The model in a topic of the form `kv@ADDRESS@MODEL`.
fn model_of_topic(topic: &[u8]) -> Option<Arc<str>> {
    let (_, model) = std::str::from_utf8(topic).ok()?.strip_prefix("kv@")?.split_once('@')?;
    (!model.is_empty()).then(|| model.into())
}

/// How old a batch is, by the engine's clock and ours.
fn lag(timestamp: f64) -> Option<Duration> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs_f64();
    Duration::try_from_secs_f64((now - timestamp).max(0.0)).ok()
}
