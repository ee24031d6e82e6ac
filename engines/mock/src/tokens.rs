//! Tokens: numbered outputs, in which a lost or doubled one shows, and a crude tokenizer for prompts.
//!
//! Output token `i` of every sequence is the text ` t{i}` (the first one without the space), so a whole output
//! reads `t0 t1 t2 …`. Invariant: the tokenizer gives a numbered token in a prompt the id that it had as an
//! output; so the next turn of a chat finds the KV of this turn's output.
//!
//! Ids below [`VOCABULARY`] are hashes of pieces of text, the same in every run and on every host; those from
//! there on are the numbered tokens. There is no way back from a hashed id to its text.

use std::fmt::Write;

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Ids of hashed pieces are below this; numbered token `i` is `VOCABULARY + i`.
pub const VOCABULARY: u32 = 131_072;

/// Bytes of a hashed piece at most: pieces of English come out at about four. No character has more.
const PIECE_BYTES: usize = 6;

/// Seeds keep a piece of text apart from a mark with the same name.
const TEXT_SEED: u64 = 0;
const MARK_SEED: u64 = 1;

/// Appends the text of output token `index`.
pub fn push_text(index: u32, text: &mut String) {
    let space = if index == 0 { "" } else { " " };
    write!(text, "{space}t{index}").expect("writing to a String does not fail");
}

/// The text of an output of `count` tokens.
#[must_use]
pub fn text(count: u32) -> String {
    let mut text = String::new();
    (0..count).for_each(|index| push_text(index, &mut text));
    text
}

/// Reads a numbered output back.
///
/// # Errors
/// Says where it is not `t0 t1 t2 …`: a token is lost, doubled, out of order, or of another kind.
pub fn count(text: &str) -> Result<u32, String> {
    let mut expected = 0;
    if text.is_empty() {
        return Ok(expected);
    }
    for word in text.split(' ') {
        if numbered(word) != Some(expected) {
            return Err(format!("expected t{expected}, found {word:?}"));
        }
        expected += 1;
    }
    Ok(expected)
}

/// Appends the token ids of a text. What follows a word never changes the ids before it.
pub fn tokenize(text: &str, ids: &mut Vec<u32>) {
    let mut rest = text;
    while !rest.is_empty() {
        let (word, after) = rest.split_at(word_end(rest));
        rest = after;
        match numbered(word.trim_start_matches(' ')) {
            Some(number) => ids.push(VOCABULARY + number),
            None => tokenize_pieces(word, ids),
        }
    }
}

/// The id of a mark that is no text, as `<|user|>` is one in a chat template.
#[must_use]
pub fn mark(name: &str) -> u32 {
    hashed(name, MARK_SEED)
}

/// Where the first word ends: spaces before it belong to it, white space after it does not.
fn word_end(text: &str) -> usize {
    let start = text.find(|c: char| !c.is_whitespace()).unwrap_or(text.len());
    text[start..].find(char::is_whitespace).map_or(text.len(), |length| start + length)
}

fn numbered(word: &str) -> Option<u32> {
    let digits = word.strip_prefix('t')?;
    let canonical = digits == "0" || !digits.starts_with(['0', '+']);
    canonical.then(|| digits.parse().ok()).flatten().filter(|&number| number < u32::MAX - VOCABULARY)
}

fn tokenize_pieces(mut word: &str, ids: &mut Vec<u32>) {
    while !word.is_empty() {
        let (piece, after) = word.split_at(word.floor_char_boundary(PIECE_BYTES));
        ids.push(hashed(piece, TEXT_SEED));
        word = after;
    }
}

fn hashed(piece: &str, seed: u64) -> u32 {
    (xxh3_64_with_seed(piece.as_bytes(), seed) % u64::from(VOCABULARY)) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ids(text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        tokenize(text, &mut ids);
        ids
    }

    #[test]
    fn an_output_is_numbered_and_tokenizes_to_its_own_ids() {
        assert_eq!(text(3), "t0 t1 t2");
        assert_eq!(ids(&text(3)), [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2]);
        assert_eq!(count(&text(12)), Ok(12));
    }

    #[test]
    fn a_lost_or_doubled_token_is_found() {
        assert_eq!(count("t0 t2"), Err("expected t1, found \"t2\"".to_owned()));
        assert_eq!(count("t0 t1 t1"), Err("expected t2, found \"t1\"".to_owned()));
        assert_eq!(count("t0 t01"), Err("expected t1, found \"t01\"".to_owned()));
        assert_eq!(count("hello"), Err("expected t0, found \"hello\"".to_owned()));
    }

    #[test]
    fn tokenizing_is_stable_and_about_four_bytes_a_token() {
        let text = "You are a helpful assistant who answers questions about the weather in many cities of the world.";
        assert_eq!(ids(text), ids(text));
        assert!((text.len() / 6..text.len() / 2).contains(&ids(text).len()), "{}", ids(text).len());
        assert_ne!(mark("user"), ids("user")[0]);
    }

    proptest! {
        #[test]
        fn appended_words_change_nothing_before_them(text in any::<String>(), more in "[a-zäöü ]{0,20}") {
            let both = ids(&format!("{text}\n{more}"));
            let prefix = ids(&text);
            // White space at the end of the text joins what follows it.
            let kept = if text.ends_with(char::is_whitespace) { ids(text.trim_end()).len() } else { prefix.len() };
            prop_assert_eq!(&both[..kept], &prefix[..kept]);
        }

        #[test]
        fn every_text_has_tokens(text in ".{1,40}") {
            prop_assert!(!ids(&text).is_empty());
        }
    }
}
