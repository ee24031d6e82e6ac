//! KV: where engines hold which blocks, as their events tell it, and what of a prompt's prefix each worker holds.
//!
//! Contract: an engine's own block hashes only name its blocks; whose content is what is told by the tokens. Amounts are
//! in tokens, since engines of one model differ in block size.

use std::sync::Arc;

use crate::UNKNOWN;

/// Where a block lies, nearest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// The engine's device memory.
    Device,
    /// Host memory, from which the engine loads.
    Host,
    /// Disk.
    Disk,
    /// A remote store or peer.
    Remote,
}

impl Tier {
    /// Every tier, nearest first.
    pub const ALL: [Self; 4] = [Self::Device, Self::Host, Self::Disk, Self::Remote];

    /// Every tier with its column of the contract (`dynamo:policy/candidates`).
    pub const COLUMNS: [(&'static str, Self); 4] = [
        ("cached-device-tokens", Self::Device),
        ("cached-host-tokens", Self::Host),
        ("cached-disk-tokens", Self::Disk),
        ("cached-remote-tokens", Self::Remote),
    ];

    /// Its column of the contract.
    #[must_use]
    pub fn column(self) -> &'static str {
        Self::COLUMNS[self as usize].0
    }

    /// Metric label.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Host => "host",
            Self::Disk => "disk",
            Self::Remote => "remote",
        }
    }
}

/// An engine's own hash of a block; it names the block within that engine and rank, and says nothing elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EngineHash(pub u64);

/// Blocks of one sequence that an engine holds now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredBlocks {
    /// The block before the first; `None` at the start of a sequence.
    pub parent: Option<EngineHash>,
    /// Their hashes, each the child of the one before it.
    pub hashes: Vec<EngineHash>,
    /// Their tokens, `block_size` for each hash.
    pub tokens: Vec<u32>,
    /// Tokens of a block.
    pub block_size: u32,
    /// Where they lie.
    pub tier: Tier,
    /// The LoRA adapter that computed them.
    pub adapter: Option<Arc<str>>,
    /// The client's `cache_salt`, which keeps them apart from others' equal ones. Of the blocks after the first of a
    /// sequence it need not be said: they follow their parent.
    pub cache_salt: Option<Arc<str>>,
}

/// A change of what one rank of an engine holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvEvent {
    /// Blocks are there.
    Stored(StoredBlocks),
    /// Blocks are gone.
    Removed {
        /// Their hashes.
        hashes: Vec<EngineHash>,
        /// From where.
        tier: Tier,
    },
    /// All blocks are gone.
    Cleared,
}

/// What one worker holds of a prompt's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The worker's slot on the load board.
    pub slot: u32,
    /// Tokens by tier, in the order of [`Tier::ALL`]: each continues the one before it.
    pub tokens: [u32; 4],
}

impl Held {
    /// All that the worker need not compute, wherever it lies.
    #[must_use]
    pub fn total(&self) -> u32 {
        self.tokens.iter().fold(0, |sum, tokens| sum.saturating_add(*tokens))
    }
}

/// What workers hold of one prompt's prefix, in whole blocks: those that hold something, in ascending slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overlap {
    held: Vec<Held>,
}

impl Overlap {
    /// Of workers in any order, each at most once.
    #[must_use]
    pub fn new(mut held: Vec<Held>) -> Self {
        held.sort_unstable_by_key(|held| held.slot);
        Self { held }
    }

    /// The same for a prompt that is counted as `tokens`, and was looked up as `looked_up`: in proportion, and nobody holds
    /// more than there is.
    #[must_use]
    pub fn in_proportion(mut self, tokens: u32, looked_up: u32) -> Self {
        for held in &mut self.held {
            let mut left = tokens;
            for of_tier in &mut held.tokens {
                let scaled = u64::from(*of_tier) * u64::from(tokens) / u64::from(looked_up.max(1));
                *of_tier = left.min(u32::try_from(scaled).unwrap_or(u32::MAX));
                left -= *of_tier;
            }
        }
        self
    }

    /// Those that hold something, in ascending slot.
    #[must_use]
    pub fn held(&self) -> &[Held] {
        &self.held
    }

    /// What one of them holds.
    #[must_use]
    pub fn of(&self, slot: u32) -> Option<&Held> {
        self.held.binary_search_by_key(&slot, |held| held.slot).ok().map(|place| &self.held[place])
    }

    /// A column over workers by their slots: tokens in one tier, 0 for who holds nothing. Without an overlap, nobody has
    /// looked: unknown in every row.
    #[must_use]
    pub fn column(overlap: Option<&Self>, tier: Tier, slots: &[u32]) -> Arc<[u32]> {
        match overlap {
            None => slots.iter().map(|_| UNKNOWN).collect(),
            Some(overlap) if overlap.held.is_empty() => slots.iter().map(|_| 0).collect(),
            Some(overlap) => slots.iter().map(|&slot| overlap.of(slot).map_or(0, |held| held.tokens[tier as usize])).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_in_proportion_to_the_prompt_and_never_more() {
        let overlap = Overlap::new(vec![Held { slot: 1, tokens: [600, 300, 0, 0] }]);
        let tokens = |tokens, looked_up| overlap.clone().in_proportion(tokens, looked_up).of(1).unwrap().tokens;
        assert_eq!(tokens(1000, 1000), [600, 300, 0, 0]);
        assert_eq!(tokens(100, 1000), [60, 30, 0, 0]);
        assert_eq!(tokens(800, 800), [600, 200, 0, 0]);
    }

    #[test]
    fn a_column_is_in_the_order_of_its_rows_and_unknown_where_nobody_looked() {
        let overlap = Overlap::new(vec![Held { slot: 7, tokens: [64, 16, 0, 0] }, Held { slot: 2, tokens: [32, 0, 0, 0] }]);
        assert_eq!(*Overlap::column(Some(&overlap), Tier::Device, &[7, 3, 2]), [64, 0, 32]);
        assert_eq!(*Overlap::column(Some(&overlap), Tier::Host, &[7, 3, 2]), [16, 0, 0]);
        assert_eq!(*Overlap::column(Some(&Overlap::default()), Tier::Device, &[7]), [0]);
        assert_eq!(*Overlap::column(None, Tier::Device, &[7]), [UNKNOWN]);
        assert_eq!((overlap.of(7).map(Held::total), overlap.of(3)), (Some(80), None));
    }
}
