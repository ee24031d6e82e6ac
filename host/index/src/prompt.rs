//! A prompt as the index knows it: its tokens, and the hashes of its blocks, chained over the prefix.

use std::sync::{Arc, Mutex, PoisonError};

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// Hash of a block's tokens and of all before it, equal on every host.
pub type SequenceHash = u64;

/// What keeps equal tokens apart: model, LoRA adapter and the client's cache salt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Salt(pub u64);

impl Salt {
    /// The salt of a request or of an engine's blocks.
    #[must_use]
    pub fn new(model: &str, adapter: Option<&str>, cache_salt: Option<&str>) -> Self {
        let mut seed = xxh3_64_with_seed(model.as_bytes(), 0);
        for (mark, part) in [(1, adapter), (2, cache_salt)] {
            if let Some(part) = part {
                seed = xxh3_64_with_seed(part.as_bytes(), seed ^ mark);
            }
        }
        Self(seed)
    }
}

/// Hash of a block's tokens alone.
pub type BlockHash = u64;

/// Hashes of the whole blocks of `tokens`, each by itself.
#[must_use]
pub fn block_hashes(block_size: u32, tokens: &[u32]) -> Vec<BlockHash> {
    if block_size == 0 {
        return Vec::new();
    }
    let mut bytes = vec![0; block_size as usize * 4];
    let hash = |block: &[u32]| {
        for (place, token) in bytes.as_chunks_mut().0.iter_mut().zip(block) {
            *place = token.to_le_bytes();
        }
        xxh3_64(&bytes)
    };
    tokens.chunks_exact(block_size as usize).map(hash).collect()
}

/// Chains the hashes of consecutive blocks; `parent` is the hash of the block before them, or the salt.
#[must_use]
pub fn chain(parent: u64, blocks: &[BlockHash]) -> Vec<SequenceHash> {
    chained(parent, blocks).collect()
}

pub(crate) fn chained(mut parent: u64, blocks: &[BlockHash]) -> impl ExactSizeIterator<Item = SequenceHash> {
    blocks.iter().map(move |block| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&parent.to_le_bytes());
        bytes[8..].copy_from_slice(&block.to_le_bytes());
        parent = xxh3_64(&bytes);
        parent
    })
}

/// Hashes of the whole blocks of `tokens`; `parent` is the hash of the block before them, or the salt.
#[must_use]
pub fn sequence_hashes(parent: u64, block_size: u32, tokens: &[u32]) -> Vec<SequenceHash> {
    chain(parent, &block_hashes(block_size, tokens))
}

/// A prompt's tokens, hashed once for each block size that is asked for.
#[derive(Debug)]
pub struct Prompt {
    salt: Salt,
    tokens: Arc<[u32]>,
    is_exact: bool,
    hashes: Mutex<Vec<(u32, Arc<[SequenceHash]>)>>,
}

impl Prompt {
    /// Of token ids; `is_exact` if the model's tokenizer made them.
    #[must_use]
    pub fn new(salt: Salt, tokens: Arc<[u32]>, is_exact: bool) -> Self {
        Self { salt, tokens, is_exact, hashes: Mutex::default() }
    }

    /// Of blocks of one size that are hashed already ([`block_hashes`]): it is known in no other size, and its tokens are not.
    #[must_use]
    pub fn of_blocks(salt: Salt, block_size: u32, blocks: &[BlockHash]) -> Self {
        let hashes = Mutex::new(vec![(block_size, chain(salt.0, blocks).into())]);
        Self { salt, tokens: Arc::new([]), is_exact: true, hashes }
    }

    /// The same with more tokens behind it; they are exact if its own are.
    #[must_use]
    pub fn followed_by(&self, tokens: &[u32]) -> Self {
        Self::new(self.salt, self.tokens.iter().chain(tokens).copied().collect(), self.is_exact)
    }

    /// Its tokens.
    #[must_use]
    pub fn tokens(&self) -> &Arc<[u32]> {
        &self.tokens
    }

    /// Whether the model's tokenizer made them, so that engines' events speak of the same ones.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.is_exact
    }

    /// Hashes of its whole blocks.
    #[must_use]
    pub fn hashes(&self, block_size: u32) -> Arc<[SequenceHash]> {
        let mut known = self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, hashes)) = known.iter().find(|(of, _)| *of == block_size) {
            return Arc::clone(hashes);
        }
        let hashes: Arc<[SequenceHash]> = sequence_hashes(self.salt.0, block_size, &self.tokens).into();
        known.push((block_size, Arc::clone(&hashes)));
        hashes
    }
}
