//! Mooncake's traces (FAST'25): a JSON object a line, with the chained hash ids of the prompt's 512-token blocks.

use std::{collections::HashMap, time::Duration};

use serde::Deserialize;

use super::{Broken, TraceRequest};
use crate::prompt::Segment;

pub(super) const EXPECTED: &str =
    r#"{"timestamp": MILLISECONDS, "input_length": TOKENS, "output_length": TOKENS, "hash_ids": [ID OF EACH 512 TOKENS, …]}"#;

/// Tokens that a hash id stands for.
const BLOCK: u32 = 512;

#[derive(Deserialize)]
struct Line {
    timestamp: f64,
    input_length: u32,
    output_length: u32,
    hash_ids: Vec<u64>,
}

pub(super) fn read(text: &str) -> Result<Vec<TraceRequest>, (usize, Broken)> {
    let mut streams = HashMap::new();
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    lines.map(|(number, line)| request(line, &mut streams).map_err(|broken| (number, broken))).collect()
}

/// What the parser says, without its own count of lines, of which it sees one.
fn said(error: &serde_json::Error) -> String {
    let text = error.to_string();
    text.split_once(" at line ").map_or(text.as_str(), |(said, _)| said).to_owned()
}

/// `streams` numbers the hash ids in the order in which they come.
fn request(line: &str, streams: &mut HashMap<u64, u32>) -> Result<TraceRequest, Broken> {
    let Line { timestamp, input_length, output_length, hash_ids } = serde_json::from_str(line).map_err(|error| said(&error))?;
    if input_length == 0 {
        return Err("input_length is 0, and a prompt has at least 1 token".to_owned());
    }
    if hash_ids.len() != input_length.div_ceil(BLOCK) as usize {
        return Err(format!(
            "{} hash_ids for input_length {input_length}, which is {} blocks of {BLOCK} tokens",
            hash_ids.len(),
            input_length.div_ceil(BLOCK)
        ));
    }
    let at = Duration::try_from_secs_f64(timestamp / 1000.0).map_err(|_| format!("timestamp {timestamp} is no time"))?;
    let mut left = input_length;
    let mut segment = |id: u64| {
        let next = streams.len() as u32;
        let tokens = left.min(BLOCK);
        left -= tokens;
        Segment { stream: *streams.entry(id).or_insert(next), tokens }
    };
    let prompt = hash_ids.into_iter().map(&mut segment).collect();
    // What was recorded with no output has stopped at once: that takes a token.
    Ok(TraceRequest { at, prompt, output_tokens: output_length.max(1), session: None })
}
