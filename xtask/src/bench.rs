//! x
use anyhow::Result;
#[derive(clap::Subcommand)]
pub(crate) enum What { 
/// x
Policy }
pub(crate) fn run(_: &What) -> Result<()> { Ok(()) }
