//! Ranking rows by a cost.

use crate::{Decision, entropy};

/// Rows that a decision holds at most.
pub const MAX_RANKED: usize = 16;
/// Numbers that are worked with at once.
const LANES: usize = 4;

/// Places the request on the rows of lowest cost, best first. `costs` has one value per row. Equal costs are
/// ordered at random, so that identical workers share the load; a NaN is worse than any number.
pub fn lowest(costs: impl IntoIterator<Item = f32>) -> Decision {
    Decision::Place(lowest_rows(costs, entropy::next()))
}

/// The rows that [`lowest`] ranks, with equals ordered by `seed`.
pub fn lowest_rows(costs: impl IntoIterator<Item = f32>, seed: u64) -> Vec<u32> {
    let costs: Vec<f32> = costs.into_iter().collect();
    // Nothing is above NaN.
    Lowest::up_to(f32::NAN, seed).of(&costs)
}

/// The rows that [`lowest_rows`] ranks, without those whose cost is infinite or NaN: they are no choice.
pub fn lowest_finite_rows(costs: &[f32], seed: u64) -> Vec<u32> {
    Lowest::finite(seed).of(costs)
}

/// A ranking of costs that come in blocks, for who works them out only as far as they matter: whatever is above
/// [`highest`](Self::highest) need not be added.
pub struct Lowest {
    /// With what they are ordered by, cost and chance; best first.
    rows: [(u64, u32); MAX_RANKED],
    count: usize,
    /// No cost above this is ranked.
    limit: u32,
    /// The cost of the last one, if they are as many as may be; else the limit.
    highest: f32,
    seed: u64,
}

impl Lowest {
    /// Rows of a block.
    pub const BLOCK: usize = 16;

    /// Ranks what is finite, equals by `seed`.
    #[must_use]
    pub fn finite(seed: u64) -> Self {
        Self::up_to(f32::MAX, seed)
    }

    fn up_to(limit: f32, seed: u64) -> Self {
        Self { rows: [(u64::MAX, 0); MAX_RANKED], count: 0, limit: ordered(limit), highest: limit, seed }
    }

    fn of(mut self, costs: &[f32]) -> Vec<u32> {
        let (blocks, rest) = costs.as_chunks();
        for (block, costs) in blocks.iter().enumerate() {
            self.add_block((block * Self::BLOCK) as u32, costs);
        }
        self.add((costs.len() - rest.len()) as u32, rest);
        self.rows()
    }

    /// No cost above this one is ranked any more.
    #[must_use]
    pub fn highest(&self) -> f32 {
        self.highest
    }

    /// The rows, best first.
    #[must_use]
    pub fn rows(&self) -> Vec<u32> {
        self.rows[..self.count].iter().map(|&(_, row)| row).collect()
    }

    /// Adds the costs of a block of rows from `first` on.
    #[inline(always)]
    pub fn add_block(&mut self, first: u32, costs: &[f32; Self::BLOCK]) {
        // SIMD, and nearly every block of a large set is turned away here.
        let mut is_any = [0; LANES];
        for costs in costs.as_chunks::<LANES>().0 {
            for (is_any, &cost) in is_any.iter_mut().zip(costs) {
                *is_any |= u32::from(!is_above(cost, self.highest));
            }
        }
        if is_any != [0; LANES] {
            self.add_equals(first, costs);
        }
    }

    /// Of idle workers all costs are equal, and chance turns nearly all away.
    #[inline(never)]
    fn add_equals(&mut self, first: u32, costs: &[f32; Self::BLOCK]) {
        let (last, highest) = (self.rows[MAX_RANKED - 1].0 as u32, self.highest);
        let mut is_any = [0; LANES];
        let mut rows = [first, first + 1, first + 2, first + 3];
        for costs in costs.as_chunks::<LANES>().0 {
            for ((is_any, row), &cost) in is_any.iter_mut().zip(&mut rows).zip(costs) {
                let is_unlike = u32::from(cost.to_bits() != highest.to_bits());
                *is_any |= u32::from(!is_above(cost, highest)) & (is_unlike | u32::from(mix(self.seed, *row) <= last));
                *row += LANES as u32;
            }
        }
        if is_any != [0; LANES] {
            self.add(first, costs);
        }
    }

    /// Adds costs of the rows from `first` on.
    pub fn add(&mut self, first: u32, costs: &[f32]) {
        for (row, &cost) in (first..).zip(costs) {
            if cost > self.highest {
                continue;
            }
            let key = u64::from(ordered(cost)) << 32 | u64::from(mix(self.seed, row));
            let is_full = self.count == MAX_RANKED;
            if if is_full { key >= self.rows[MAX_RANKED - 1].0 } else { ordered(cost) > self.limit } {
                continue;
            }
            let mut at = self.count.min(MAX_RANKED - 1);
            while at > 0 && self.rows[at - 1].0 > key {
                self.rows[at] = self.rows[at - 1];
                at -= 1;
            }
            self.rows[at] = (key, row);
            self.count = (self.count + 1).min(MAX_RANKED);
            if self.count == MAX_RANKED {
                self.highest = unordered((self.rows[MAX_RANKED - 1].0 >> 32) as u32);
            }
        }
    }
}

/// Nothing is above NaN, and NaN above nothing.
fn is_above(cost: f32, other: f32) -> bool {
    cost > other
}

/// An integer that is ordered as costs are: NaN last.
fn ordered(cost: f32) -> u32 {
    let bits = cost.to_bits();
    let negative = (bits as i32 >> 31) as u32;
    if cost.is_nan() { u32::MAX } else { bits ^ (negative | 1 << 31) }
}

/// The cost of an [`ordered`] integer.
fn unordered(integer: u32) -> f32 {
    let negative = (!integer as i32 >> 31) as u32;
    f32::from_bits(integer ^ (negative | 1 << 31))
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
    fn a_ranking_is_that_of_all_keys_in_order() {
        for seed in 0..200 {
            let values = [f32::NAN, f32::INFINITY, -0.0, 0.0, 1.0, 1.0, 2.0, -3.0, f32::NEG_INFINITY];
            let cost =
                |row: u32| values[(mix(u64::from(row) * 0x9e37_79b9, row * 7 + 3) >> 7) as usize % (1 + seed as usize % 9)];
            let costs: Vec<f32> = (0..(seed as u32 % 100)).map(cost).collect();
            let mut rows: Vec<u32> = (0..costs.len() as u32).collect();
            rows.sort_by_key(|&row| (ordered(costs[row as usize]), mix(seed, row)));
            let finite: Vec<u32> = rows.iter().copied().filter(|&row| costs[row as usize] < f32::INFINITY).take(16).collect();
            rows.truncate(16);
            assert_eq!(lowest_rows(costs.iter().copied(), seed), rows, "{costs:?}");
            assert_eq!(lowest_finite_rows(&costs, seed), finite, "{costs:?}");
        }
    }

    #[test]
    fn what_is_no_choice_is_left_out() {
        let costs =
            |row: u32| if row.is_multiple_of(3) { 1000.0 - row as f32 } else { [f32::NAN, f32::INFINITY][row as usize % 2] };
        let costs: Vec<f32> = (0..100).map(costs).collect();
        let rows = lowest_finite_rows(&costs, 7);
        assert_eq!(rows, lowest_rows(costs, 7));
        assert_eq!((rows[0], rows.len()), (99, 16));
        assert_eq!(lowest_finite_rows(&[f32::INFINITY, 2.0, f32::NAN, -1.0, f32::NEG_INFINITY], 0), [4, 3, 1]);
        assert!(lowest_finite_rows(&[f32::INFINITY; 40], 0).is_empty());
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
