//! Debian packages: installed when root, otherwise asked for by their exact command.

use std::process::Command;

use anyhow::{Result, bail};

use crate::run;

/// Installs packages. `why` names what needs them.
pub(crate) fn install(packages: &[&str], why: &str) -> Result<()> {
    let list = packages.join(" ");
    if !run::works(Command::new("apt-get").arg("--version")) {
        bail!("{why} needs what Debian calls {list}; install it with this system's package manager");
    }
    if run::read(Command::new("id").arg("-u"))?.trim() != "0" {
        bail!("{why} needs {list}; run: sudo apt-get install --no-install-recommends {list}");
    }
    println!("Installing {list} for {why}");
    run::read(Command::new("apt-get").arg("update"))?;
    run::read(
        Command::new("apt-get")
            .args(["install", "--yes", "--no-install-recommends"])
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive"),
    )?;
    Ok(())
}
