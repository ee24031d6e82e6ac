//! Prefixes: what workers hold of a request's prompt, from its tokens and the prefix index.

use std::sync::Arc;

use bytes::Bytes;
use dynamo_host_core::{Overlap, RequestFacts, TokenCount};
use dynamo_host_index::{PrefixIndexes, Prompt, Salt};

use crate::{
    roster::Snapshot,
    tokenize::{Tokenized, Tokenizing},
};

/// What it takes to know them.
pub(crate) struct Prefixes {
    indexes: Arc<PrefixIndexes>,
    tokenizing: Tokenizing,
}

impl Prefixes {
    pub(crate) fn new(indexes: Arc<PrefixIndexes>, tokenizing: Tokenizing) -> Self {
        Self { indexes, tokenizing }
    }

    /// Reads a request's prompt; its count of tokens is exact from then on if its tokenizer is known.
    pub(crate) async fn read(&self, facts: &mut RequestFacts, body: &Bytes, snapshot: &Snapshot) -> Prompt {
        let Tokenized { ids, is_exact, cache_salt } = self.tokenizing.tokenize(facts, body, snapshot).await;
        if is_exact {
            facts.prompt = TokenCount { tokens: ids.len() as u32, exact: true };
        }
        Prompt::new(Salt::new(&facts.model, facts.adapter.as_deref(), cache_salt.as_deref()), ids, is_exact)
    }

    /// What the workers of its model hold of it.
    pub(crate) fn overlap(&self, facts: &RequestFacts, prompt: &Prompt) -> Arc<Overlap> {
        Arc::new(self.indexes.overlap(&facts.model, prompt))
    }
}
