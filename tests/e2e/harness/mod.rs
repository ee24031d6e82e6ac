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

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};

use tokio::time::{Instant, sleep};

/// Longer than anything here takes on a busy machine; a wait that reaches it has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A free port of a loopback address that nobody else here binds: whoever comes back to it, or is expected to be gone from it,
/// finds no other program there, as at a port of 127.0.0.1 that was given up and handed out again.
pub(crate) fn own_address() -> String {
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    let number = TAKEN.fetch_add(1, Relaxed);
    format!("127.{}.{}.{}:0", 1 + std::process::id() % 250, number / 250 % 250, 1 + number % 250)
}

/// Puts another text in a file's place, all of it at once: whoever reads a file that is being written finds half of it.
pub(crate) fn replace(file: &Path, text: &str) {
    let beside = file.with_extension("new");
    fs::write(&beside, text).unwrap();
    fs::rename(beside, file).unwrap();
}

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
