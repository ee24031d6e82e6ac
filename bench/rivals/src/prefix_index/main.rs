//! Two prefix indexes on one stream: ours and Dynamo 1.6.1's `ConcurrentRadixTreeCompressed` in its `ThreadPoolIndexer`.
//!
//! The stream is made from a trace ([`stream`]): each request is looked up, goes to a worker, and that worker's cache (LRU,
//! leaf first) says what it stored and removed. Both get the same lookups and events in the same order, from one thread
//! that looks up and hands events on, through the same kind of channel, to the same number of threads that apply them.
//!
//! **Inside the timing**: lookups, sending, applying, and waiting until the last event is applied. **Outside**: making
//! events and keys. Dynamo's events carry hashes of the blocks' tokens, and its lookups are asked with such hashes: the
//! tokens are hashed before the clock starts, and so they are for `ours`. `ours-tokens` is our index as engines' own
//! events feed it, hashing token ids inside the timing: another boundary, given for itself.
//!
//! One run measures one contender in a process of its own and prints one JSON object; `cargo xtask bench index`
//! alternates them.

mod allocator;
mod contender;
mod ours;
mod stream;
mod theirs;

use std::{path::PathBuf, time::Instant};

use clap::{Parser, ValueEnum};
use serde_json::json;

use crate::{allocator::Counting, contender::Contender, ours::Ours, stream::Stream, theirs::Theirs};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[derive(Parser)]
struct Arguments {
    /// Which index to measure
    #[arg(long)]
    contender: Which,
    /// What to measure
    #[arg(long, default_value = "speed")]
    mode: Mode,
    /// A trace in Mooncake's format; without one, made-up conversations
    #[arg(long)]
    trace: Option<PathBuf>,
    /// Requests of the trace at most
    #[arg(long, default_value_t = usize::MAX)]
    requests: usize,
    /// Workers
    #[arg(long, default_value_t = 32)]
    workers: usize,
    /// Tokens of a block; divides 512
    #[arg(long, default_value_t = 64)]
    block: u32,
    /// Blocks that a worker's cache holds
    #[arg(long, default_value_t = 16_384)]
    capacity: usize,
    /// Threads that apply events
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Rounds of churn, in mode memory
    #[arg(long, default_value_t = 10)]
    churn: usize,
}

#[derive(Clone, Copy, ValueEnum)]
enum Which {
    /// dynamo-host's, fed as Dynamo's is: with hashes of the blocks' tokens
    Ours,
    /// dynamo-host's, fed with token ids, which are hashed inside the timing
    OursTokens,
    /// Dynamo's
    Theirs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Lookups and events per second, and latencies
    Speed,
    /// Bytes per block, and what is left after churn
    Memory,
}

fn main() {
    let arguments = Arguments::parse();
    let stream = Stream::of(&arguments.trace, arguments.requests, arguments.block, arguments.workers, arguments.capacity);
    let result = match arguments.contender {
        Which::Ours => measure::<Ours<false>>(&arguments, &stream),
        Which::OursTokens => measure::<Ours<true>>(&arguments, &stream),
        Which::Theirs => measure::<Theirs>(&arguments, &stream),
    };
    println!("{result}");
}

fn measure<C: Contender>(arguments: &Arguments, stream: &Stream) -> serde_json::Value {
    match arguments.mode {
        Mode::Speed => speed::<C>(arguments, stream),
        Mode::Memory => memory::<C>(arguments, stream),
    }
}

fn speed<C: Contender>(arguments: &Arguments, stream: &Stream) -> serde_json::Value {
    let keys: Vec<C::Key> = stream.steps.iter().map(|step| C::key(&step.blocks, arguments.block)).collect();
    let events: Vec<Vec<(usize, C::Event)>> = stream
        .steps
        .iter()
        .map(|step| step.events.iter().map(|(w, e)| (*w, C::event(*w, e, arguments.block))).collect())
        .collect();
    let mut index = C::new(arguments.workers, arguments.threads, arguments.block);
    let mut flood = Vec::with_capacity(keys.len());
    let mut matched = 0;
    let cpu = allocator::cpu_seconds();
    let start = Instant::now();
    for (key, events) in keys.iter().zip(events) {
        let before = Instant::now();
        matched += index.lookup(key);
        flood.push(before.elapsed().as_nanos() as u64);
        for (worker, event) in events {
            index.send(worker, event);
        }
    }
    index.drain();
    let elapsed = start.elapsed().as_secs_f64();
    let cpu = allocator::cpu_seconds() - cpu;
    std::hint::black_box(matched);

    let mut beside = beside::<C>(arguments, stream, &keys);
    let mut quiet = Vec::with_capacity(keys.len());
    let mut sum = 0;
    let start = Instant::now();
    for key in &keys {
        let before = Instant::now();
        sum += index.lookup(key);
        quiet.push(before.elapsed().as_nanos() as u64);
    }
    let lookups = keys.len() as f64 / start.elapsed().as_secs_f64();
    let block_ops = stream.lookup_blocks() + stream.stored + stream.removed;
    json!({
        "block_ops_per_s": block_ops as f64 / elapsed,
        "events_per_s": stream.events() as f64 / elapsed,
        "seconds": elapsed, "cpu_seconds": cpu, "block_ops_per_cpu_s": block_ops as f64 / cpu,
        "flood_p50_us": percentile(&mut flood, 50.0), "flood_p99_us": percentile(&mut flood, 99.0), "flood_p999_us": percentile(&mut flood, 99.9),
        "beside_p50_us": percentile(&mut beside, 50.0), "beside_p99_us": percentile(&mut beside, 99.0),
        "lookups_per_s": lookups,
        "quiet_p50_us": percentile(&mut quiet, 50.0), "quiet_p99_us": percentile(&mut quiet, 99.0),
        "matched_blocks": sum,
        "lookup_blocks": stream.lookup_blocks(), "stored": stream.stored, "removed": stream.removed,
        "events": stream.events(), "resident": stream.resident,
    })
}

/// Times of lookups beside events: as before, but events are applied before the next 32 lookups begin, so that both contenders are
/// asked of the same contents. Otherwise who lags behind finds less, and looks quicker.
fn beside<C: Contender>(arguments: &Arguments, stream: &Stream, keys: &[C::Key]) -> Vec<u64> {
    let mut index = C::new(arguments.workers, arguments.threads, arguments.block);
    let mut times = Vec::with_capacity(keys.len());
    for (keys, steps) in keys.chunks(32).zip(stream.steps.chunks(32)) {
        let events = steps.iter().flat_map(|step| &step.events);
        for (worker, event) in events {
            index.send(*worker, C::event(*worker, event, arguments.block));
        }
        for key in keys {
            let before = Instant::now();
            std::hint::black_box(index.lookup(key));
            times.push(before.elapsed().as_nanos() as u64);
        }
        index.drain();
    }
    times
}

fn memory<C: Contender>(arguments: &Arguments, stream: &Stream) -> serde_json::Value {
    let apply = |index: &mut C| {
        for (worker, event) in stream.steps.iter().flat_map(|step| &step.events) {
            index.send(*worker, C::event(*worker, event, arguments.block));
        }
        index.drain();
    };
    let rss_before = allocator::rss();
    let live_before = allocator::live();
    let mut index = C::new(arguments.workers, arguments.threads, arguments.block);
    apply(&mut index);
    let bytes = allocator::live() - live_before;
    let mut rss = vec![allocator::rss() - rss_before];
    for _ in 0..arguments.churn {
        index.remove_workers();
        apply(&mut index);
        rss.push(allocator::rss() - rss_before);
    }
    let churned = allocator::live() - live_before;
    index.remove_workers();
    let empty = allocator::live() - live_before;
    json!({
        "resident": stream.resident, "bytes": bytes, "bytes_per_block": bytes as f64 / stream.resident as f64,
        "bytes_after_churn": churned, "bytes_when_empty": empty,
        "rss": rss[0], "rss_after_churn": rss[rss.len() - 1],
    })
}

/// Nearest rank, in µs.
fn percentile(nanoseconds: &mut [u64], percent: f64) -> f64 {
    nanoseconds.sort_unstable();
    let rank = (nanoseconds.len() as f64 * percent / 100.0).ceil() as usize;
    nanoseconds[rank.saturating_sub(1)] as f64 / 1e3
}
