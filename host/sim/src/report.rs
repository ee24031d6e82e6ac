//! Reports: what a comparison found, as a table, as JSON and as a page.
//!
//! Contract: what is written to a file depends on the trace, the options and the seed alone. Times of this machine are in
//! the table on the terminal only.

mod html;
mod plot;
mod pools;
mod service;
mod text;

use serde::Serialize;

pub use self::{
    pools::{HandoffRow, PoolRow},
    service::{AdmissionRow, FaultRow, QueueRow, ShareRow, TenantRow},
};

use crate::{
    bounds::Bounds,
    samples::{Quantiles, Share},
    simulation::Tally,
};

/// A comparison of policies over one trace.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was simulated.
    pub trace: String,
    /// Requests of it.
    pub requests: u64,
    /// Workers.
    pub workers: u64,
    /// How much faster than in the trace requests came.
    pub speed: f64,
    /// Seed.
    pub seed: u64,
    /// The engine of the first worker.
    pub engine: dynamo_engine_mock::Profile,
    /// What nobody can beat.
    pub bounds: Bounds,
    /// What each policy came to, in the order in which they were given.
    pub policies: Vec<Row>,
}

/// What one policy came to.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its name, as it was given.
    pub name: String,
    /// `name@version`.
    pub policy: String,
    /// Requests that were served to their end.
    pub served: u64,
    /// Requests that it refused.
    pub rejected: u64,
    /// Time to first token in milliseconds.
    pub ttft: Quantiles,
    /// Time between two tokens in milliseconds.
    pub itl: Quantiles,
    /// Time to the last token in milliseconds.
    pub e2e: Quantiles,
    /// Share of the prompt tokens that nobody computed, since whoever was to had them cached.
    pub reuse: f64,
    /// Output tokens per second.
    pub output_tokens_per_second: f64,
    /// Requests per second.
    pub requests_per_second: f64,
    /// The busiest worker's time over the mean.
    pub imbalance: f64,
    /// Mean share of the time in which workers computed.
    pub utilization: f64,
    /// Sequences computed again for want of KV memory.
    pub preemptions: u64,
    /// Blocks that the prefix index had no room for.
    pub refused_blocks: u64,
    /// Decisions.
    pub decisions: u64,
    /// Fuel of a decision, on average.
    pub fuel_per_decision: f64,
    /// Decisions that were the fallback's, by cause.
    pub fallbacks: std::collections::BTreeMap<String, u64>,
    /// The distribution of times to first token.
    pub ttft_shares: Vec<Share>,
    /// The distribution of times between tokens.
    pub itl_shares: Vec<Share>,
    /// What the workers of each role did, if there are roles.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pools: Vec<PoolRow>,
    /// What came of handing KV over, if there are roles.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handoffs: Option<HandoffRow>,
    /// What the queue came to, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue: Option<QueueRow>,
    /// What faults came to, if there were to be any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub faults: Option<FaultRow>,
    #[serde(skip)]
    tally: Tally,
}

impl Row {
    /// Of a run.
    #[must_use]
    pub fn new(mut tally: Tally) -> Self {
        let seconds = tally.makespan.as_secs_f64().max(f64::MIN_POSITIVE);
        let served = tally.e2e.count();
        Self {
            name: tally.name.clone(),
            policy: tally.policy.clone(),
            served,
            rejected: tally.rejected,
            ttft: tally.ttft.quantiles(),
            itl: tally.itl.quantiles(),
            e2e: tally.e2e.quantiles(),
            reuse: tally.reuse(),
            output_tokens_per_second: tally.output_tokens as f64 / seconds,
            requests_per_second: served as f64 / seconds,
            imbalance: tally.imbalance(),
            utilization: tally.busy.iter().sum::<f64>() / tally.busy.len().max(1) as f64,
            preemptions: tally.preemptions,
            refused_blocks: tally.refused_blocks,
            decisions: tally.decisions,
            fuel_per_decision: tally.fuel as f64 / tally.decisions.max(1) as f64,
            fallbacks: tally.fallbacks.clone(),
            ttft_shares: Share::all(|share| tally.ttft.quantile(share)),
            itl_shares: Share::all(|share| tally.itl.quantile(share)),
            pools: pools::rows(&tally),
            handoffs: HandoffRow::new(&mut tally),
            queue: tally.queue.as_deref().map(QueueRow::new),
            faults: tally.faults.clone().map(|faults| FaultRow { faults, failed: tally.failed }),
            tally,
        }
    }

    /// What was counted.
    #[must_use]
    pub fn tally(&self) -> &Tally {
        &self.tally
    }
}

impl Report {
    /// The table for a terminal, with this machine's times.
    #[must_use]
    pub fn table(&self) -> String {
        text::table(self)
    }

    /// The page with plots.
    #[must_use]
    pub fn html(&self) -> String {
        html::page(self)
    }

    /// As JSON.
    #[must_use]
    pub fn json(&self) -> String {
        format!("{:#}\n", serde_json::to_value(self).unwrap_or_default())
    }
}
