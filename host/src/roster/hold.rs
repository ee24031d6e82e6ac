//! Holding requests while nobody can serve them and somebody is starting; and what retries may cost.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, timeout_at};

use super::{Roster, Snapshot, lock};
use crate::config::HealthConfig;

impl Roster {
    /// How health is judged now.
    pub(crate) fn health(&self) -> Arc<HealthConfig> {
        self.health.load_full()
    }

    /// Has health judged so from now on.
    pub(crate) fn set_health(&self, health: HealthConfig) {
        self.health.store(Arc::new(health));
    }

    /// A request came that may be retried: a share of these may.
    pub(crate) fn note_request(&self) {
        lock(&self.retries).request(self.clock.now_ms());
    }

    /// Takes one retry before the first byte from what all requests together have; `false`: there is none left.
    pub(crate) fn take_retry(&self) -> bool {
        let is_granted = lock(&self.retries).take(&self.health().budget_rules(), self.clock.now_ms());
        if !is_granted {
            metrics::counter!("dynamo_host_retries_denied_total").increment(1);
        }
        is_granted
    }

    /// Waits for somebody who serves a model of this name, for as long as somebody is starting who may, no longer than
    /// `health.hold_s`, and not past `deadline`. With somebody there, or nobody starting, it returns at once.
    pub(crate) async fn hold(&self, asked: &str, deadline: Instant) {
        if self.snapshot.load().is_awaited(asked) {
            let patience = self.health().hold().min(deadline.saturating_duration_since(Instant::now()));
            self.until(patience, |snapshot| !snapshot.is_awaited(asked)).await;
        }
    }

    /// Waits until a snapshot is as it should be, or the time is over.
    pub(super) async fn until(&self, patience: Duration, condition: impl Fn(&Snapshot) -> bool) {
        let until = Instant::now() + patience;
        let mut changes = self.changes();
        while !condition(&self.snapshot.load()) {
            if !matches!(timeout_at(until, changes.changed()).await, Ok(Ok(()))) {
                return;
            }
        }
    }
}
