//! Hand-off: KV that one engine computes and another one goes on from, as both of them see it.
//!
//! As with vLLM's NIXL connector. Who *prefills* keeps a sequence's blocks when it has finished ([`Sequence::hold`]), until it is
//! told that they were fetched, or that nobody will ([`release`](EngineModel::release)). Who *decodes* ([`Sequence::remote`])
//! allocates the blocks of the whole prompt when it admits the sequence, uses what its own prefix cache has, and fetches the rest,
//! which is never nothing: the last token's KV is fetched even so. Meanwhile the sequence has no place among those that run.
//! When the KV is there ([`fetched`](EngineModel::fetched)) its blocks are known and published like those that were computed
//! here, and it goes on with its last prompt token, before anyone who waits for room. Preempted later, it is computed here.
//!
//! Contract: whoever drives the model carries out its [fetches](EngineModel::take_fetches), and tells of each how it ended,
//! unless the sequence was cancelled meanwhile. How long KV is held, and how long a fetch takes, is not decided here.
//!
//! [`Sequence::hold`]: super::Sequence::hold
//! [`Sequence::remote`]: super::Sequence::remote

use std::{collections::BTreeMap, time::Duration};

use super::{EngineModel, SequenceId, cache::BlockId, profile::Pass, sequence::Live};

/// KV that a sequence waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Which sequence.
    pub sequence: SequenceId,
    /// How many tokens at the end of its prompt, at least one; those before are cached here.
    pub tokens: u32,
}

/// Sequences between two engines.
#[derive(Debug, Default)]
pub(super) struct Handoffs {
    /// Their blocks are allocated, their KV is on its way since then.
    fetching: BTreeMap<SequenceId, (Live, Duration)>,
    /// Their KV is there, or is to be computed here after all; there was no place for them yet.
    arrived: BTreeMap<SequenceId, Live>,
    /// Blocks of those that have finished.
    held: BTreeMap<SequenceId, Vec<BlockId>>,
    /// What nobody has begun to fetch.
    fetches: Vec<Fetch>,
}

impl Handoffs {
    pub(super) fn fetch(&mut self, mut live: Live, now: Duration) {
        live.awaits_kv = false;
        self.fetches.push(Fetch { sequence: live.id, tokens: live.known() - live.computed });
        self.fetching.insert(live.id, (live, now));
    }

    pub(super) fn hold(&mut self, live: &mut Live) {
        self.held.insert(live.id, std::mem::take(&mut live.blocks));
    }

    pub(super) fn cancel(&mut self, id: SequenceId) -> Option<Live> {
        self.fetches.retain(|fetch| fetch.sequence != id);
        self.fetching.remove(&id).map(|(live, _)| live).or_else(|| self.arrived.remove(&id))
    }

    pub(super) fn waiting(&self) -> usize {
        self.fetching.len() + self.arrived.len()
    }

    pub(super) fn fetching(&self) -> usize {
        self.fetching.len()
    }

    pub(super) fn held(&self) -> usize {
        self.held.len()
    }

    /// Blocks of all that are here, with repetitions.
    #[cfg(test)]
    pub(super) fn uses(&self) -> usize {
        let fetching = self.fetching.values().map(|(live, _)| live.blocks.len());
        let arrived = self.arrived.values().map(|live| live.blocks.len());
        fetching.chain(arrived).chain(self.held.values().map(Vec::len)).sum()
    }
}

impl EngineModel {
    /// Appends what is to be fetched and was not told before. To be asked after each [`begin_step`](Self::begin_step).
    pub fn take_fetches(&mut self, fetches: &mut Vec<Fetch>) {
        fetches.append(&mut self.handoffs.fetches);
    }

    /// The KV that a sequence waits for is there: it decodes from the next step on, if there is a place for it. Returns whether
    /// there was such a one.
    pub fn fetched(&mut self, id: SequenceId, now: Duration) -> bool {
        let Some((mut live, begun)) = self.handoffs.fetching.remove(&id) else { return false };
        self.stats.fetch_time.observe(now.saturating_sub(begun));
        live.arrived(&mut self.cache, &self.profile);
        self.handoffs.arrived.insert(id, live);
        // With what is known now, it may need less room.
        self.head_blocked_at = None;
        true
    }

    /// The KV that a sequence waits for does not come: it computes its prompt itself, with the blocks that it has. Whoever wants
    /// it to fail cancels it instead. Returns whether there was such a one.
    pub fn fetch_failed(&mut self, id: SequenceId) -> bool {
        let Some((live, _)) = self.handoffs.fetching.remove(&id) else { return false };
        self.stats.fetches_failed += 1;
        self.handoffs.arrived.insert(id, live);
        true
    }

    /// Frees the blocks of a sequence that finished and was to hold them. Returns whether there was such a one.
    pub fn release(&mut self, id: SequenceId) -> bool {
        let Some(mut blocks) = self.handoffs.held.remove(&id) else { return false };
        self.cache.release(&mut blocks);
        true
    }

    /// Indices of the blocks that a finished sequence holds, in the order of its tokens.
    #[must_use]
    pub fn held(&self, id: SequenceId) -> Option<&[u32]> {
        self.handoffs.held.get(&id).map(Vec::as_slice)
    }

    /// Blocks that finished sequences hold, each counted once.
    #[must_use]
    pub fn held_blocks(&self) -> u32 {
        let mut blocks: Vec<_> = self.handoffs.held.values().flatten().copied().collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks.len() as u32
    }

    /// Gives places to those whose KV is there, the oldest first. They have their blocks: for them, nobody is preempted.
    pub(super) fn resume_arrived(&mut self, now: Duration, pass: &mut Pass, budget: &mut u32) {
        while *budget > 0 && self.running.len() < self.profile.max_num_seqs as usize {
            let Some((_, live)) = self.handoffs.arrived.pop_first() else { return };
            self.run(live, now, pass, budget);
        }
    }
}

#[cfg(test)]
mod tests;
