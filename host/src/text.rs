//! Texts of others: what guests and engines say, made fit for a log line, a terminal and a client.

/// Bytes that are kept.
const MAX_BYTES: usize = 1024;

/// The text on one line, without control characters, cut to its bound.
pub(crate) fn plain(text: &str) -> String {
    let cut = &text[..text.floor_char_boundary(MAX_BYTES)];
    let mut plain: String = cut.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if cut.len() < text.len() {
        plain.push('…');
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_replaced_and_long_texts_cut_between_characters() {
        assert_eq!(plain("a\n\u{1b}[2Jb é"), "a  [2Jb é");
        let long = plain(&"é".repeat(MAX_BYTES));
        assert_eq!((long.chars().count(), long.ends_with('…')), (MAX_BYTES / 2 + 1, true));
    }
}
