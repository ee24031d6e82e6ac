//! Routing policies over traces: what each makes of the same traffic in `dynamo-host simulate`, and the goals of `adaptive`.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{paths, policies, run};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// A Mooncake or Azure trace for the scenarios of the goal; without it, synthetic traffic only
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// A host that is built already, instead of one built for release
    #[arg(long, value_name = "FILE")]
    host: Option<PathBuf>,
    /// Seed of all that is left to chance
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

const POLICIES: &[&str] = &["round-robin", "least-loaded", "power-of-two", "two-tier", "kv-aware", "adaptive"];

/// Traffic, and what it comes to.
struct Scenario {
    name: &'static str,
    /// Empty: the trace of the command line.
    trace: &'static str,
    arguments: &'static [&'static str],
    goal: Goal,
}

/// What is asked of `adaptive`.
#[derive(Clone, Copy)]
enum Goal {
    /// At least half of the gap between kv-aware's and the pooled bound's mean TTFT, at no worse p99 and ITL.
    HalfTheGap,
    /// Mean and p99 TTFT at least 15 % below kv-aware's.
    Better,
    /// Mean TTFT no worse than least-loaded's.
    Overload,
    /// Mean TTFT at most 5 % above the better one's of kv-aware and least-loaded.
    Robust,
}

const fn goal(name: &'static str, arguments: &'static [&'static str], goal: Goal) -> Scenario {
    Scenario { name, trace: "", arguments, goal }
}

const fn robust(name: &'static str, trace: &'static str, arguments: &'static [&'static str]) -> Scenario {
    Scenario { name, trace, arguments, goal: Goal::Robust }
}

const SCENARIOS: &[Scenario] = &[
    goal("1×", &["--workers=8"], Goal::HalfTheGap),
    goal("4×", &["--workers=8", "--speed=4"], Goal::Better),
    goal("1×, 4,096 blocks", &["--workers=8", "--kv-blocks=4096"], Goal::Better),
    goal("12×", &["--workers=8", "--speed=12"], Goal::Overload),
    robust(
        "hot system prompts",
        "synthetic:requests=20000,rate=30,prefixes=200,prefix_tokens=6000,turns=1,input=600,output=150",
        &["--workers=8"],
    ),
    robust(
        "the same, little cache",
        "synthetic:requests=20000,rate=30,prefixes=200,prefix_tokens=6000,turns=1,input=600,output=150",
        &["--workers=8", "--kv-blocks=4096"],
    ),
    robust(
        "one system prompt",
        "synthetic:requests=20000,rate=30,prefixes=1,prefix_tokens=8000,turns=1,input=600,output=150",
        &["--workers=8"],
    ),
    robust(
        "agents",
        "synthetic:requests=20000,rate=20,prefixes=4,prefix_tokens=4000,turns=15,think_s=8,input=1000,output=200,max_input=100000",
        &["--workers=8"],
    ),
    robust(
        "no reuse",
        "synthetic:requests=20000,rate=20,prefixes=1000000,prefix_tokens=64,turns=1,input=3000,output=200",
        &["--workers=8"],
    ),
    robust("two workers", "synthetic:requests=5000,rate=5,turns=5,think_s=20,input=1500,output=200", &["--workers=2"]),
    robust("64 workers", "synthetic:requests=50000,rate=160,turns=5,think_s=20,input=1500,output=200", &["--workers=64"]),
    robust(
        "half of them slow",
        "synthetic:requests=20000,rate=15,turns=5,think_s=20,input=1500,output=200",
        &["--workers=4", "--workers=4,speedup=0.4"],
    ),
];

pub(crate) fn run(options: &Options) -> Result<()> {
    policies::build()?;
    let host = match &options.host {
        Some(host) => host.clone(),
        None => {
            run::check(run::cargo().args(["build", "--quiet", "--release", "--package", "dynamo-host"]))?;
            paths::target().join("release/dynamo-host")
        }
    };
    println!(
        "| scenario | policy | TTFT mean | p50 | p90 | p99 | ITL mean | p99 | reuse |\n|---|---|---:|---:|---:|---:|---:|---:|---:|"
    );
    let mut verdicts = Vec::new();
    for scenario in SCENARIOS {
        let trace = match (scenario.trace, &options.trace) {
            ("", Some(trace)) => trace.display().to_string(),
            ("", None) => continue,
            (trace, _) => trace.to_owned(),
        };
        let mut command = Command::new(&host);
        command
            .args(["simulate", "--output=json", "--trace", &trace, &format!("--seed={}", options.seed)])
            .args(scenario.arguments);
        for policy in POLICIES {
            command.arg(format!("--policy=routing={}", paths::policies().join(format!("{policy}.wasm")).display()));
        }
        let report: Value = serde_json::from_str(&run::read(&mut command)?).context("simulate printed no JSON")?;
        print_rows(scenario.name, &report)?;
        verdicts.push(verdict(scenario, &report)?);
    }
    println!("\n| scenario | goal of adaptive | it has | |\n|---|---|---|---|");
    verdicts.iter().for_each(|line| println!("{line}"));
    Ok(())
}

fn print_rows(scenario: &str, report: &Value) -> Result<()> {
    for policy in POLICIES {
        let row = of(report, policy)?;
        let figures = ["ttft/mean", "ttft/p50", "ttft/p90", "ttft/p99"].map(|path| number(row, path));
        let [mean, p50, p90, p99] = figures.map(|figure| figure.unwrap_or(f64::NAN));
        let (itl, itl_p99, reuse) = (number(row, "itl/mean")?, number(row, "itl/p99")?, number(row, "reuse")?);
        println!("| {scenario} | {policy} | {mean:.1} | {p50:.1} | {p90:.1} | {p99:.0} | {itl:.2} | {itl_p99:.1} | {reuse:.3} |");
    }
    for (bound, name) in [("pooled", "bound: pooled LRU"), ("infinite", "bound: infinite cache")] {
        let bound = &report["bounds"][bound];
        let [mean, p50, p90, p99] = ["mean", "p50", "p90", "p99"].map(|key| bound["ttft"][key].as_f64().unwrap_or(f64::NAN));
        let reuse = number(bound, "reuse")?;
        println!("| {scenario} | *{name}* | {mean:.1} | {p50:.1} | {p90:.1} | {p99:.0} | – | – | {reuse:.3} |");
    }
    Ok(())
}

/// A line that says whether the goal is met, and by what.
fn verdict(scenario: &Scenario, report: &Value) -> Result<String> {
    let [ours, theirs, loads] = [of(report, "adaptive")?, of(report, "kv-aware")?, of(report, "least-loaded")?];
    let mean = |row| number(row, "ttft/mean");
    let ratio = |path| anyhow::Ok(number(ours, path)? / number(theirs, path)?);
    let (goal, has, is_met) = match scenario.goal {
        Goal::HalfTheGap => {
            let bound = number(report, "bounds/pooled/ttft/mean")?;
            let closed = (mean(theirs)? - mean(ours)?) / (mean(theirs)? - bound);
            let (p99, itl) = (ratio("ttft/p99")?, ratio("itl/mean")?);
            let has = format!("{:.0} % closed, p99 ×{p99:.3}, ITL ×{itl:.3}", 100.0 * closed);
            (
                "half of the gap from kv-aware to the pooled bound closed, p99 and ITL no worse",
                has,
                closed >= 0.5 && p99 <= 1.0 && itl <= 1.0,
            )
        }
        Goal::Better => {
            let (mean, p99) = (ratio("ttft/mean")?, ratio("ttft/p99")?);
            // Where even a cache without end and without a queue would not do.
            let bound = number(report, "bounds/infinite/ttft/p99")? / number(theirs, "ttft/p99")?;
            let has = format!("mean ×{mean:.3}, p99 ×{p99:.3} (bound ×{bound:.3})");
            ("mean and p99 TTFT ×0.85 of kv-aware's", has, mean <= 0.85 && p99 <= 0.85)
        }
        Goal::Overload => {
            let ratio = mean(ours)? / mean(loads)?;
            ("TTFT no worse than least-loaded's", format!("×{ratio:.3}"), ratio <= 1.0)
        }
        Goal::Robust => {
            let ratio = mean(ours)? / mean(theirs)?.min(mean(loads)?);
            ("TTFT at most ×1.05 of the better of kv-aware and least-loaded", format!("×{ratio:.3}"), ratio <= 1.05)
        }
    };
    Ok(format!("| {} | {goal} | {has} | {} |", scenario.name, if is_met { "met" } else { "**not met**" }))
}

fn of<'a>(report: &'a Value, policy: &str) -> Result<&'a Value> {
    let rows = report["policies"].as_array().context("a report without policies")?;
    rows.iter().find(|row| row["name"] == policy).with_context(|| format!("no row of {policy}"))
}

fn number(value: &Value, path: &str) -> Result<f64> {
    path.split('/').fold(value, |value, key| &value[key]).as_f64().with_context(|| format!("no {path} in the report"))
}
