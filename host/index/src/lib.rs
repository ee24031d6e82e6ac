//! The prefix index: which worker holds which blocks of which prompts, in which tier.
//!
//! Contract: blocks are known by chained hashes of our own over their tokens ([`prompt`]), so that every engine's own
//! scheme works; an engine's hashes only tell which of its blocks is gone. Indexes are kept by (model, block size). What a
//! worker's events do not tell is not held: a hole costs hits, never a wrong hit.
//!
//! An overlap is the longest chain of a prompt's leading blocks that a worker holds, each counted in the nearest tier that holds
//! it. Only a block that is held in no tier ends the chain: a device block after a host block still counts, as the engine
//! loads the one and then has the other.
//!
//! Inside: `runs` is the shared part, read without locks; `worker` one worker's part, with the engine's hashes (`places`), or with
//! what is expected of an engine without events (`expected`).

mod expected;
mod heads;
mod index;
mod places;
pub mod prompt;
mod run;
mod runs;
mod worker;

pub use index::{BYTES_PER_BLOCK, IndexLimits, IndexStats, PrefixIndexes};
pub use prompt::{BlockHash, Prompt, Salt, SequenceHash, block_hashes, chain, sequence_hashes};
pub use worker::{DEFAULT_CAPACITY_TOKENS, HashedBlocks, WorkerKv};
