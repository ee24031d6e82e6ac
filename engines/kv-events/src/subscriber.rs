//! A subscriber: follows publishers, closes gaps by replay, and says when what was told holds no more.
//!
//! With a replay endpoint, each connection begins with what the publisher still has, from the last batch that is known on:
//! that also tells whether it is the same publisher. The same is asked after a quiet while, since what was lost last shows
//! by nothing else. Without one, whatever may have been missed is a reset.
//!
//! A batch that cannot be read may have removed anything: what was told before holds no more.
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
        let mut follower =
            Follower { source, updates: updates.clone(), ranks: BTreeMap::new(), is_interrupted: false, is_heard: false };
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
    /// Whether somebody was heard: where we listen, there may be nobody.
    is_heard: bool,
}

/// What is known of the publisher of a rank.
#[derive(Default)]
struct Publisher {
    continuity: Continuity,
    decoder: Decoder,
    /// Of its last live topic, for replays that do not repeat it.
    model: Option<Arc<str>>,
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
        self.is_interrupted = false;
        if self.source.connects_to_us {
            let reason = format!("nobody has connected to {}", self.source.endpoint);
            self.note(None, KvNote::Silent { reason }).await?;
            self.reconnected().await?;
        } else {
            self.reconnected().await?;
            self.heard().await?;
        }
        let mut quiet = FIRST_CHECK;
        loop {
            match timeout(quiet, listening.next()).await {
                Ok(Heard::Message(frames)) => self.hear(frames).await?,
                Ok(Heard::Lost(_)) if self.source.connects_to_us => self.reconnected().await?,
                Ok(Heard::Lost(reason)) => {
                    self.is_heard = false;
                    return Ok(reason);
                }
                Err(_) => {
                    quiet = CHECK_EVERY;
                    self.catch_up_all().await?;
                }
            }
        }
    }

    /// Finds out what was missed while nobody was connected.
    async fn reconnected(&mut self) -> Result<(), Unread> {
        if self.source.replay.is_none() {
            return self.reset_all("disconnected").await;
        }
        self.ranks.values_mut().for_each(|publisher| publisher.continuity.reconnected());
        self.catch_up_all().await
    }

    /// Says, once, that somebody is there.
    async fn heard(&mut self) -> Result<(), Unread> {
        if std::mem::replace(&mut self.is_heard, true) {
            return Ok(());
        }
        self.note(None, KvNote::Current).await
    }

    async fn hear(&mut self, mut frames: Vec<Bytes>) -> Result<(), Unread> {
        let batch = match (frames.len(), frames.pop()) {
            (3, Some(payload)) => Numbered::read(std::mem::take(&mut frames[0]), &frames[1], payload),
            _ => None,
        };
        let Some(batch) = batch else { return self.left_out(self.source.rank, "frames", 1).await };
        self.heard().await?;
        let rank = self.rank_of(&batch);
        self.publisher(rank).model = model_of_topic(&batch.topic);
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
        if batch.payload.len() > MAX_PAYLOAD_BYTES {
            self.unreadable(rank, batch, is_live).await?;
            return self.left_out(rank, "too_large", 1).await;
        }
        let publisher = self.publisher(rank);
        let Ok(read) = publisher.decoder.decode(&batch.payload) else {
            self.unreadable(rank, batch, is_live).await?;
            return self.left_out(rank, "no_batch", 1).await;
        };
        let model = match is_live || !batch.topic.is_empty() {
            true => model_of_topic(&batch.topic),
            false => publisher.model.clone(),
        };
        if read.must_reset {
            self.unreadable(rank, batch, is_live).await?;
        } else {
            publisher.continuity.took(batch, is_live);
        }
        for (cause, events) in read.left_out {
            self.left_out(rank, cause.label(), events).await?;
        }
        // What a batch stores before a removal that cannot be read may be gone by it.
        if read.must_reset || read.events.is_empty() {
            return Ok(());
        }
        let lag = is_live.then(|| lag(read.timestamp)).flatten();
        self.tell(KvUpdate::Events { rank, model, events: read.events, lag }).await
    }

    /// Passes over a batch that may hold removals: nothing that was told before is known to be so any more.
    async fn unreadable(&mut self, rank: u32, batch: &Numbered, is_live: bool) -> Result<(), Unread> {
        // The publisher is the same, and so are its layer groups.
        let decoder = std::mem::take(&mut self.publisher(rank).decoder);
        self.reset(rank, "unreadable").await?;
        let publisher = self.publisher(rank);
        publisher.decoder = decoder;
        publisher.continuity.took(batch, is_live);
        Ok(())
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
        if self.source.connects_to_us {
            self.heard().await?;
        }
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
        (publisher.continuity, publisher.decoder) = (Continuity::default(), Decoder::default());
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

#[cfg(test)]
mod tests {
    use dynamo_engine_api::{EngineHash, KvEvent, Tier};

    use super::*;
    use crate::{publish::Form, wire::encode};

    fn follower() -> (Follower, mpsc::Receiver<KvUpdate>) {
        let endpoint = "tcp://127.0.0.1:1".parse().unwrap();
        let source = Source { endpoint, connects_to_us: false, replay: None, topic: String::new(), rank: 0 };
        let (updates, reader) = mpsc::channel(UPDATES);
        (Follower { source, updates, ranks: BTreeMap::new(), is_interrupted: false, is_heard: false }, reader)
    }

    fn batch(topic: &'static str, number: u64, payload: Vec<u8>) -> Numbered {
        Numbered { topic: topic.into(), number, publisher: None, payload: payload.into() }
    }

    fn removed(hash: u64) -> Vec<u8> {
        encode(0.0, &[KvEvent::Removed { hashes: vec![EngineHash(hash)], tier: Tier::Device }], 0, Form::Map)
    }

    async fn hear(follower: &mut Follower, batch: Numbered) {
        let number = Bytes::copy_from_slice(&batch.number.to_be_bytes());
        assert!(follower.hear(vec![batch.topic, number, batch.payload]).await.is_ok());
    }

    /// What was told: `events`, the cause of a reset, or that of what was left out.
    fn told(reader: &mut mpsc::Receiver<KvUpdate>) -> Vec<&'static str> {
        let told = std::iter::from_fn(|| reader.try_recv().ok()).filter_map(|update| match update {
            KvUpdate::Events { .. } => Some("events"),
            KvUpdate::Reset { cause, .. } | KvUpdate::Note { note: KvNote::LeftOut { cause, .. }, .. } => Some(cause),
            KvUpdate::Note { .. } => None,
        });
        told.collect()
    }

    #[tokio::test]
    async fn a_batch_that_cannot_be_read_voids_what_was_told_and_the_next_one_follows_it() {
        // A batch with a removal of no hashes.
        let mut no_hashes = vec![0x92, 0x00, 0x91, 0x91, 0xac];
        no_hashes.extend(b"BlockRemoved");
        let too_large = vec![0; MAX_PAYLOAD_BYTES + 1];
        for (payload, cause) in [(vec![0xc1], "no_batch"), (no_hashes, "malformed"), (too_large, "too_large")] {
            let (mut follower, mut reader) = follower();
            hear(&mut follower, batch("", 0, removed(1))).await;
            hear(&mut follower, batch("", 1, payload)).await;
            hear(&mut follower, batch("", 2, removed(2))).await;
            assert_eq!(told(&mut reader), ["events", "unreadable", cause, "events"]);
        }
    }

    #[tokio::test]
    async fn a_replay_without_a_topic_is_of_the_last_live_topics_model() {
        let (mut follower, mut reader) = follower();
        hear(&mut follower, batch("kv@10.0.0.7:8000@m", 0, removed(1))).await;
        assert!(follower.reset(0, "gap").await.is_ok());
        assert!(follower.apply(0, &batch("", 1, removed(2)), false).await.is_ok());
        assert!(follower.apply(0, &batch("kv@10.0.0.7:8000@other", 2, removed(3)), false).await.is_ok());
        let models = std::iter::from_fn(|| reader.try_recv().ok()).filter_map(|update| match update {
            KvUpdate::Events { model, .. } => Some(model),
            _ => None,
        });
        assert_eq!(models.collect::<Vec<_>>(), [Some("m".into()), Some("m".into()), Some("other".into())]);
    }
}
