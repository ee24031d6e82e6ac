//! Links: how long KV takes from one worker to the others.
//!
//! Before a way was used, its topology says how quick it is. What was measured scales that: times as the host sees them hold a
//! wait for the decode worker's step, too, so that a way counts as slower than the best one from the same worker only where
//! it is so by far.

use dynamo_policy_sdk::{Candidates, UNKNOWN, topology};

use crate::{
    Settings,
    cost::{least, most},
};

/// How many times as slow a way is before it is told from chance.
const BY_FAR: f32 = 4.0;
/// How much quicker or slower than their topology says all ways from a worker can be: hand-offs that wait for the memory of busy
/// workers look slow, too, and whoever decodes there waits for that, handed over or not.
const ALL: (f32, f32) = (0.25, 10.0);
/// How much slower one way can be.
const ONE: f32 = 1000.0;
/// Share of errors that counts at most.
const MOST_ERRORS: f32 = 0.9;

/// The ways from one worker.
pub(crate) struct Links {
    reachable: Vec<u32>,
    error_rate: Vec<f32>,
    /// Milliseconds per token.
    token_ms: Vec<f32>,
    /// Times as long as that they take, by what was measured.
    scale: Vec<f32>,
    base_ms: f32,
}

impl Links {
    /// From a row, or from the worker that prefills by now.
    pub(crate) fn of(settings: &Settings, candidates: &Candidates, from: Option<u32>) -> Self {
        let links = candidates.links();
        let base_ms = settings.handoff.base_ms;
        let from_row = from.or_else(|| {
            let of = links.prefilled_by()?;
            candidates.worker_id().iter().position(|&id| id == of).map(|row| row as u32)
        });
        let token_ms = token_ms(settings, candidates, from_row);
        let rates = links.tokens_per_second(from);
        let times = links.handoff_ms(from);
        // Of what arrived on average, against what its topology says.
        let measured: Vec<f32> = (rates.iter().zip(&times).zip(&token_ms))
            .map(|((&rate, &ms), &token_ms)| ms / (base_ms + rate * ms / 1000.0 * token_ms))
            .collect();
        let best = measured.iter().copied().fold(f32::INFINITY, least);
        let all = if best < f32::INFINITY { least(most(best, ALL.0), ALL.1) } else { 1.0 };
        let scale = measured.iter().map(|&scale| if scale > BY_FAR * best { least(scale, ONE) } else { all }).collect();
        Self { reachable: links.reachable(from), error_rate: links.error_rate(from), token_ms, scale, base_ms }
    }

    pub(crate) fn is_reachable(&self, row: usize) -> bool {
        self.reachable[row] == 1
    }

    /// Milliseconds until so many tokens' KV is there.
    pub(crate) fn ms(&self, row: usize, tokens: f32) -> f32 {
        self.scale[row] * (self.base_ms + self.token_ms[row] * tokens)
    }

    /// Tries that recent errors make likely.
    pub(crate) fn tries(&self, row: usize) -> f32 {
        let errors = self.error_rate[row];
        if errors > 0.0 { 1.0 / (1.0 - least(errors, MOST_ERRORS)) } else { 1.0 }
    }
}

/// Milliseconds per token by topology: the closest level that both are known to share.
fn token_ms(settings: &Settings, candidates: &Candidates, from: Option<u32>) -> Vec<f32> {
    let rates = &settings.handoff.tokens_per_second;
    let count = candidates.count() as usize;
    let mut token_ms = vec![1000.0 / rates.unknown; count];
    let Some(from) = from else { return token_ms };
    let levels = [(topology::ZONE, rates.zone), (topology::RACK, rates.rack), (topology::HOST, rates.host)];
    for (level, rate) in levels {
        let places = candidates.topology(level);
        let own = places[from as usize];
        if own == UNKNOWN {
            continue;
        }
        for (token_ms, &place) in token_ms.iter_mut().zip(&places) {
            if place == own {
                *token_ms = 1000.0 / rate;
            } else if level == topology::ZONE && place != UNKNOWN {
                *token_ms = 1000.0 / rates.elsewhere;
            }
        }
    }
    token_ms
}
