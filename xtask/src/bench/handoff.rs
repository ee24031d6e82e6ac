//! `cargo xtask bench handoff`: what it costs the host that one engine prefills and another decodes.
//!
//! The same load, in turn: straight at an engine (*direct*), through a host over two engines that do all of a request
//! (*aggregated*), and through a host over one that prefills and one that decodes (*split*). The fake engines (`bench/load`) answer
//! at once and move no KV, so that what is measured is the second request, the reading of the first answer, and the second
//! decision. How many requests were handed over is read from the host's own count, and must be all of them.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{
    build_load, build_tools, generate,
    processes::{self, Engines, Router, free_port},
};
use crate::{paths, policies};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Rounds; each runs every load through all three, and the median counts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Requests of each load
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    requests: u64,
    /// Connections, each with one request at a time
    #[arg(long, value_delimiter = ',', value_name = "N,…", default_values_t = [1, 16], value_parser = clap::value_parser!(u64).range(1..=4096))]
    concurrency: Vec<u64>,
    /// Tokens of a prompt, of four bytes each
    #[arg(long, value_delimiter = ',', value_name = "N,…", default_values_t = [400, 8000])]
    prompt_tokens: Vec<u64>,
    /// Tokens of an answer
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u64).range(2..))]
    tokens: u64,
    /// Policy that routes, or `native`; one that does not tell roles apart hands all over on split pools
    #[arg(long, default_value = "least-loaded")]
    policy: String,
    /// Program to measure in place of a release build of this tree
    #[arg(long, value_name = "FILE")]
    host: Option<PathBuf>,
}

/// How long the host may take to see that its engines can hand over.
const PROOF: Duration = Duration::from_secs(30);
/// The host's count of hand-offs.
const HANDOFFS: &str = "dynamo_host_handoffs_total";

/// A kind of request.
#[derive(Clone, Copy)]
struct Load {
    whole: bool,
    prompt_tokens: u64,
    concurrency: u64,
}

/// What came of it on one of the three: the host's CPU for a request in µs, and the time to the first token (of whole answers:
/// to their end) and to the end in ms.
#[derive(Clone, Copy)]
struct Point {
    cpu_us: f64,
    first_ms: f64,
    end_ms: f64,
}

/// A host under measurement.
struct Host {
    router: Router,
    admin: u16,
    hands_over: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    policies::build()?;
    let tools = if options.host.is_none() { build_load()? } else { build_tools()? };
    let engines = Engines::start(&tools.join("engine"), 4, 0)?;
    let (whole, split) = engines.urls().split_at(2);
    let hosts = [
        Host::start("aggregated", options, whole, ["aggregated"; 2])?,
        Host::start("split", options, split, ["prefill", "decode"])?,
    ];
    hosts[1].wait_for_handoffs(&tools, options)?;
    let loads: Vec<Load> = loads(options);
    let mut samples: Vec<[Vec<Point>; 3]> = loads.iter().map(|_| Default::default()).collect();
    for round in 1..=options.rounds {
        println!("Round {round} of {}", options.rounds);
        for (serial, (load, points)) in (1..).zip(loads.iter().zip(&mut samples)) {
            for turn in 0..3 {
                // Each runs first, second and third in turn.
                let at = (turn + round as usize) % 3;
                let seed = (round * 100 + serial) * 10 + at as u64;
                let bench = Bench { options, tools: &tools, load: *load, seed };
                let point = match at {
                    0 => bench.measure(&whole[..1], None)?,
                    _ => bench.measure(&[hosts[at - 1].router.url().to_owned()], Some(&hosts[at - 1]))?,
                };
                points[at].push(point);
            }
        }
    }
    print(options, &loads, &samples);
    Ok(())
}

fn loads(options: &Options) -> Vec<Load> {
    let mut loads = Vec::new();
    for &concurrency in &options.concurrency {
        for whole in [false, true] {
            loads.extend(options.prompt_tokens.iter().map(|&prompt_tokens| Load { whole, prompt_tokens, concurrency }));
        }
    }
    loads
}

struct Bench<'a> {
    options: &'a Options,
    tools: &'a Path,
    load: Load,
    seed: u64,
}

impl Bench<'_> {
    fn measure(&self, urls: &[String], host: Option<&Host>) -> Result<Point> {
        // Connections, caches and clocks of the processor.
        self.generate(urls, self.options.requests.div_ceil(10), 0)?;
        let before = host.map(Host::read).transpose()?;
        let result = self.generate(urls, self.options.requests, 1)?;
        let after = host.map(Host::read).transpose()?;
        let requests = self.options.requests;
        let mut cpu_us = f64::NAN;
        if let (Some(host), Some(before), Some(after)) = (host, before, after) {
            let (handed_over, expected) = (after.1 - before.1, if host.hands_over { requests } else { 0 });
            ensure!(handed_over == expected, "{handed_over} of {requests} requests were handed over instead of {expected}");
            cpu_us = after.0.saturating_sub(before.0).as_secs_f64() * 1e6 / requests as f64;
        }
        let ms = |pointer: &str| {
            let us = result.pointer(pointer).and_then(Value::as_f64);
            us.map(|us| us / 1e3).with_context(|| format!("the generator printed no {pointer}"))
        };
        Ok(Point { cpu_us, first_ms: ms("/ttft_us/p50")?, end_ms: ms("/total_us/p50")? })
    }

    /// Runs the generator, with prompts that nobody has seen.
    fn generate(&self, urls: &[String], requests: u64, part: u64) -> Result<Value> {
        let numbers = [
            ("--requests", requests),
            ("--concurrency", self.load.concurrency),
            ("--tokens", self.options.tokens),
            ("--prompt-bytes", self.load.prompt_tokens * 4),
            ("--seed", self.seed * 2 + part),
        ];
        let result = generate(self.tools, urls, &numbers, if self.load.whole { &["--whole"] } else { &[] })?;
        ensure!(result["failures"] == 0, "{} requests failed: {}", result["failures"], result["reasons"]);
        Ok(result)
    }
}

impl Host {
    fn start(name: &str, options: &Options, engines: &[String], roles: [&str; 2]) -> Result<Self> {
        let (port, admin) = (free_port()?, free_port()?);
        let built = || paths::target().join("release/dynamo-host");
        let mut command = Command::new(options.host.clone().unwrap_or_else(built));
        command.args(["serve", "--http", &format!("127.0.0.1:{port}"), "--admin", &format!("127.0.0.1:{admin}")]);
        command.args(["--log-level", "warn", "--routing"]);
        let component = paths::policies().join(format!("{}.wasm", options.policy));
        command.arg(if options.policy == "native" { Path::new("native") } else { &component });
        for (engine, role) in engines.iter().zip(roles) {
            command.args(["--worker", &format!("{engine},role={role}")]);
        }
        let router = Router::start(&format!("handoff-{name}"), port, command)?;
        Ok(Self { router, admin, hands_over: roles.contains(&"prefill") })
    }

    /// Its CPU time and the hand-offs that went well, so far.
    fn read(&self) -> Result<(Duration, u64)> {
        let metrics = processes::get(self.admin, "/metrics")?;
        let answered = metrics.lines().filter(|line| line.starts_with(HANDOFFS) && line.contains(r#"result="answered""#));
        let count = answered.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>();
        Ok((self.router.cpu()?, count as u64))
    }

    /// Until then it serves requests whole.
    fn wait_for_handoffs(&self, tools: &Path, options: &Options) -> Result<()> {
        let begun = Instant::now();
        let load = Load { whole: true, prompt_tokens: 100, concurrency: 1 };
        let bench = Bench { options, tools, load, seed: 1 };
        while self.read()?.1 == 0 {
            ensure!(begun.elapsed() < PROOF, "the host handed nothing over within {} s", PROOF.as_secs());
            bench.generate(&[self.router.url().to_owned()], 50, 0)?;
        }
        Ok(())
    }
}

fn print(options: &Options, loads: &[Load], samples: &[[Vec<Point>; 3]]) {
    println!("\nMedians of {} rounds; latency p50 in ms, over direct; CPU of the host in µs for a request\n", options.rounds);
    println!(
        "| connections | answer | prompt tokens | direct first | end | aggregated CPU µs | first | end | split CPU µs | first | end | second leg CPU µs | end |"
    );
    println!("|---:|---|---:|{}", "---:|".repeat(10));
    for (load, points) in loads.iter().zip(samples) {
        let [direct, aggregated, split] = points.each_ref().map(|points| Point::median(points));
        let answer = if load.whole { "whole" } else { "streamed" };
        print!("| {} | {answer} | {} | {:.2} | {:.2} |", load.concurrency, load.prompt_tokens, direct.first_ms, direct.end_ms);
        for host in [aggregated, split] {
            let (first, end) = (host.first_ms - direct.first_ms, host.end_ms - direct.end_ms);
            print!(" {:.0} | {first:+.2} | {end:+.2} |", host.cpu_us);
        }
        println!(" {:+.0} | {:+.2} |", split.cpu_us - aggregated.cpu_us, split.end_ms - aggregated.end_ms);
    }
}

impl Point {
    fn median(points: &[Self]) -> Self {
        let median = |value: fn(&Self) -> f64| {
            let mut values: Vec<f64> = points.iter().map(value).collect();
            values.sort_unstable_by(f64::total_cmp);
            values[values.len() / 2]
        };
        Self { cpu_us: median(|p| p.cpu_us), first_ms: median(|p| p.first_ms), end_ms: median(|p| p.end_ms) }
    }
}
