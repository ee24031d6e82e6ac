//! `cargo xtask bench index`: our prefix index and Dynamo 1.6.1's, on one stream of lookups and events.
//!
//! The program that measures is `bench/rivals/src/prefix_index`; it says there what is inside the timing. Here contenders take
//! turns, each run in a process of its own, and medians over rounds are set side by side.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::Value;

use crate::{paths, run};

#[derive(Args)]
pub(crate) struct Options {
    /// A trace in Mooncake's format (JSON lines with input_length, output_length, hash_ids of 512-token blocks); without one,
    /// made-up conversations
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Workers
    #[arg(long, default_value_t = 32)]
    workers: usize,
    /// Tokens of a block; divides 512
    #[arg(long, default_value_t = 64)]
    block: u32,
    /// Blocks that each worker's cache holds
    #[arg(long, default_value_t = 16_384)]
    capacity: usize,
    /// Threads that apply events
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Rounds; each runs every contender once
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Rounds of churn: all workers go, come back and store everything anew
    #[arg(long, default_value_t = 10)]
    churn: usize,
}

/// Contenders as the program names them.
const CONTENDERS: [&str; 3] = ["ours", "theirs", "ours-tokens"];

/// A row: its name, its key in the results, by what to divide, and whether more is better.
type Row = (&'static str, &'static str, f64, bool);

const SPEED: &[Row] = &[
    ("block operations, M/s (events drained)", "block_ops_per_s", 1e6, true),
    ("block operations, M per CPU second", "block_ops_per_cpu_s", 1e6, true),
    ("events, k/s (events drained)", "events_per_s", 1e3, true),
    ("lookups beside events, p50 µs", "beside_p50_us", 1.0, false),
    ("lookups beside events, p99 µs", "beside_p99_us", 1.0, false),
    ("lookups at rest, k/s", "lookups_per_s", 1e3, true),
    ("lookups at rest, p50 µs", "quiet_p50_us", 1.0, false),
    ("lookups at rest, p99 µs", "quiet_p99_us", 1.0, false),
];

const MEMORY: &[Row] = &[
    ("bytes per held block (live)", "bytes_per_block", 1.0, false),
    ("RSS grown, MB", "rss", 1e6, false),
    ("RSS grown after churn, MB", "rss_after_churn", 1e6, false),
    ("live when all workers are gone, MB", "bytes_when_empty", 1e6, false),
];

pub(crate) fn run(options: &Options) -> Result<()> {
    ensure!(options.block > 0 && 512 % options.block == 0, "--block {} does not divide 512", options.block);
    println!("Building both indexes for release");
    let target = paths::target().join("bench");
    let mut build = run::cargo();
    build.current_dir(paths::root().join("bench")).env("CARGO_TARGET_DIR", &target);
    run::check(build.args(["build", "--quiet", "--release", "--bin", "prefix-index"]))?;
    let program = target.join("release/prefix-index");

    let mut speed: [Vec<Value>; 3] = Default::default();
    let mut memory: [Vec<Value>; 3] = Default::default();
    for round in 1..=options.rounds {
        println!("Round {round} of {}", options.rounds);
        for (at, contender) in CONTENDERS.iter().enumerate() {
            speed[at].push(measure(options, &program, contender, "speed")?);
            memory[at].push(measure(options, &program, contender, "memory")?);
        }
    }
    let matched = |runs: &[Value]| runs[0]["matched_blocks"].as_u64();
    ensure!(
        matched(&speed[0]) == matched(&speed[1]),
        "the indexes disagree: {:?} and {:?}",
        matched(&speed[0]),
        matched(&speed[1])
    );
    let stream = &speed[0][0];
    println!(
        "\n{} blocks looked up, {} stored and {} removed in {} events; {} held at the end. Both found the same {} blocks.\n",
        stream["lookup_blocks"],
        stream["stored"],
        stream["removed"],
        stream["events"],
        stream["resident"],
        stream["matched_blocks"]
    );
    println!("| | dynamo-host | Dynamo 1.6.1 | ratio (above 1: ours is better) | dynamo-host from token ids |");
    println!("|---|---:|---:|---:|---:|");
    for (rows, results) in [(SPEED, &speed), (MEMORY, &memory)] {
        for row in rows {
            print_row(row, results)?;
        }
    }
    Ok(())
}

fn measure(options: &Options, program: &PathBuf, contender: &str, mode: &str) -> Result<Value> {
    let mut command = Command::new(program);
    command.args(["--contender", contender, "--mode", mode]);
    for (flag, value) in [
        ("--workers", options.workers.to_string()),
        ("--block", options.block.to_string()),
        ("--capacity", options.capacity.to_string()),
        ("--threads", options.threads.to_string()),
        ("--churn", options.churn.to_string()),
    ] {
        command.args([flag, &value]);
    }
    if let Some(trace) = &options.trace {
        command.arg("--trace").arg(trace);
    }
    serde_json::from_str(&run::read(&mut command)?).with_context(|| format!("{contender} printed no JSON"))
}

fn print_row((name, key, unit, more_is_better): &Row, results: &[Vec<Value>; 3]) -> Result<()> {
    let median = |runs: &[Value]| -> Result<f64> {
        let values: Option<Vec<f64>> = runs.iter().map(|run| run[*key].as_f64()).collect();
        let mut values = values.with_context(|| format!("no {key} in a result"))?;
        values.sort_unstable_by(f64::total_cmp);
        Ok(values[values.len() / 2] / unit)
    };
    let [ours, theirs, tokens] = [median(&results[0])?, median(&results[1])?, median(&results[2])?];
    let ratio = if *more_is_better { ours / theirs } else { theirs / ours };
    println!("| {name} | {ours:.2} | {theirs:.2} | {ratio:.2} | {tokens:.2} |");
    Ok(())
}
