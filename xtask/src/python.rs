//! A Python environment with the official clients, for the tests that speak to the host as users do.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use crate::{paths, run, system};

/// The clients that tests use. A new release is a change to be made here.
const CLIENTS: &[&str] = &["openai==3.54.0", "anthropic==2.12.0"];

/// The interpreter of an environment that has the clients.
pub(crate) fn with_clients() -> Result<PathBuf> {
    let directory = paths::target().join("python");
    let python = directory.join("bin/python");
    if CLIENTS.iter().all(|client| is_installed(&python, client)) {
        return Ok(python);
    }
    println!("Installing {} into {}", CLIENTS.join(" and "), directory.display());
    if !run::works(Command::new("python3").args(["-c", "import venv, ensurepip"])) {
        system::install(&["python3", "python3-venv"], "the tests with the official clients")?;
    }
    run::read(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&directory))?;
    run::read(Command::new(&python).args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]).args(CLIENTS))?;
    Ok(python)
}

fn is_installed(python: &Path, client: &str) -> bool {
    let (name, version) = client.split_once("==").expect("the client is pinned");
    let installed = format!("import importlib.metadata as m; assert m.version({name:?}) == {version:?}");
    run::works(Command::new(python).args(["-c", &installed]))
}
