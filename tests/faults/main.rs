//! Faults: the host over engines that die, hang, break and lie, with clients that count every token.
//!
//! Engines are mock engines in processes of their own, so that they can be killed and stopped as real ones are; what each of
//! them does wrong is in `docs/faults.md`. What comes is judged by [`load`]: a request is good if each of its choices has all
//! of its numbered tokens once and in order, one role, one finish reason and the right usage, and its stream one `[DONE]`.
//!
//! Each test is short here; `cargo xtask faults` runs the shows and the soak at length (`DYNAMO_HOST_TEST_FAULTS_*`).

mod disk;
mod engines;
mod footprint;
mod handoff;
mod load;
mod outage;
mod scripted;
mod show;
mod soak;

#[path = "../e2e/harness/mod.rs"]
#[allow(dead_code, reason = "the end-to-end tests use all of it, these some")]
mod harness;
