//! Outcomes on their way to the policy: in batches with a pause between them, as the host brings them.

use std::{sync::Arc, time::Duration};

use dynamo_host_policy::{OUTCOMES_AT_ONCE, OUTCOMES_EVERY, OUTCOMES_WAITING, OutcomeRow, PolicyVersion};

#[derive(Default)]
pub(crate) struct Outcomes {
    rows: Vec<OutcomeRow>,
    is_due: bool,
    not_before: Duration,
}

impl Outcomes {
    /// Leaves an outcome. Returns when it is to be brought, if nothing was on the way.
    pub(crate) fn tell(&mut self, row: OutcomeRow, now: Duration) -> Option<Duration> {
        if self.rows.len() < OUTCOMES_WAITING {
            self.rows.push(row);
        }
        self.expect(now)
    }

    /// Brings a batch. Returns when the next is to be brought, if there is one.
    pub(crate) fn bring(&mut self, version: &PolicyVersion, now: Duration) -> Option<Duration> {
        let batch: Arc<[OutcomeRow]> = self.rows.drain(..self.rows.len().min(OUTCOMES_AT_ONCE)).collect();
        self.is_due = false;
        // More is waiting behind a full batch.
        self.not_before = if batch.len() == OUTCOMES_AT_ONCE { now } else { now + OUTCOMES_EVERY };
        // What it fails with, the version counts and says itself.
        let _ = version.observe(batch);
        if self.rows.is_empty() { None } else { self.expect(now) }
    }

    fn expect(&mut self, now: Duration) -> Option<Duration> {
        let at = (!self.is_due).then(|| now.max(self.not_before));
        self.is_due = true;
        at
    }
}
