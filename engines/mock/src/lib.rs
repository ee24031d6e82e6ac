//! A model of an LLM engine: continuous batching over a paged KV cache, with the speed of a GPU that isn't there.
//!
//! Purpose: what the host does with engines can be tested, demonstrated and simulated without a GPU, and with
//! outputs in which a lost or doubled token shows. The parts, from the inside out:
//! - [`model`] is the engine itself, as a state machine in virtual time: no tokio, no clock, no I/O. The
//!   simulator drives the same code.
//! - [`tokens`] says what is generated, and turns prompts into token ids.
//! - [`MockEngine`] runs the model in real time inside this process, as an adapter (`mock://NAME?model=…`).
//! - its prefix cache is told as it changes, in this process or over ZeroMQ as vLLM publishes it.
//! - it hands KV over to engines in other processes, and takes it over, as vLLM's NIXL connector does ([`HandoffOptions`]).
//! - it does what [`Faults`] say wrong, from its start or while it runs.
//! - [`server`] puts it behind vLLM's HTTP surface, for tests of whatever speaks to engines over the network.
//!
//! Its output goes on where a prompt leaves off: one that ends in the beginning of a numbered output is continued, as a model
//! would at temperature 0.
//!
//! Deliberately absent: sampling, stop tokens, log probabilities, tools. Their parameters are accepted and ignored.

mod driver;
mod engine;
mod faults;
mod handoff;
pub mod model;
mod options;
mod publishing;
pub mod server;
mod service;
mod tape;
pub mod tokens;

pub use engine::{MockEngine, Stopped};
pub use faults::{FaultError, Faults, FetchMoment, Refusal, Switches};
pub use handoff::HandoffOptions;
pub use model::{Profile, ProfileError};
pub use options::{MockOptions, OptionsError};
