//! One worker's part in the indexes.

use std::{
    borrow::Cow,
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
};

use dynamo_host_core::{EngineHash, KvEvent, StoredBlocks, Tier};

use crate::{
    expected::Expected,
    index::{Counters, PrefixIndexes},
    places::{Place, Places},
    prompt::{BlockHash, Prompt, Salt, SequenceHash, block_hashes, chained},
    run::{Tiers, Who},
    runs::{Placed, Runs},
};

/// Tokens that a worker is taken to hold when its capacity is not known.
pub const DEFAULT_CAPACITY_TOKENS: u32 = 262_144;

const ALL_TIERS: Tiers = 0b1111;

/// Block sizes of one worker at most: of its layer groups, and what is expected.
const MAX_PARTS: usize = 4;

/// Blocks of one sequence that an engine holds now, their tokens hashed: [`StoredBlocks`] without token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HashedBlocks<'a> {
    /// The block before the first; `None` at the start of a sequence.
    pub parent: Option<EngineHash>,
    /// The engine's hashes.
    pub hashes: Cow<'a, [EngineHash]>,
    /// Hashes of the tokens of each ([`block_hashes`]).
    pub blocks: Cow<'a, [BlockHash]>,
    /// Tokens of a block.
    pub block_size: u32,
    /// Where they lie.
    pub tier: Tier,
    /// What keeps them apart; it counts at the start of a sequence.
    pub salt: Salt,
}

/// What one worker holds. Applying is for one thread at a time; lookups go on meanwhile.
pub struct WorkerKv {
    indexes: Arc<PrefixIndexes>,
    model: Arc<str>,
    slot: u32,
    parts: Mutex<Vec<Part>>,
}

/// Its blocks of one size.
struct Part {
    block_size: u32,
    runs: Arc<Runs>,
    who: Who,
    places: Places,
    /// Blocks that the engine knows by more than one hash.
    aliases: HashMap<Place, Alias>,
    expected: Option<Expected>,
    /// Kept for its memory.
    group: Group,
    chain: Vec<SequenceHash>,
}

/// The tiers of a block by the engine's hashes of it.
struct Alias {
    /// Of the hash that it was first known by, until that is gone.
    first: Tiers,
    others: Vec<(u64, Tiers)>,
}

impl WorkerKv {
    pub(crate) fn new(indexes: Arc<PrefixIndexes>, model: Arc<str>, slot: u32) -> Self {
        Self { indexes, model, slot, parts: Mutex::default() }
    }

    /// Takes over a change. What cannot be placed (its parent is not known) is left out, and counted.
    pub fn apply(&self, event: &KvEvent) {
        match event {
            KvEvent::Stored(stored) => self.store(stored),
            KvEvent::Removed { hashes, tier } => {
                for part in &mut *self.parts() {
                    part.remove(hashes, *tier, self.indexes.counters());
                }
            }
            KvEvent::Cleared => self.clear(),
        }
    }

    /// Takes over that a worker without events was sent a prompt, and will hold it: on its device, in blocks of this size, with what it
    /// was sent before, as much as it can hold; least recently used blocks go first. Without a capacity,
    /// [`DEFAULT_CAPACITY_TOKENS`].
    ///
    /// What is expected is kept apart from what events say: of both, a lookup finds the longer. Where the indexes are full,
    /// what was expected of it before makes room.
    pub fn expect(&self, prompt: &Prompt, block_size: u32, capacity_tokens: Option<u32>) {
        if block_size == 0 {
            return;
        }
        let chain = prompt.hashes(block_size);
        let capacity = (capacity_tokens.unwrap_or(DEFAULT_CAPACITY_TOKENS) / block_size) as usize;
        let mut parts = self.parts();
        let Some(part) = self.part(&mut parts, block_size) else { return };
        let counters = self.indexes.counters();
        let Part { expected, runs, .. } = part;
        let expected = expected.get_or_insert_with(|| Expected::new(self.indexes.next_who(self.slot)));
        let (mut before, bytes) = (expected.len(), expected.bytes());
        let chain = &chain[..chain.len().min(capacity)];
        // Room for all of it, as if none were known.
        let mut known = 0;
        if counters.room() < chain.len() {
            known = expected.known(runs, chain);
            expected.touch(runs, &chain[..known], capacity);
            let short = (chain.len() - known).saturating_sub(counters.room());
            expected.keep(runs, expected.len().saturating_sub(short).max(known));
            counters.blocks.fetch_sub((before - expected.len()) as u64, Ordering::Relaxed);
            before = expected.len();
        }
        let room = counters.reserve(chain.len() - known);
        expected.touch(runs, &chain[..known + room], capacity);
        counters.blocks.fetch_sub((room + before - expected.len()) as u64, Ordering::Relaxed);
        counters.changed_bytes(bytes, expected.bytes());
    }

    /// Blocks that it is known, or expected, to hold.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        let expected = |part: &Part| part.expected.as_ref().map_or(0, Expected::len);
        self.parts().iter().map(|part| (part.places.len() + expected(part)) as u64).sum()
    }

    /// Forgets all that it holds.
    pub fn clear(&self) {
        let parts = std::mem::take(&mut *self.parts());
        parts.into_iter().for_each(|part| part.forget_all(self.indexes.counters()));
        self.indexes.prune();
    }

    /// Takes over that blocks are there, whose tokens are hashed already: the hashing is most of the work, and token ids need not travel.
    pub fn apply_hashed(&self, stored: &HashedBlocks) {
        let HashedBlocks { parent, hashes, blocks, block_size, tier, salt } = stored;
        if *block_size == 0 {
            return;
        }
        let mut parts = self.parts();
        let counters = self.indexes.counters();
        if parent.is_some() && !parts.iter().any(|part| part.block_size == *block_size) {
            counters.unknown_parents.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let Some(part) = self.part(&mut parts, *block_size) else {
            counters.refused.fetch_add(blocks.len().min(hashes.len()) as u64, Ordering::Relaxed);
            return;
        };
        let (after, parent) = match parent {
            None => (None, salt.0),
            Some(parent) => {
                let place = part.places.get(parent.0);
                let Some((place, hash)) = place.and_then(|place| Some((place, part.runs.hash(place)?))) else {
                    counters.unknown_parents.fetch_add(1, Ordering::Relaxed);
                    return;
                };
                (Some(place), hash)
            }
        };
        let room = counters.reserve(blocks.len().min(hashes.len()));
        let mut chain = std::mem::take(&mut part.chain);
        chain.clear();
        chain.extend(chained(parent, &blocks[..room]));
        part.store(after, &hashes[..room], &chain, 1 << *tier as u8, counters);
        // A long prompt's is not kept.
        if chain.capacity() <= 4_096 {
            part.chain = chain;
        }
    }

    fn store(&self, stored: &StoredBlocks) {
        let StoredBlocks { parent, hashes, tokens, block_size, tier, adapter, cache_salt } = stored;
        let blocks = block_hashes(*block_size, tokens);
        let salt = Salt::new(&self.model, adapter.as_deref(), cache_salt.as_deref());
        self.apply_hashed(&HashedBlocks {
            parent: *parent,
            hashes: hashes.into(),
            blocks: blocks.into(),
            block_size: *block_size,
            tier: *tier,
            salt,
        });
    }

    /// Its part of this block size; `None` if it would be one too many.
    fn part<'a>(&self, parts: &'a mut Vec<Part>, block_size: u32) -> Option<&'a mut Part> {
        let known = parts.iter().position(|part| part.block_size == block_size);
        if known.is_none() && parts.len() < MAX_PARTS {
            let (runs, who) = (self.indexes.runs(&self.model, block_size), self.indexes.next_who(self.slot));
            parts.push(Part::new(block_size, runs, who));
            return parts.last_mut();
        }
        parts.get_mut(known?)
    }

    fn parts(&self) -> MutexGuard<'_, Vec<Part>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for WorkerKv {
    fn drop(&mut self) {
        self.clear();
        self.indexes.counters().workers.fetch_sub(1, Ordering::Relaxed);
    }
}

impl fmt::Debug for WorkerKv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerKv").field("model", &self.model).field("slot", &self.slot).finish_non_exhaustive()
    }
}

impl Part {
    fn new(block_size: u32, runs: Arc<Runs>, who: Who) -> Self {
        let (places, aliases, group, chain) = (Places::default(), HashMap::new(), Group::default(), Vec::new());
        Self { block_size, runs, who, places, aliases, expected: None, group, chain }
    }

    /// Stores blocks, for each of which room is reserved; gives back the room of those that were there.
    fn store(
        &mut self,
        mut after: Option<Place>,
        hashes: &[EngineHash],
        chain: &[SequenceHash],
        tiers: Tiers,
        counters: &Counters,
    ) {
        let (before, bytes) = (self.places.len(), self.places.bytes());
        self.places.reserve(hashes.len());
        self.places.warm(hashes.iter().map(|hash| hash.0));
        let mut at = 0;
        while at < chain.len() {
            let placed = self.runs.hold(after, &chain[at..], self.who, tiers);
            self.name(&placed, &hashes[at..at + placed.count], tiers, counters);
            at += placed.count;
            after = Some(placed.last());
        }
        counters.blocks.fetch_sub((hashes.len() + before - self.places.len()) as u64, Ordering::Relaxed);
        counters.changed_bytes(bytes, self.places.bytes());
    }

    /// Notes the engine's hashes of blocks that were placed.
    fn name(&mut self, placed: &Placed, hashes: &[EngineHash], tiers: Tiers, counters: &Counters) {
        for (nth, hash) in hashes.iter().enumerate() {
            let place = Place { run: placed.place.run, offset: placed.place.offset + nth as u16 };
            let before = placed.before.as_ref().map_or(0, |before| before[nth]);
            if before != 0 {
                self.name_again(hash.0, place, before, tiers, counters);
            } else if let Some(other) = self.places.insert(hash.0, place) {
                self.replaced(hash.0, other, counters);
            }
        }
    }

    /// Notes the engine's hash of a block that the worker held already: by this hash, or by another too.
    fn name_again(&mut self, hash: u64, place: Place, before: Tiers, tiers: Tiers, counters: &Counters) {
        let other = self.places.insert(hash, place);
        if other == Some(place) {
            if let Some(alias) = self.aliases.get_mut(&place) {
                *alias.tiers_mut(hash) |= tiers;
            }
            return;
        }
        self.aliases.entry(place).or_insert(Alias { first: before, others: Vec::new() }).others.push((hash, tiers));
        if let Some(other) = other {
            self.replaced(hash, other, counters);
        }
    }

    /// The engine gave a hash to other tokens: it no longer means the block that it meant.
    fn replaced(&mut self, hash: u64, other: Place, counters: &Counters) {
        counters.hash_collisions.fetch_add(1, Ordering::Relaxed);
        let tiers = match self.aliases.contains_key(&other) {
            true => self.release_alias(hash, other, ALL_TIERS).1,
            false => ALL_TIERS,
        };
        self.runs.release(other.run, &[other.offset], self.who, tiers);
    }

    fn remove(&mut self, hashes: &[EngineHash], tier: Tier, counters: &Counters) {
        let tiers: Tiers = 1 << tier as u8;
        let (before, bytes) = (self.places.len(), self.places.bytes());
        self.places.warm(hashes.iter().map(|hash| hash.0));
        let mut group = std::mem::take(&mut self.group);
        for hash in hashes {
            let Some(place) = self.places.remove(hash.0) else { continue };
            if !self.aliases.is_empty() && self.aliases.contains_key(&place) {
                self.places.insert(hash.0, place);
                self.remove_alias(hash.0, place, tiers);
                continue;
            }
            if group.run != place.run {
                self.remove_group(&mut group, tiers);
                group.run = place.run;
            }
            group.hashes.push(hash.0);
            group.blocks.push(place.offset);
        }
        self.remove_group(&mut group, tiers);
        self.group = group;
        self.places.shrink();
        counters.blocks.fetch_sub((before - self.places.len()) as u64, Ordering::Relaxed);
        counters.changed_bytes(bytes, self.places.bytes());
    }

    /// Removes blocks of one run, whose hashes were taken out; those that are still held in other tiers come back.
    fn remove_group(&mut self, group: &mut Group, tiers: Tiers) {
        let Group { run, hashes, blocks } = group;
        if !blocks.is_empty() {
            let is_sorted = blocks.is_sorted_by(|a, b| a >= b);
            let sorted: Cow<'_, [u16]> = if is_sorted {
                Cow::Borrowed(blocks)
            } else {
                let mut sorted = blocks.clone();
                sorted.sort_unstable_by(|a, b| b.cmp(a));
                Cow::Owned(sorted)
            };
            if !self.runs.release(*run, &sorted, self.who, tiers) {
                for (hash, offset) in hashes.iter().zip(&*blocks) {
                    let place = Place { run: *run, offset: *offset };
                    if self.runs.tiers(place, self.who) != 0 {
                        self.places.insert(*hash, place);
                    }
                }
            }
        }
        hashes.clear();
        blocks.clear();
    }

    /// Removes a block that the engine knows by other hashes, too.
    fn remove_alias(&mut self, hash: u64, place: Place, tiers: Tiers) {
        let (is_gone, tiers) = self.release_alias(hash, place, tiers);
        self.runs.release(place.run, &[place.offset], self.who, tiers);
        if is_gone {
            self.places.remove(hash);
        }
    }

    /// Takes one of a block's hashes out of tiers: whether it is in none now, and which tiers of them no other hash is in.
    fn release_alias(&mut self, hash: u64, place: Place, tiers: Tiers) -> (bool, Tiers) {
        let Some(alias) = self.aliases.get_mut(&place) else { return (true, tiers) };
        let of = alias.tiers_mut(hash);
        *of &= !tiers;
        let is_gone = *of == 0;
        alias.others.retain(|(_, tiers)| *tiers != 0);
        let left = alias.others.iter().fold(alias.first, |all, (_, tiers)| all | tiers);
        if alias.others.len() + usize::from(alias.first != 0) < 2 {
            self.aliases.remove(&place);
        }
        (is_gone, tiers & !left)
    }

    fn forget_all(self, counters: &Counters) {
        let mut runs: Vec<u32> = self.places.iter().map(|(_, place)| place.run).collect();
        runs.sort_unstable();
        runs.dedup();
        runs.into_iter().for_each(|run| self.runs.release_all(run, self.who));
        let mut blocks = self.places.len();
        counters.changed_bytes(self.places.bytes(), 0);
        if let Some(expected) = &self.expected {
            expected.runs().for_each(|run| self.runs.release_all(run, expected.who));
            blocks += expected.len();
            counters.changed_bytes(expected.bytes(), 0);
        }
        counters.blocks.fetch_sub(blocks as u64, Ordering::Relaxed);
    }
}

impl Alias {
    /// The tiers of one of the hashes; any that is not among the others is the first.
    fn tiers_mut(&mut self, hash: u64) -> &mut Tiers {
        self.others.iter_mut().find(|(of, _)| *of == hash).map_or(&mut self.first, |(_, tiers)| tiers)
    }
}

/// Blocks of one run that go together.
#[derive(Default)]
struct Group {
    run: u32,
    hashes: Vec<u64>,
    blocks: Vec<u16>,
}
