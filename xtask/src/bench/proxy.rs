//! `cargo xtask bench proxy`: this host as a proxy, beside the proxies that others use, in front of the same engines.
//!
//! Two fake engines answer at once (*unpaced*), two more a token every few milliseconds (*paced*); a closed-loop generator
//! streams chat completions through each contender and checks every token (`bench/load`). Each round starts every
//! contender afresh, in another order; medians over rounds count. The generator straight at the engines, *direct*, is
//! what latencies are compared with.
//!
//! A contender that cannot be installed or started is reported and left out: networks differ, and the others count.

mod contenders;
mod report;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use self::{
    contenders::Contender,
    report::{Point, Report},
};
use super::{
    build_load, generate,
    processes::{Engines, Router, free_port},
};
use crate::policies;

/// Tokens of each stream.
const TOKENS: u64 = 32;
/// What a paced point may take; fewer connections have fewer streams in it.
const PACED_TIME: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Rounds; each runs every contender once, and the median round counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Streams of each point; paced points have fewer where they would take more than 10 s
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..))]
    requests: u64,
    /// Contenders, `direct` aside, which always runs
    #[arg(long, value_delimiter = ',', value_name = "NAME,…", value_parser = clap::builder::PossibleValuesParser::new(contenders::names()))]
    only: Vec<String>,
    /// Connections, each with one stream at a time
    #[arg(long, value_delimiter = ',', value_name = "N,…", default_values_t = [1, 16, 64, 256],
        value_parser = clap::value_parser!(u64).range(1..=4096))]
    concurrency: Vec<u64>,
    /// Engines behind each contender
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=64))]
    engines: u64,
    /// Milliseconds between the tokens of the paced engines
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pace_ms: u64,
    /// Measure one mode only
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// File for the results as JSON, every round's included
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// How engines write their tokens.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, clap::ValueEnum)]
pub(crate) enum Mode {
    /// As fast as they can
    Unpaced,
    /// One every so often
    Paced,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    policies::build()?;
    let tools = build_load()?;
    let (mut contenders, skipped) = contenders::prepare(&options.only)?;
    let mut report = Report::new(options, &contenders, skipped);
    let modes = options.mode.map_or_else(|| vec![Mode::Unpaced, Mode::Paced], |mode| vec![mode]);
    let mut fleets = Vec::new();
    for mode in modes {
        let pace_ms = if mode == Mode::Paced { options.pace_ms } else { 0 };
        fleets.push((mode, Engines::start(&tools.join("engine"), options.engines, pace_ms)?));
    }
    let mut serial = 0;
    for round in 1..=options.rounds {
        println!("Round {round} of {}", options.rounds);
        for (mode, engines) in &fleets {
            for contender in &contenders {
                serial += 1;
                let bench = Bench { options, tools: &tools, mode: *mode, seed: serial };
                match bench.measure(contender, engines, &mut report) {
                    Ok(()) => {}
                    // Without it there is nothing to compare with.
                    Err(error) if contender.is_direct() => return Err(error),
                    Err(error) => report.skip(contender.name, &error),
                }
            }
        }
        // Each contender runs early in one round and late in another.
        contenders.rotate_left(1);
    }
    report.print();
    match &options.output {
        Some(file) => std::fs::write(file, report.json()?).with_context(|| format!("cannot write {}", file.display())),
        None => Ok(()),
    }
}

/// One contender's turn in one mode.
struct Bench<'a> {
    options: &'a Options,
    tools: &'a Path,
    mode: Mode,
    seed: u64,
}

impl Bench<'_> {
    fn measure(&self, contender: &Contender, engines: &Engines, report: &mut Report) -> Result<()> {
        let port = free_port()?;
        let command = contender.command(port, engines.urls())?;
        let router = command.map(|command| Router::start(contender.name, port, command)).transpose()?;
        let urls = router.as_ref().map_or_else(|| engines.urls().to_vec(), |router| vec![router.url().to_owned()]);
        let warm_up = if self.mode == Mode::Paced { 64 } else { 500 };
        self.load(&urls, warm_up, 32, 0)?;
        for (number, &concurrency) in (1..).zip(&self.options.concurrency) {
            let requests = self.requests(concurrency);
            let before = router.as_ref().map(Router::cpu).transpose()?;
            let result = self.load(&urls, requests, concurrency, number)?;
            let after = router.as_ref().map(Router::cpu).transpose()?;
            let cpu = before.zip(after).map(|(before, after)| after.saturating_sub(before));
            let point = Point::read(&result, cpu)?;
            println!("  {:?} {concurrency:>4} {:<26} {point}", self.mode, contender.name);
            if point.failures > 0 {
                println!("    failures: {}", result["reasons"]);
            }
            report.add(contender.name, self.mode, concurrency, point);
        }
        if let Some(router) = router {
            report.started(contender.name, router.ready_after(), router.peak_rss()?);
        }
        Ok(())
    }

    fn requests(&self, concurrency: u64) -> u64 {
        if self.mode == Mode::Unpaced {
            return self.options.requests;
        }
        let stream_ms = TOKENS * self.options.pace_ms;
        let most = concurrency * (PACED_TIME.as_millis() as u64).div_ceil(stream_ms);
        self.options.requests.min(most)
    }

    /// Runs the generator. The seed is another for each run, so that no prompt comes twice.
    fn load(&self, urls: &[String], requests: u64, concurrency: u64, number: u64) -> Result<Value> {
        let seed = self.seed * 100 + number;
        let numbers = [("--requests", requests), ("--concurrency", concurrency), ("--tokens", TOKENS), ("--seed", seed)];
        let result = generate(self.tools, urls, &numbers, &[])?;
        let (failures, requests) =
            (result["failures"].as_u64().unwrap_or_default(), result["requests"].as_u64().unwrap_or_default());
        ensure!(requests > 0, "the generator sent nothing");
        if failures == requests {
            bail!("all {requests} streams failed: {}", result["reasons"]);
        }
        Ok(result)
    }
}
