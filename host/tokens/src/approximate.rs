//! Stand-ins for the tokens of a prompt whose tokenizer is not known.
//!
//! Contract: requests whose prompts begin alike have stand-ins that begin alike, whatever else their bodies say: a chat's
//! next turn continues those of the turn before it.

use dynamo_host_core::Endpoint;

use crate::{PromptTokens, prompt::Fields};

/// Bytes of one stand-in: about as many as a token's.
const BYTES: usize = 4;

/// Bytes of a prompt that are looked at; the rest of a longer one counts for nothing. As many stand-ins as a worker is taken
/// to hold tokens, when it does not say.
const MAX_BYTES: usize = 1 << 20;

/// Stand-ins for the tokens of a request's prompt: four bytes each of its JSON as it is written.
pub(crate) fn approximate(endpoint: Endpoint, fields: &Fields<'_>) -> PromptTokens {
    let parts: &[&str] = match endpoint {
        Endpoint::Completions => &["prompt"],
        Endpoint::Embeddings => &["input"],
        Endpoint::ChatCompletions => &["tools", "messages"],
        Endpoint::Responses => &["instructions", "tools", "input"],
        Endpoint::Messages | Endpoint::CountTokens => &["system", "tools", "messages"],
    };
    let raw = |name: &&str| fields.get(name).unwrap_or_default();
    let mut bytes = Vec::new();
    for part in parts.iter().map(raw) {
        // How a list or a string ends is not how its continuation goes on.
        let part = part.strip_suffix([']', '"']).unwrap_or(part).as_bytes();
        bytes.extend_from_slice(&part[..part.len().min(MAX_BYTES - bytes.len())]);
    }
    let ids = bytes.chunks(BYTES).map(|chunk| chunk.iter().rev().fold(0, |id, byte| id << 8 | u32::from(*byte))).collect();
    PromptTokens { ids, is_exact: false }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Asked;

    fn chat(body: &str) -> Vec<u32> {
        let tokens = Asked::of(Endpoint::ChatCompletions, body.as_bytes()).approximate();
        assert!(!tokens.is_exact);
        tokens.ids.to_vec()
    }

    #[test]
    fn a_chats_next_turn_continues_the_stand_ins_of_the_turn_before_it() {
        let first = chat(r#"{"model":"m","max_tokens":5,"messages":[{"role":"user","content":"a long question"}]}"#);
        let next = chat(
            r#"{"stream":true,"messages":[{"role":"user","content":"a long question"},{"role":"assistant","content":"yes"}],"model":"m"}"#,
        );
        let alike = first.len() - 1;
        assert!(alike > 8 && next.len() > first.len());
        assert_eq!(first[..alike], next[..alike]);
    }

    #[test]
    fn another_prompt_has_other_stand_ins_and_no_prompt_has_none() {
        let of_body = |body: &[u8]| Asked::of(Endpoint::Completions, body).approximate().ids;
        let of = |text: &str| of_body(format!(r#"{{"prompt":"{text}"}}"#).as_bytes());
        assert_eq!(of("aaabbbbcccc")[..2], of("aaabbbbdddd")[..2]);
        assert_ne!(of("aaabbbbcccc"), of("aaabbbbdddd"));
        assert!(of_body(b"{}").is_empty() && of_body(b"\xff").is_empty());
    }
}
