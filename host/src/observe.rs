//! Brings outcomes to the policies that placed the requests, in batches, off the request path.
//!
//! Bounded: when policies learn more slowly than requests end, outcomes are dropped and counted. They are advice.

use std::{collections::HashMap, sync::Arc};

use dynamo_host_policy::{OUTCOMES_AT_ONCE, OUTCOMES_EVERY, OUTCOMES_WAITING, OutcomeRow, PolicyVersion};
use tokio::sync::mpsc;

use crate::tasks;

/// Where requests leave their outcomes.
#[derive(Clone)]
pub(crate) struct Observer(mpsc::Sender<(Arc<PolicyVersion>, OutcomeRow)>);

impl Observer {
    pub(crate) fn start() -> Self {
        let (sender, receiver) = mpsc::channel(OUTCOMES_WAITING);
        tasks::spawn("observe", deliver(receiver));
        Self(sender)
    }

    /// Leaves an outcome for the version that placed the request.
    pub(crate) fn tell(&self, version: Arc<PolicyVersion>, outcome: OutcomeRow) {
        if self.0.try_send((version, outcome)).is_err() {
            metrics::counter!("dynamo_host_policy_outcomes_dropped_total").increment(1);
        }
    }
}

async fn deliver(mut receiver: mpsc::Receiver<(Arc<PolicyVersion>, OutcomeRow)>) {
    let mut batch = Vec::with_capacity(OUTCOMES_AT_ONCE);
    while receiver.recv_many(&mut batch, OUTCOMES_AT_ONCE).await > 0 {
        let is_full = batch.len() == OUTCOMES_AT_ONCE;
        let mut by_version: HashMap<usize, (Arc<PolicyVersion>, Vec<OutcomeRow>)> = HashMap::new();
        for (version, outcome) in batch.drain(..) {
            by_version.entry(Arc::as_ptr(&version).addr()).or_insert_with(|| (version, Vec::new())).1.push(outcome);
        }
        for (_, (version, outcomes)) in by_version {
            // What it fails with, the version counts and says itself.
            let _ = tokio::task::spawn_blocking(move || version.observe(outcomes.into())).await;
        }
        // More is waiting behind a full batch.
        if !is_full {
            tokio::time::sleep(OUTCOMES_EVERY).await;
        }
    }
}
