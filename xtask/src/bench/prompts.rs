//! `cargo xtask bench prompts`: long prompts through the host, over engines that answer at once.
//!
//! Two loads, each at its own pace whatever the host does: *cold*, prompts that nobody has seen before, and *cached*, prompts
//! whose beginning, 96 % of them, is one of twenty that come again and again. What the host adds is its time to first
//! token less that of the generator straight at the engines, *direct*. CPU is the host's alone.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{
    build_load,
    processes::{Engines, Router, free_port},
};
use crate::{paths, policies};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Folder with the model's tokenizer; without one the host takes four bytes for a token
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Bytes of a prompt; 100,000 tokens of these words are about 680,000 by Qwen's vocabulary
    #[arg(long, default_value_t = 680_000)]
    bytes: u64,
    /// Policy that routes
    #[arg(long, default_value = "kv-aware")]
    policy: String,
    /// Seconds of each load
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Rounds; the median round counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Engines behind the host
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=64))]
    engines: u64,
}

/// A way in which prompts come.
struct Load {
    name: &'static str,
    per_second: u64,
    /// Hundredths of a prompt that are one of the shared beginnings.
    shared: u64,
}

const LOADS: [Load; 2] = [Load { name: "cold", per_second: 2, shared: 0 }, Load { name: "cached", per_second: 10, shared: 96 }];

/// Different shared beginnings.
const DOCUMENTS: u64 = 20;

/// One run: times to first token in ms, and CPU as a share of a core.
#[derive(Clone, Copy)]
struct Point {
    p50: f64,
    p95: f64,
    cores: f64,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    policies::build()?;
    let tools = build_load()?;
    let engines = Engines::start(&tools.join("engine"), options.engines, 0)?;
    let mut rows: Vec<(&str, [Vec<f64>; 3])> = Vec::new();
    let mut peak = 0;
    for round in 1..=options.rounds {
        let port = free_port()?;
        let host = Router::start("long-prompts", port, command(options, port, engines.urls()))?;
        for load in &LOADS {
            if load.shared > 0 {
                // Every document once, so that what is measured is their coming again.
                generate(options, &tools, &[host.url().to_owned()], load, DOCUMENTS, round)?;
            }
            let requests = load.per_second * options.seconds;
            let direct = generate(options, &tools, engines.urls(), load, requests, round)?;
            let before = host.cpu()?;
            let through = generate(options, &tools, &[host.url().to_owned()], load, requests, round)?;
            let cpu = host.cpu()?.saturating_sub(before);
            let cores = cpu.as_secs_f64() / number(&through, "/wall_s")?;
            let added = |quantile: &str| Ok::<_, anyhow::Error>((number(&through, quantile)? - number(&direct, quantile)?) / 1e3);
            let point = Point { p50: added("/ttft_us/p50")?, p95: added("/ttft_us/p95")?, cores };
            println!("  round {round}, {:<6}: +{:.2} ms p50, +{:.2} ms p95, {:.3} cores", load.name, point.p50, point.p95, cores);
            if !rows.iter().any(|(name, _)| *name == load.name) {
                rows.push((load.name, Default::default()));
            }
            let (_, samples) = rows.iter_mut().find(|(name, _)| *name == load.name).context("the row is there")?;
            samples.iter_mut().zip([point.p50, point.p95, point.cores]).for_each(|(all, value)| all.push(value));
        }
        peak = peak.max(host.peak_rss()?);
    }
    println!("\nPrompts of {} bytes, medians of {} rounds; peak RSS {} MiB\n", options.bytes, options.rounds, peak >> 20);
    println!("| load | per second | added p50 ms | added p95 ms | cores |\n|---|---:|---:|---:|---:|");
    for ((name, samples), load) in rows.into_iter().zip(&LOADS) {
        let [p50, p95, cores] = samples.map(|mut samples| {
            samples.sort_unstable_by(f64::total_cmp);
            samples[samples.len() / 2]
        });
        println!("| {name} | {} | {p50:.2} | {p95:.2} | {cores:.3} |", load.per_second);
    }
    Ok(())
}

fn command(options: &Options, port: u16, engines: &[String]) -> Command {
    let mut command = Command::new(paths::target().join("release/dynamo-host"));
    command.args(["serve", "--http", &format!("127.0.0.1:{port}"), "--admin", "127.0.0.1:0", "--log-level", "warn"]);
    for engine in engines {
        command.args(["--worker", engine]);
    }
    if let Some(directory) = &options.tokenizer {
        command.arg("--model").arg(format!("bench={}", directory.display()));
    }
    command.arg("--routing").arg(paths::policies().join(format!("{}.wasm", options.policy)));
    command
}

/// Runs the generator. A round's prompts are its own, so that no cache has seen them.
fn generate(
    options: &Options,
    tools: &std::path::Path,
    urls: &[String],
    load: &Load,
    requests: u64,
    round: u64,
) -> Result<Value> {
    let numbers = [
        ("--requests", requests),
        ("--rate", load.per_second),
        ("--concurrency", 64),
        ("--tokens", 2),
        ("--prompt-bytes", options.bytes),
        ("--shared-bytes", options.bytes * load.shared / 100),
        ("--documents", DOCUMENTS),
        ("--seed", round * 1000 + requests),
        ("--timeout-s", 60),
    ];
    let result = super::generate(tools, urls, &numbers, &[])?;
    ensure!(result["failures"] == 0, "{} prompts failed: {}", result["failures"], result["reasons"]);
    Ok(result)
}

fn number(result: &Value, pointer: &str) -> Result<f64> {
    result.pointer(pointer).and_then(Value::as_f64).with_context(|| format!("the generator printed no {pointer}"))
}
