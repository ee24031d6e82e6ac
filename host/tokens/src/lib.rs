//! Tokens of prompts, as the engine will see them: what the prefix index is asked with.
//!
//! Contract: pure but for the files that [`Tokenizer::load`] reads, and bounded in memory and time; whoever calls decides on
//! which thread. Ids that are called exact are those that vLLM computes for the same body (`prompt` has the rules, read in
//! vLLM 0.32 and Transformers 5); where one cannot know, they are called something else.
//!
//! The only crate with `tokenizers` and `minijinja`.

mod approximate;
mod cut;
mod error;
mod files;
mod json;
mod prompt;
mod runs;
mod template;
mod tokenizer;

use std::sync::Arc;

pub use error::{PromptError, TokenizerError};
pub use prompt::Asked;
pub use runs::RunCache;
pub use tokenizer::{Begun, Tokenizer};

/// A prompt's tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptTokens {
    /// The ids, or stand-ins for them.
    pub ids: Arc<[u32]>,
    /// Whether they are the ones that the engine computes.
    pub is_exact: bool,
}
