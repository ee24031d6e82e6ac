//! The one developer entry point: `cargo xtask demo`, `test`, `ci`, `policies`, `bench`, `dist`, `dashboard`, `fuzz`,
//! `faults`, `overload`, `real-engine`.
#![allow(clippy::print_stdout)]

mod bench;
mod demo;
mod dist;
mod faults;
mod paths;
mod policies;
mod python;
mod real_engine;
mod run;
#[cfg(test)]
mod structure;
mod system;
mod wasm;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::run::cargo;

/// Developer tasks of dynamo-host.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing, build policies and host, and stream a chat completion through three mock engines.
    Demo {
        /// Stop after one completion; otherwise the host keeps running until Ctrl-C.
        #[arg(long)]
        once: bool,
    },
    /// Build the policies and the test guests as components.
    Policies,
    /// Run all tests. What CI runs.
    Test {
        /// Passed on to `cargo test`.
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Check formatting and lints, then run all tests.
    Ci,
    /// Measure, side by side with the rivals where there are any.
    Bench {
        /// What to measure.
        #[command(subcommand)]
        what: bench::What,
    },
    /// Build a release: one archive with the program, policies, man pages, completions and a dashboard.
    Dist {
        /// Target triple; by default x86_64-unknown-linux-musl where rustup has it, else this machine's.
        #[arg(long, value_name = "TRIPLE")]
        target: Option<String>,
    },
    /// Make dist/grafana.json anew from the metrics.
    Dashboard,
    /// Mutate the corpus of the fuzz targets for some time. Every test run does a little of it.
    Fuzz {
        /// Seconds for each target.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// Targets; all without any.
        targets: Vec<String>,
    },
    /// Kill, stop and break mock engines under load for long, and count every token. Every test run does a little of it.
    ///
    /// Without minutes, the show: 4 engines, 64 clients, 60 tokens at 20 ms each; engines killed every 2 s, or stopped every
    /// 5 s, for a minute each way of asking (about 9 minutes in all).
    Faults {
        /// Instead, faults of all kinds for so many minutes, with the host's memory, sockets and threads over time.
        #[arg(long)]
        minutes: Option<u64>,
        /// Of all that is random [default: 1].
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Put three times as much work on mock engines as they can do, and print who was served how much and how soon.
    Overload {
        /// Seconds for each scene.
        #[arg(long, default_value_t = 60)]
        seconds: u32,
        /// A release build: slower to build, and what is measured is what is shipped.
        #[arg(long)]
        release: bool,
        /// Parts of scenes' names; all without any.
        scenes: Vec<String>,
    },
    /// Build a real llama.cpp server (ten minutes, once) and drive it through the host. Not part of CI.
    RealEngine {
        /// Instead, install a real vLLM for the CPU (5 GB, once) and drive the adapter at it.
        #[arg(long)]
        vllm: bool,
        /// Instead, two real vLLMs, of which one prefills and the other decodes (NIXL; 5 GB, once), killed and started again.
        #[arg(long, conflicts_with = "vllm")]
        disagg: bool,
        /// Compare our tokens with vLLM's also over the tokenizer in this directory
        #[arg(long, value_name = "DIR", requires = "vllm")]
        tokenizer: Option<PathBuf>,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().task {
        Task::Demo { once } => demo::run(once),
        Task::Policies => policies::build().map(drop),
        Task::Test { arguments } => test(&arguments),
        Task::Ci => ci(),
        Task::Bench { what } => bench::run(&what),
        Task::Dist { target } => dist::run(target.as_deref()),
        Task::Dashboard => dist::dashboard(),
        Task::Fuzz { seconds, targets } => fuzz(seconds, &targets),
        Task::Faults { minutes, seed } => faults::run(minutes, seed),
        Task::Overload { seconds, release, scenes } => overload(seconds, release, &scenes),
        Task::RealEngine { disagg: true, .. } => real_engine::disaggregated(),
        Task::RealEngine { vllm: false, .. } => real_engine::llama_cpp(),
        Task::RealEngine { vllm: true, tokenizer, .. } => real_engine::vllm(tokenizer.as_deref()),
    }
}

fn test(arguments: &[String]) -> Result<()> {
    let toolchain = policies::build()?;
    let python = python::with_clients()?;
    let mut command = cargo();
    command.args(["test", "--workspace"]).args(arguments).env("DYNAMO_HOST_TEST_PYTHON", python);
    if let Some(toolchain) = toolchain.for_tests()? {
        command.env("DYNAMO_HOST_TEST_WASM_TOOLCHAIN", toolchain);
    }
    run::check(&mut command)
}

fn fuzz(seconds: u64, targets: &[String]) -> Result<()> {
    // Of the whole workspace, as the tests build it: by itself the host would have other features, and be built twice.
    let test = ["test", "--workspace", "--features", "dynamo-host/fuzzing", "--test", "fuzz", "--", &seconds.to_string()];
    run::check(cargo().args(test).args(targets))
}

fn overload(seconds: u32, release: bool, scenes: &[String]) -> Result<()> {
    policies::build()?;
    let mut command = cargo();
    // Of the whole workspace, for the reason that `faults` has.
    command.args(["test", "--workspace", "--test", "e2e"]).args(release.then_some("--release"));
    command.args(["--", "overload::", "--nocapture", "--test-threads=1"]);
    command.env("DYNAMO_HOST_OVERLOAD_SECONDS", seconds.to_string()).env("DYNAMO_HOST_OVERLOAD_SCENES", scenes.join(","));
    run::check(&mut command)
}

fn ci() -> Result<()> {
    run::check(cargo().args(["fmt", "--all", "--check"]))?;
    run::check(cargo().args(["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"]))?;
    test(&[])
}
