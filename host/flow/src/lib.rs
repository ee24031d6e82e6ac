//! Flow: who waits, who is served next, and how much runs at once.
//!
//! Contract: one owner, no clock, no I/O. What happens outside is told by calls (`arrive`, `set_room`, `finish`, …); what is to
//! be done about it is asked for with [`Flow::select`] and takes effect with [`Flow::apply`], until there is nothing left to
//! do. So the host behind its lock, the simulator and the tests drive the very same code.

mod breaker;
mod budget;
mod lately;
mod outlier;
mod queue;

pub use breaker::{Attempt, Breaker, BreakerRules, Ended, Failure, Stand};
pub use budget::{BUDGET_SECONDS, BudgetRules, RetryBudget};
pub use lately::Lately;
pub use outlier::{Ejection, Latencies, Measure, OutlierRules, Place, Row, Slow, outliers};
pub use queue::{Action, Arrival, Bounds, Demand, Flow, PoolLoad, Refusal, Room, Ticket};
