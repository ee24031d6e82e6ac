//! Tape: what became of the prefix cache, step by step, as engines tell it.
//!
//! Contract: who begins to read gets what is still kept, and then each step's changes. Recording begins with the first
//! reader. Bounds: batches and tokens that are kept; a reader who does not keep up loses its place, and sees its tape end.
//!
//! Blocks of sequences with a salt are left out: the model knows the salt's hash only, and who reads could not match them.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use dynamo_engine_api::{EngineHash, KvEvent, KvNote, KvUpdate, StoredBlocks, Tier};
use tokio::sync::mpsc;

use crate::{
    driver::Tapes,
    model::{CacheEvent, block_hash},
};

/// Batches that are kept.
const BATCHES: usize = 10_000;
/// Tokens in them.
const TOKENS: usize = 1 << 22;
/// Batches that a reader may be behind by.
const BEHIND: usize = 1024;

/// Changes of one step.
pub(crate) type Batch = Arc<[KvEvent]>;

#[derive(Debug)]
pub(crate) struct Tape {
    block_size: u32,
    kept: VecDeque<Batch>,
    tokens: usize,
    readers: Vec<mpsc::Sender<Batch>>,
}

impl Tape {
    pub(crate) fn new(block_size: u32) -> Self {
        Self { block_size, kept: VecDeque::new(), tokens: 0, readers: Vec::new() }
    }

    /// A reader, from the beginning.
    pub(crate) fn read(&mut self) -> mpsc::Receiver<Batch> {
        let (sender, reader) = mpsc::channel(self.kept.len() + BEHIND);
        for batch in &self.kept {
            let _ = sender.try_send(Arc::clone(batch));
        }
        self.readers.push(sender);
        reader
    }

    /// Records a step.
    pub(crate) fn record(&mut self, events: Vec<CacheEvent>) {
        let batch: Batch = events.into_iter().filter_map(|event| self.told(event)).collect();
        if batch.is_empty() {
            return;
        }
        self.readers.retain(|reader| reader.try_send(Arc::clone(&batch)).is_ok());
        self.tokens += tokens(&batch);
        self.kept.push_back(batch);
        while self.kept.len() > BATCHES || self.tokens > TOKENS {
            let Some(oldest) = self.kept.pop_front() else { return };
            self.tokens -= tokens(&oldest);
        }
    }

    fn told(&self, event: CacheEvent) -> Option<KvEvent> {
        Some(match event {
            CacheEvent::Stored { parent, hashes, tokens, .. } => {
                let first = tokens.get(..self.block_size as usize)?;
                if parent.is_none() && hashes.first() != Some(&block_hash(0, first)) {
                    return None;
                }
                KvEvent::Stored(StoredBlocks {
                    parent: parent.map(EngineHash),
                    hashes: hashes.into_iter().map(EngineHash).collect(),
                    tokens,
                    block_size: self.block_size,
                    tier: Tier::Device,
                    adapter: None,
                    cache_salt: None,
                })
            }
            CacheEvent::Removed { hash } => KvEvent::Removed { hashes: vec![EngineHash(hash)], tier: Tier::Device },
            CacheEvent::Cleared => KvEvent::Cleared,
        })
    }
}

/// Reads tapes within this process, one after another.
pub(crate) struct Reading {
    tapes: Tapes,
    tape: Option<mpsc::Receiver<Batch>>,
}

impl Reading {
    pub(crate) fn new(tapes: Tapes) -> Self {
        Self { tapes, tape: None }
    }

    /// What is told next; `None` if the engine was stopped.
    pub(crate) async fn next(&mut self) -> Option<KvUpdate> {
        if let Some(tape) = &mut self.tape
            && let Some(batch) = tape.recv().await
        {
            return Some(KvUpdate::Events { rank: 0, model: None, events: batch.to_vec(), lag: Some(Duration::ZERO) });
        }
        let was_read = self.tape.is_some();
        self.tape = Some(self.tapes.next().await.ok()?);
        Some(if was_read {
            KvUpdate::Reset { rank: None, cause: "gap" }
        } else {
            KvUpdate::Note { rank: None, note: KvNote::Current }
        })
    }
}

fn tokens(batch: &[KvEvent]) -> usize {
    batch.iter().map(|event| if let KvEvent::Stored(stored) = event { stored.tokens.len() } else { 1 }).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(parent: Option<u64>, salt: u64, tokens: &[u32]) -> CacheEvent {
        let hash = block_hash(parent.unwrap_or(salt), tokens);
        CacheEvent::Stored { parent, hashes: vec![hash], tokens: tokens.to_vec() }
    }

    #[test]
    fn a_late_reader_reads_all_and_a_salted_sequence_is_not_told() {
        let mut tape = Tape::new(2);
        tape.record(vec![stored(None, 0, &[1, 2]), stored(None, 7, &[1, 2])]);
        tape.record(vec![stored(None, 7, &[1, 2])]);
        let mut reader = tape.read();
        tape.record(vec![CacheEvent::Cleared]);
        let first = reader.try_recv().unwrap();
        assert!(matches!(&first[..], [KvEvent::Stored(stored)] if stored.tokens == [1, 2] && stored.block_size == 2));
        assert_eq!(*reader.try_recv().unwrap(), [KvEvent::Cleared]);
        assert!(reader.try_recv().is_err());
    }

    #[test]
    fn who_does_not_keep_up_sees_the_tape_end() {
        let mut tape = Tape::new(2);
        let mut reader = tape.read();
        for _ in 0..=BEHIND {
            tape.record(vec![CacheEvent::Cleared]);
        }
        assert!(tape.readers.is_empty());
        while reader.try_recv().is_ok() {}
        assert!(reader.is_closed());
    }
}
