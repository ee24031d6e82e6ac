//! What became of what was decided, as columns.

use std::{cell::OnceCell, ops::Range};

use crate::{UNKNOWN, bindings::dynamo::policy::outcomes as host, codes::end};

/// What became of what was decided: columns, one value per attempt on a worker that has ended. A request that failed on
/// one worker and was served by another is two rows, of one decision or of two. Admission decides once for all attempts,
/// and is told of a request that ended in the queue too.
///
/// Each column is asked of the host when a policy first reads it.
///
/// ```
/// use std::time::Duration;
///
/// use dynamo_policy_sdk::{Outcomes, end, state};
///
/// /// What `Router::observe` would do: count the failures of each worker.
/// fn observe(outcomes: &Outcomes) {
///     for outcome in outcomes.iter().filter(|outcome| outcome.end() == end::FAILED) {
///         let key = format!("failures.{:x}", outcome.worker_id());
///         // Without state there is nothing to learn in; the policy decides well without.
///         let _ = state::add(&key, 1, Duration::from_secs(60));
///     }
/// }
///
/// let outcomes = Outcomes::test(3).with_worker_id([7, 8, 7]).with_end([end::FAILED, end::DONE, end::FAILED]);
/// observe(&outcomes);
/// assert_eq!(state::add("failures.7", 0, Duration::ZERO), Ok(2));
/// ```
#[derive(Debug, Default)]
pub struct Outcomes {
    pub(crate) count: OnceCell<u32>,
    pub(crate) decision_id: OnceCell<Vec<u64>>,
    pub(crate) worker_id: OnceCell<Vec<u64>>,
    pub(crate) ttft_ms: OnceCell<Vec<f32>>,
    pub(crate) itl_ms: OnceCell<Vec<f32>>,
    pub(crate) queue_ms: OnceCell<Vec<f32>>,
    pub(crate) output_tokens: OnceCell<Vec<u32>>,
    pub(crate) end: OnceCell<Vec<u32>>,
}

impl Outcomes {
    /// Number of rows; there may be none.
    pub fn count(&self) -> u32 {
        *self.count.get_or_init(|| if cfg!(target_arch = "wasm32") { host::count() } else { 0 })
    }

    /// The rows: `0..count`.
    pub fn rows(&self) -> Range<u32> {
        0..self.count()
    }

    /// One [`Outcome`] after the other, in row order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Outcome<'_>> + DoubleEndedIterator + Clone {
        self.rows().map(|row| Outcome { outcomes: self, row })
    }

    /// The column, asked of the host once; outside the sandbox, where there is no host to ask, unknown in every row.
    fn pull<'a, T: Clone>(&self, cell: &'a OnceCell<Vec<T>>, host: fn() -> Vec<T>, unknown: T) -> &'a [T] {
        cell.get_or_init(|| if cfg!(target_arch = "wasm32") { host() } else { vec![unknown; self.count() as usize] })
    }

    /// The decision that placed it, or let it in: its [`Request::decision_id`](crate::Request::decision_id).
    pub fn decision_id(&self) -> &[u64] {
        self.pull(&self.decision_id, host::decision_id, u64::MAX)
    }

    /// The worker; `u64::MAX` if it came to none.
    pub fn worker_id(&self) -> &[u64] {
        self.pull(&self.worker_id, host::worker_id, u64::MAX)
    }

    /// Time from sending it to the worker to its first token; NaN if there was none.
    pub fn ttft_ms(&self) -> &[f32] {
        self.pull(&self.ttft_ms, host::ttft_ms, f32::NAN)
    }

    /// Mean time between tokens; NaN below two tokens.
    pub fn itl_ms(&self) -> &[f32] {
        self.pull(&self.itl_ms, host::itl_ms, f32::NAN)
    }

    /// Time that the request waited in the host's queue; NaN where nobody knows.
    pub fn queue_ms(&self) -> &[f32] {
        self.pull(&self.queue_ms, host::queue_ms, f32::NAN)
    }

    /// Tokens of output.
    pub fn output_tokens(&self) -> &[u32] {
        self.pull(&self.output_tokens, host::output_tokens, UNKNOWN)
    }

    /// How it ended, see [`end`].
    pub fn end(&self) -> &[u32] {
        self.pull(&self.end, host::end, end::DONE)
    }
}

/// One row of [`Outcomes`].
#[derive(Clone, Copy, Debug)]
pub struct Outcome<'a> {
    outcomes: &'a Outcomes,
    row: u32,
}

impl Outcome<'_> {
    /// Its position.
    #[must_use]
    pub fn row(self) -> u32 {
        self.row
    }

    /// See [`Outcomes::decision_id`].
    #[must_use]
    pub fn decision_id(self) -> u64 {
        self.outcomes.decision_id()[self.row as usize]
    }

    /// See [`Outcomes::worker_id`].
    #[must_use]
    pub fn worker_id(self) -> u64 {
        self.outcomes.worker_id()[self.row as usize]
    }

    /// See [`Outcomes::ttft_ms`].
    #[must_use]
    pub fn ttft_ms(self) -> f32 {
        self.outcomes.ttft_ms()[self.row as usize]
    }

    /// See [`Outcomes::itl_ms`].
    #[must_use]
    pub fn itl_ms(self) -> f32 {
        self.outcomes.itl_ms()[self.row as usize]
    }

    /// See [`Outcomes::queue_ms`].
    #[must_use]
    pub fn queue_ms(self) -> f32 {
        self.outcomes.queue_ms()[self.row as usize]
    }

    /// See [`Outcomes::output_tokens`].
    #[must_use]
    pub fn output_tokens(self) -> u32 {
        self.outcomes.output_tokens()[self.row as usize]
    }

    /// See [`Outcomes::end`].
    #[must_use]
    pub fn end(self) -> u32 {
        self.outcomes.end()[self.row as usize]
    }
}
