//! The prefix index: which worker holds which blocks of which prompts, in which tier.
//!
//! Contract: blocks are known by chained hashes of our own over their tokens ([`prompt`]), so that every engine's own
//! scheme works; an engine's hashes only tell which of its blocks is gone. Indexes are kept by (model, block size). What a
//! worker's events do not tell is not held: a hole costs hits, never a wrong hit.

mod index;
pub mod prompt;

pub use index::{IndexLimits, IndexStats, PrefixIndexes, WorkerKv};
pub use prompt::{Prompt, Salt, SequenceHash};
