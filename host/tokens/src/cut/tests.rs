//! Pieces have the tokens of the whole, over all pre-tokenizers that are cut, and others.

use proptest::{collection::vec, prelude::*, sample::select};
use serde_json::json;

use super::*;

const SMALL: &[u8] = include_bytes!("../../tests/fixtures/small/tokenizer.json");

/// The small tokenizer with other parts.
fn with(change: impl Fn(&mut Value)) -> Tokenizer {
    let mut written: Value = serde_json::from_slice(SMALL).unwrap();
    change(&mut written);
    Tokenizer::from_bytes(written.to_string()).unwrap()
}

fn split(regexes: &[&str], behavior: &str, invert: bool) -> Tokenizer {
    let splits = regexes
        .iter()
        .map(|regex| json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": behavior, "invert": invert }));
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false });
    let all: Vec<Value> = splits.chain([byte_level]).collect();
    with(|written| written["pre_tokenizer"] = json!({ "type": "Sequence", "pretokenizers": all }))
}

/// Tokenizers whose texts are cut, each by its pre-tokenizer.
fn known() -> Vec<Tokenizer> {
    let mut all: Vec<Tokenizer> = PATTERNS[..4].iter().map(|regex| split(&[regex], "Isolated", false)).collect();
    all.push(split(&PATTERNS[4..], "Isolated", false));
    all.push(split(&PATTERNS[..1], "Removed", true));
    let gpt2 = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    all.push(with(|written| written["pre_tokenizer"] = gpt2.clone()));
    all
}

/// Tokenizers whose texts are cut before added tokens only.
fn others() -> Vec<Tokenizer> {
    let metaspace = json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false });
    let prepend = json!({ "type": "Prepend", "prepend": "Ġ" });
    vec![
        split(&[r"\s+|\S"], "Isolated", false),
        with(|written| written["pre_tokenizer"] = metaspace.clone()),
        with(|written| written["normalizer"] = prepend.clone()),
        with(|written| written["added_tokens"][0]["lstrip"] = true.into()),
        with(|written| written["added_tokens"][1]["rstrip"] = true.into()),
        with(|written| written["added_tokens"][2]["single_word"] = true.into()),
        with(|written| written["added_tokens"][2]["normalized"] = true.into()),
    ]
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec()
}

#[track_caller]
fn check(tokenizer: &Tokenizer, text: &str) -> usize {
    let cuts = Cuts::everywhere(tokenizer);
    let pieces = cuts.pieces(text);
    assert_eq!(pieces.concat(), text);
    let of_pieces: Vec<u32> = pieces.iter().flat_map(|piece| ids(tokenizer, piece)).collect();
    assert_eq!(of_pieces, ids(tokenizer, text), "{pieces:?}");
    pieces.len()
}

fn text() -> impl Strategy<Value = String> {
    let fragments = select(vec![
        " ",
        " ",
        "\n",
        "\n",
        "a",
        "the",
        "Word",
        "don't",
        "'s",
        "'S",
        "12",
        "3",
        ".",
        "/",
        ",\n",
        "\r\n",
        "\t",
        "  ",
        "\n\n",
        "é",
        "e",
        "\u{301}",
        "你好",
        "東",
        "。",
        "😀",
        "ﬁ",
        "\u{a0}",
        "\u{3000}",
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<tool_call>",
        "<|im_",
        "</",
        "_",
        "-",
        "ǅ",
        "ª",
        "²",
        "Ⅷ",
        "ा",
        "\u{200b}",
        "שלום",
    ]);
    vec(fragments, 0..60).prop_map(|fragments| fragments.concat())
}

proptest! {
    #[test]
    fn pieces_have_the_tokens_of_the_whole(text in text(), which in 0usize..14) {
        thread_local!(static ALL: Vec<Tokenizer> = known().into_iter().chain(others()).collect());
        ALL.with(|all| check(&all[which % all.len()], &text));
    }

    #[test]
    fn a_text_that_grows_keeps_its_cuts(text in text(), more in text()) {
        thread_local!(static SMALL_ONE: Tokenizer = Tokenizer::from_bytes(SMALL).unwrap());
        SMALL_ONE.with(|tokenizer| {
            let cuts = Cuts::everywhere(tokenizer);
            let (before, whole) = (cuts.pieces(&text), format!("{text} {more}"));
            let after = cuts.pieces(&whole);
            // The last two may go on: an added token may have been there in part.
            let kept = before.len().saturating_sub(2);
            prop_assert_eq!(&before[..kept], &after[..kept]);
            Ok(())
        })?;
    }
}

#[test]
fn texts_are_cut_by_what_is_known_of_their_pre_tokenizer() {
    let text = "A line of words\nand another one, <|im_start|>user\nof  words\n\nthe end.";
    for tokenizer in known() {
        assert!(Cuts::new(&tokenizer).within_text(), "{:?}", tokenizer.get_pre_tokenizer());
        assert!(check(&tokenizer, text) > 8);
    }
    for tokenizer in &others()[..4] {
        assert!(!Cuts::new(tokenizer).within_text(), "{:?}", tokenizer.get_pre_tokenizer());
        assert_eq!(check(tokenizer, text), 2);
    }
}

#[test]
fn long_texts_are_cut_into_runs_of_some_size_and_short_ones_are_not() {
    let tokenizer = Tokenizer::from_bytes(SMALL).unwrap();
    let cuts = Cuts::new(&tokenizer);
    let chat = "<|im_start|>user\nshort<|im_end|>\n".repeat(3);
    assert_eq!(cuts.pieces(&chat), [chat.as_str()]);
    assert_eq!(cuts.pieces(""), [""; 0]);
    let long = "words and words\n".repeat(1000);
    let pieces = cuts.pieces(&long);
    assert!(pieces.iter().all(|piece| piece.len() < MIN_TEXT_BYTES + 32) && pieces.len() > 14, "{}", pieces.len());
}
