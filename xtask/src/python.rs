//! A Python environment with the official OpenAI client, for the tests that speak to the host as users do.

use std::{path::PathBuf, process::Command};

use anyhow::Result;

use crate::{paths, run, system};

/// The client that tests use. A new release is a change to be made here.
const CLIENT: &str = "openai==3.54.0";

/// The interpreter of an environment that has the client.
pub(crate) fn with_openai_client() -> Result<PathBuf> {
    let directory = paths::target().join("python");
    let python = directory.join("bin/python");
    let (name, version) = CLIENT.split_once("==").expect("the client is pinned");
    let installed = format!("import importlib.metadata as m; assert m.version({name:?}) == {version:?}");
    if run::works(Command::new(&python).args(["-c", &installed])) {
        return Ok(python);
    }
    println!("Installing {CLIENT} into {}", directory.display());
    if !run::works(Command::new("python3").args(["-c", "import venv, ensurepip"])) {
        system::install(&["python3", "python3-venv"], "the tests with the official OpenAI client")?;
    }
    run::read(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&directory))?;
    run::read(Command::new(&python).args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", CLIENT]))?;
    Ok(python)
}
