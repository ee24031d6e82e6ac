//! Prefixes: what workers hold of a request's prompt, from its tokens and the prefix index.

use std::sync::Arc;

use dynamo_host_core::{Overlap, RequestFacts, TokenCount};
use dynamo_host_index::{PrefixIndexes, Prompt, Salt};
use dynamo_host_tokens::{PromptTokens, approximate};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::kv::KvFeed;

/// What it takes to know them.
pub(crate) struct Prefixes {
    indexes: Arc<PrefixIndexes>,
    /// Whether workers whose engines do not tell are expected to hold what they were sent.
    is_approximate: bool,
}

/// Keeps stand-ins for tokens apart from tokens.
const STAND_INS: u64 = 0x5354_414e_4449_4e53;

impl Prefixes {
    pub(crate) fn new(indexes: Arc<PrefixIndexes>, is_approximate: bool) -> Self {
        Self { indexes, is_approximate }
    }

    /// Reads a request's prompt; its count of tokens is exact from then on if its tokenizer is known.
    pub(crate) fn read(&self, facts: &mut RequestFacts, body: &[u8]) -> Prompt {
        let Written { ids, cache_salt } = written(body);
        let ids = ids.map(|ids| PromptTokens { ids: ids.into(), is_exact: true });
        let PromptTokens { ids, is_exact } = ids.unwrap_or_else(|| approximate(body));
        if is_exact {
            facts.prompt = TokenCount { tokens: ids.len() as u32, exact: true };
        }
        let Salt(salt) = Salt::new(&facts.model, facts.adapter.as_deref(), cache_salt.as_deref());
        Prompt::new(Salt(if is_exact { salt } else { salt ^ STAND_INS }), ids, is_exact)
    }

    /// What the workers of its model hold of it.
    pub(crate) fn overlap(&self, facts: &RequestFacts, prompt: &Prompt) -> Arc<Overlap> {
        Arc::new(self.indexes.overlap(&facts.model, prompt))
    }

    /// A worker was sent a prompt.
    pub(crate) fn sent(&self, feed: &KvFeed, prompt: &Prompt, block_size: Option<u32>) {
        if self.is_approximate {
            feed.sent(prompt, block_size);
        }
    }
}

/// What a body says of its prompt's tokens.
#[derive(Default)]
struct Written {
    /// A prompt that is token ids already, exactly as the engine will see it.
    ids: Option<Vec<u32>>,
    cache_salt: Option<String>,
}

fn written(body: &[u8]) -> Written {
    #[derive(Deserialize)]
    struct Fields<'a> {
        #[serde(borrow, default)]
        prompt: Option<&'a RawValue>,
        #[serde(default)]
        cache_salt: Option<String>,
    }
    let Ok(Fields { prompt, cache_salt }) = serde_json::from_slice(body) else { return Written::default() };
    let ids = prompt.filter(|prompt| prompt.get().starts_with('[')).and_then(|prompt| serde_json::from_str(prompt.get()).ok());
    Written { ids: ids.filter(|ids: &Vec<u32>| !ids.is_empty()), cache_salt }
}

#[cfg(test)]
mod tests {
    use dynamo_host_core::Endpoint;

    use super::*;

    fn read(body: &str) -> (Prompt, RequestFacts) {
        let mut facts = RequestFacts::new("id", "m".to_owned(), Endpoint::Completions);
        let prompt = Prefixes::new(PrefixIndexes::new(), true).read(&mut facts, body.as_bytes());
        (prompt, facts)
    }

    #[test]
    fn a_prompt_of_token_ids_is_exact_and_kept_apart_from_stand_ins() {
        let (prompt, facts) = read(r#"{"prompt":[1,2,3,4]}"#);
        assert_eq!((&**prompt.tokens(), prompt.is_exact()), (&[1, 2, 3, 4][..], true));
        assert_eq!((facts.prompt.tokens, facts.prompt.exact), (4, true));
        for body in
            [r#"{"prompt":"text of some length"}"#, r#"{"prompt":["a","b"]}"#, r#"{"prompt":[[1],[2]]}"#, r#"{"prompt":[]}"#]
        {
            assert!(!read(body).0.is_exact(), "{body}");
        }
        let stand_ins = Prompt::new(Salt::new("m", None, None), read("aaaabbbb").0.tokens().clone(), true);
        assert_ne!(read("aaaabbbb").0.hashes(2), stand_ins.hashes(2));
    }

    #[test]
    fn a_salt_keeps_equal_prompts_apart() {
        let (plain, salted) = (read(r#"{"prompt":[1,2]}"#).0, read(r#"{"prompt":[1,2],"cache_salt":"t"}"#).0);
        assert_ne!(plain.hashes(2), salted.hashes(2));
        let as_event = Prompt::new(Salt::new("m", None, Some("t")), [1, 2].into(), true);
        assert_eq!(as_event.hashes(2), salted.hashes(2));
    }
}
