//! `cargo xtask bench`: what is measured against others, side by side in one run.

mod handoff;
mod index;
mod processes;
mod prompts;
mod proxy;
mod routing;
mod tokenize;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use clap::Subcommand;
use serde_json::Value;

use crate::{paths, policies, run};

#[derive(Subcommand)]
pub(crate) enum What {
    /// Cost of one routing decision: sandboxed, native, and Dynamo 1.6.1's own selection
    Policy {
        /// Rounds; each runs every contender once, and the median round counts
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
    /// Swaps under load: 64 streams over four mock engines while the policy is swapped 50 times
    Swap {
        /// Streams of each client; 40 take about half a minute
        #[arg(long, default_value_t = 40)]
        streams: usize,
    },
    /// The prefix index: throughput, lookups and memory, beside Dynamo 1.6.1's
    Index(index::Options),
    /// CPU, latency, memory and start-up as a proxy, beside vLLM's router and the SGLang model gateway
    Proxy(proxy::Options),
    /// What it costs the host that one engine prefills and another decodes
    Handoff(handoff::Options),
    /// Prompts of 100,000 tokens through the host: what reading, hashing and routing them costs
    Prompts(prompts::Options),
    /// Tokens of a prompt of 100,000 and of a ten-turn chat, with the cache and without
    Tokenize(tokenize::Options),
    /// Routing policies side by side in the simulator, and whether adaptive meets its goals
    Routing(routing::Options),
}

/// Numbers of candidates.
const SIZES: &[u64] = &[4, 64, 1024, 10_000];

pub(crate) fn run(what: &What) -> Result<()> {
    match what {
        What::Policy { rounds } => policy(*rounds),
        What::Swap { streams } => swap(*streams),
        What::Index(options) => index::run(options),
        What::Proxy(options) => proxy::run(options),
        What::Handoff(options) => handoff::run(options),
        What::Prompts(options) => prompts::run(options),
        What::Tokenize(options) => tokenize::run(options),
        What::Routing(options) => routing::run(options),
    }
}

/// Builds the host, the load generator and the fake engine for release; returns where the last two are.
fn build_load() -> Result<PathBuf> {
    println!("Building the host, the generator and the engine for release");
    run::check(run::cargo().args(["build", "--quiet", "--release", "--package", "dynamo-host"]))?;
    build_tools()
}

/// Builds the load generator and the fake engine; returns where they are.
fn build_tools() -> Result<PathBuf> {
    let target = paths::target().join("bench");
    let mut cargo = run::cargo();
    cargo.current_dir(paths::root().join("bench")).env("CARGO_TARGET_DIR", &target);
    run::check(cargo.args(["build", "--quiet", "--release", "--package", "load"]))?;
    Ok(target.join("release"))
}

/// Runs the load generator, built by [`build_load`], and returns what it measured.
fn generate(tools: &Path, urls: &[String], numbers: &[(&str, u64)], switches: &[&str]) -> Result<Value> {
    let mut command = Command::new(tools.join("load"));
    command.args(switches);
    for (flag, value) in numbers {
        command.args([flag, value.to_string().as_str()]);
    }
    for url in urls {
        command.args(["--url", url]);
    }
    serde_json::from_str(&run::read(&mut command)?).context("the generator printed no JSON")
}

/// The black-box test of swaps, with more load than CI has time for.
fn swap(streams: usize) -> Result<()> {
    policies::build()?;
    let test = ["test", "--package", "dynamo-host", "--test", "e2e", "swap::", "--", "--nocapture"];
    run::check(run::cargo().args(test).env("DYNAMO_HOST_SWAP_STREAMS", streams.to_string()))
}

/// A contender's name, and where its median stands in the output of a run.
type Column = (&'static str, Vec<Vec<f64>>);

fn policy(rounds: usize) -> Result<()> {
    policies::build()?;
    println!("Building the host and the rival for release");
    run::check(run::cargo().args(["build", "--quiet", "--release", "--package", "dynamo-host"]))?;
    let rivals = paths::target().join("bench");
    let mut rival = run::cargo();
    rival.current_dir(paths::root().join("bench")).env("CARGO_TARGET_DIR", &rivals);
    run::check(rival.args(["build", "--quiet", "--release", "--bin", "worker-selection"]))?;

    let host = paths::target().join("release/dynamo-host");
    let rival = rivals.join("release/worker-selection");
    let kv_cost = paths::guests().join("kv-cost.wasm");
    let least_loaded = paths::policies().join("least-loaded.wasm");
    let empty = || vec![Vec::new(); SIZES.len()];
    let mut columns: Vec<Column> =
        ["kv-cost.wasm", "least-loaded.wasm", "least-loaded native", "Dynamo reference", "Dynamo shipped"]
            .map(|name| (name, empty()))
            .into();
    for round in 1..=rounds {
        println!("Round {round} of {rounds}");
        let kv = bench_component(&host, &kv_cost)?;
        let least = bench_component(&host, &least_loaded)?;
        let dynamo: Value = serde_json::from_str(&run::read(&mut Command::new(&rival))?)?;
        for (at, &size) in SIZES.iter().enumerate() {
            let medians = [
                median_of(&kv["results"], size, "policy")?,
                median_of(&least["results"], size, "policy")?,
                median_of(&least["results"], size, "native")?,
                median_of(&dynamo["results"], size, "")?,
                median_of(&dynamo["shipped"]["results"], size, "")?,
            ];
            for ((_, column), median) in columns.iter_mut().zip(medians) {
                column[at].push(median);
            }
        }
    }
    print_table(&columns);
    Ok(())
}

fn bench_component(host: &Path, component: &Path) -> Result<Value> {
    let sizes = SIZES.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
    let output =
        run::read(Command::new(host).args(["policy", "bench", "--output", "json", "--candidates", &sizes]).arg(component))?;
    serde_json::from_str(&output).context("policy bench printed no JSON")
}

/// The median at a size, in microseconds.
fn median_of(results: &Value, size: u64, part: &str) -> Result<f64> {
    let rows = results.as_array().context("no results")?;
    let find = |row: &Value| {
        let row = if part.is_empty() { row } else { &row[part] };
        (row["candidates"].as_u64() == Some(size)).then(|| row["median_ns"].as_f64()).flatten()
    };
    rows.iter().find_map(find).map(|ns| ns / 1e3).with_context(|| format!("no result for {size} candidates"))
}

fn print_table(columns: &[Column]) {
    let median = |samples: &[f64]| {
        let mut samples = samples.to_vec();
        samples.sort_unstable_by(f64::total_cmp);
        samples[samples.len() / 2]
    };
    println!("\nMedian µs per decision, columns built and answer checked (median of rounds):\n");
    print!("| candidates |");
    for (name, _) in columns {
        print!(" {name} |");
    }
    println!(" kv-cost.wasm ÷ Dynamo shipped |");
    println!("|---:|{}", "---:|".repeat(columns.len() + 1));
    for (at, size) in SIZES.iter().enumerate() {
        let row: Vec<f64> = columns.iter().map(|(_, samples)| median(&samples[at])).collect();
        print!("| {size} |");
        for value in &row {
            print!(" {value:.2} |");
        }
        println!(" {:.2} |", row[0] / row[row.len() - 1]);
    }
}
