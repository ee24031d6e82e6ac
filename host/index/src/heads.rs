//! The heads of runs: which run begins with a block.
//!
//! Readers probe without locks, in a table that is replaced as a whole when it grows. What they find is a hint: whoever follows it
//! checks that the run really begins with the block, so an entry that changes while it is read leads nowhere wrong.
//! Writers take turns. They also hand out the runs' numbers, lowest first, so that numbers stay dense.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;

use crate::prompt::SequenceHash;

/// What is no run's number: nothing was ever here, or it was removed and probing goes on.
const NEVER: u32 = u32::MAX;
const GONE: u32 = u32::MAX - 1;

pub(crate) struct Heads {
    table: ArcSwap<Table>,
    numbers: Mutex<Numbers>,
}

struct Table {
    entries: Box<[Entry]>,
    /// Eight bits for each entry, one of them set by its head, and never cleared: most misses end here, in the
    /// processor's nearest cache.
    seen: Box<[AtomicU64]>,
}

struct Entry {
    head: AtomicU64,
    run: AtomicU32,
}

#[derive(Default)]
struct Numbers {
    free: BinaryHeap<Reverse<u32>>,
    next: u32,
    /// Heads that came into the table since it was made.
    used: usize,
    live: usize,
}

/// Numbers and entries, for one writer at a time.
pub(crate) struct HeadsWriter<'a> {
    heads: &'a Heads,
    numbers: MutexGuard<'a, Numbers>,
}

impl Heads {
    pub(crate) fn new() -> Self {
        Self { table: ArcSwap::from_pointee(Table::new(64)), numbers: Mutex::default() }
    }

    /// The run that begins with the block, most likely.
    pub(crate) fn get(&self, head: SequenceHash) -> Option<u32> {
        self.table.load().get(head)
    }

    /// Several lookups of what is likely there, in one table.
    pub(crate) fn reader(&self) -> impl Fn(SequenceHash) -> Option<u32> {
        let table = self.table.load();
        move |head| table.get(head)
    }

    /// How many of the blocks come before the first that is a head; most likely none is.
    pub(crate) fn before_head(&self, blocks: &[SequenceHash]) -> usize {
        let table = self.table.load();
        blocks.iter().take_while(|head| !table.may_have(**head) || table.get(**head).is_none()).count()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.table.load().entries.len() * (size_of::<Entry>() + 1)
    }

    pub(crate) fn write(&self) -> HeadsWriter<'_> {
        HeadsWriter { heads: self, numbers: self.numbers.lock().unwrap_or_else(PoisonError::into_inner) }
    }
}

impl HeadsWriter<'_> {
    /// A number for a run that is to come.
    pub(crate) fn take_number(&mut self) -> u32 {
        let numbers = &mut *self.numbers;
        numbers.free.pop().map_or_else(
            || {
                numbers.next += 1;
                numbers.next - 1
            },
            |Reverse(number)| number,
        )
    }

    /// Makes a run known; no other begins with the block.
    pub(crate) fn insert(&mut self, head: SequenceHash, run: u32) {
        let mut table = self.heads.table.load_full();
        if (self.numbers.used + 1) * 10 > table.entries.len() * 7 {
            self.resize(&table, (self.numbers.live + 1) * 2);
            table = self.heads.table.load_full();
        }
        // All that ever were: a table that saw too many begins anew.
        self.numbers.used += 1;
        table.insert(head, run);
        self.numbers.live += 1;
    }

    /// Forgets a run and its number.
    pub(crate) fn remove(&mut self, head: SequenceHash, run: u32) {
        let table = self.heads.table.load();
        table.remove(head);
        self.numbers.live -= 1;
        self.numbers.free.push(Reverse(run));
        if self.numbers.live * 16 < table.entries.len() && table.entries.len() > 64 {
            self.resize(&table, self.numbers.live * 2);
        }
    }

    fn resize(&mut self, table: &Table, entries: usize) {
        let resized = Table::new(entries);
        for (head, run) in table.entries() {
            resized.insert(head, run);
        }
        self.heads.table.store(Arc::new(resized));
        self.numbers.used = self.numbers.live;
    }
}

impl Table {
    fn new(entries: usize) -> Self {
        let size = entries.next_power_of_two().max(64);
        Self {
            entries: (0..size).map(|_| Entry { head: AtomicU64::new(0), run: AtomicU32::new(NEVER) }).collect(),
            seen: (0..size / 8).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// The word and the bit of a head.
    fn seen(&self, head: SequenceHash) -> (&AtomicU64, u64) {
        // The low bits choose the entry.
        let word = (head >> 32) as usize & (self.seen.len() - 1);
        (&self.seen[word], 1 << (head >> 58))
    }

    fn may_have(&self, head: SequenceHash) -> bool {
        let (word, bit) = self.seen(head);
        word.load(Ordering::Acquire) & bit != 0
    }

    fn get(&self, head: SequenceHash) -> Option<u32> {
        let mask = self.entries.len() - 1;
        let mut at = head as usize & mask;
        // Never full, but a bound all the same.
        for _ in 0..=mask {
            match self.entries[at].run.load(Ordering::Acquire) {
                NEVER => return None,
                GONE => {}
                run if self.entries[at].head.load(Ordering::Relaxed) == head => return Some(run),
                _ => {}
            }
            at = (at + 1) & mask;
        }
        None
    }

    fn insert(&self, head: SequenceHash, run: u32) {
        let mask = self.entries.len() - 1;
        let mut at = head as usize & mask;
        loop {
            let found = self.entries[at].run.load(Ordering::Relaxed);
            if found == NEVER || found == GONE {
                self.entries[at].head.store(head, Ordering::Relaxed);
                self.entries[at].run.store(run, Ordering::Release);
                let (word, bit) = self.seen(head);
                word.fetch_or(bit, Ordering::Release);
                return;
            }
            at = (at + 1) & mask;
        }
    }

    fn remove(&self, head: SequenceHash) {
        let mask = self.entries.len() - 1;
        let mut at = head as usize & mask;
        loop {
            match self.entries[at].run.load(Ordering::Relaxed) {
                NEVER => return,
                GONE => {}
                _ if self.entries[at].head.load(Ordering::Relaxed) == head => {
                    return self.entries[at].run.store(GONE, Ordering::Release);
                }
                _ => {}
            }
            at = (at + 1) & mask;
        }
    }

    fn entries(&self) -> impl Iterator<Item = (SequenceHash, u32)> {
        let loaded = |entry: &Entry| (entry.head.load(Ordering::Relaxed), entry.run.load(Ordering::Relaxed));
        self.entries.iter().map(loaded).filter(|(_, run)| *run < GONE)
    }
}
