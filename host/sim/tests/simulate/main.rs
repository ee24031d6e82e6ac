//! Runs in virtual time, with the native fallback and with the components that `cargo xtask policies` builds.

mod policies;
mod reports;
mod roles;
mod service;
mod times;

use std::{fs, path::Path, time::Duration};

use dynamo_engine_mock::Profile;
use dynamo_host_sim::{Contender, EngineSpec, Options, Tally, Trace, TraceRequest, prompt::Segment, simulate};

/// Times that are easy to add up: a prefill token is 1 ms, a pass with prefill 100 ms more, a decode pass 10 ms.
fn profile() -> Profile {
    Profile {
        block_size: 64,
        kv_blocks: 1000,
        max_num_seqs: 16,
        max_num_batched_tokens: 1024,
        max_model_len: 64_000,
        kv_bytes_per_token: 131_072,
        prefill_ms_per_token_squared: 0.0,
        prefill_ms_per_token: 1.0,
        prefill_ms_base: 100.0,
        decode_ms_base: 10.0,
        decode_ms_per_sequence: 0.0,
        decode_ms_per_context_token: 0.0,
        speedup: 1.0,
        ..Profile::default()
    }
}

fn specs(profiles: &[Profile]) -> Vec<EngineSpec> {
    profiles.iter().cloned().map(EngineSpec::from).collect()
}

fn options(workers: usize) -> Options {
    Options::new(vec![profile(); workers])
}

/// A request: its milliseconds, streams with how many of their tokens its prompt has, and its output tokens.
type Line<'a> = (u64, &'a [(u32, u32)], u32);

fn trace(requests: &[Line<'_>]) -> Trace {
    let request = |&(at_ms, streams, output_tokens): &Line<'_>| TraceRequest {
        at: Duration::from_millis(at_ms),
        prompt: streams.iter().map(|&(stream, tokens)| Segment { stream, tokens }).collect(),
        output_tokens,
        session: None,
    };
    Trace { name: "test".to_owned(), requests: requests.iter().map(request).collect() }
}

fn native() -> Contender {
    Contender { name: "native".to_owned(), policy: None }
}

fn component(kind: &str, name: &str, settings: &str) -> Contender {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let path = target.join(kind).join(format!("{name}.wasm"));
    let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}; run: cargo xtask policies", path.display()));
    Contender { name: name.to_owned(), policy: Some((bytes, settings.to_owned())) }
}

#[track_caller]
fn run(trace: &Trace, options: &Options, contender: &Contender) -> Tally {
    simulate(trace, options, contender, &|_| ()).unwrap()
}
