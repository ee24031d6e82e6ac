//! A run: consecutive blocks of one chain, and who holds which of them.
//!
//! A run is read through a snapshot. What is changed in place is safe to read at any time: hashes are only appended, and how far
//! a holder's leading blocks reach is one number. Every other change makes a new run of the same hashes.

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use crate::prompt::SequenceHash;

/// Blocks of a run at most.
pub(crate) const MAX_BLOCKS: usize = 1_024;

/// Tiers, as bits in the order of `Tier::ALL`.
pub(crate) type Tiers = u8;

/// A holder: the worker's slot in the upper half, and a number that no other part ever had in the lower.
pub(crate) type Who = u64;

pub(crate) struct Run {
    /// With room for more; those beyond `len` say nothing.
    hashes: Arc<[AtomicU64]>,
    len: AtomicU32,
    holders: Holders,
}

/// In ascending `who`. Most runs have one holder: it lies in the run.
enum Holders {
    One(Holder),
    Many(Box<[Holder]>),
}

/// What one part holds of a run: at least one block.
#[derive(Debug)]
pub(crate) struct Holder {
    pub(crate) who: Who,
    /// Blocks from the first on, all in the same tiers: their number, above eight bits of tiers. Nothing if `scattered`.
    leading: AtomicU32,
    /// The tiers of each block, where they differ or have holes.
    scattered: Option<Arc<Vec<Tiers>>>,
}

impl Run {
    pub(crate) fn new(hashes: &[SequenceHash], holder: Holder) -> Self {
        let len = AtomicU32::new(hashes.len() as u32);
        Self { hashes: hashes.iter().copied().map(AtomicU64::new).collect(), len, holders: Holders::One(holder) }
    }

    pub(crate) fn len(&self) -> usize {
        self.len.load(Ordering::Acquire) as usize
    }

    pub(crate) fn hash(&self, at: usize) -> Option<SequenceHash> {
        (at < self.len()).then(|| self.hashes[at].load(Ordering::Relaxed))
    }

    pub(crate) fn holders(&self) -> &[Holder] {
        self.holders.as_slice()
    }

    /// How many of `hashes` lie here one after the other, from the block at `from` on. A hash stands for all before it, so
    /// one comparison tells of all, and where it fails, halving finds the last.
    pub(crate) fn common(&self, from: usize, hashes: &[SequenceHash]) -> usize {
        let most = self.len().saturating_sub(from).min(hashes.len());
        let here = &self.hashes[from.min(self.hashes.len())..];
        let is_equal = |at: usize| here[at].load(Ordering::Relaxed) == hashes[at];
        if most == 0 || is_equal(most - 1) {
            return most;
        }
        let (mut equal, mut other) = (0, most - 1);
        while equal < other {
            let middle = equal + (other - equal) / 2;
            if is_equal(middle) {
                equal = middle + 1;
            } else {
                other = middle;
            }
        }
        equal
    }

    /// Appends in place where there is room; else gives a run with more.
    pub(crate) fn append(&self, more: &[SequenceHash]) -> Option<Self> {
        let len = self.len();
        let end = len + more.len();
        if end <= self.hashes.len() {
            for (hash, place) in more.iter().zip(&self.hashes[len..]) {
                place.store(*hash, Ordering::Relaxed);
            }
            self.len.store(end as u32, Ordering::Release);
            return None;
        }
        let room = end.max((len + len / 8 + 4).min(MAX_BLOCKS));
        let more = more.iter().copied().chain(std::iter::repeat(0)).take(room - len);
        let hashes = self.hashes[..len].iter().map(|hash| hash.load(Ordering::Relaxed)).chain(more).map(AtomicU64::new).collect();
        Some(Self { hashes, len: AtomicU32::new(end as u32), holders: Holders::of(self.holders().iter().map(Holder::copy)) })
    }

    pub(crate) fn find(&self, who: Who) -> Result<usize, usize> {
        self.holders().binary_search_by_key(&who, |holder| holder.who)
    }

    /// The same blocks, with a holder in place of another, or more, or one less.
    pub(crate) fn with(&self, at: Result<usize, usize>, holder: Option<Holder>) -> Self {
        let (at, after) = at.map_or_else(|at| (at, at), |at| (at, at + 1));
        let (before, behind) = (&self.holders()[..at], &self.holders()[after..]);
        let holders = Holders::of(before.iter().map(Holder::copy).chain(holder).chain(behind.iter().map(Holder::copy)));
        // Hashes that nobody holds any more go when they are the larger part.
        let held = holders.as_slice().iter().map(Holder::end).max().unwrap_or(0);
        let hashes = if held * 2 < self.hashes.len() && self.hashes.len() > 32 {
            self.hashes[..held].iter().map(|hash| AtomicU64::new(hash.load(Ordering::Relaxed))).collect()
        } else {
            Arc::clone(&self.hashes)
        };
        let len = self.len().min(hashes.len());
        Self { hashes, len: AtomicU32::new(len as u32), holders }
    }

    /// Whether hardly anything of it is held any more, so that it is worth a copy.
    pub(crate) fn is_sparse(&self) -> bool {
        self.hashes.len() > 32 && self.holders().iter().all(|holder| holder.end() * 2 < self.hashes.len())
    }

    /// Memory, with its part of the tables that lead to it.
    pub(crate) fn bytes(&self) -> usize {
        let scattered = self.holders().iter().filter_map(|holder| holder.scattered.as_ref()).map(|tiers| 48 + tiers.len());
        let listed = if let Holders::Many(holders) = &self.holders { size_of_val(&**holders) + 16 } else { 0 };
        // Two allocations' counts and padding beside the run itself, its slot, and its entry among the heads.
        size_of::<Self>() + 32 + 16 + 40 + self.hashes.len() * 8 + listed + scattered.sum::<usize>()
    }
}

impl Holders {
    fn of(mut holders: impl Iterator<Item = Holder>) -> Self {
        match (holders.next(), holders.next()) {
            (Some(one), None) => Self::One(one),
            (one, two) => Self::Many(one.into_iter().chain(two).chain(holders).collect()),
        }
    }

    fn as_slice(&self) -> &[Holder] {
        match self {
            Self::One(holder) => std::slice::from_ref(holder),
            Self::Many(holders) => holders,
        }
    }
}

impl Holder {
    /// Of the blocks `from..to`.
    pub(crate) fn of(who: Who, from: usize, to: usize, tiers: Tiers) -> Self {
        if from == 0 {
            return Self { who, leading: AtomicU32::new(pack(to, tiers)), scattered: None };
        }
        let mut all = vec![0; to];
        all[from..].fill(tiers);
        Self { who, leading: AtomicU32::new(0), scattered: Some(Arc::new(all)) }
    }

    /// Of blocks in these tiers, unless they are in none.
    fn of_tiers(who: Who, mut tiers: Vec<Tiers>) -> Option<Self> {
        tiers.truncate(tiers.iter().rposition(|tiers| *tiers != 0)? + 1);
        let first = tiers[0];
        if tiers.iter().all(|tiers| *tiers == first) {
            return Some(Self::of(who, 0, tiers.len(), first));
        }
        tiers.shrink_to_fit();
        Some(Self { who, leading: AtomicU32::new(0), scattered: Some(Arc::new(tiers)) })
    }

    fn copy(&self) -> Self {
        let leading = AtomicU32::new(self.leading.load(Ordering::Relaxed));
        Self { who: self.who, leading, scattered: self.scattered.clone() }
    }

    /// The leading blocks, and their tiers.
    fn leading(&self) -> (usize, Tiers) {
        let packed = self.leading.load(Ordering::Relaxed);
        ((packed >> 8) as usize, packed as Tiers)
    }

    /// Where the last that it holds ends.
    fn end(&self) -> usize {
        self.scattered.as_ref().map_or_else(|| self.leading().0, |tiers| tiers.len())
    }

    /// The tiers that hold a block.
    pub(crate) fn tiers(&self, at: usize) -> Tiers {
        match &self.scattered {
            Some(tiers) => tiers.get(at).copied().unwrap_or(0),
            None => {
                let (blocks, tiers) = self.leading();
                if at < blocks { tiers } else { 0 }
            }
        }
    }

    /// Whether it holds any of the blocks `from..to`.
    pub(crate) fn holds_any(&self, from: usize, to: usize) -> bool {
        match &self.scattered {
            Some(tiers) => tiers.iter().take(to).skip(from).any(|tiers| *tiers != 0),
            None => from < to && from < self.leading().0,
        }
    }

    /// Counts its leading blocks, `most` at most, each in its nearest tier.
    pub(crate) fn count(&self, most: usize, by_tier: &mut [u32; 4]) -> usize {
        match &self.scattered {
            None => {
                let (blocks, tiers) = self.leading();
                let blocks = blocks.min(most);
                if blocks > 0 {
                    by_tier[tiers.trailing_zeros() as usize & 3] += blocks as u32;
                }
                blocks
            }
            Some(all) => {
                let leading = all.iter().take(most).take_while(|tiers| **tiers != 0);
                leading.map(|tiers| by_tier[tiers.trailing_zeros() as usize & 3] += 1).count()
            }
        }
    }

    /// Adds tiers to the blocks `from..to`: in place, or as another holder.
    pub(crate) fn add(&self, from: usize, to: usize, tiers: Tiers) -> Option<Self> {
        if self.scattered.is_none() {
            let (blocks, held) = self.leading();
            if held == tiers && from <= blocks {
                self.leading.store(pack(blocks.max(to), held), Ordering::Relaxed);
                return None;
            }
            let is_all = from == 0 && to >= blocks;
            if is_all && (to == blocks || held | tiers == tiers) {
                self.leading.store(pack(to, held | tiers), Ordering::Relaxed);
                return None;
            }
        }
        let mut all = self.all(to);
        all[from..to].iter_mut().for_each(|of| *of |= tiers);
        Self::of_tiers(self.who, all)
    }

    /// Takes blocks (in descending order) out of tiers: in place if that shortens the leading blocks, `Ok(false)` if nothing is
    /// left; else as another holder.
    pub(crate) fn take(&self, blocks: &[u16], tiers: Tiers) -> Result<bool, Option<Self>> {
        if self.scattered.is_none() {
            let (mut leading, held) = self.leading();
            if held & tiers == 0 {
                return Ok(true);
            }
            let is_tail = |at: usize| {
                if at + 1 == leading {
                    leading = at;
                }
                at >= leading
            };
            if held & !tiers == 0 && blocks.iter().copied().map(usize::from).all(is_tail) {
                if leading > 0 {
                    self.leading.store(pack(leading, held), Ordering::Relaxed);
                }
                return Ok(leading > 0);
            }
        }
        let mut all = self.all(0);
        for block in blocks {
            if let Some(of) = all.get_mut(usize::from(*block)) {
                *of &= !tiers;
            }
        }
        Err(Self::of_tiers(self.who, all))
    }

    /// The tiers of each block, of `least` blocks at least.
    fn all(&self, least: usize) -> Vec<Tiers> {
        let blocks = self.end().max(least);
        (0..blocks).map(|at| self.tiers(at)).collect()
    }
}

fn pack(blocks: usize, tiers: Tiers) -> u32 {
    (blocks as u32) << 8 | u32::from(tiers)
}
