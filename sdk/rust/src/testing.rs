//! For a policy's own tests: requests, candidates, pools and outcomes as a test gives them, and a host to go with them.
//!
//! `Request::test()`, `Candidates::test(count)`, `Pools::test(count)` and `Outcomes::test(count)` make them; a `with_` function for each fact
//! and column gives its values. What a test does not give is unknown, as it may be in production. Where the contract
//! has a value for "nothing of the kind", it is that: no tenant, no flags, the first attempt, a healthy worker.
//!
//! State, clock, randomness, telemetry and explanations are stand-ins that belong to the test's thread. Each test
//! usually has its own, but `--test-threads=1` runs all on one: begin with [`reset`] where it matters.
//!
//! ```
//! use std::time::Duration;
//!
//! use dynamo_policy_sdk::{Candidates, Decision, clock, entropy, rank, state, testing, topology};
//!
//! testing::reset();
//! testing::seed(7);
//!
//! // Workers 0 and 2 are in zone "a"; the third worker's label is unknown.
//! let candidates = Candidates::test(3)
//!     .with_active_requests([4, 0, 2])
//!     .with_topology(topology::ZONE, ["a", "b", "a"])
//!     .with_label("gpu", [Some("h100"), Some("a100"), None]);
//! assert_eq!(candidates.topology(topology::ZONE), [0, 1, 0]);
//! assert_eq!(candidates.label_code("gpu", "h100"), Some(candidates.label("gpu")[0]));
//! let cost = candidates.active_requests().iter().map(|&requests| requests as f32);
//! assert_eq!(rank::lowest(cost), Decision::Place(vec![1, 2, 0]));
//!
//! // Time stands still until the test moves it; state expires by it.
//! state::set("note", b"remember", Duration::from_secs(5)).unwrap();
//! testing::advance(Duration::from_secs(5));
//! assert_eq!(clock::monotonic_ms(), 5000);
//! assert_eq!(state::get("note"), None);
//! ```

mod candidates;
mod links;
mod outcomes;
mod pools;
mod request;
pub(crate) mod services;

use std::cell::OnceCell;

pub(crate) use candidates::Given;
pub(crate) use links::GivenLinks;
pub(crate) use pools::GivenQuantiles;
pub use services::{
    advance, clear_state, counter, explanations, gauge, log_lines, reset, seed, set_explain_wanted, set_now_ms, set_state_error,
};

fn given<T>(value: T) -> OnceCell<T> {
    OnceCell::from(value)
}

/// # Panics
/// If the column has not one value per row.
fn column<T>(count: u32, values: impl Into<Vec<T>>) -> OnceCell<Vec<T>> {
    let values = values.into();
    assert_eq!(values.len(), count as usize, "a column has one value per row");
    given(values)
}
