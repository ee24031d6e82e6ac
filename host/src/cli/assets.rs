//! `dynamo-host assets`: what a release carries besides the program and comes from it: man pages, shell completions, and the
//! Grafana dashboard. Not for operators: `cargo xtask dist` and `cargo xtask dashboard` call it.

use std::{fs, io, path::Path};

use clap::CommandFactory;
use clap_complete::Shell;

use super::{Arguments, dashboard};

/// Writes them into folders of `directory`, which is made.
///
/// # Errors
/// If a file cannot be written.
pub(super) fn write(directory: &Path) -> Result<(), String> {
    let write = || -> io::Result<()> {
        let (man, completions) = (directory.join("man/man1"), directory.join("completions"));
        fs::create_dir_all(&man)?;
        fs::create_dir_all(&completions)?;
        clap_mangen::generate_to(Arguments::command(), &man)?;
        for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
            clap_complete::generate_to(shell, &mut Arguments::command(), "dynamo-host", &completions)?;
        }
        fs::write(directory.join("grafana.json"), dashboard::json())
    };
    write().map_err(|error| format!("{} cannot be filled: {error}", directory.display()))
}
