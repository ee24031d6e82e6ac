//! What a worker without events is expected to hold: what was sent to it, least recently used blocks forgotten first.
//!
//! Recency is kept by run, as marks: a mark (end, time) says that the blocks before `end` were used at that time, and a later mark of the
//! same run ends before an earlier one. So a prompt touches as many marks as it has runs, not blocks, and the order is
//! still that of single blocks: the oldest first, and of equally old ones the deepest, so that no prefix goes before what continues it.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
};

use crate::{
    prompt::SequenceHash,
    run::Who,
    runs::{Placed, Runs},
};

/// Device memory, as [`crate::run::Tiers`].
const DEVICE: u8 = 1;

pub(crate) struct Expected {
    pub(crate) who: Who,
    time: u64,
    /// Blocks in all.
    len: usize,
    /// End and time of each mark of a run; ends fall, times rise.
    runs: HashMap<u32, Vec<(u16, u64)>>,
    /// Marks by time, and the deepest run first: which run's first mark it is.
    oldest: BTreeMap<(u64, Reverse<u32>), u32>,
}

impl Expected {
    pub(crate) fn new(who: Who) -> Self {
        Self { who, time: 0, len: 0, runs: HashMap::new(), oldest: BTreeMap::new() }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn runs(&self) -> impl Iterator<Item = u32> {
        self.runs.keys().copied()
    }

    pub(crate) fn bytes(&self) -> usize {
        // A map's entry, a list of marks, and the tree's entry of each.
        self.runs.len() * 64 + self.oldest.len() * 56
    }

    /// Leading blocks of the chain that are held.
    pub(crate) fn known(&self, runs: &Runs, chain: &[SequenceHash]) -> usize {
        let found = runs.find(chain).into_iter().find(|found| found.who == self.who);
        found.map_or(0, |found| found.blocks.iter().map(|blocks| *blocks as usize).sum())
    }

    /// Holds the chain from now on, and of what was held before as much as is left of `capacity` blocks.
    pub(crate) fn touch(&mut self, runs: &Runs, chain: &[SequenceHash], capacity: usize) {
        self.time += 1;
        let chain = &chain[..chain.len().min(capacity)];
        let (mut at, mut after) = (0, None);
        while at < chain.len() {
            let placed = runs.hold(after, &chain[at..], self.who, DEVICE);
            let known = placed.before.as_ref().map_or(0, |before| before.iter().filter(|tiers| **tiers != 0).count());
            self.len += placed.count - known;
            self.mark(&placed, at);
            at += placed.count;
            after = Some(placed.last());
        }
        self.keep(runs, capacity);
    }

    fn mark(&mut self, placed: &Placed, depth: usize) {
        let end = placed.last().offset + 1;
        // Of the run's first block, as the same in every prompt that comes here.
        let depth = depth as u32 - u32::from(placed.place.offset);
        let marks = self.runs.entry(placed.place.run).or_default();
        while let Some((_, time)) = marks.pop_if(|(of, _)| *of <= end) {
            self.oldest.remove(&(time, Reverse(depth)));
        }
        marks.push((end, self.time));
        self.oldest.insert((self.time, Reverse(depth)), placed.place.run);
    }

    /// Forgets the oldest, until no more than `capacity` blocks are left.
    pub(crate) fn keep(&mut self, runs: &Runs, capacity: usize) {
        while self.len > capacity {
            let Some(oldest) = self.oldest.first_entry() else { break };
            let run = *oldest.get();
            let Some(marks) = self.runs.get_mut(&run) else { break };
            let lower = marks.get(1).map_or(0, |(end, _)| *end);
            let end = marks[0].0;
            let from = end - (self.len - capacity).min(usize::from(end - lower)) as u16;
            if from == lower {
                oldest.remove();
                marks.remove(0);
            } else {
                marks[0].0 = from;
            }
            if marks.is_empty() {
                self.runs.remove(&run);
            }
            runs.release(run, &(from..end).rev().collect::<Vec<_>>(), self.who, DEVICE);
            self.len -= usize::from(end - from);
        }
    }
}
