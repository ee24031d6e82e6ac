//! Admission: what a policy sees of the pools that could serve a request, and what it may say.

use std::sync::Arc;

use crate::{Rejection, Role, UNKNOWN};

/// Longest name of a class, in bytes: it becomes a metric label.
pub const MAX_CLASS_BYTES: usize = 64;

/// Tiers that there are: 0 to this less one, 0 served first.
pub const TIERS: u32 = 16;

/// Least and largest weight of a class or tenant.
pub const WEIGHTS: std::ops::RangeInclusive<f32> = 0.001..=1000.0;

/// One pool at one moment: the workers of one model and role, and what waits for them.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolState {
    /// Key of model and role, equal on every host.
    pub key: u64,
    /// What its workers do.
    pub role: Role,
    /// Workers that accept requests.
    pub ready_workers: u32,
    /// Requests that run.
    pub running_requests: u32,
    /// Requests that could be started at once; [`UNKNOWN`] where nothing limits them.
    pub free_requests: u32,
    /// Requests that wait in the host's queue.
    pub queued_requests: u32,
    /// Prompt tokens that wait in the host's queue.
    pub queued_tokens: u32,
    /// Age of the oldest waiting request in milliseconds; 0 if none waits.
    pub oldest_age_ms: u32,
    /// What the host predicts that the request would wait, in milliseconds; NaN if it cannot say.
    pub predicted_wait_ms: f32,
    /// Share of recent requests that were shed or refused, 0 to 1.
    pub shed_rate: f32,
    /// Recent times to first token.
    pub ttft: Quantiles,
    /// Recent times between tokens.
    pub itl: Quantiles,
}

/// Recent latencies: values at evenly spaced percentiles, from 0 to 100. Empty: nothing is known.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Quantiles(pub Arc<[f32]>);

impl Quantiles {
    /// The value at a percentile from 0 to 100, interpolated; NaN if nothing is known, or for what is no percentile.
    #[must_use]
    pub fn at(&self, percentile: f32) -> f32 {
        let Some(last) = self.0.len().checked_sub(1) else { return f32::NAN };
        if !(0.0..=100.0).contains(&percentile) {
            return f32::NAN;
        }
        let place = percentile / 100.0 * last as f32;
        let (low, high) = (self.0[place.floor() as usize], self.0[place.ceil() as usize]);
        low + (high - low) * place.fract()
    }
}

/// How a request was let in: its place in the queue's order.
#[derive(Clone, Debug, PartialEq)]
pub struct Admitted {
    /// Class, for fair sharing within a tier and as a metric label.
    pub class: Option<Arc<str>>,
    /// Strict tier: lower is served first.
    pub tier: u32,
    /// Share of service of its class among the classes of a tier.
    pub class_weight: f32,
    /// Share of service of its tenant among the tenants of a class.
    pub tenant_weight: f32,
    /// Within the tenant: higher is sooner.
    pub priority: f32,
    /// Milliseconds from now after which it must not wait any more; `None`: the host's bound.
    pub deadline_ms: Option<u32>,
}

impl Default for Admitted {
    fn default() -> Self {
        Self { class: None, tier: 0, class_weight: 1.0, tenant_weight: 1.0, priority: 0.0, deadline_ms: None }
    }
}

/// An answer of an admission policy that was checked.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Let it in.
    Admit(Admitted),
    /// An error for the client.
    Shed(Rejection),
}

/// Whether a weight may be used.
#[must_use]
pub fn is_weight(weight: f32) -> bool {
    WEIGHTS.contains(&weight)
}

/// A free amount, as the contract has it.
#[must_use]
pub fn free(amount: Option<u32>) -> u32 {
    amount.map_or(UNKNOWN, |amount| amount.min(UNKNOWN - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_lies_between_its_neighbours_and_nothing_is_known_of_nothing() {
        let quantiles = Quantiles([0.0, 10.0, 20.0, 30.0, 1000.0].into());
        assert_eq!([0.0, 50.0, 62.5, 100.0].map(|at| quantiles.at(at)), [0.0, 20.0, 25.0, 1000.0]);
        for nothing in [quantiles.at(-1.0), quantiles.at(f32::NAN), quantiles.at(101.0), Quantiles::default().at(50.0)] {
            assert!(nothing.is_nan());
        }
    }
}
