//! Runs of tokens that are known already, by their text.
//!
//! Contract: bounded in bytes; what is used least goes first. A run costs four bytes a token and 128. Threads share
//! it in shards, each behind a lock that is held for a look-up only. A run is found by 128 bits of hash, seeded anew in every
//! process, and by its text's length, so that nobody can make a text that finds another's run.

use std::{
    hash::{BuildHasher, RandomState},
    sync::Arc,
};

use quick_cache::{Weighter, sync::Cache};
use xxhash_rust::xxh3::xxh3_128_with_seed;

/// What a run costs beside its tokens: hash, length, pointers, counters, and its place in the cache.
pub(crate) const RUN_BYTES: u64 = 128;

/// A text, with the tokenizer that it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RunKey {
    hash: u128,
    len: u32,
}

#[derive(Clone, Debug)]
struct Cost;

impl Weighter<RunKey, Arc<[u32]>> for Cost {
    fn weight(&self, _key: &RunKey, run: &Arc<[u32]>) -> u64 {
        RUN_BYTES + 4 * run.len() as u64
    }
}

/// Known runs of all tokenizers of a host.
#[derive(Debug)]
pub struct RunCache {
    runs: Cache<RunKey, Arc<[u32]>, Cost>,
    seed: u64,
}

impl RunCache {
    /// What a cache is given unless someone says otherwise: about 15 million tokens.
    pub const DEFAULT_BYTES: u64 = 64 << 20;

    /// An empty one that will hold so many bytes at most.
    #[must_use]
    pub fn new(bytes: u64) -> Arc<Self> {
        // Runs are of a few hundred tokens.
        let runs = Cache::with_weighter((bytes / 1024) as usize, bytes, Cost);
        Arc::new(Self { runs, seed: RandomState::new().hash_one(0u8) })
    }

    /// Bytes that it holds now.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.runs.weight()
    }

    pub(crate) fn key(&self, tokenizer: u64, text: &str) -> RunKey {
        let hash = xxh3_128_with_seed(text.as_bytes(), self.seed ^ tokenizer);
        RunKey { hash, len: text.len() as u32 }
    }

    pub(crate) fn get(&self, key: RunKey) -> Option<Arc<[u32]>> {
        self.runs.get(&key)
    }

    pub(crate) fn insert(&self, key: RunKey, run: Arc<[u32]>) {
        self.runs.insert(key, run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stays_within_its_bytes_and_keeps_what_is_used() {
        let cache = RunCache::new(1 << 20);
        let often = cache.key(1, "often");
        cache.insert(often, [7].into());
        for number in 0..20_000u32 {
            let key = cache.key(1, &number.to_string());
            cache.insert(key, vec![number; 100].into());
            assert_eq!(cache.get(often).as_deref(), Some(&[7][..]), "after {number}");
        }
        assert!(cache.bytes() <= 1 << 20 && cache.bytes() > 1 << 19, "{}", cache.bytes());
        assert!(cache.get(cache.key(2, "often")).is_none(), "another tokenizer's");
    }
}
