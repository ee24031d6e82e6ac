//! Ranking rows by a cost.

use crate::{Decision, entropy};

/// Rows that a decision holds at most.
const MAX_RANKED: usize = 16;
/// Rows that are looked at together.
const CHUNK: usize = 8;

/// Places the request on the rows of lowest cost, best first. `costs` has one value per row. Equal costs are
/// ordered at random, so that identical workers share the load; a NaN is worse than any number.
pub fn lowest(costs: impl IntoIterator<Item = f32>) -> Decision {
    Decision::Place(lowest_rows(costs, entropy::next()))
}

/// The rows that [`lowest`] ranks, with equals ordered by `seed`.
pub fn lowest_rows(costs: impl IntoIterator<Item = f32>, seed: u64) -> Vec<u32> {
    // Integers in separate passes, since those become SIMD: nearly every chunk of a large set is turned away whole.
    let costs: Vec<u32> = costs.into_iter().map(ordered).collect();
    let mut best = [(u64::MAX, 0u32); MAX_RANKED];
    let mut count = 0;
    let mut worst = u64::MAX;
    for (chunk, costs) in (0u32..).zip(costs.chunks(CHUNK)) {
        if costs.iter().min().is_some_and(|&least| least > (worst >> 32) as u32) {
            continue;
        }
        for (row, &cost) in (chunk * CHUNK as u32..).zip(costs) {
            if cost > (worst >> 32) as u32 {
                continue;
            }
            let key = u64::from(cost) << 32 | u64::from(mix(seed, row));
            if key >= worst && count == MAX_RANKED {
                continue;
            }
            let mut at = count.min(MAX_RANKED - 1);
            while at > 0 && best[at - 1].0 > key {
                best[at] = best[at - 1];
                at -= 1;
            }
            best[at] = (key, row);
            count = (count + 1).min(MAX_RANKED);
            if count == MAX_RANKED {
                worst = best[MAX_RANKED - 1].0;
            }
        }
    }
    best[..count].iter().map(|&(_, row)| row).collect()
}

/// An integer that is ordered as costs are: NaN last.
fn ordered(cost: f32) -> u32 {
    let bits = cost.to_bits();
    let negative = (bits as i32 >> 31) as u32;
    if cost.is_nan() { u32::MAX } else { bits ^ (negative | 1 << 31) }
}

/// Orders equals: multiply-shift hashing (Dietzfelbinger et al. 1997) with both constants from the seed.
fn mix(seed: u64, row: u32) -> u32 {
    (row ^ (seed >> 32) as u32).wrapping_mul(seed as u32 | 1)
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
        assert_eq!(lowest_rows([-1.0, 0.5, f32::INFINITY, -2.5, f32::NAN], 0), [3, 0, 1, 2, 4]);
        assert_eq!(lowest_rows([f32::NAN; 40], 0).len(), 16);
    }

    #[test]
    fn equal_costs_share_the_load() {
        let mut hits = [0u32; 40];
        for _ in 0..40_000 {
            hits[lowest_rows([1.0; 40], entropy::next())[0] as usize] += 1;
        }
        assert!(hits.iter().all(|hits| (800..1200).contains(hits)), "{hits:?}");
    }
}
