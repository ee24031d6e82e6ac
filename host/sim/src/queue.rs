//! The queue of what happens next, in virtual time.
//!
//! Invariant: what happens at one moment happens in the order in which it was queued, so that a run depends on nothing
//! but its inputs.

use std::{
    cmp::{Ordering, Reverse},
    collections::BinaryHeap,
    time::Duration,
};

use crate::faults::Fault;

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Happening {
    /// A worker's step ends.
    StepEnd { worker: u32 },
    /// KV may have come over.
    Transfers,
    /// KV has been kept for as long as it is.
    Lease { request: u32 },
    /// The oldest events of a worker's cache arrive.
    KvEvents { worker: u32 },
    /// A worker's load is read.
    LoadReport { worker: u32 },
    /// A request that a policy held is to be placed again.
    AskAgain { request: u32 },
    /// Somebody may have waited for too long.
    Wake,
    /// A client leaves.
    Leave { request: u32 },
    /// An engine fails.
    Fault { kind: Fault },
    /// A worker that hangs is found out.
    Stalled { worker: u32 },
    /// A worker is well again.
    Recover { worker: u32 },
    /// Outcomes are brought to the policy.
    Observe,
    /// And to that of admission.
    ObserveAdmitted,
    /// The fleet's load is written down for the report.
    Sample,
}

#[derive(Debug, PartialEq, Eq)]
struct Entry {
    at: Duration,
    number: u64,
    what: Happening,
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// What is to happen.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    entries: BinaryHeap<Reverse<Entry>>,
    pushed: u64,
}

impl Queue {
    pub(crate) fn push(&mut self, at: Duration, what: Happening) {
        self.entries.push(Reverse(Entry { at, number: self.pushed, what }));
        self.pushed += 1;
    }

    /// When the next one happens.
    pub(crate) fn next_at(&self) -> Option<Duration> {
        self.entries.peek().map(|Reverse(entry)| entry.at)
    }

    /// The next one, if it happens by then.
    pub(crate) fn pop_until(&mut self, until: Duration) -> Option<Happening> {
        self.next_at().filter(|&at| at <= until)?;
        self.entries.pop().map(|Reverse(entry)| entry.what)
    }
}
