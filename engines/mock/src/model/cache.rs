//! Cache: the KV blocks of an engine, those in use and those that are free but still hold a known prefix.
//!
//! A full block is identified by the hash of its tokens, chained over the blocks before it; there is one block
//! per hash. A block whose last user leaves stays cached until its room is needed: least recently used first.
//!
//! Invariant, leaf first: whoever uses a block uses all blocks before it, and [`BlockCache::release`] frees the
//! last block first. So a block always stands before its parent in the order of eviction, and no block is ever
//! cached without its prefix. The alternative, a tree with counts of children, buys nothing over that.

use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
};

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Hash of a block's tokens and of all tokens before it.
pub type BlockHash = u64;

/// Index of a block.
pub(super) type BlockId = u32;

/// A change of what is cached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheEvent {
    /// Blocks that hold computed tokens now; each is the child of the one before it.
    Stored {
        /// The block before the first; `None` at the start of a sequence.
        parent: Option<BlockHash>,
        /// Their hashes.
        hashes: Vec<BlockHash>,
        /// Their tokens, `block_size` for each hash.
        tokens: Vec<u32>,
    },
    /// A block was evicted.
    Removed {
        /// Its hash.
        hash: BlockHash,
    },
    /// Everything was dropped.
    Cleared,
}

/// The chained hash of a block; `parent` is the hash of the block before it, or the sequence's salt.
#[must_use]
pub fn block_hash(parent: u64, tokens: &[u32]) -> BlockHash {
    let mut bytes = [0; 256];
    if let Some(bytes) = bytes.get_mut(..tokens.len() * 4) {
        for (to, token) in bytes.chunks_exact_mut(4).zip(tokens) {
            to.copy_from_slice(&token.to_le_bytes());
        }
        return xxh3_64_with_seed(bytes, parent);
    }
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    xxh3_64_with_seed(&bytes, parent)
}

/// No block: the end of a list.
const NONE: BlockId = BlockId::MAX;

#[derive(Clone, Copy, Debug)]
struct Block {
    users: u32,
    hash: Option<BlockHash>,
    /// Neighbours among the evictable.
    before: BlockId,
    after: BlockId,
}

/// All blocks of an engine.
#[derive(Debug)]
pub(super) struct BlockCache {
    /// Those that were ever used: a fleet of thousands of engines, most of them idle, must not cost their whole tables.
    blocks: Vec<Block>,
    capacity: usize,
    by_hash: HashMap<BlockHash, BlockId, BuildHasherDefault<HashIsHash>>,
    /// Blocks that were used, and are free and hold nothing known.
    blank: Vec<BlockId>,
    /// Free blocks that are cached: a list through [`Block`], next to evict first.
    oldest: BlockId,
    newest: BlockId,
    evictable: usize,
    events: Option<Vec<CacheEvent>>,
}

impl BlockCache {
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            blocks: Vec::new(),
            capacity: capacity as usize,
            by_hash: HashMap::default(),
            blank: Vec::new(),
            oldest: NONE,
            newest: NONE,
            evictable: 0,
            events: None,
        }
    }

    /// Records events from now on. Whoever asks for that must drain them.
    pub(super) fn record_events(&mut self) {
        self.events.get_or_insert_default();
    }

    /// Hands over the events since the last call.
    pub(super) fn take_events(&mut self) -> Vec<CacheEvent> {
        self.events.as_mut().map(std::mem::take).unwrap_or_default()
    }

    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Blocks that can be allocated, cached ones included.
    pub(super) fn free(&self) -> usize {
        self.capacity - self.used()
    }

    pub(super) fn used(&self) -> usize {
        self.blocks.len() - self.blank.len() - self.evictable
    }

    /// Takes the longest cached prefix of `hashes` and fills up with blank blocks to `count` blocks. Returns how many
    /// were cached; `None`, and no change, if there is no room.
    pub(super) fn admit(&mut self, hashes: &[BlockHash], count: usize, blocks: &mut Vec<BlockId>) -> Option<usize> {
        debug_assert!(blocks.is_empty());
        blocks.extend(hashes.iter().map_while(|hash| self.by_hash.get(hash)));
        let cached = blocks.len();
        let revived = blocks.iter().filter(|&&id| self.blocks[id as usize].users == 0).count();
        if count - cached > self.free() - revived {
            blocks.clear();
            return None;
        }
        for &id in blocks.iter() {
            self.retain(id);
        }
        for _ in cached..count {
            blocks.push(self.allocate());
        }
        Some(cached)
    }

    /// Takes a blank block, evicting if need be.
    ///
    /// # Panics
    /// If none is [`Self::free`].
    pub(super) fn allocate(&mut self) -> BlockId {
        let id = match self.blank.pop() {
            Some(id) => id,
            None if self.blocks.len() < self.capacity => {
                self.blocks.push(Block { users: 0, hash: None, before: NONE, after: NONE });
                (self.blocks.len() - 1) as BlockId
            }
            None => self.evict(),
        };
        self.blocks[id as usize].users = 1;
        id
    }

    /// Makes a full block known under its hash, with its tokens appended by `tokens`. Returns the block to go on
    /// with: another one, if that content was cached already.
    pub(super) fn store(
        &mut self,
        id: BlockId,
        hash: BlockHash,
        parent: Option<BlockHash>,
        tokens: impl FnOnce(&mut Vec<u32>),
    ) -> BlockId {
        if let Some(&known) = self.by_hash.get(&hash) {
            debug_assert_ne!(known, id);
            self.retain(known);
            self.release_one(id);
            return known;
        }
        self.by_hash.insert(hash, id);
        self.blocks[id as usize].hash = Some(hash);
        if let Some(events) = &mut self.events {
            match events.last_mut() {
                Some(CacheEvent::Stored { hashes, tokens: all, .. }) if hashes.last().copied() == parent => {
                    hashes.push(hash);
                    tokens(all);
                }
                _ => {
                    let mut all = Vec::new();
                    tokens(&mut all);
                    events.push(CacheEvent::Stored { parent, hashes: vec![hash], tokens: all });
                }
            }
        }
        id
    }

    /// Gives a sequence's blocks back, the last one first.
    pub(super) fn release(&mut self, blocks: &mut Vec<BlockId>) {
        while let Some(id) = blocks.pop() {
            self.release_one(id);
        }
    }

    /// Forgets all content. Refused, with `false`, while any block is in use.
    pub(super) fn clear(&mut self) -> bool {
        if self.used() > 0 {
            return false;
        }
        while self.evictable > 0 {
            let id = self.oldest;
            self.unlink(id);
            self.blocks[id as usize].hash = None;
            self.blank.push(id);
        }
        self.by_hash.clear();
        if let Some(events) = &mut self.events {
            events.push(CacheEvent::Cleared);
        }
        true
    }

    /// Users over all blocks.
    #[cfg(test)]
    pub(super) fn users(&self) -> usize {
        self.blocks.iter().map(|block| block.users as usize).sum()
    }

    /// Blocks that hold known content.
    #[cfg(test)]
    pub(super) fn cached(&self) -> usize {
        self.by_hash.len()
    }

    fn retain(&mut self, id: BlockId) {
        if self.blocks[id as usize].users == 0 {
            self.unlink(id);
        }
        self.blocks[id as usize].users += 1;
    }

    fn release_one(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        block.users -= 1;
        if block.users > 0 {
            return;
        }
        if block.hash.is_none() {
            self.blank.push(id);
            return;
        }
        block.before = self.newest;
        block.after = NONE;
        match self.newest {
            NONE => self.oldest = id,
            newest => self.blocks[newest as usize].after = id,
        }
        self.newest = id;
        self.evictable += 1;
    }

    fn evict(&mut self) -> BlockId {
        let id = self.oldest;
        self.unlink(id);
        let hash = self.blocks[id as usize].hash.take().expect("only blocks with a hash are evictable");
        self.by_hash.remove(&hash);
        if let Some(events) = &mut self.events {
            events.push(CacheEvent::Removed { hash });
        }
        id
    }

    fn unlink(&mut self, id: BlockId) {
        let Block { before, after, .. } = self.blocks[id as usize];
        match before {
            NONE => self.oldest = after,
            before => self.blocks[before as usize].after = after,
        }
        match after {
            NONE => self.newest = before,
            after => self.blocks[after as usize].before = before,
        }
        self.evictable -= 1;
    }
}

/// Block hashes are mixed well already: hashing them again would be most of a lookup's cost.
#[derive(Default)]
struct HashIsHash(u64);

impl Hasher for HashIsHash {
    fn write(&mut self, _: &[u8]) {
        unreachable!("a block hash is hashed as one u64");
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sequence that runs alone: admitted, stored, released.
    fn pass_through(cache: &mut BlockCache, hashes: &[BlockHash]) -> usize {
        let mut blocks = Vec::new();
        let cached = cache.admit(hashes, hashes.len(), &mut blocks).unwrap();
        for i in cached..hashes.len() {
            blocks[i] = cache.store(blocks[i], hashes[i], i.checked_sub(1).map(|i| hashes[i]), |all| all.push(i as u32));
        }
        cache.release(&mut blocks);
        cached
    }

    #[test]
    fn a_released_prefix_is_found_again() {
        let mut cache = BlockCache::new(4);
        assert_eq!(pass_through(&mut cache, &[1, 2, 3]), 0);
        assert_eq!((cache.free(), cache.used()), (4, 0));
        assert_eq!(pass_through(&mut cache, &[1, 2, 9]), 2);
    }

    #[test]
    fn the_least_recently_used_goes_first_and_leaves_before_their_parents() {
        let mut cache = BlockCache::new(5);
        cache.record_events();
        pass_through(&mut cache, &[1, 2]);
        pass_through(&mut cache, &[5, 6]);
        pass_through(&mut cache, &[1]);
        cache.take_events();
        pass_through(&mut cache, &[7, 8, 9, 10, 11]);
        let removed: Vec<_> = cache
            .take_events()
            .into_iter()
            .filter_map(|event| match event {
                CacheEvent::Removed { hash } => Some(hash),
                _ => None,
            })
            .collect();
        assert_eq!(removed, [2, 6, 5, 1]);
    }

    #[test]
    fn events_chain_from_parent_to_child() {
        let mut cache = BlockCache::new(8);
        cache.record_events();
        pass_through(&mut cache, &[1, 2]);
        pass_through(&mut cache, &[1, 3]);
        let events = cache.take_events();
        let first = CacheEvent::Stored { parent: None, hashes: vec![1, 2], tokens: vec![0, 1] };
        let second = CacheEvent::Stored { parent: Some(1), hashes: vec![3], tokens: vec![1] };
        assert_eq!(events, [first, second]);
        assert!(cache.clear());
        assert_eq!(cache.take_events(), [CacheEvent::Cleared]);
        assert_eq!(pass_through(&mut cache, &[1, 2]), 0);
    }

    #[test]
    fn no_room_changes_nothing() {
        let mut cache = BlockCache::new(3);
        pass_through(&mut cache, &[1, 2]);
        let mut blocks = Vec::new();
        assert_eq!(cache.admit(&[1, 2], 4, &mut blocks), None);
        assert!(blocks.is_empty());
        assert_eq!((cache.free(), cache.admit(&[1, 2], 3, &mut blocks)), (3, Some(2)));
        assert!(!cache.clear(), "blocks in use are not dropped");
    }

    #[test]
    fn content_that_is_cached_already_is_not_kept_twice() {
        let mut cache = BlockCache::new(4);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        cache.admit(&[], 1, &mut a);
        cache.admit(&[], 1, &mut b);
        a[0] = cache.store(a[0], 7, None, |_| ());
        b[0] = cache.store(b[0], 7, None, |_| ());
        assert_eq!((a[0], cache.used()), (b[0], 1));
        cache.release(&mut a);
        assert_eq!(cache.used(), 1);
        cache.release(&mut b);
        assert_eq!(cache.used(), 0);
    }

    #[test]
    fn a_hash_depends_on_tokens_parent_and_length_of_any_size() {
        let long: Vec<u32> = (0..200).collect();
        assert_ne!(block_hash(0, &[1, 2]), block_hash(1, &[1, 2]));
        assert_ne!(block_hash(0, &[1, 2]), block_hash(0, &[2, 1]));
        assert_ne!(block_hash(0, &long), block_hash(0, &long[..64]));
        assert_eq!(block_hash(3, &long), block_hash(3, &long));
    }
}
