//! The harness: programs started as users start them, a small HTTP client, engines that do what a test tells them.
//!
//! Contract: every wait has a bound and looks at a level, never at a moment that could be missed; nothing outlives its
//! test; when a test fails, it shows the log of each program that it started.

pub(crate) mod client;
pub(crate) mod components;
pub(crate) mod host;
pub(crate) mod load;
pub(crate) mod process;
pub(crate) mod scripted;
pub(crate) mod sse;

use std::time::Duration;

use tokio::time::{Instant, sleep};

/// Longer than anything here takes on a busy machine; a wait that reaches it has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How often a level is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Bounds a wait. `what` is what is waited for.
pub(crate) async fn soon<T>(what: &str, wait: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("not within {} s: {what}", PATIENCE.as_secs()))
}

/// Looks until there is something to see, and returns it.
pub(crate) async fn eventually<T>(what: &str, look: impl AsyncFnMut() -> Option<T>) -> T {
    eventually_within(PATIENCE, what, look).await
}

/// The same for what takes longer, such as a compiler.
pub(crate) async fn eventually_within<T>(patience: Duration, what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let give_up = Instant::now() + patience;
    loop {
        if let Some(seen) = soon(what, look()).await {
            return seen;
        }
        assert!(Instant::now() < give_up, "not within {} s: {what}", patience.as_secs());
        sleep(LOOK_EVERY).await;
    }
}
