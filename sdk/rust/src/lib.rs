//! Write a policy for dynamo-host.
//!
//! A routing policy is a type with settings and one function, registered by one line:
//!
//! ```
//! use dynamo_policy_sdk::{Candidates, Decision, NoSettings, Request, Router, rank};
//!
//! struct ShortestQueue;
//!
//! impl Router for ShortestQueue {
//!     type Settings = NoSettings;
//!
//!     fn new(_: NoSettings) -> Result<Self, String> {
//!         Ok(Self)
//!     }
//!
//!     fn route(&self, _: &Request, candidates: &Candidates) -> Decision {
//!         rank::lowest(candidates.active_requests().iter().map(|&requests| requests as f32))
//!     }
//! }
//!
//! dynamo_policy_sdk::register!(ShortestQueue);
//!
//! let candidates = Candidates::test(3).with_active_requests([4, 0, 2]);
//! assert_eq!(ShortestQueue.route(&Request::test(), &candidates), Decision::Place(vec![1, 2, 0]));
//! ```
//!
//! Build it for `wasm32-unknown-unknown` as a `cdylib` and wrap it as a component. The same code runs natively in
//! your tests: there, facts and columns are what the test gives, and [`state`], [`clock`] and [`entropy`] are
//! small stand-ins within the test's thread.
//!
//! Contract: what is not asked for is not computed and never crosses the boundary; each fact and column is
//! asked for at most once per call. A policy's own memory is a cache that may vanish between any two calls;
//! what must last goes to [`state`].

// The generated bindings name this crate as their users do.
extern crate self as dynamo_policy_sdk;

mod candidates;
mod decision;
pub mod rank;
mod request;
mod router;
mod services;
mod testing;

#[doc(hidden)]
pub mod bindings;
#[doc(hidden)]
pub mod guest;

pub use candidates::Candidates;
pub use decision::{Decision, explain, explain_wanted};
pub use request::{Request, endpoint, flags};
pub use router::{NoSettings, Outcomes, Router, end};
pub use services::{clock, entropy, state, telemetry};

/// Derives a settings type's JSON Schema; re-exported so that a policy needs no dependency of its own.
pub use schemars;
pub use serde;

/// What columns and facts hold where an amount is not known.
pub const UNKNOWN: u32 = u32::MAX;

/// The README's policy compiles.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
