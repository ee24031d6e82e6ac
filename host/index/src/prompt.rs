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

/// Hashes of the whole blocks of `tokens`; `parent` is the hash of the block before them, or the salt.
#[must_use]
pub fn sequence_hashes(parent: u64, block_size: u32, tokens: &[u32]) -> Vec<SequenceHash> {
    if block_size == 0 {
        return Vec::new();
    }
    let mut parent = parent;
    // The parent lies before the tokens: a seed would have xxh3 derive its secret anew for each block.
    let mut bytes = vec![0; 8 + block_size as usize * 4];
    tokens
        .chunks_exact(block_size as usize)
        .map(|block| {
            bytes[..8].copy_from_slice(&parent.to_le_bytes());
            for (place, token) in bytes[8..].as_chunks_mut().0.iter_mut().zip(block) {
                *place = token.to_le_bytes();
            }
            parent = xxh3_64(&bytes);
            parent
        })
        .collect()
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
