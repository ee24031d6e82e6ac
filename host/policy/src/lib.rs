//! The policy host: runs decisions in a sandbox, and keeps serving when one is bad.
//!
//! Contract: a policy is bytes; what comes out of [`PolicyRuntime::load`] has been inspected, compiled, linked,
//! configured, probed and warmed, all off the request path. A call is synchronous and bounded by fuel, memory, stack
//! and what the host hands out; whatever goes wrong in it is a [`PolicyFault`] with a cause, the instance is
//! discarded, and the slot's fallback decides. This is the only crate that knows wasmtime.
//!
//! Rejected: a fresh instance per call (instantiation costs more than a decision), `deserialize` of precompiled code
//! (it trusts its input as native code), records across the boundary (marshalling was the cost: ten fields of
//! 1,024 candidates took 65 µs, four columns 7 µs).

mod abi;
pub mod bench;
mod blueprint;
mod call;
mod fault;
mod identity;
mod inspect;
mod limits;
mod load;
mod pool;
mod question;
mod record;
mod runtime;
mod slot;
mod standing;
mod state;
pub mod synthetic;
mod trial;
mod version;
mod world;

pub use blueprint::Decided;
pub use call::{Explanation, OUTCOMES_AT_ONCE, OUTCOMES_EVERY, OUTCOMES_WAITING, OutcomeBatch, OutcomeRow, Reading};
pub use fault::{FaultCause, PolicyFault};
pub use identity::{Digest, PolicyName};
pub use inspect::{Inspection, inspect};
pub use limits::{Limits, QuarantineLimits};
pub use load::{LoadError, read_component};
pub use question::{AdmissionCall, Question, RouteCall, native_route};
pub use runtime::{Clock, Now, PolicyRuntime, RuntimeError};
pub use slot::{
    AdmissionSlot, DecidedBy, Decision, Failed, Lifecycle, NoHistory, Pinned, QuarantineReport, RoutingSlot, Slot, SlotReport,
    VersionReport, VersionState,
};
pub use state::SlotState;
pub use trial::{MemoryDependence, Trial};
pub use version::PolicyVersion;
pub use world::World;
