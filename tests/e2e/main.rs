//! The host as its users meet it: the real binary, its listeners, its command line, its state on disk.
//!
//! Nothing here knows the host's code. Programs take free ports and say which; every wait is bounded and looks at a level;
//! a test that fails shows the logs of what it started. Speed is measured in benches, not here.

mod abuse;
mod admission;
mod anthropic_client;
mod audit;
mod authors;
mod bad_input;
mod books;
mod bypass;
mod cli;
mod cors;
mod disagg;
mod discovery;
mod doubles;
mod endpoints;
mod engine_pairs;
mod failures;
mod harness;
mod health;
mod hostile_load;
mod keys;
#[cfg(feature = "kubernetes")]
mod kubernetes;
mod kv;
mod limits;
mod metrics;
mod migration;
mod models;
mod on_error;
mod openai_client;
mod outcomes;
mod overload;
mod persistence;
mod policies;
mod profile;
mod quarantine;
mod queue;
mod receipts;
mod refusals;
mod reload;
mod requests;
mod retries;
mod roles;
mod simulate;
mod stop;
mod swap;
mod tls;
mod tokens;
mod traces;
mod workers;
