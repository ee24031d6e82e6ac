//! The host as its users meet it: the real binary, its listeners, its command line, its state on disk.
//!
//! Nothing here knows the host's code. Programs take free ports and say which; every wait is bounded and looks at a level;
//! a test that fails shows the logs of what it started. Speed is measured in benches, not here.

mod bad_input;
mod cli;
mod discovery;
mod failures;
mod harness;
#[cfg(feature = "kubernetes")]
mod kubernetes;
mod limits;
mod metrics;
mod models;
mod openai_client;
mod persistence;
mod policies;
mod refusals;
mod reload;
mod requests;
mod retries;
mod swap;
mod workers;
