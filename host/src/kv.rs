//! What each worker holds of KV: fed by its engine's events, or by what it was sent.
//!
//! Contract: one feed for each worker (model and rank), for as long as the worker is there; dropping it forgets all. What
//! does not fit the worker (another model, another block size) is left out, counted and said once. An engine that is not
//! heard keeps what it told for the short while that its adapter grants, and then loses it: nothing old is silently used.
//! What a worker was sent counts only where its engine does not tell, or could not tell of the same tokens.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use dynamo_engine_api::{KvEvent, KvNote, KvUpdate};
use dynamo_host_core::{LoadSlot, load::Reported};
use dynamo_host_index::{IndexLimits, IndexStats, PrefixIndexes, Prompt, WorkerKv};
use serde::{Deserialize, Serialize};

use crate::text::plain;

/// Tokens of a block where the engine does not say: it only bounds how exact an expectation is.
const EXPECTED_BLOCK_SIZE: u32 = 16;

/// Settings of `[kv]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct KvConfig {
    /// Whether workers whose engines do not tell of their KV are expected to hold what they were sent.
    pub(crate) approximate: bool,
    /// Most blocks in the index, each counted once for every worker that holds it.
    pub(crate) max_blocks: u64,
}

impl Default for KvConfig {
    fn default() -> Self {
        Self { approximate: true, max_blocks: IndexLimits::default().max_blocks }
    }
}

/// Where what is known of a worker's KV comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum KvSource {
    /// Nothing is known.
    #[default]
    None,
    /// It is expected to hold what it was sent.
    Approximate,
    /// Its engine tells.
    Events,
}

/// One worker's part in the index, and how it is fed.
pub(crate) struct KvFeed {
    kv: WorkerKv,
    standing: Mutex<Standing>,
    has_events: AtomicBool,
    /// Dropped last: the slot must not be another worker's before the index has forgotten this one.
    slot: Arc<LoadSlot>,
}

#[derive(Debug, Default)]
struct Standing {
    source: KvSource,
    /// It tells, and is not heard now.
    is_interrupted: bool,
    last_event_ms: Option<u64>,
    resets: u64,
    left_out: u64,
    /// Why it does not tell, or is not heard.
    trouble: Option<String>,
    /// Why what it tells is left out: that holds however well it is heard.
    misfit: Option<String>,
}

/// How a worker's KV is known, for people and tools.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct KvReport {
    pub(crate) source: KvSource,
    /// Blocks that it is known to hold.
    pub(crate) blocks: u64,
    /// Since its engine last told of a change.
    pub(crate) last_event_age_ms: Option<u64>,
    /// How often all that it had told was void.
    pub(crate) resets: u64,
    /// Events that were not taken up.
    pub(crate) left_out: u64,
    /// It tells, and is not heard now.
    pub(crate) stale: bool,
    /// Why it does not tell, is not heard, or tells of something else.
    pub(crate) trouble: Option<String>,
}

impl KvFeed {
    pub(crate) fn new(indexes: &Arc<PrefixIndexes>, model: &str, slot: &Arc<LoadSlot>) -> Arc<Self> {
        let kv = indexes.join(model, slot.index());
        Arc::new(Self { kv, standing: Mutex::default(), has_events: AtomicBool::new(false), slot: Arc::clone(slot) })
    }

    /// Takes over changes that its engine told.
    pub(crate) fn apply(&self, worker: &str, events: &[KvEvent], block_size: Option<u32>, now_ms: u64) {
        self.begin_events();
        for event in events {
            let result = match event {
                KvEvent::Stored(stored) => match block_size.filter(|size| *size != stored.block_size) {
                    None => "applied",
                    // The last tokens of a sequence, which no whole block holds.
                    Some(size) if stored.block_size < size && stored.parent.is_some() && stored.hashes.len() == 1 => "partial",
                    Some(size) => {
                        let said = stored.block_size;
                        self.left_out(worker, || {
                            format!("its KV events are of blocks of {said} tokens, and its blocks have {size}; set block_size= if that is wrong")
                        });
                        "block_size"
                    }
                },
                KvEvent::Removed { .. } | KvEvent::Cleared => "applied",
            };
            if result == "applied" {
                self.kv.apply(event);
            }
            let kind = match event {
                KvEvent::Stored(_) => "stored",
                KvEvent::Removed { .. } => "removed",
                KvEvent::Cleared => "cleared",
            };
            metrics::counter!("dynamo_host_kv_events_total", "kind" => kind, "result" => result).increment(1);
        }
        self.standing().last_event_ms = Some(now_ms);
    }

    /// Whether its engine tells.
    pub(crate) fn has_events(&self) -> bool {
        self.has_events.load(Relaxed)
    }

    /// Forgets what its engine told, which holds no more.
    pub(crate) fn reset(&self, cause: &'static str) {
        self.kv.clear();
        let mut standing = self.standing();
        standing.resets += 1;
        standing.misfit = None;
        drop(standing);
        metrics::counter!("dynamo_host_kv_resets_total", "cause" => cause).increment(1);
    }

    /// Forgets what it was expected to hold: its engine is away, and may come back empty.
    pub(crate) fn forget_expected(&self) {
        if !self.has_events() {
            self.kv.clear();
        }
    }

    /// Begins anew: whoever told before is heard no more.
    pub(crate) fn begin(&self) {
        let mut standing = self.standing();
        // What was expected by what it was sent still holds.
        if self.has_events.swap(false, Relaxed) {
            self.kv.clear();
            standing.source = KvSource::None;
        }
        (standing.is_interrupted, standing.trouble, standing.misfit) = (false, None, None);
    }

    /// Takes down how it is told.
    pub(crate) fn note(&self, worker: &str, note: &KvNote) {
        match note {
            KvNote::Current => {
                self.begin_events();
                let mut standing = self.standing();
                (standing.is_interrupted, standing.trouble) = (false, None);
            }
            KvNote::Interrupted { reason } | KvNote::ReplayFailed { reason } => {
                let mut standing = self.standing();
                standing.is_interrupted |= matches!(note, KvNote::Interrupted { .. });
                let reason = plain(reason);
                if standing.trouble.as_ref() != Some(&reason) {
                    tracing::debug!(worker, "its KV events: {reason}");
                    standing.trouble = Some(reason);
                }
            }
            KvNote::Silent { reason } => {
                let told_before = self.has_events.swap(false, Relaxed);
                let mut standing = self.standing();
                if told_before {
                    self.kv.clear();
                    standing.source = KvSource::None;
                }
                standing.is_interrupted = false;
                let reason = plain(reason);
                if standing.trouble.as_ref() != Some(&reason) {
                    tracing::debug!(worker, "it does not tell of its KV: {reason}");
                    standing.trouble = Some(reason);
                }
            }
            KvNote::LeftOut { events, .. } => self.standing().left_out += u64::from(*events),
            KvNote::Replayed { .. } => {}
        }
    }

    /// Counts an event that is not taken up; why is said once.
    fn left_out(&self, worker: &str, why: impl FnOnce() -> String) {
        let mut standing = self.standing();
        standing.left_out += 1;
        if standing.misfit.is_none() {
            let why = why();
            tracing::warn!(worker, "{why}");
            standing.misfit = Some(why);
        }
    }

    /// Events of another model came for it.
    pub(crate) fn other_model(&self, worker: &str, events: usize, why: impl FnOnce() -> String) {
        metrics::counter!("dynamo_host_kv_events_total", "kind" => "any", "result" => "other_model").increment(events as u64);
        self.left_out(worker, why);
    }

    /// It has taken up a prompt: where nobody tells of it, it is expected to hold it.
    pub(crate) fn taken_up(&self, prompt: &Prompt, block_size: Option<u32>) {
        // Locked, so that what is expected and what is told cannot overtake one another.
        let mut standing = self.standing();
        let has_events = self.has_events();
        // Of stand-ins for tokens, no event can tell.
        if has_events && prompt.is_exact() {
            return;
        }
        let block_size = block_size.or_else(|| self.slot.get_reported(Reported::BlockSize)).unwrap_or(EXPECTED_BLOCK_SIZE);
        self.kv.expect(prompt, block_size, self.slot.get_reported(Reported::KvTokensTotal));
        if !has_events {
            standing.source = KvSource::Approximate;
        }
    }

    /// Whether it tells and is not heard.
    pub(crate) fn is_stale(&self) -> bool {
        self.standing().is_interrupted && self.has_events()
    }

    pub(crate) fn report(&self, now_ms: u64) -> KvReport {
        let standing = self.standing();
        KvReport {
            source: standing.source,
            blocks: self.kv.blocks(),
            last_event_age_ms: standing.last_event_ms.map(|at| now_ms.saturating_sub(at)),
            resets: standing.resets,
            left_out: standing.left_out,
            stale: standing.is_interrupted && self.has_events(),
            trouble: standing.trouble.clone().or_else(|| standing.misfit.clone()),
        }
    }

    /// From now on its engine tells: what was expected counts no more.
    fn begin_events(&self) {
        if self.has_events() {
            return;
        }
        let mut standing = self.standing();
        self.has_events.store(true, Relaxed);
        self.kv.clear();
        standing.source = KvSource::Events;
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts what an update tells apart from its worker.
pub(crate) fn measure(update: &KvUpdate) {
    match update {
        KvUpdate::Events { lag: Some(lag), .. } => {
            metrics::histogram!("dynamo_host_kv_event_lag_seconds").record(lag.as_secs_f64());
        }
        KvUpdate::Note { note: KvNote::Replayed { .. }, .. } => {
            metrics::counter!("dynamo_host_kv_replays_total", "result" => "done").increment(1);
        }
        KvUpdate::Note { note: KvNote::ReplayFailed { .. }, .. } => {
            metrics::counter!("dynamo_host_kv_replays_total", "result" => "failed").increment(1);
        }
        KvUpdate::Note { note: KvNote::LeftOut { cause, events }, .. } => {
            metrics::counter!("dynamo_host_kv_events_total", "kind" => "any", "result" => *cause).increment(u64::from(*events));
        }
        _ => {}
    }
}

/// Counts what the index holds, and what it could not take up.
pub(crate) fn measure_index(stats: &IndexStats) {
    metrics::gauge!("dynamo_host_kv_index_blocks").set(stats.blocks as f64);
    metrics::gauge!("dynamo_host_kv_index_bytes").set(stats.bytes as f64);
    for (cause, count) in
        [("full", stats.refused), ("unknown_parent", stats.unknown_parents), ("hash_collision", stats.hash_collisions)]
    {
        metrics::counter!("dynamo_host_kv_index_left_out_total", "cause" => cause).absolute(count);
    }
}

#[cfg(test)]
mod tests {
    use dynamo_engine_api::{EngineHash, StoredBlocks, Tier};
    use dynamo_host_core::LoadBoard;
    use dynamo_host_index::Salt;

    use super::*;

    fn stored(block_size: u32) -> KvEvent {
        let tokens = (0..block_size).collect();
        let (hashes, tier) = (vec![EngineHash(u64::from(block_size))], Tier::Device);
        KvEvent::Stored(StoredBlocks { parent: None, hashes, tokens, block_size, tier, adapter: None, cache_salt: None })
    }

    fn feed() -> (Arc<PrefixIndexes>, Arc<KvFeed>) {
        let indexes = PrefixIndexes::new();
        let feed = KvFeed::new(&indexes, "m", &LoadBoard::new(1).claim().unwrap());
        (indexes, feed)
    }

    fn prompt(is_exact: bool) -> Prompt {
        Prompt::new(Salt::new("m", None, None), (0..64).collect(), is_exact)
    }

    #[test]
    fn blocks_of_another_size_are_left_out_and_said_once() {
        let (indexes, feed) = feed();
        feed.apply("w", &[stored(32), stored(16), stored(64)], Some(16), 7);
        let report = feed.report(17);
        assert_eq!((report.source, report.blocks, report.left_out, report.last_event_age_ms), (KvSource::Events, 1, 2, Some(10)));
        assert!(report.trouble.unwrap().contains("blocks of 32 tokens"));
        // They were of a replay, with the end of which all is heard.
        feed.note("w", &KvNote::Current);
        assert!(feed.report(17).trouble.unwrap().contains("blocks of 32 tokens"));
        assert_eq!(indexes.overlap("m", &prompt(true)).held()[0].tokens, [16, 0, 0, 0]);
    }

    #[test]
    fn what_a_worker_was_sent_counts_until_its_engine_tells() {
        let (indexes, feed) = feed();
        feed.taken_up(&prompt(true), None);
        assert_eq!((feed.report(0).source, feed.report(0).blocks), (KvSource::Approximate, 4));
        feed.note("w", &KvNote::Current);
        assert_eq!((feed.report(0).source, feed.report(0).blocks), (KvSource::Events, 0));
        feed.taken_up(&prompt(true), None);
        assert_eq!(indexes.overlap("m", &prompt(true)).held().len(), 0);
        feed.taken_up(&prompt(false), None);
        assert_eq!((feed.report(0).source, feed.report(0).blocks), (KvSource::Events, 4));
        feed.note("w", &KvNote::Silent { reason: "off".to_owned() });
        assert_eq!((feed.report(0).source, feed.report(0).blocks), (KvSource::None, 0));
    }

    #[test]
    fn an_engine_that_is_not_heard_is_stale_until_it_is() {
        let (_indexes, feed) = feed();
        feed.note("w", &KvNote::Interrupted { reason: "no connection".to_owned() });
        assert!(!feed.is_stale(), "it has not told anything");
        feed.note("w", &KvNote::Current);
        feed.note("w", &KvNote::Interrupted { reason: "no connection".to_owned() });
        assert!(feed.is_stale() && feed.report(0).trouble.is_some());
        feed.reset("disconnected");
        feed.note("w", &KvNote::Current);
        assert_eq!((feed.is_stale(), feed.report(0).resets, feed.report(0).trouble), (false, 1, None));
    }
}
