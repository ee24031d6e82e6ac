//! What a report says of roles: each pool's part of the work, and what went from one to another.

use dynamo_host_core::Role;
use serde::Serialize;

use super::{Report, Row};
use crate::{
    samples::Quantiles,
    simulation::{PoolTally, Tally},
};

/// What the workers of one role did.
#[derive(Clone, Debug, Serialize)]
pub struct PoolRow {
    /// Their role.
    pub role: Role,
    /// How many there are.
    pub workers: u64,
    /// Mean share of the time in which they computed.
    pub utilization: f64,
    /// The busiest worker's time over the mean.
    pub imbalance: f64,
    /// Requests and parts of them that they were given.
    pub legs: u64,
    /// Prompt tokens that they were to compute.
    pub prompt_tokens: u64,
    /// Share of those that they had in their caches.
    pub reuse: f64,
    /// Tokens of output; a prefill has one, which nobody sees.
    pub output_tokens: u64,
}

/// What came of handing KV over.
#[derive(Clone, Debug, Serialize)]
pub struct HandoffRow {
    /// Share of the answers that began after a hand-off.
    pub remote_share: f64,
    /// Share of those of a decode worker that computed the prompt itself.
    pub local_share: f64,
    /// Share of those of other workers that did all of it.
    pub aggregated_share: f64,
    /// Transfers that came to their end.
    pub transfers: u64,
    /// Tokens whose KV came over.
    pub fetched_tokens: u64,
    /// In so many bytes.
    pub bytes: u64,
    /// KV that was given up since nobody had begun to fetch it in time.
    pub leases_lost: u64,
    /// Milliseconds from a request's arrival to the end of its prefill, of those that went on elsewhere.
    pub prefilled: Quantiles,
    /// Milliseconds from there to the first token.
    pub handoff: Quantiles,
    /// Those of them in which KV was under way.
    pub transfer: Quantiles,
}

/// Empty where there are no roles.
pub(super) fn rows(tally: &Tally) -> Vec<PoolRow> {
    if !has_roles(tally) {
        return Vec::new();
    }
    let row = |pool: &PoolTally| PoolRow {
        role: pool.role,
        workers: pool.workers,
        utilization: pool.busy,
        imbalance: pool.imbalance,
        legs: pool.legs,
        prompt_tokens: pool.prompt_tokens,
        reuse: pool.cached_tokens as f64 / pool.prompt_tokens.max(1) as f64,
        output_tokens: pool.output_tokens,
    };
    tally.pools.iter().map(row).collect()
}

fn has_roles(tally: &Tally) -> bool {
    tally.pools.iter().any(|pool| pool.role != Role::Aggregated)
}

impl HandoffRow {
    /// `None` where there are no roles.
    pub(super) fn new(tally: &mut Tally) -> Option<Self> {
        if !has_roles(tally) {
            return None;
        }
        let of = &mut tally.handoffs;
        let all = (of.handed_over + of.local + of.aggregated).max(1) as f64;
        Some(Self {
            remote_share: of.handed_over as f64 / all,
            local_share: of.local as f64 / all,
            aggregated_share: of.aggregated as f64 / all,
            transfers: of.transfer.count(),
            fetched_tokens: of.fetched_tokens,
            bytes: of.bytes,
            leases_lost: of.leases_lost,
            prefilled: of.prefilled.quantiles(),
            handoff: of.time.quantiles(),
            transfer: of.transfer.quantiles(),
        })
    }
}

/// A column: what stands above it, and what it says.
type Column<T> = (&'static str, fn(&T) -> String);

const POOLS: &[Column<PoolRow>] = &[
    ("role", |row| row.role.to_string()),
    ("workers", |row| row.workers.to_string()),
    ("busy", |row| format!("{:.3}", row.utilization)),
    ("max/mean", |row| format!("{:.3}", row.imbalance)),
    ("legs", |row| row.legs.to_string()),
    ("prompt tokens", |row| row.prompt_tokens.to_string()),
    ("reuse", |row| format!("{:.3}", row.reuse)),
    ("output tokens", |row| row.output_tokens.to_string()),
];

const HANDOFFS: &[Column<HandoffRow>] = &[
    ("remote", |row| format!("{:.3}", row.remote_share)),
    ("local", |row| format!("{:.3}", row.local_share)),
    ("aggregated", |row| format!("{:.3}", row.aggregated_share)),
    ("transfers", |row| row.transfers.to_string()),
    ("GB moved", |row| format!("{:.1}", row.bytes as f64 / 1e9)),
    ("leases lost", |row| row.leases_lost.to_string()),
    ("prefilled mean", |row| format!("{:.1}", row.prefilled.mean)),
    ("p90", |row| format!("{:.1}", row.prefilled.p90)),
    ("p99", |row| format!("{:.1}", row.prefilled.p99)),
    ("hand-off mean", |row| format!("{:.1}", row.handoff.mean)),
    ("p50", |row| format!("{:.1}", row.handoff.p50)),
    ("p99", |row| format!("{:.1}", row.handoff.p99)),
    ("transfer mean", |row| format!("{:.1}", row.transfer.mean)),
    ("p50", |row| format!("{:.1}", row.transfer.p50)),
    ("p99", |row| format!("{:.1}", row.transfer.p99)),
];

/// The tables: what was handed over, a line for each policy, and what each policy's pools did. None where there are no roles.
pub(super) fn tables(report: &Report) -> Vec<Vec<Vec<String>>> {
    let handoffs = report.policies.iter().flat_map(|row| row.handoffs.iter().map(move |handoffs| (row, handoffs)));
    let pools = report.policies.iter().flat_map(|row| row.pools.iter().map(move |pool| (row, pool)));
    let tables = [table("hand-offs", HANDOFFS, handoffs), table("pools", POOLS, pools)];
    tables.into_iter().filter(|table| table.len() > 1).collect()
}

fn table<'a, T: 'a>(name: &str, columns: &[Column<T>], rows: impl Iterator<Item = (&'a Row, &'a T)>) -> Vec<Vec<String>> {
    let heads = std::iter::once(name.to_owned()).chain(columns.iter().map(|(name, _)| (*name).to_owned())).collect();
    let line = |(policy, row): (&Row, &T)| {
        std::iter::once(policy.name.clone()).chain(columns.iter().map(|(_, cell)| cell(row))).collect()
    };
    std::iter::once(heads).chain(rows.map(line)).collect()
}

/// How many workers there are of each role, for the heading.
pub(super) fn roles(report: &Report) -> String {
    let pools = report.policies.first().map(|row| &row.pools[..]).unwrap_or_default();
    let parts: Vec<String> = pools.iter().map(|pool| format!("{} {}", pool.workers, pool.role)).collect();
    if parts.is_empty() { String::new() } else { format!(" ({})", parts.join(", ")) }
}
