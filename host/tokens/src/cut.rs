//! Where a text may be cut so that the tokens of its pieces, one after the other, are those of the whole.
//!
//! Contract: cuts are found from the left, by what is before them and the one character after. A text that grows at its end
//! keeps its cuts, so that the runs of its beginning are known already.
//!
//! Two kinds of places are sound.
//! - *Before an added token* (`<|im_start|>`): a tokenizer finds those before it does anything else, and what is between
//!   them is a text of its own, in which only the very first one is told apart. Since each piece then begins with such a
//!   token, none but the first is the first. Not before tokens that take the space on their left, that must stand alone, or
//!   that are found in normalized text: those look back.
//! - *Within a text*, between an ASCII letter and a space, and after a lone line break before a letter or digit, if the
//!   pre-tokenizer is one of [`PATTERNS`]. None of their alternatives goes on from a letter to a space, or from a line break
//!   to a letter or digit; none looks behind; and what ends at these places ends the same way at the end of a text: only
//!   `\s+(?!\S)` looks ahead, of which one line break alone gives the same piece either way. Normal forms do not join across
//!   them. Other pre-tokenizers, and none at all (SentencePiece), are not cut there.

use aho_corasick::{AhoCorasick, MatchKind};
use memchr::memchr2_iter;
use serde_json::Value;
use tokenizers::{AddedToken, ModelWrapper, Tokenizer};

/// Bytes of a run before it is cut at an added token: shorter ones cost more to find than to compute.
const MIN_BYTES: usize = 256;

/// Bytes of a run before it is cut within a text: what is computed again of a prompt that has grown.
const MIN_TEXT_BYTES: usize = 1024;

/// Regular expressions of pre-tokenizers of which it is proven (above) and tested that texts can be cut.
const PATTERNS: &[&str] = &[
    // Llama 3, and whoever took over OpenAI's cl100k.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // Qwen 2 and 3.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // Qwen 3.5.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // Llama 4, gpt-oss: OpenAI's o200k.
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // DeepSeek V3 and R1: three in a row.
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

/// Where the texts of one tokenizer may be cut.
#[derive(Debug)]
pub(crate) struct Cuts {
    /// All added tokens that are found in a text as it is.
    tokens: Option<AhoCorasick>,
    /// Before which of them, by pattern.
    is_cut: Vec<bool>,
    within_text: bool,
    /// [`MIN_BYTES`] and [`MIN_TEXT_BYTES`], but for tests.
    least: (usize, usize),
}

impl Cuts {
    pub(crate) fn new(tokenizer: &Tokenizer) -> Self {
        let added: Vec<AddedToken> = tokenizer.get_added_tokens_decoder().into_values().collect();
        let raw: Vec<&AddedToken> = added.iter().filter(|token| !token.normalized && !token.content.is_empty()).collect();
        let tokens = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(raw.iter().map(|token| &token.content));
        Self {
            is_cut: raw.iter().map(|token| is_cut(token)).collect(),
            tokens: tokens.ok(),
            within_text: added.iter().all(leaves_texts_alone) && is_known(tokenizer),
            least: (MIN_BYTES, MIN_TEXT_BYTES),
        }
    }

    /// The same, cutting wherever it may.
    #[cfg(test)]
    pub(crate) fn everywhere(tokenizer: &Tokenizer) -> Self {
        Self { least: (1, 1), ..Self::new(tokenizer) }
    }

    /// Whether texts are cut where there is no added token.
    #[cfg(test)]
    pub(crate) fn within_text(&self) -> bool {
        self.within_text
    }

    /// The pieces of a text, in order.
    pub(crate) fn pieces<'a>(&self, text: &'a str) -> Vec<&'a str> {
        let mut pieces = Vec::with_capacity(text.len() / MIN_TEXT_BYTES + 1);
        let mut start = 0;
        let mut seen = 0;
        for found in self.tokens.iter().flat_map(|tokens| tokens.find_iter(text)) {
            start = self.cut_within(text, start, seen, found.start(), &mut pieces);
            if found.start() - start >= self.least.0 && self.is_cut[found.pattern()] {
                pieces.push(&text[start..found.start()]);
                start = found.start();
            }
            seen = found.end();
        }
        start = self.cut_within(text, start, seen, text.len(), &mut pieces);
        if start < text.len() {
            pieces.push(&text[start..]);
        }
        pieces
    }

    /// Cuts what is between two added tokens, `from..to`, of a piece that begins at `start`; returns where the next begins.
    fn cut_within<'a>(&self, text: &'a str, start: usize, from: usize, to: usize, pieces: &mut Vec<&'a str>) -> usize {
        let mut start = start;
        let least = self.least.1;
        let from = from.max(start + least);
        if !self.within_text || from >= to {
            return start;
        }
        for found in memchr2_iter(b' ', b'\n', &text.as_bytes()[from..to]) {
            let at = from + found;
            let cut = match text.as_bytes()[at] {
                b' ' => Some(at).filter(|_| text.as_bytes()[at - 1].is_ascii_alphabetic()),
                _ => Some(at + 1).filter(|_| is_lone_break(text, at)),
            };
            if let Some(cut) = cut.filter(|&cut| cut < to && cut - start >= least) {
                pieces.push(&text[start..cut]);
                start = cut;
            }
        }
        start
    }
}

/// Whether the line break at `at` has no white space before it, and a letter or digit after it.
fn is_lone_break(text: &str, at: usize) -> bool {
    text[..at].chars().next_back().is_some_and(|before| !before.is_whitespace())
        && text[at + 1..].chars().next().is_some_and(char::is_alphanumeric)
}

/// Whether a text may be cut before this token.
fn is_cut(token: &AddedToken) -> bool {
    let first = token.content.chars().next();
    let is_apart = first.is_some_and(|first| !first.is_alphanumeric() && !first.is_whitespace() && first != '_');
    is_apart && !token.lstrip && !token.single_word
}

/// Whether cuts within texts are never within this token, nor within the space that it takes.
fn leaves_texts_alone(token: &AddedToken) -> bool {
    let takes_space = token.lstrip || token.rstrip && token.content.ends_with(|last: char| last.is_ascii_alphabetic());
    !takes_space && !token.content.contains(char::is_whitespace)
}

/// Whether texts are split in a way that is known, and their parts then seen one by one.
fn is_known(tokenizer: &Tokenizer) -> bool {
    let json = |part: Result<Value, serde_json::Error>| part.unwrap_or(Value::Bool(false));
    let normalizer = json(serde_json::to_value(tokenizer.get_normalizer()));
    let pre_tokenizer = json(serde_json::to_value(tokenizer.get_pre_tokenizer()));
    let is_bpe = matches!(tokenizer.get_model(), ModelWrapper::BPE(bpe) if bpe.dropout.is_none());
    is_bpe && is_normal_form(&normalizer) && is_known_split(&pre_tokenizer)
}

fn is_normal_form(normalizer: &Value) -> bool {
    match normalizer["type"].as_str() {
        None => normalizer.is_null(),
        Some("Sequence") => normalizer["normalizers"].as_array().is_some_and(|all| all.iter().all(is_normal_form)),
        Some(kind) => matches!(kind, "NFC" | "NFD" | "NFKC" | "NFKD"),
    }
}

fn is_known_split(pre_tokenizer: &Value) -> bool {
    let is_byte_level = |step: &Value, use_regex: bool| {
        step["type"] == "ByteLevel" && step["add_prefix_space"] == false && step["use_regex"] == use_regex
    };
    let is_split = |step: &Value| {
        let is_kept = step["behavior"] == "Isolated" && step["invert"] == false;
        let is_kept = is_kept || step["behavior"] == "Removed" && step["invert"] == true;
        step["type"] == "Split" && is_kept && step["pattern"]["Regex"].as_str().is_some_and(|regex| PATTERNS.contains(&regex))
    };
    match pre_tokenizer["pretokenizers"].as_array().map(Vec::as_slice) {
        // GPT-2's own pattern is built in.
        None => is_byte_level(pre_tokenizer, true),
        Some([splits @ .., last]) => !splits.is_empty() && is_byte_level(last, false) && splits.iter().all(is_split),
        Some([]) => false,
    }
}

#[cfg(test)]
mod tests;
