//! Prefixes: what workers hold of a request's prompt, from its tokens and the prefix index.

use std::sync::Arc;

use bytes::Bytes;
use dynamo_host_core::{Endpoint, Overlap, RequestFacts, TokenCount};
use dynamo_host_index::{PrefixIndexes, Prompt, Salt};

use crate::{
    kv::KvFeed,
    roster::Snapshot,
    tokenize::{Tokenized, Tokenizing},
};

/// What it takes to know them.
pub(crate) struct Prefixes {
    indexes: Arc<PrefixIndexes>,
    /// Whether workers whose engines do not tell are expected to hold what they were sent.
    is_approximate: bool,
    tokenizing: Tokenizing,
}

/// Keeps stand-ins for tokens apart from tokens.
const STAND_INS: u64 = 0x5354_414e_4449_4e53;

impl Prefixes {
    pub(crate) fn new(indexes: Arc<PrefixIndexes>, is_approximate: bool, tokenizing: Tokenizing) -> Self {
        Self { indexes, is_approximate, tokenizing }
    }

    /// Reads a request's prompt; its count of tokens is exact from then on if its tokenizer is known.
    pub(crate) async fn read(&self, facts: &mut RequestFacts, body: &Bytes, snapshot: &Snapshot) -> Prompt {
        let tokenized = self.tokenizing.tokenize(facts, body, snapshot).await;
        if tokenized.is_exact {
            facts.prompt = TokenCount { tokens: tokenized.ids.len() as u32, exact: true };
        }
        prompt(facts, tokenized)
    }

    /// What the workers of its model hold of it, in tokens as the prompt is counted: stand-ins are of all that the body says,
    /// and the count of the text.
    pub(crate) fn overlap(&self, facts: &RequestFacts, prompt: &Prompt) -> Arc<Overlap> {
        let looked_up = prompt.tokens().len() as u32;
        Arc::new(self.indexes.overlap(&facts.model, prompt).in_proportion(facts.prompt.tokens, looked_up))
    }

    /// A worker has computed a prompt.
    pub(crate) fn taken_up(&self, endpoint: Endpoint, feed: &KvFeed, prompt: &Prompt, block_size: Option<u32>) {
        // What is only counted, or embedded, is not kept.
        let is_kept = !matches!(endpoint, Endpoint::CountTokens | Endpoint::Embeddings);
        if self.is_approximate && is_kept {
            feed.taken_up(prompt, block_size);
        }
    }
}

fn prompt(facts: &RequestFacts, tokenized: Tokenized) -> Prompt {
    let Tokenized { ids, is_exact, cache_salt } = tokenized;
    let Salt(salt) = Salt::new(&facts.model, facts.adapter.as_deref(), cache_salt.as_deref());
    Prompt::new(Salt(if is_exact { salt } else { salt ^ STAND_INS }), ids, is_exact)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(is_exact: bool, cache_salt: Option<&str>) -> Arc<[u64]> {
        let facts = RequestFacts::new("id", "m".to_owned(), Endpoint::Completions);
        let cache_salt = cache_salt.map(str::to_owned);
        prompt(&facts, Tokenized { ids: [1, 2, 3, 4].into(), is_exact, cache_salt }).hashes(2)
    }

    #[test]
    fn tokens_are_found_by_the_hashes_of_events_and_kept_apart_from_stand_ins() {
        let as_event = |cache_salt| Prompt::new(Salt::new("m", None, cache_salt), [1, 2, 3, 4].into(), true).hashes(2);
        assert_eq!(hashes(true, None), as_event(None));
        assert_eq!(hashes(true, Some("t")), as_event(Some("t")));
        assert_ne!(hashes(true, None), hashes(true, Some("t")));
        assert_ne!(hashes(false, None), hashes(true, None));
    }
}
