//! A real engine behind the host: llama.cpp's server with a tiny model, as `cargo xtask real-engine` builds and starts it.
//!
//! The model's answers are the same every time (README.md here says under what conditions), so that what comes through the
//! host can be compared with what the engine says itself. Run one test at a time: two cores are few.

#![expect(clippy::print_stdout, reason = "figures are for whoever runs it with --nocapture")]

mod adapter;
mod conformance;
mod engine;
mod killed;
mod through_the_host;
mod tokens;
mod vllm;

#[path = "../e2e/harness/mod.rs"]
#[allow(dead_code, reason = "the end-to-end tests use all of it, these some")]
mod harness;
