//! All indexes of a host: by model and block size, with one bound for all.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;
use dynamo_host_core::{Held, Overlap};

use crate::{
    prompt::Prompt,
    run::Who,
    runs::{Found, Runs},
    worker::WorkerKv,
};

/// What the indexes may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexLimits {
    /// Blocks, each counted once for every worker that holds it. Each costs about [`BYTES_PER_BLOCK`]. A block beyond them is
    /// not taken up and counted as refused: its worker's part is incomplete then, and never wrong.
    pub max_blocks: u64,
}

/// What a held block costs in the index, in bytes, where prompts have some ten blocks of their own; measured by a test. A prompt's
/// part that is its own costs about 200 bytes more, however short it is.
pub const BYTES_PER_BLOCK: u64 = 48;

impl Default for IndexLimits {
    /// 16,777,216 blocks: about 800 MB when full, and the KV cache of a thousand workers of a million tokens in blocks of 64.
    fn default() -> Self {
        Self { max_blocks: 1 << 24 }
    }
}

/// How the indexes do, in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IndexStats {
    /// Blocks, each counted once for every worker that holds it.
    pub blocks: u64,
    /// Workers that joined and did not leave.
    pub workers: u64,
    /// Memory that they take.
    pub bytes: u64,
    /// Blocks that were not taken up since there was no room. Never falls.
    pub refused: u64,
    /// Stored events that were left out since their parent was not known. Never falls.
    pub unknown_parents: u64,
    /// Hashes that an engine gave to other tokens than before: they mean the new ones now. Never falls.
    pub hash_collisions: u64,
}

/// The prefix indexes of a host, by model and block size.
#[derive(Default)]
pub struct PrefixIndexes {
    limits: IndexLimits,
    /// Read as a whole by lookups; changed only when a pair of model and block size comes or goes.
    indexes: ArcSwap<Vec<Index>>,
    changes: Mutex<()>,
    next_part: AtomicU32,
    counters: Counters,
}

#[derive(Clone)]
struct Index {
    model: Arc<str>,
    block_size: u32,
    runs: Arc<Runs>,
}

/// Counted by all parts.
#[derive(Default)]
pub(crate) struct Counters {
    max_blocks: u64,
    pub(crate) blocks: AtomicU64,
    pub(crate) workers: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) unknown_parents: AtomicU64,
    pub(crate) hash_collisions: AtomicU64,
    bytes: AtomicI64,
}

impl Counters {
    /// Counts so many more blocks, or as many as there is room for.
    pub(crate) fn reserve(&self, blocks: usize) -> usize {
        let asked = blocks as u64;
        let before = self.blocks.fetch_add(asked, Ordering::Relaxed);
        let room = self.max_blocks.saturating_sub(before).min(asked);
        if room < asked {
            self.blocks.fetch_sub(asked - room, Ordering::Relaxed);
            self.refused.fetch_add(asked - room, Ordering::Relaxed);
        }
        room as usize
    }

    /// Blocks that there is room for now.
    pub(crate) fn room(&self) -> usize {
        self.max_blocks.saturating_sub(self.blocks.load(Ordering::Relaxed)) as usize
    }

    pub(crate) fn changed_bytes(&self, before: usize, now: usize) {
        if before != now {
            self.bytes.fetch_add(now as i64 - before as i64, Ordering::Relaxed);
        }
    }
}

impl PrefixIndexes {
    /// No index yet, within the default limits.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Self::with_limits(IndexLimits::default())
    }

    /// No index yet.
    #[must_use]
    pub fn with_limits(limits: IndexLimits) -> Arc<Self> {
        let counters = Counters { max_blocks: limits.max_blocks, ..Counters::default() };
        Arc::new(Self { limits, counters, ..Self::default() })
    }

    /// What it may take.
    #[must_use]
    pub fn limits(&self) -> IndexLimits {
        self.limits
    }

    /// What the workers of a model hold of a prompt's prefix: the longest chain of its leading blocks, each counted in the
    /// nearest tier that holds it. Waits for nobody.
    #[must_use]
    pub fn overlap(&self, model: &str, prompt: &Prompt) -> Overlap {
        let indexes = self.indexes.load();
        let mut all: Vec<Held> = Vec::new();
        for Index { block_size, runs, .. } in indexes.iter().filter(|index| &*index.model == model) {
            let found = runs.find(&prompt.hashes(*block_size));
            // No more than the prompt's own tokens: they are fewer than u32 holds.
            let held = |Found { who, blocks }| Held {
                slot: (who >> 32) as u32,
                tokens: blocks.map(|blocks: u32| blocks.wrapping_mul(*block_size)),
            };
            all.extend(found.into_iter().map(held));
        }
        // A worker may have several parts: by block size, of events and expected, or an old one that is about to go.
        if !all.is_sorted_by(|a, b| a.slot < b.slot) {
            all.sort_unstable_by_key(|held| (held.slot, std::cmp::Reverse(held.total())));
            all.dedup_by_key(|held| held.slot);
        }
        Overlap::new(all)
    }

    /// A worker's part, empty; what it held is forgotten when it is dropped.
    #[must_use]
    pub fn join(self: &Arc<Self>, model: &str, slot: u32) -> WorkerKv {
        self.counters.workers.fetch_add(1, Ordering::Relaxed);
        WorkerKv::new(Arc::clone(self), model.into(), slot)
    }

    /// How they do.
    #[must_use]
    pub fn stats(&self) -> IndexStats {
        let Counters { blocks, workers, refused, unknown_parents, hash_collisions, bytes, .. } = &self.counters;
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let runs: usize = self.indexes.load().iter().map(|index| index.runs.bytes()).sum();
        IndexStats {
            blocks: count(blocks),
            workers: count(workers),
            bytes: bytes.load(Ordering::Relaxed).max(0) as u64 + runs as u64,
            refused: count(refused),
            unknown_parents: count(unknown_parents),
            hash_collisions: count(hash_collisions),
        }
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// A holder that never was before, of this slot.
    pub(crate) fn next_who(&self, slot: u32) -> Who {
        u64::from(slot) << 32 | u64::from(self.next_part.fetch_add(1, Ordering::Relaxed))
    }

    /// The runs of a model and block size.
    pub(crate) fn runs(&self, model: &Arc<str>, block_size: u32) -> Arc<Runs> {
        let _turn = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let indexes = self.indexes.load();
        if let Some(index) = indexes.iter().find(|index| index.block_size == block_size && index.model == *model) {
            return Arc::clone(&index.runs);
        }
        let runs = Arc::new(Runs::new());
        let index = Index { model: Arc::clone(model), block_size, runs: Arc::clone(&runs) };
        self.indexes.store(Arc::new(indexes.iter().cloned().chain([index]).collect()));
        runs
    }

    /// Lets go of indexes that no worker has a part in.
    pub(crate) fn prune(&self) {
        let _turn = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let indexes = self.indexes.load_full();
        let is_used = |index: &&Index| Arc::strong_count(&index.runs) > 1;
        if indexes.iter().any(|index| !is_used(&index)) {
            self.indexes.store(Arc::new(indexes.iter().filter(is_used).cloned().collect()));
        }
    }
}

impl fmt::Debug for PrefixIndexes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrefixIndexes").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
