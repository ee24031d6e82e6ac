//! Sequences: one prompt and its output, as the engine schedules it.

use std::{sync::Arc, time::Duration};

use super::{
    cache::{BlockCache, BlockHash, BlockId, block_hash},
    profile::Profile,
};

/// A sequence within one engine; later ones have greater ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub(super) u64);

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model was done, or a stop string came.
    Stop,
    /// The limit of tokens was reached.
    Length,
}

impl FinishReason {
    /// Its name in replies and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// What is submitted to an engine.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// Token ids of the prompt, at least one.
    pub prompt: Arc<[u32]>,
    /// Token ids of the output are this, this + 1, …
    pub first_output_token: u32,
    /// How many tokens are generated, at least one.
    pub output_tokens: u32,
    /// What the last of them reports.
    pub finish: FinishReason,
    /// Keeps apart what must not share KV blocks (tenants, adapters); 0 if nothing.
    pub salt: u64,
    /// Whether its KV stays when it has finished, until [`release`](super::EngineModel::release): another engine goes on from it.
    pub hold: bool,
    /// Whether the KV of its prompt comes from another engine: it is a [`Fetch`](super::Fetch) first.
    pub remote: bool,
}

/// One token that a step generated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Of which sequence.
    pub sequence: SequenceId,
    /// Its place in the output, from 0.
    pub index: u32,
    /// Its id.
    pub token: u32,
    /// Prompt tokens that were cached when the sequence was first admitted.
    pub cached_tokens: u32,
    /// On the last token of a sequence: why it ended.
    pub finish: Option<FinishReason>,
}

/// A sequence that an engine can never run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// There is nothing to compute.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// There is nothing to generate.
    #[error("no output token is asked for")]
    NoOutput,
    /// It does not fit.
    #[error("{tokens} tokens of prompt and output are more than max_model_len={max_model_len}")]
    TooLong {
        /// Prompt and output.
        tokens: u64,
        /// What fits.
        max_model_len: u32,
    },
}

/// A sequence in an engine.
///
/// Invariants: `blocks` cover at least `computed + scheduled` tokens; the first `stored` of them are in the cache
/// under the first `stored` of `hashes`.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) id: SequenceId,
    pub(super) sequence: Sequence,
    pub(super) submitted: Duration,
    pub(super) last_token: Duration,
    /// Tokens generated so far.
    pub(super) generated: u32,
    /// Tokens whose KV is computed.
    pub(super) computed: u32,
    /// Tokens that the current step computes.
    pub(super) scheduled: u32,
    /// Whether the known tokens have not all been computed since admission.
    pub(super) prefilling: bool,
    /// Set at first admission.
    pub(super) cached_tokens: Option<u32>,
    /// Prompt tokens whose KV was fetched.
    pub(super) fetched_tokens: u32,
    /// Whether the KV of its prompt is still to be fetched.
    pub(super) awaits_kv: bool,
    /// Whether it has never had a place among those that run.
    pub(super) is_new: bool,
    pub(super) blocks: Vec<BlockId>,
    hashes: Vec<BlockHash>,
    stored: usize,
}

impl Live {
    pub(super) fn new(id: SequenceId, sequence: Sequence, submitted: Duration) -> Self {
        Self {
            id,
            awaits_kv: sequence.remote,
            is_new: true,
            fetched_tokens: 0,
            sequence,
            submitted,
            last_token: submitted,
            generated: 0,
            computed: 0,
            scheduled: 0,
            prefilling: true,
            cached_tokens: None,
            blocks: Vec::new(),
            hashes: Vec::new(),
            stored: 0,
        }
    }

    /// Tokens whose ids are known: prompt and output so far.
    pub(super) fn known(&self) -> u32 {
        self.sequence.prompt.len() as u32 + self.generated
    }

    /// Tries to get KV blocks for all known tokens, reusing what is cached; at least one token stays to be computed.
    /// Returns whether there was room.
    pub(super) fn admit(&mut self, cache: &mut BlockCache, profile: &Profile) -> bool {
        self.hash_until((self.known() / profile.block_size) as usize, profile.block_size);
        let reusable = ((self.known() - 1) / profile.block_size) as usize;
        let Some(cached) = cache.admit(&self.hashes[..reusable], profile.blocks_for(self.known()), &mut self.blocks) else {
            return false;
        };
        self.stored = cached;
        self.computed = cached as u32 * profile.block_size;
        self.prefilling = true;
        true
    }

    /// Schedules `tokens` more tokens for the current step and makes the blocks that they fill known. Like vLLM,
    /// at the start of the step: whoever is admitted into the same step shares them.
    pub(super) fn schedule(&mut self, tokens: u32, cache: &mut BlockCache, profile: &Profile) {
        self.scheduled = tokens;
        self.store_until(self.computed + tokens, cache, profile);
    }

    /// The KV of all known tokens is there, from elsewhere. The last of them is computed once more, for what comes after it.
    pub(super) fn arrived(&mut self, cache: &mut BlockCache, profile: &Profile) {
        self.store_until(self.known(), cache, profile);
        self.fetched_tokens = self.known() - self.computed;
        self.computed = self.known() - 1;
        self.prefilling = false;
    }

    /// Makes the full blocks of the first `tokens` tokens known.
    fn store_until(&mut self, tokens: u32, cache: &mut BlockCache, profile: &Profile) {
        let full = (tokens / profile.block_size) as usize;
        self.hash_until(full, profile.block_size);
        while self.stored < full {
            let at = self.stored;
            let parent = at.checked_sub(1).map(|before| self.hashes[before]);
            let (sequence, block_size) = (&self.sequence, profile.block_size);
            self.blocks[at] = cache.store(self.blocks[at], self.hashes[at], parent, |all| {
                let start = at as u32 * block_size;
                all.extend((start..start + block_size).map(|position| sequence.token(position)));
            });
            self.stored += 1;
        }
    }

    /// Gives up the KV; what was generated stays, and will be computed again like a prompt.
    pub(super) fn give_up_blocks(&mut self, cache: &mut BlockCache) {
        cache.release(&mut self.blocks);
        self.computed = 0;
        self.scheduled = 0;
        self.stored = 0;
    }

    fn hash_until(&mut self, blocks: usize, block_size: u32) {
        let mut tokens = Vec::new();
        while self.hashes.len() < blocks {
            let parent = self.hashes.last().copied().unwrap_or(self.sequence.salt);
            let start = self.hashes.len() * block_size as usize;
            let hash = match self.sequence.prompt.get(start..start + block_size as usize) {
                Some(block) => block_hash(parent, block),
                None => {
                    tokens.clear();
                    let start = start as u32;
                    tokens.extend((start..start + block_size).map(|position| self.sequence.token(position)));
                    block_hash(parent, &tokens)
                }
            };
            self.hashes.push(hash);
        }
    }
}

impl Sequence {
    /// The id at a position of prompt and output.
    fn token(&self, position: u32) -> u32 {
        match self.prompt.get(position as usize) {
            Some(&token) => token,
            None => self.output_token(position - self.prompt.len() as u32),
        }
    }

    /// The id of an output token.
    pub(super) fn output_token(&self, index: u32) -> u32 {
        self.first_output_token.wrapping_add(index)
    }

    pub(super) fn check(&self, profile: &Profile) -> Result<(), SubmitError> {
        if self.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if self.output_tokens == 0 {
            return Err(SubmitError::NoOutput);
        }
        let tokens = self.prompt.len() as u64 + u64::from(self.output_tokens);
        if tokens > u64::from(profile.max_model_len) {
            return Err(SubmitError::TooLong { tokens, max_model_len: profile.max_model_len });
        }
        Ok(())
    }
}
