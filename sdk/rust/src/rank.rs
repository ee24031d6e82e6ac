//! Ranking rows by a cost.

use crate::{Decision, entropy};

/// Rows that a decision holds at most.
const MAX_RANKED: usize = 16;

/// Places the request on the rows of lowest cost, best first. `costs` has one value per row. Equal costs are
/// ordered at random, so that identical workers share the load; a NaN is worse than any number.
pub fn lowest(costs: impl IntoIterator<Item = f32>) -> Decision {
    Decision::Place(lowest_rows(costs, entropy::next()))
}

/// The rows that [`lowest`] ranks, with equals ordered by `seed`.
pub fn lowest_rows(costs: impl IntoIterator<Item = f32>, seed: u64) -> Vec<u32> {
    // A sorted array of the best so far: nearly every row of a large set is turned away by one comparison.
    let mut best: Vec<(f32, u32, u32)> = Vec::with_capacity(MAX_RANKED + 1);
    let mut worst = f32::INFINITY;
    for (row, cost) in (0..).zip(costs) {
        let cost = if cost.is_nan() { f32::INFINITY } else { cost };
        if cost > worst {
            continue;
        }
        let entry = (cost, mix(seed, row), row);
        let at = best.partition_point(|other| (other.0, other.1) < (entry.0, entry.1));
        if at < MAX_RANKED {
            best.insert(at, entry);
            best.truncate(MAX_RANKED);
            if best.len() == MAX_RANKED {
                worst = best[MAX_RANKED - 1].0;
            }
        }
    }
    best.into_iter().map(|(_, _, row)| row).collect()
}

/// A well-mixed function of seed and row (the finalizer of murmur3, Appleby 2011).
fn mix(seed: u64, row: u32) -> u32 {
    let mut x = (seed as u32) ^ row.wrapping_mul(0x9e37_79b1);
    x = (x ^ (x >> 16)).wrapping_mul(0x85eb_ca6b);
    x = (x ^ (x >> 13)).wrapping_mul(0xc2b2_ae35);
    x ^ (x >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_costs_come_first() {
        assert_eq!(lowest_rows([3.0, 1.0, 2.0], 0), [1, 2, 0]);
        let many: Vec<f32> = (0..1000).rev().map(|cost| cost as f32).collect();
        assert_eq!(lowest_rows(many, 0), (984..1000).rev().collect::<Vec<u32>>());
    }

    #[test]
    fn a_nan_is_last_and_infinities_are_ranked() {
        assert_eq!(lowest_rows([f32::NAN, 5.0, f32::NEG_INFINITY], 0), [2, 1, 0]);
        assert_eq!(lowest_rows([f32::NAN; 3], 0).len(), 3);
    }

    #[test]
    fn equal_costs_share_the_load() {
        let mut hits = [0u32; 40];
        for seed in 0..40_000 {
            hits[lowest_rows([1.0; 40], seed)[0] as usize] += 1;
        }
        assert!(hits.iter().all(|hits| (800..1200).contains(hits)), "{hits:?}");
    }
}
