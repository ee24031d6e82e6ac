//! Prefixes: what workers hold of a request's prompt, from its tokens and the prefix index.

use std::sync::Arc;

use dynamo_host_core::{Overlap, RequestFacts, TokenCount};
use dynamo_host_index::{PrefixIndexes, Prompt, Salt};
use dynamo_host_tokens::{PromptTokens, approximate};

/// What it takes to know them.
pub(crate) struct Prefixes {
    indexes: Arc<PrefixIndexes>,
}

impl Prefixes {
    pub(crate) fn new(indexes: Arc<PrefixIndexes>) -> Self {
        Self { indexes }
    }

    /// Reads a request's prompt; its count of tokens is exact from then on if its tokenizer is known.
    pub(crate) fn read(&self, facts: &mut RequestFacts, body: &[u8]) -> Prompt {
        let PromptTokens { ids, is_exact } = approximate(body);
        if is_exact {
            facts.prompt = TokenCount { tokens: ids.len() as u32, exact: true };
        }
        Prompt::new(Salt::new(&facts.model, facts.adapter.as_deref(), None), ids, is_exact)
    }

    /// What the workers of its model hold of it.
    pub(crate) fn overlap(&self, facts: &RequestFacts, prompt: &Prompt) -> Arc<Overlap> {
        Arc::new(self.indexes.overlap(&facts.model, prompt))
    }
}
