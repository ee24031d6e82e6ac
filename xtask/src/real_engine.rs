//! A real engine behind the host: builds `llama-server`, makes its model, and runs `tests/real-engine` over them.

use std::{env, path::PathBuf, process::Command};

use anyhow::{Context, Result};

use crate::{
    paths, policies,
    run::{self, cargo},
};

/// Builds what is missing, then tests.
pub(crate) fn run() -> Result<()> {
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
    // One at a time: what an engine says is compared with what it says alone.
    run::check(
        cargo()
            .args(["test", "--package", "dynamo-host", "--features", "real-engine", "--test", "real-engine"])
            .args(["--", "--test-threads=1"])
            .env("DYNAMO_HOST_TEST_LLAMA_SERVER", directory.join("llama-server"))
            .env("DYNAMO_HOST_TEST_LLAMA_MODEL", model),
    )
}

/// Where programs keep what can be made again: the build outlives `cargo clean`.
fn cache() -> Result<PathBuf> {
    let stated = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let at_home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    stated
        .or_else(at_home)
        .context("neither XDG_CACHE_HOME nor HOME is set; set one, so that llama-server has a place to be kept")
}
