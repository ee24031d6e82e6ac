//! Embeddings: a vector for each input that its tokens decide, as OpenAI documents the answer.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::fields::Fields;

/// Numbers of a vector whose request does not say how many.
const DIMENSIONS: usize = 64;
const MAX_DIMENSIONS: i64 = 4096;

/// How vectors are written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Embedding {
    dimensions: usize,
    is_base64: bool,
}

impl Embedding {
    pub(super) fn decode(fields: &mut Fields) -> Self {
        let dimensions = fields.integer("dimensions").map_or(DIMENSIONS, |wanted| wanted.clamp(1, MAX_DIMENSIONS) as usize);
        Self { dimensions, is_base64: fields.string("encoding_format").as_deref() == Some("base64") }
    }

    /// One member of `data`.
    pub(super) fn item(self, index: usize, prompt: &[u32]) -> Value {
        let vector = vector(prompt, self.dimensions);
        let embedding = if self.is_base64 {
            let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
            json!(BASE64_STANDARD.encode(bytes))
        } else {
            json!(vector)
        };
        json!({ "index": index, "object": "embedding", "embedding": embedding })
    }
}

/// A vector of length 1. Its numbers are hashes: the same tokens have the same ones, and no others.
fn vector(prompt: &[u32], dimensions: usize) -> Vec<f32> {
    let bytes: Vec<u8> = prompt.iter().flat_map(|id| id.to_le_bytes()).collect();
    let number = |at: usize| (xxh3_64_with_seed(&bytes, at as u64) >> 40) as f32 / (1 << 23) as f32 - 1.0;
    let numbers: Vec<f32> = (0..dimensions).map(number).collect();
    let length = numbers.iter().map(|number| number * number).sum::<f32>().sqrt();
    numbers.into_iter().map(|number| number / length).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_has_length_1_and_belongs_to_its_tokens() {
        let one = vector(&[1, 2], 64);
        assert!((one.iter().map(|number| number * number).sum::<f32>() - 1.0).abs() < 1e-5);
        assert_eq!(one, vector(&[1, 2], 64));
        assert_ne!(one, vector(&[1, 3], 64));
    }
}
