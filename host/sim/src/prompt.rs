//! Prompts of a trace: which stretches of which token streams they are made of. Their tokens are made when they are
//! needed, since those of a whole trace would not fit into memory.

use std::sync::Arc;

/// A stretch of tokens: the first `tokens` ones of a stream of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The stream; different streams have different tokens at every place.
    pub stream: u32,
    /// Tokens, at least 1.
    pub tokens: u32,
}

/// Spreads stream numbers over all token ids: an odd number, so that no two streams get the same (Knuth's multiplier).
const SPREAD: u32 = 0x9e37_79b1;

/// The tokens of a prompt.
#[must_use]
pub fn tokens(segments: &[Segment]) -> Arc<[u32]> {
    let mut tokens = Vec::with_capacity(segments.iter().map(|segment| segment.tokens as usize).sum());
    for segment in segments {
        let first = segment.stream.wrapping_mul(SPREAD);
        tokens.extend((0..segment.tokens).map(|place| first.wrapping_add(place)));
    }
    tokens.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_share_tokens_as_far_as_they_share_streams() {
        let segment = |stream, tokens| Segment { stream, tokens };
        let one = tokens(&[segment(1, 512), segment(2, 100)]);
        let other = tokens(&[segment(1, 512), segment(3, 90)]);
        let longer = tokens(&[segment(1, 512), segment(2, 512), segment(4, 3)]);
        assert_eq!((one.len(), &one[..512]), (612, &other[..512]));
        assert!(one[512..].iter().zip(&other[512..]).all(|(one, other)| one != other));
        assert_eq!(one[..], longer[..612]);
    }
}
