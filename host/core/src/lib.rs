//! Domain nouns and pure decisions: what a worker, a fleet, a request and an answer are.
//!
//! Contract: nothing here does I/O, is async, or reads a clock; time and randomness are arguments. That is
//! what lets a simulator drive the very same code in virtual time, and what makes a decision replayable.

pub mod admission;
pub mod answer;
pub mod column;
pub mod fleet;
pub mod id;
pub mod kv;
pub mod links;
pub mod load;
pub mod native;
pub mod request;
pub mod slot;
pub mod worker;

pub use admission::{Admitted, PoolState};
pub use answer::{Answer, AnswerFault, Ranking, Rejection};
pub use column::Column;
pub use fleet::{Among, Candidates, Fleet, FleetError, RecordedError, Recording, Ways};
pub use id::WorkerId;
pub use kv::{EngineHash, Held, KvEvent, Overlap, StoredBlocks, Tier};
pub use links::LinkBoard;
pub use load::{Load, LoadBoard, LoadReport, LoadSlot};
pub use request::{Endpoint, RequestFacts, Slo, Stage, TokenCount};
pub use slot::{OnError, SlotKind, SlotName};
pub use worker::{Handoff, Role, Worker, WorkerSpec, WorkerState};

/// What columns hold where an amount is not known.
pub const UNKNOWN: u32 = u32::MAX;
