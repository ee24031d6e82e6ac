//! Pickers: from totals to a ranking.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{entropy, rank};

/// How candidates are ranked by their totals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Picker {
    /// The best first; equals in random order.
    #[default]
    Best,
    /// At random, the better the likelier: each candidate's chance is proportional to `exp(total / temperature)`. Totals
    /// are from 0 to 1, so that 0.02 nearly always takes the best, and 1 is nearly even.
    Softmax {
        /// Above 0.
        temperature: f32,
    },
    /// Any of the best so many, with equal chances: hosts that see the same loads do not all take the same worker.
    TopK {
        /// From 1 to 16.
        k: u32,
    },
}

impl Picker {
    /// # Errors
    /// Which number is out of its range.
    pub fn validate(&self) -> Result<(), String> {
        match *self {
            Self::Softmax { temperature } if !(temperature.is_finite() && temperature > 0.0) => {
                Err(format!("picker.softmax.temperature is {temperature}; use a number above 0, such as 0.1"))
            }
            Self::TopK { k } if !(1..=16).contains(&k) => Err(format!("picker.top_k.k is {k}; use a number from 1 to 16")),
            _ => Ok(()),
        }
    }

    /// The rows to try, best first, at most 16, for totals of which more is better.
    #[must_use]
    pub fn pick(&self, totals: &[f32]) -> Vec<u32> {
        let best = || rank::lowest_rows(totals.iter().map(|total| -total), entropy::next());
        match *self {
            Self::Best => best(),
            Self::Softmax { temperature } => rank::lowest_rows(perturbed(totals, temperature, entropy::next()), entropy::next()),
            Self::TopK { k } => {
                let mut rows = best();
                let within = rows.len().min(k as usize);
                let chosen = (entropy::next() % within.max(1) as u64) as usize;
                rows[..=chosen].rotate_right(1);
                rows
            }
        }
    }
}

/// Costs whose ranking is a draw without replacement with chances proportional to `exp(total / temperature)`: the
/// Gumbel-top-k trick (Kool et al. 2019), in units of the temperature.
fn perturbed(totals: &[f32], temperature: f32, seed: u64) -> impl Iterator<Item = f32> {
    let scale = 1.0 / temperature;
    (1u64..).zip(totals).map(move |(row, &total)| {
        // splitmix64, at the row's own place in the sequence.
        let x = seed.wrapping_add(row.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // In (0, 1): neither end has a finite logarithm of a logarithm.
        let uniform = ((x >> 41) as f32 + 0.5) / (1u32 << 23) as f32;
        (-uniform.ln()).ln() - total * scale
    })
}
