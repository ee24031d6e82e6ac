//! Fuzz targets: what reads bytes of others, each as a function of bytes that panics where a promise is broken.
//!
//! The same functions are driven three ways: over the committed corpus and a bounded number of mutations in every test run
//! (below), for as long as one likes by `cargo xtask fuzz`, and guided by coverage by cargo-fuzz (tests/fuzz).
//!
//! A reader that arrives later gets a function here, a line in [`TARGETS`], seeds in `tests/fuzz/corpus/NAME`, and a file in
//! `tests/fuzz/fuzz_targets`.

pub mod mutate;

use bytes::Bytes;
use dynamo_engine_api::{
    Endpoint,
    sse::{Chunk, Framer, Summary},
};
use dynamo_engine_mock::MockOptions;
pub use dynamo_engine_openai::fuzzing::{handoff, http_answer, metrics};
use dynamo_engine_openai::{OpenAiEngine, OpenAiOptions};

use crate::{
    config::{WorkerConfig, written},
    decode::{Bounds, decode, parts},
};

/// A function that panics where a promise is broken.
pub type Target = fn(&[u8]);

/// All targets by their names, which are those of the corpus's folders.
pub const TARGETS: &[(&str, Target)] = &[
    ("component", component),
    ("config", config),
    ("handoff", handoff),
    ("http", http_answer),
    ("metrics", metrics),
    ("request", request),
    ("sse", sse),
    ("worker", worker),
];

/// The bounds of the default configuration, which decide about what is accepted and nothing else.
const BOUNDS: Bounds = Bounds { max_output_tokens: 1_000_000, max_choices: 128 };

/// An engine's stream: the same frames and the same counts however the network cuts it, and nothing lost.
///
/// The first byte says where it is cut.
pub fn sse(data: &[u8]) {
    let Some((&cut, stream)) = data.split_first() else { return };
    let whole = framed([stream]);
    let step = usize::from(cut) % 13 + 1;
    let pieces = framed(stream.chunks(step));
    assert_eq!(whole, pieces, "cut every {step} bytes");
    assert_eq!(whole.0, stream.trim_ascii_end(), "bytes are lost or made up");
}

/// What is relayed, up to blank lines at its end, and what is counted over all of it.
fn framed<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<u8>, Summary) {
    let mut framer = Framer::default();
    let mut relayed = Vec::new();
    let mut total = Summary::default();
    let mut take = |chunk: Chunk| {
        if let Some(ending) = chunk.ending() {
            assert!(ending.summary.done || ending.summary.error.is_some(), "it ends with something else");
            assert!(ending.at.end <= chunk.bytes.len() && ending.at.start < ending.at.end, "it ends outside of itself");
        }
        relayed.extend_from_slice(&chunk.bytes);
        total.add(chunk.summary);
    };
    for piece in pieces {
        if let Some(chunk) = framer.push(Bytes::copy_from_slice(piece)).expect("the corpus is below the bound of a frame") {
            take(chunk);
        }
    }
    framer.finish().into_iter().for_each(&mut take);
    relayed.truncate(relayed.trim_ascii_end().len());
    (relayed, total)
}

/// A client's body: refused with a reason, or forwarded as a body that is taken as it is the second time.
///
/// The first byte chooses the endpoint.
pub fn request(data: &[u8]) {
    let Some((&choice, body)) = data.split_first() else { return };
    let endpoint = Endpoint::ALL[usize::from(choice) % Endpoint::ALL.len()];
    let body = Bytes::copy_from_slice(body);
    match decode(endpoint, "id".to_owned(), body.clone(), BOUNDS) {
        Err(error) => assert!(!error.to_string().is_empty(), "a refusal says why"),
        Ok(decoded) => {
            assert!(decoded.facts.choices > 0, "at least one choice is asked for");
            assert!(decoded.body.len() <= body.len(), "fields are taken out, not put in");
            let again = decode(endpoint, "id".to_owned(), decoded.body.clone(), BOUNDS).expect("what is forwarded is valid");
            assert_eq!(again.body, decoded.body, "nothing of the host's is left in it");
            assert_eq!(again.stream, decoded.stream);
            let (prompts, choices) = (decoded.facts.prompts, decoded.facts.choices);
            if choices > 1
                && let Ok(parts) = parts(&decoded.body, prompts, choices, BOUNDS.max_choices, 1 << 20)
            {
                assert_eq!(parts.bodies.len(), choices as usize, "each choice is a part");
                // A prompt that is none is found when it is alone.
                for part in parts.bodies.into_iter().filter_map(|body| decode(endpoint, "id".to_owned(), body, BOUNDS).ok()) {
                    assert_eq!((part.facts.prompts, part.facts.choices), (1, 1), "a part has one answer");
                }
            }
        }
    }
}

/// A configuration file: taken, or refused with a reason.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Err(reason) = written(text) {
        assert!(!reason.is_empty(), "a refusal says why");
    }
}

/// An operator's worker: a URL with options.
pub fn worker(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match text.parse::<WorkerConfig>() {
        Err(error) => assert!(!error.to_string().is_empty(), "a refusal says why"),
        Ok(worker) => {
            let refusal = if worker.url.starts_with("mock://") {
                MockOptions::from_url(&worker.url).err().map(|error| error.to_string())
            } else {
                OpenAiEngine::new(&worker.url, OpenAiOptions::default()).err().map(|error| error.to_string())
            };
            assert!(refusal.is_none_or(|reason| !reason.is_empty()), "a refusal says why");
        }
    }
}

/// A component as it is uploaded, looked at before anything is compiled.
pub fn component(data: &[u8]) {
    if let Err(error) = dynamo_host_policy::inspect(data, 1 << 20) {
        assert!(!error.to_string().is_empty(), "a refusal says why");
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    /// Mutations of each seed: what takes a second, not what finds everything.
    const MUTATIONS: u64 = 500;

    fn seeds(name: &str) -> Vec<Vec<u8>> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus").join(name);
        let mut files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files.iter().map(|file| fs::read(file).unwrap()).collect()
    }

    #[test]
    fn every_target_has_seeds_and_holds_its_promises_on_them_and_near_them() {
        for (name, target) in TARGETS {
            let seeds = seeds(name);
            assert!(seeds.len() > 2, "{name} has few seeds");
            seeds.iter().for_each(|seed| target(seed));
            let mut mutator = mutate::Mutator::new(7);
            for _ in 0..MUTATIONS * seeds.len() as u64 {
                target(&mutator.next(&seeds));
            }
        }
    }
}
