//! The simulator: a trace of requests replayed in virtual time against modelled engines.
//!
//! Contract: what decides is what decides in production: the same `.wasm` in the same sandbox with the same bounds, over
//! the same candidates, load board and prefix index, told of outcomes in the same batches. What computes is the mock
//! engine's model. Only time is another: it is that of an event queue, and a decision takes none of it. The same trace,
//! options and seed give the same report, byte for byte.
//!
//! The queue in front of the engines, their faults and clients that leave are there if they are asked for. Deliberately
//! absent: networks other than those that KV goes over. `docs/simulator.md` says what is modelled and what is not.

pub mod bounds;
mod engine;
pub mod faults;
mod options;
mod outcome;
pub mod prompt;
mod queue;
pub mod queueing;
pub mod report;
mod requests;
mod samples;
mod simulation;
pub mod trace;

pub use engine::{EngineSpec, default_profile};
pub use faults::Faults;
pub use queueing::{AdmissionPolicy, Queueing, Tenant};
pub use report::Report;
pub use samples::{Quantiles, Samples};
pub use simulation::{
    Contender, FaultTally, HandoffTally, Links, Options, PoolTally, QueueTally, SimulationError, Tally, TenantTally, simulate,
};
pub use trace::{Trace, TraceError, TraceRequest};
