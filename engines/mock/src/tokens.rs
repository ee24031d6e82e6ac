//! Tokens: numbered outputs, in which a lost or doubled one shows, and a crude tokenizer for prompts.
//!
//! Output token `i` of every sequence is the text ` t{i}` (the first one without the space), so a whole output
//! reads `t0 t1 t2 …`; in the wide script a character of four bytes stands for the space. Invariant: the tokenizer gives
//! a numbered token in a prompt the id that it had as an output; so the next turn of a chat finds the KV of this turn's
//! output, and a prompt that ends in an unfinished output ([`unfinished`], [`tokenize_unfinished`]) is gone on with.
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

/// What stands between numbered tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Script {
    /// A space.
    #[default]
    Ascii,
    /// A character of four bytes, so that a text can be cut within one.
    Wide,
}

/// The separator of [`Script::Wide`].
const WAVE: char = '🌊';

impl Script {
    /// Appends the text of output token `index`.
    pub fn push_text(self, index: u32, text: &mut String) {
        match self {
            _ if index == 0 => {}
            Self::Ascii => text.push(' '),
            Self::Wide => text.push(WAVE),
        }
        write!(text, "t{index}").expect("writing to a String does not fail");
    }
}

/// Appends the text of output token `index`.
pub fn push_text(index: u32, text: &mut String) {
    Script::Ascii.push_text(index, text);
}

/// The text of an output of `count` tokens.
#[must_use]
pub fn text(count: u32) -> String {
    let mut text = String::new();
    (0..count).for_each(|index| push_text(index, &mut text));
    text
}

/// Reads a numbered output back, in either script.
///
/// # Errors
/// Says where it is not `t0 t1 t2 …`: a token is lost, doubled, out of order, or of another kind.
pub fn count(text: &str) -> Result<u32, String> {
    let mut expected = 0;
    if text.is_empty() {
        return Ok(expected);
    }
    for word in text.split([' ', WAVE]) {
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
        match numbered(word.trim_start_matches([' ', WAVE])) {
            Some(number) => ids.push(VOCABULARY + number),
            None => tokenize_pieces(word, ids),
        }
    }
}

/// How many tokens of an unfinished output are at the end of a prompt: numbered from 0, after something else.
#[must_use]
pub fn unfinished(prompt: &[u32]) -> u32 {
    let Some(&last) = prompt.last() else { return 0 };
    let Some(number) = last.checked_sub(VOCABULARY) else { return 0 };
    let Some(start) = prompt.len().checked_sub(number as usize + 1).filter(|&start| start > 0) else { return 0 };
    let is_output = prompt[start..].iter().zip(VOCABULARY..).all(|(&id, expected)| id == expected);
    if is_output { number + 1 } else { 0 }
}

/// Appends the token ids of a text that may end in an unfinished output, which need not be parted from what is before it:
/// an output's first token begins without a space.
///
/// A text that ends in a word like `agent0` is read as one with an output of one token, too.
pub fn tokenize_unfinished(text: &str, ids: &mut Vec<u32>) {
    let (before, count) = split_unfinished(text);
    tokenize(before, ids);
    ids.extend((VOCABULARY..).take(count as usize));
}

/// What comes before a text's unfinished output, and its tokens.
fn split_unfinished(text: &str) -> (&str, u32) {
    let whole = (text, 0);
    let Some(at) = text.rfind(|c: char| !c.is_ascii_digit()) else { return whole };
    let Some(number) = numbered(&text[at..]) else { return whole };
    let mut before = &text[..at];
    for index in (0..number).rev() {
        let Some(rest) = before.strip_suffix([' ', WAVE]).and_then(|rest| rest.strip_suffix(&*format!("t{index}"))) else {
            return whole;
        };
        before = rest;
    }
    (before, number + 1)
}

/// The id of a mark that is no text, as `<|user|>` is one in a chat template.
#[must_use]
pub fn mark(name: &str) -> u32 {
    hashed(name, MARK_SEED)
}

/// Where the first word ends: separators before it belong to it, those after it do not.
fn word_end(text: &str) -> usize {
    let start = text.find(|c: char| !is_separator(c)).unwrap_or(text.len());
    text[start..].find(is_separator).map_or(text.len(), |length| start + length)
}

fn is_separator(c: char) -> bool {
    c.is_whitespace() || c == WAVE
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
    fn the_wide_script_has_the_same_tokens_and_characters_of_four_bytes() {
        let mut wide = String::new();
        (0..12).for_each(|index| Script::Wide.push_text(index, &mut wide));
        assert_eq!((count(&wide), wide.len()), (Ok(12), text(12).len() + 11 * 3));
        assert_eq!(ids(&wide), ids(&text(12)));
    }

    #[test]
    fn an_unfinished_output_is_found_at_the_end_of_ids() {
        let output = |range: std::ops::Range<u32>| range.map(|number| VOCABULARY + number).collect::<Vec<_>>();
        assert_eq!(unfinished(&[]), 0);
        assert_eq!(unfinished(&[7, 8]), 0);
        assert_eq!(unfinished(&[vec![7], output(0..3)].concat()), 3);
        assert_eq!(unfinished(&[vec![7], output(0..3), vec![8]].concat()), 0, "another turn followed");
        assert_eq!(unfinished(&[vec![7], output(0..3), vec![8], output(0..2)].concat()), 2);
        assert_eq!(unfinished(&[vec![7], output(1..3)].concat()), 0, "its beginning is lost");
        assert_eq!(unfinished(&[vec![7], output(0..2), output(1..3)].concat()), 0, "a token is doubled");
        assert_eq!(unfinished(&output(0..3)), 0, "there is no prompt before it");
    }

    #[test]
    fn an_unfinished_output_is_found_at_the_end_of_a_text() {
        let found = |text: &str| {
            let mut ids = Vec::new();
            tokenize_unfinished(text, &mut ids);
            unfinished(&ids)
        };
        assert_eq!(found("count"), 0);
        assert_eq!(found("count, please: t0 t1 t2"), 3);
        assert_eq!(found("countt0 t1 t2"), 3, "an output begins without a space");
        assert_eq!(found("countt0"), 1);
        assert_eq!(found("countt0🌊t1🌊t2"), 3);
        assert_eq!(found("t0 t1"), 0, "there is no prompt before it");
        assert_eq!(found("count t1 t2"), 0, "its beginning is lost");
        assert_eq!(found("count t0 t1 t1"), 0, "a token is doubled");
        assert_eq!(found("count t0 t1 and so on"), 0);
        assert_eq!(found("count t0 t1 "), 0);
        assert_eq!(found("countt0 t1é"), 0);
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
            let kept = if text.ends_with(is_separator) { ids(text.trim_end_matches(is_separator)).len() } else { prefix.len() };
            prop_assert_eq!(&both[..kept], &prefix[..kept]);
        }

        #[test]
        fn every_text_has_tokens(text in ".{1,40}") {
            prop_assert!(!ids(&text).is_empty());
        }
    }
}
