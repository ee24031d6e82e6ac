//! Threads for what takes long, and how it can fail to be computed.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use dynamo_host_tokens::PromptError;
use tokio::sync::Semaphore;

/// Prompts that wait for a thread.
const MAX_WAITING: usize = 64;

/// How long one waits for a thread: longer than that, the wait costs more than a good guess is worth.
const MAX_WAIT: Duration = Duration::from_millis(500);

/// A bounded number of threads.
#[derive(Debug)]
pub(super) struct Pool {
    threads: Arc<Semaphore>,
    waiting: AtomicUsize,
    patience: Duration,
}

/// Why tokens were not computed.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotComputed {
    #[error(transparent)]
    Prompt(#[from] PromptError),
    #[error("more long prompts come than half of the cores can tokenize")]
    Busy,
    #[error("it is too long to be tokenized")]
    TooLong,
    #[error("the tokenizer panicked")]
    Panic,
}

impl NotComputed {
    /// Metric label.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Prompt(_) => "prompt",
            Self::Busy => "busy",
            Self::TooLong => "too_long",
            Self::Panic => "panic",
        }
    }
}

/// Leaves the queue, however it is left.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl Pool {
    /// Of half the cores.
    pub(super) fn new() -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self::with((cores / 2).max(1), MAX_WAIT)
    }

    fn with(threads: usize, patience: Duration) -> Self {
        Self { threads: Arc::new(Semaphore::new(threads)), waiting: AtomicUsize::new(0), patience }
    }

    /// Runs something on a thread of its own.
    ///
    /// # Cancel safety
    /// What has begun runs to its end, and counts until then.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, PromptError> + Send + 'static,
    ) -> Result<T, NotComputed> {
        let thread = {
            let is_full = self.waiting.fetch_add(1, Relaxed) >= MAX_WAITING;
            let _waiting = Waiting(&self.waiting);
            if is_full {
                return Err(NotComputed::Busy);
            }
            let thread = tokio::time::timeout(self.patience, Arc::clone(&self.threads).acquire_owned()).await;
            thread.map_err(|_| NotComputed::Busy)?.map_err(|_| NotComputed::Busy)?
        };
        let done = tokio::task::spawn_blocking(move || {
            let _thread = thread;
            here(work)
        });
        done.await.unwrap_or(Err(NotComputed::Panic))
    }
}

/// Runs something here. A library that panics over a prompt costs the prompt its tokens, not the request its answer.
pub(super) fn here<T>(work: impl FnOnce() -> Result<T, PromptError>) -> Result<T, NotComputed> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|_| NotComputed::Panic)?.map_err(NotComputed::Prompt)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused() -> PromptError {
        PromptError::Unreadable("no".to_owned())
    }

    #[tokio::test]
    async fn what_fails_is_told_apart_and_leaves_its_thread() {
        let pool = Pool::with(1, MAX_WAIT);
        assert_eq!(pool.run(|| Ok(7)).await.unwrap(), 7);
        assert_eq!(pool.run(|| Err::<(), _>(refused())).await.unwrap_err().label(), "prompt");
        assert_eq!(pool.run::<()>(|| panic!("a test's")).await.unwrap_err().label(), "panic");
        assert_eq!(pool.run(|| Ok(8)).await.unwrap(), 8);
        assert_eq!(pool.waiting.load(Relaxed), 0);
    }

    #[tokio::test]
    async fn who_waits_too_long_or_finds_the_queue_full_is_refused() {
        let pool = Pool::with(1, Duration::from_millis(5));
        let taken = Arc::clone(&pool.threads).acquire_owned().await.unwrap();
        assert_eq!(pool.run(|| Ok(())).await.unwrap_err().label(), "busy");
        pool.waiting.store(MAX_WAITING, Relaxed);
        assert_eq!(pool.run(|| Ok(())).await.unwrap_err().label(), "busy");
        pool.waiting.store(0, Relaxed);
        drop(taken);
        assert_eq!(pool.run(|| Ok(7)).await.unwrap(), 7);
    }
}
