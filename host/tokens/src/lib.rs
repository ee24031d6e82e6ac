//! Tokens of prompts, as the engine will see them: what the prefix index is asked with.
//!
//! Contract: pure, and bounded in memory and time; whoever calls decides on which thread.

use std::sync::Arc;

/// A prompt's tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptTokens {
    /// The ids, or stand-ins for them.
    pub ids: Arc<[u32]>,
    /// Whether the model's tokenizer made them.
    pub is_exact: bool,
}

/// Stand-ins for the tokens of a prompt whose tokenizer is not known: four bytes each, about as many as there would be.
#[must_use]
pub fn approximate(prompt: &[u8]) -> PromptTokens {
    let ids = prompt.chunks(4).map(|bytes| bytes.iter().rev().fold(0, |id, byte| id << 8 | u32::from(*byte))).collect();
    PromptTokens { ids, is_exact: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_that_begin_alike_have_stand_ins_that_begin_alike() {
        let (a, b) = (approximate(b"aaaabbbbcc"), approximate(b"aaaabbbbdd"));
        assert_eq!((a.ids.len(), &a.ids[..2], a.ids[2] == b.ids[2]), (3, &b.ids[..2], false));
        assert!(!a.is_exact);
    }
}
