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
//! An [`Admission`] policy, which lets requests in or sheds them, is registered by `register!(MyPolicy as Admission)`.
//!
//! `dynamo-host policy new` writes a crate to start from, and `dynamo-host policy build` makes the component of it. Policies
//! from parts, scorers with weights, are in [`compose`]. The same code runs natively in your tests: there, facts and columns
//! are what the test gives, and the host's services are stand-ins within the test's thread, see [`testing`].
//!
//! Contract: what is not asked for is not computed and never crosses the boundary. Each fact and column is asked of the
//! host at most once per call and kept; what takes an argument ([`label`](Candidates::label),
//! [`label_code`](Candidates::label_code), [`topology`](Candidates::topology), [`signal`](Candidates::signal),
//! [`attribute`](Request::attribute), [`Links`]) is asked each time. A policy's own memory is a cache that may vanish between any
//! two calls; what must last goes to [`state`].

// The generated bindings name this crate as their users do.
extern crate self as dynamo_policy_sdk;

mod admission;
mod candidate;
mod candidates;
pub mod classes;
mod codes;
pub mod compose;
mod decision;
mod links;
mod outcomes;
mod pools;
pub mod rank;
mod request;
mod router;
mod services;
pub mod testing;
mod verdict;

#[doc(hidden)]
pub mod bindings;
#[doc(hidden)]
pub mod guest;

pub use admission::Admission;
pub use candidate::Candidate;
pub use candidates::Candidates;
pub use codes::{end, endpoint, flags, role, stage, topology, worker_state};
pub use decision::{Decision, explain, explain_wanted};
pub use links::Links;
pub use outcomes::{Outcome, Outcomes};
pub use pools::Pools;
pub use request::Request;
pub use router::{NoSettings, Router};
pub use services::{clock, entropy, state, telemetry};
pub use verdict::{Admit, Shed, Verdict};

/// Derives a settings type's JSON Schema; re-exported so that a policy needs no dependency of its own.
pub use schemars;
pub use serde;

/// What facts and columns of `u32` hold where a value is not known.
pub const UNKNOWN: u32 = u32::MAX;
