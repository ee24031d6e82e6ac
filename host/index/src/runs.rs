//! The runs of one index: a tree over chained hashes, without edges.
//!
//! A block's hash stands for its whole prefix, so a run needs no link to the run that it continues: it is found by the
//! hash of its first block ([`Heads`]). Runs are never split; where two prompts part, each goes on in a run of its own.
//!
//! Invariants: (1) a block lies in one place at most: inside the run of its parent, right behind it, or as a head. (2) A run lives
//! while somebody holds a block of it. (3) Locks are taken in the order run, heads; one run at a time.
//!
//! Readers take no lock and wait for nobody: a run is a snapshot behind an atomic pointer.

use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, PoisonError,
    atomic::{AtomicI64, Ordering},
};

use arc_swap::ArcSwapOption;

use crate::{
    heads::Heads,
    places::Place,
    prompt::SequenceHash,
    run::{Holder, MAX_BLOCKS, Run, Tiers, Who},
};

pub(crate) struct Runs {
    heads: Heads,
    slots: Slots,
    bytes: AtomicI64,
}

/// What was placed: `count` blocks from `place` on.
pub(crate) struct Placed {
    pub(crate) place: Place,
    pub(crate) count: usize,
    /// Tiers in which the same holder held each of them before; `None` if it held none.
    pub(crate) before: Option<Vec<Tiers>>,
}

impl Placed {
    pub(crate) fn last(&self) -> Place {
        Place { run: self.place.run, offset: self.place.offset + self.count as u16 - 1 }
    }
}

/// What one holder holds of a chain: blocks by their nearest tiers.
#[derive(Clone, Copy)]
pub(crate) struct Found {
    pub(crate) who: Who,
    pub(crate) blocks: [u32; 4],
}

impl Runs {
    pub(crate) fn new() -> Self {
        Self { heads: Heads::new(), slots: Slots::default(), bytes: AtomicI64::new(0) }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed).max(0) as usize + self.heads.bytes()
    }

    /// Who holds how much of a chain's beginning, in ascending `who`.
    pub(crate) fn find(&self, chain: &[SequenceHash]) -> Vec<Found> {
        let mut found: Vec<Found> = Vec::new();
        // Those of `found` who hold all so far.
        let mut active: Vec<u32> = Vec::new();
        let head = self.heads.reader();
        let mut rest = chain;
        while let Some(next) = rest.first().and_then(|first| head(*first)) {
            let run = self.slots.get(next).run.load();
            let Some(run) = run.as_deref() else { break };
            let common = run.common(0, rest);
            if common == 0 {
                break;
            }
            if rest.len() == chain.len() {
                found.reserve_exact(run.holders().len());
                active.reserve_exact(run.holders().len());
                for holder in run.holders() {
                    let mut blocks = [0; 4];
                    let count = holder.count(common, &mut blocks);
                    if count > 0 {
                        found.push(Found { who: holder.who, blocks });
                    }
                    if count == common {
                        active.push(found.len() as u32 - 1);
                    }
                }
            } else {
                go_on(run.holders(), common, &mut found, &mut active);
            }
            if active.is_empty() {
                break;
            }
            rest = &rest[common..];
        }
        found
    }

    /// Has a holder hold the first of `chain`, which follow the block at `after` (that it holds), or begin a chain.
    pub(crate) fn hold(&self, after: Option<Place>, chain: &[SequenceHash], who: Who, tiers: Tiers) -> Placed {
        loop {
            let head = match after {
                None => self.head_or_new(chain, who, tiers),
                Some(after) => {
                    let slot = self.slots.get(after.run);
                    let _turn = slot.turn();
                    let run = slot.run.load();
                    if let Some(run) = run.as_deref() {
                        let next = usize::from(after.offset) + 1;
                        let is_tail = next == run.len() && next < MAX_BLOCKS;
                        if run.hash(next) == Some(chain[0]) || (is_tail && self.heads.get(chain[0]).is_none()) {
                            return self.hold_in(slot, run, Place { run: after.run, offset: next as u16 }, chain, who, tiers);
                        }
                    }
                    self.head_or_new(chain, who, tiers)
                }
            };
            let number = match head {
                Ok(placed) => return placed,
                Err(number) => number,
            };
            let slot = self.slots.get(number);
            let _turn = slot.turn();
            let run = slot.run.load();
            // Otherwise it went in this moment.
            if let Some(run) = run.as_deref().filter(|run| run.hash(0) == Some(chain[0])) {
                return self.hold_in(slot, run, Place { run: number, offset: 0 }, chain, who, tiers);
            }
        }
    }

    /// Takes a holder's blocks (in descending order) of a run out of tiers; whether it holds none of them any more.
    pub(crate) fn release(&self, number: u32, blocks: &[u16], who: Who, tiers: Tiers) -> bool {
        let slot = self.slots.get(number);
        let _turn = slot.turn();
        let run = slot.run.load();
        let Some(run) = run.as_deref() else { return true };
        let at = run.find(who);
        let Ok(place) = at else { return true };
        let holder = &run.holders()[place];
        let changed = match holder.take(blocks, tiers) {
            Ok(true) => {
                let is_gone = blocks.iter().all(|block| holder.tiers(usize::from(*block)) == 0);
                if run.is_sparse() {
                    self.replace(slot, run, run.with(Err(0), None));
                }
                return is_gone;
            }
            Ok(false) => None,
            Err(changed) => changed,
        };
        let is_gone = changed.as_ref().is_none_or(|holder| blocks.iter().all(|block| holder.tiers(usize::from(*block)) == 0));
        self.change(slot, run, number, at, changed);
        is_gone
    }

    /// Takes all that a holder holds of a run.
    pub(crate) fn release_all(&self, number: u32, who: Who) {
        let slot = self.slots.get(number);
        let _turn = slot.turn();
        let run = slot.run.load();
        let Some(run) = run.as_deref() else { return };
        let at = run.find(who);
        if at.is_ok() {
            self.change(slot, run, number, at, None);
        }
    }

    /// The hash of a block that somebody holds.
    pub(crate) fn hash(&self, place: Place) -> Option<SequenceHash> {
        self.slots.get(place.run).run.load().as_ref()?.hash(place.offset.into())
    }

    /// The tiers in which a holder holds a block.
    pub(crate) fn tiers(&self, place: Place, who: Who) -> Tiers {
        let run = self.slots.get(place.run).run.load();
        let Some(run) = run.as_deref() else { return 0 };
        run.find(who).map_or(0, |at| run.holders()[at].tiers(place.offset.into()))
    }

    /// The run that begins with the chain, or a new one with as much of it as is nowhere yet.
    fn head_or_new(&self, chain: &[SequenceHash], who: Who, tiers: Tiers) -> Result<Placed, u32> {
        if let Some(number) = self.heads.get(chain[0]) {
            return Err(number);
        }
        let mut writer = self.heads.write();
        if let Some(number) = self.heads.get(chain[0]) {
            return Err(number);
        }
        // A block may be a head although its parent is nowhere: that went first.
        let count = 1 + self.heads.before_head(&chain[1..chain.len().min(MAX_BLOCKS)]);
        let run = Run::new(&chain[..count], Holder::of(who, 0, count, tiers));
        let number = writer.take_number();
        self.bytes.fetch_add(run.bytes() as i64, Ordering::Relaxed);
        self.slots.get(number).run.store(Some(Arc::new(run)));
        writer.insert(chain[0], number);
        Ok(Placed { place: Place { run: number, offset: 0 }, count, before: None })
    }

    /// Has a holder hold the blocks of the chain that lie in the run from the place on, or that can be appended there.
    fn hold_in(&self, slot: &Slot, run: &Run, place: Place, chain: &[SequenceHash], who: Who, tiers: Tiers) -> Placed {
        let from = usize::from(place.offset);
        let mut count = run.common(from, chain);
        let mut grown = None;
        if count < chain.len() && from + count == run.len() {
            let most = (MAX_BLOCKS - from).min(chain.len());
            let more = self.heads.before_head(&chain[count..most]);
            if more > 0 {
                grown = run.append(&chain[count..count + more]);
                count += more;
            }
        }
        let current = grown.as_ref().unwrap_or(run);
        let (to, at) = (from + count, current.find(who));
        let holder = at.ok().map(|at| &current.holders()[at]);
        let before = holder.filter(|holder| holder.holds_any(from, to));
        let before = before.map(|holder| (from..to).map(|at| holder.tiers(at)).collect());
        let changed = holder.map_or_else(|| Some(Holder::of(who, from, to, tiers)), |holder| holder.add(from, to, tiers));
        match (changed, grown) {
            (Some(holder), grown) => {
                let changed = grown.as_ref().unwrap_or(run).with(at, Some(holder));
                self.replace(slot, run, changed);
            }
            (None, Some(grown)) => self.replace(slot, run, grown),
            (None, None) => {}
        }
        Placed { place, count, before }
    }

    /// Gives a run another holder, or one less, and lets it go with the last.
    fn change(&self, slot: &Slot, run: &Run, number: u32, at: Result<usize, usize>, holder: Option<Holder>) {
        if holder.is_some() || run.holders().len() > 1 {
            return self.replace(slot, run, run.with(at, holder));
        }
        let head = run.hash(0).expect("a run has a block");
        self.bytes.fetch_sub(run.bytes() as i64, Ordering::Relaxed);
        slot.run.store(None);
        self.heads.write().remove(head, number);
    }

    fn replace(&self, slot: &Slot, run: &Run, changed: Run) {
        self.bytes.fetch_add(changed.bytes() as i64 - run.bytes() as i64, Ordering::Relaxed);
        slot.run.store(Some(Arc::new(changed)));
    }
}

/// Goes on with those of `active` who hold more.
fn go_on(holders: &[Holder], common: usize, found: &mut [Found], active: &mut Vec<u32>) {
    let mut kept = 0;
    if active.len() * 8 < holders.len() {
        active.retain(|&at| {
            let found = &mut found[at as usize];
            let at = holders.binary_search_by_key(&found.who, |holder| holder.who);
            at.is_ok_and(|at| holders[at].count(common, &mut found.blocks) == common)
        });
        return;
    }
    let mut from = 0;
    for holder in holders {
        let before = active[from..].partition_point(|&at| found[at as usize].who < holder.who);
        from += before;
        let Some(&at) = active.get(from) else { break };
        if found[at as usize].who != holder.who {
            continue;
        }
        from += 1;
        if holder.count(common, &mut found[at as usize].blocks) == common {
            active[kept] = at;
            kept += 1;
        }
    }
    active.truncate(kept);
}

/// A place for a run, by its number.
#[derive(Default)]
struct Slot {
    turn: Mutex<()>,
    run: ArcSwapOption<Run>,
}

impl Slot {
    /// Writers take turns.
    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Slots that never move: levels, each as large as all before it.
#[derive(Default)]
struct Slots {
    levels: [OnceLock<Box<[Slot]>>; 26],
}

/// Slots of the first level.
const FIRST: u32 = 64;

impl Slots {
    fn get(&self, number: u32) -> &Slot {
        let number = number + FIRST;
        let level = number.ilog2() - FIRST.ilog2();
        let slots = self.levels[level as usize].get_or_init(|| (0..FIRST << level).map(|_| Slot::default()).collect());
        &slots[(number - (FIRST << level)) as usize]
    }
}
