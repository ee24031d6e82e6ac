//! The host: wiring, the front door, and a request's life.
//!
//! Everything that decides or remembers is a crate of its own; what is here brings them together. Start reading at
//! [`request`]: one file, top to bottom, from a client's bytes to the engine's last token.

mod account;
mod admin;
mod admit;
mod audit;
mod auth;
mod body;
pub mod cli;
mod clock;
mod config;
mod cores;
mod decode;
mod discovery;
mod dispatch;
mod door;
mod error;
mod exchange;
mod exposition;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod handoff;
mod kv;
mod listener;
mod meters;
mod migrate;
mod models;
mod observe;
mod parts;
mod place;
mod policies;
mod prefixes;
mod profile;
mod receipts;
mod relay;
mod reload;
mod request;
mod retry_after;
mod roster;
mod serve;
mod stop;
mod tasks;
mod telemetry;
mod text;
mod tls;
mod tokenize;
mod trace;
mod watch;
