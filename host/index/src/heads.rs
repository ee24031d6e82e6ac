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
    keys: Box<[AtomicU64]>,
    runs: Box<[AtomicU32]>,
}

#[derive(Default)]
struct Numbers {
    free: BinaryHeap<Reverse<u32>>,
    next: u32,
    /// Entries that are or were in the table.
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

    /// Several lookups in one table.
    pub(crate) fn reader(&self) -> impl Fn(SequenceHash) -> Option<u32> {
        let table = self.table.load();
        move |head| table.get(head)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.table.load().keys.len() * 12
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
        if (self.numbers.used + 1) * 10 > table.keys.len() * 7 {
            self.resize(&table, (self.numbers.live + 1) * 2);
            table = self.heads.table.load_full();
        }
        self.numbers.used += usize::from(table.insert(head, run));
        self.numbers.live += 1;
    }

    /// Forgets a run and its number.
    pub(crate) fn remove(&mut self, head: SequenceHash, run: u32) {
        let table = self.heads.table.load();
        table.remove(head);
        self.numbers.live -= 1;
        self.numbers.free.push(Reverse(run));
        if self.numbers.live * 16 < table.keys.len() && table.keys.len() > 64 {
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
        Self { keys: (0..size).map(|_| AtomicU64::new(0)).collect(), runs: (0..size).map(|_| AtomicU32::new(NEVER)).collect() }
    }

    fn get(&self, head: SequenceHash) -> Option<u32> {
        let mask = self.keys.len() - 1;
        let mut at = head as usize & mask;
        // Never full, but a bound all the same.
        for _ in 0..=mask {
            match self.runs[at].load(Ordering::Acquire) {
                NEVER => return None,
                GONE => {}
                run if self.keys[at].load(Ordering::Relaxed) == head => return Some(run),
                _ => {}
            }
            at = (at + 1) & mask;
        }
        None
    }

    /// Whether a place is taken that never was before.
    fn insert(&self, head: SequenceHash, run: u32) -> bool {
        let mask = self.keys.len() - 1;
        let mut at = head as usize & mask;
        loop {
            let found = self.runs[at].load(Ordering::Relaxed);
            if found == NEVER || found == GONE {
                self.keys[at].store(head, Ordering::Relaxed);
                self.runs[at].store(run, Ordering::Release);
                return found == NEVER;
            }
            at = (at + 1) & mask;
        }
    }

    fn remove(&self, head: SequenceHash) {
        let mask = self.keys.len() - 1;
        let mut at = head as usize & mask;
        loop {
            match self.runs[at].load(Ordering::Relaxed) {
                NEVER => return,
                GONE => {}
                _ if self.keys[at].load(Ordering::Relaxed) == head => return self.runs[at].store(GONE, Ordering::Release),
                _ => {}
            }
            at = (at + 1) & mask;
        }
    }

    fn entries(&self) -> impl Iterator<Item = (SequenceHash, u32)> {
        let loaded = |(key, run): (&AtomicU64, &AtomicU32)| (key.load(Ordering::Relaxed), run.load(Ordering::Relaxed));
        self.keys.iter().zip(&self.runs).map(loaded).filter(|(_, run)| *run < GONE)
    }
}
