//! Columns: one value per candidate, in row order; what policies read instead of records.

use std::sync::Arc;

/// A column as it was read.
#[derive(Clone, Debug, PartialEq)]
pub enum Column {
    /// Identities.
    U64(Arc<[u64]>),
    /// Amounts and codes; [`UNKNOWN`](crate::UNKNOWN) where one is not known.
    U32(Arc<[u32]>),
    /// Measures; NaN where one is not known.
    F32(Arc<[f32]>),
}

impl Column {
    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::U64(values) => values.len(),
            Self::U32(values) => values.len(),
            Self::F32(values) => values.len(),
        }
    }

    /// Whether it has no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl From<Arc<[u64]>> for Column {
    fn from(values: Arc<[u64]>) -> Self {
        Self::U64(values)
    }
}

impl From<Arc<[u32]>> for Column {
    fn from(values: Arc<[u32]>) -> Self {
        Self::U32(values)
    }
}

impl From<Arc<[f32]>> for Column {
    fn from(values: Arc<[f32]>) -> Self {
        Self::F32(values)
    }
}

/// Columns of `u64`, by what they hold: identities that cannot change within a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum U64Column {
    /// Identity of the worker.
    WorkerId,
    /// Key of its engine.
    EngineKey,
    /// Key of its pool.
    PoolKey,
}

impl U64Column {
    /// Every column with its name in the contract (`dynamo:policy/candidates`).
    pub const ALL: &[(&'static str, Self)] =
        &[("worker-id", Self::WorkerId), ("engine-key", Self::EngineKey), ("pool-key", Self::PoolKey)];

    /// Its name in the contract.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL[self as usize].0
    }
}

/// Columns of `u32`, by what they hold. Those of cached tokens are [`Tier::COLUMNS`](crate::Tier::COLUMNS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum U32Column {
    /// Data-parallel rank.
    DpRank,
    /// Role code.
    Role,
    /// State code.
    State,
    /// Tokens per block.
    BlockSize,
    /// Prompt tokens without a first token.
    ActivePrefillTokens,
    /// Of those, what has to be computed.
    ActiveUncachedTokens,
    /// Time since the last progress in prefill.
    PrefillBusyMs,
    /// Context tokens that decode.
    ActiveDecodeTokens,
    /// Requests in flight.
    ActiveRequests,
    /// Requests that wait inside the engine.
    QueuedRequests,
    /// Requests that the engine runs at once.
    MaxRunningRequests,
    /// Tokens that the engine computes in one step.
    MaxBatchedTokens,
    /// KV capacity.
    KvTokensTotal,
    /// Free KV capacity.
    KvTokensFree,
    /// Age of the engine's last report.
    LoadAgeMs,
    /// Time since recent observations.
    RecentAgeMs,
    /// Seconds since the worker joined.
    UpSeconds,
    /// Whether the adapter is loaded.
    AdapterLoaded,
}

impl U32Column {
    /// Every column with its name in the contract (`dynamo:policy/candidates`).
    pub const ALL: &[(&'static str, Self)] = &[
        ("dp-rank", Self::DpRank),
        ("role", Self::Role),
        ("state", Self::State),
        ("block-size", Self::BlockSize),
        ("active-prefill-tokens", Self::ActivePrefillTokens),
        ("active-uncached-tokens", Self::ActiveUncachedTokens),
        ("prefill-busy-ms", Self::PrefillBusyMs),
        ("active-decode-tokens", Self::ActiveDecodeTokens),
        ("active-requests", Self::ActiveRequests),
        ("queued-requests", Self::QueuedRequests),
        ("max-running-requests", Self::MaxRunningRequests),
        ("max-batched-tokens", Self::MaxBatchedTokens),
        ("kv-tokens-total", Self::KvTokensTotal),
        ("kv-tokens-free", Self::KvTokensFree),
        ("load-age-ms", Self::LoadAgeMs),
        ("recent-age-ms", Self::RecentAgeMs),
        ("up-seconds", Self::UpSeconds),
        ("adapter-loaded", Self::AdapterLoaded),
    ];

    /// Its name in the contract.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL[self as usize].0
    }
}

/// Columns of `f32`, by what they hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum F32Column {
    /// Recent time to first token.
    RecentTtftMs,
    /// Recent time between tokens.
    RecentItlMs,
    /// Recent output throughput.
    RecentTokensPerSecond,
    /// Share of recent requests that failed.
    ErrorRate,
    /// The operator's preference.
    Preference,
}

impl F32Column {
    /// Every column with its name in the contract (`dynamo:policy/candidates`).
    pub const ALL: &[(&'static str, Self)] = &[
        ("recent-ttft-ms", Self::RecentTtftMs),
        ("recent-itl-ms", Self::RecentItlMs),
        ("recent-tokens-per-second", Self::RecentTokensPerSecond),
        ("error-rate", Self::ErrorRate),
        ("preference", Self::Preference),
    ];

    /// Its name in the contract.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL[self as usize].0
    }
}

/// Name of the column of links that says whether KV can go there: the one that is no measure.
pub const REACHABLE: &str = "reachable";

/// Columns of `f32` of the ways by which KV goes from one worker to each candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkColumn {
    /// Recent tokens of prompt per second.
    TokensPerSecond,
    /// Recent time of a hand-off.
    HandoffMs,
    /// Share of recent hand-offs that failed.
    ErrorRate,
}

impl LinkColumn {
    /// Every column with its name in the contract (`dynamo:policy/links`).
    pub const ALL: &[(&'static str, Self)] =
        &[("tokens-per-second", Self::TokensPerSecond), ("handoff-ms", Self::HandoffMs), ("error-rate", Self::ErrorRate)];

    /// Its name in the contract.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL[self as usize].0
    }
}

/// Label that holds a worker's placement domain at a topology level of the contract.
#[must_use]
pub fn topology_label(level: u32) -> Option<&'static str> {
    ["host", "rack", "zone", "region"].get(level as usize).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_column_stands_in_its_table_where_its_name_is_looked_for() {
        assert!(U64Column::ALL.iter().all(|(name, column)| column.name() == *name));
        assert!(U32Column::ALL.iter().all(|(name, column)| column.name() == *name));
        assert!(F32Column::ALL.iter().all(|(name, column)| column.name() == *name));
        assert!(LinkColumn::ALL.iter().all(|(name, column)| column.name() == *name));
    }
}
