//! All indexes of a host, and each worker's part in them.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use dynamo_host_core::{EngineHash, Held, KvEvent, Overlap, StoredBlocks, Tier};

use crate::prompt::{Prompt, Salt, SequenceHash, sequence_hashes};

/// What the indexes may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexLimits {
    /// Blocks, each counted once for every worker that holds it.
    pub max_blocks: u64,
}

impl Default for IndexLimits {
    fn default() -> Self {
        Self { max_blocks: 1 << 24 }
    }
}

/// How the indexes do, in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IndexStats {
    /// Blocks, each counted once for every worker that holds it.
    pub blocks: u64,
}

/// The prefix indexes of a host, by model and block size.
#[derive(Debug, Default)]
pub struct PrefixIndexes {
    indexes: Mutex<HashMap<(Arc<str>, u32), Holders>>,
}

/// Tiers, as bits, in which workers hold a block, by their slots.
type Holders = HashMap<SequenceHash, BTreeMap<u32, u8>>;

impl PrefixIndexes {
    /// No index yet.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// No index yet, within limits.
    #[must_use]
    pub fn with_limits(_limits: IndexLimits) -> Arc<Self> {
        Arc::default()
    }

    /// How they do.
    #[must_use]
    pub fn stats(&self) -> IndexStats {
        let blocks = self.lock().values().flat_map(HashMap::values).map(|workers| workers.len() as u64).sum();
        IndexStats { blocks }
    }

    /// What the workers of a model hold of a prompt's prefix.
    #[must_use]
    pub fn overlap(&self, model: &str, prompt: &Prompt) -> Overlap {
        let indexes = self.lock();
        let mut all = Vec::new();
        for ((_, block_size), holders) in indexes.iter().filter(|((of, _), _)| &**of == model) {
            let mut held: BTreeMap<u32, ([u32; 4], usize)> = BTreeMap::new();
            for (nth, hash) in prompt.hashes(*block_size).iter().enumerate() {
                let Some(workers) = holders.get(hash) else { break };
                let mut any = false;
                for (&slot, &tiers) in workers {
                    let (tokens, blocks) = held.entry(slot).or_default();
                    if *blocks == nth && tiers != 0 {
                        tokens[tiers.trailing_zeros() as usize] += block_size;
                        *blocks += 1;
                        any = true;
                    }
                }
                if !any {
                    break;
                }
            }
            all.extend(held.into_iter().filter(|(_, (_, blocks))| *blocks > 0).map(|(slot, (tokens, _))| Held { slot, tokens }));
        }
        Overlap::new(all)
    }

    /// A worker's part, empty; what it held is forgotten when it is dropped.
    #[must_use]
    pub fn join(self: &Arc<Self>, model: &str, slot: u32) -> WorkerKv {
        WorkerKv { indexes: Arc::clone(self), model: model.into(), slot, blocks: Mutex::default(), expected: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(Arc<str>, u32), Holders>> {
        self.indexes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one worker holds. Applying is for one thread at a time; lookups go on meanwhile.
#[derive(Debug)]
pub struct WorkerKv {
    indexes: Arc<PrefixIndexes>,
    model: Arc<str>,
    slot: u32,
    /// The engine's hashes: ours, the block size, and tiers as bits.
    blocks: Mutex<HashMap<EngineHash, (SequenceHash, u32, u8)>>,
    /// Hashes that are expected, least recently sent first.
    expected: Mutex<std::collections::VecDeque<EngineHash>>,
}

impl WorkerKv {
    /// Takes over a change. What cannot be placed (its parent is not known) is left out.
    pub fn apply(&self, event: &KvEvent) {
        match event {
            KvEvent::Stored(stored) => self.store(stored),
            KvEvent::Removed { hashes, tier } => hashes.iter().for_each(|&hash| self.remove(hash, *tier)),
            KvEvent::Cleared => self.clear(),
        }
    }

    /// Blocks that it is known, or expected, to hold.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.held().len() as u64
    }

    /// Takes over that a worker without events was sent a prompt, and will hold as much of it, and of those before it, as it
    /// can.
    pub fn expect(&self, prompt: &Prompt, block_size: u32, capacity_tokens: Option<u32>) {
        let capacity = (capacity_tokens.unwrap_or(262_144) / block_size.max(1)) as usize;
        let hashes = prompt.hashes(block_size);
        let mut expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner);
        for hash in hashes.iter().take(capacity).rev() {
            expected.retain(|known| known.0 != *hash);
            expected.push_back(EngineHash(*hash));
            self.held().entry(EngineHash(*hash)).or_insert((*hash, block_size, 0)).2 |= 1;
            let mut indexes = self.indexes.lock();
            let holders = indexes.entry((Arc::clone(&self.model), block_size)).or_default();
            *holders.entry(*hash).or_default().entry(self.slot).or_default() |= 1;
        }
        while expected.len() > capacity {
            let Some(oldest) = expected.pop_front() else { return };
            self.remove(oldest, Tier::Device);
        }
    }

    /// Forgets all that it holds.
    pub fn clear(&self) {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let hashes: Vec<EngineHash> = self.held().keys().copied().collect();
        for hash in hashes {
            Tier::ALL.into_iter().for_each(|tier| self.remove(hash, tier));
        }
    }

    fn store(&self, stored: &StoredBlocks) {
        let StoredBlocks { parent, hashes, tokens, block_size, tier, adapter, cache_salt } = stored;
        let mut blocks = self.held();
        let parent = match parent {
            None => Salt::new(&self.model, adapter.as_deref(), cache_salt.as_deref()).0,
            Some(parent) => match blocks.get(parent) {
                Some((ours, ..)) => *ours,
                None => return,
            },
        };
        let mut indexes = self.indexes.lock();
        let holders = indexes.entry((Arc::clone(&self.model), *block_size)).or_default();
        for (hash, ours) in hashes.iter().zip(sequence_hashes(parent, *block_size, tokens)) {
            blocks.entry(*hash).or_insert((ours, *block_size, 0)).2 |= 1 << *tier as u8;
            *holders.entry(ours).or_default().entry(self.slot).or_default() |= 1 << *tier as u8;
        }
    }

    fn remove(&self, hash: EngineHash, tier: Tier) {
        let mut blocks = self.held();
        let Some((ours, block_size, tiers)) = blocks.get_mut(&hash) else { return };
        *tiers &= !(1 << tier as u8);
        let (ours, block_size, left) = (*ours, *block_size, *tiers);
        if left == 0 {
            blocks.remove(&hash);
        }
        let mut indexes = self.indexes.lock();
        let Some(holders) = indexes.get_mut(&(Arc::clone(&self.model), block_size)) else { return };
        let Some(workers) = holders.get_mut(&ours) else { return };
        workers.insert(self.slot, left);
        if left == 0 {
            workers.remove(&self.slot);
        }
        if workers.is_empty() {
            holders.remove(&ours);
        }
    }

    fn held(&self) -> MutexGuard<'_, HashMap<EngineHash, (SequenceHash, u32, u8)>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for WorkerKv {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(parent: Option<u64>, hashes: &[u64], tokens: &[u32], tier: Tier) -> KvEvent {
        KvEvent::Stored(StoredBlocks {
            parent: parent.map(EngineHash),
            hashes: hashes.iter().copied().map(EngineHash).collect(),
            tokens: tokens.to_vec(),
            block_size: 2,
            tier,
            adapter: None,
            cache_salt: None,
        })
    }

    #[test]
    fn a_worker_holds_what_its_events_say_until_they_say_otherwise() {
        let indexes = PrefixIndexes::new();
        let prompt = Prompt::new(Salt::new("m", None, None), [1, 2, 3, 4, 5].into(), true);
        let held = |slot| indexes.overlap("m", &prompt).of(slot).map(|held| held.tokens);
        let a = indexes.join("m", 3);
        a.apply(&stored(None, &[10], &[1, 2], Tier::Device));
        a.apply(&stored(Some(10), &[11], &[3, 4], Tier::Host));
        a.apply(&stored(Some(99), &[12], &[5, 6], Tier::Device));
        assert_eq!(held(3), Some([2, 2, 0, 0]));
        let b = indexes.join("m", 4);
        b.apply(&stored(None, &[7], &[1, 2], Tier::Device));
        assert_eq!(held(4), Some([2, 0, 0, 0]));
        a.apply(&KvEvent::Removed { hashes: vec![EngineHash(10)], tier: Tier::Device });
        assert_eq!((held(3), held(4)), (None, Some([2, 0, 0, 0])));
        drop(b);
        drop(a);
        assert!(indexes.lock().values().all(HashMap::is_empty));
    }
}
