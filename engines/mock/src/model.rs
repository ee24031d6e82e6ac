//! Model: the engine as a state machine in virtual time.
//!
//! Continuous batching as in vLLM's V1 scheduler: each step takes a token of every decoding sequence, then
//! prompts first come, first served, in chunks, up to `max_num_batched_tokens`. A sequence is admitted when the KV
//! blocks of all its known tokens are free; when a decode finds no block, the latest sequence is preempted, and
//! computed again later. Only what a step costs is a formula ([`Profile`]); blocks, hits and evictions are real.
//!
//! One engine may compute a prompt, and another go on from its KV (`handoff`, `transfer`).
//!
//! Contract: no clock, no I/O, no randomness. Time is a [`Duration`] since a start of the caller's choice. A step is
//! [`begin_step`](EngineModel::begin_step), then at the time that it returned [`end_step`](EngineModel::end_step);
//! between the two, sequences may be submitted and cancelled. The same calls give the same results.
//!
//! Invariants: every sequence ends exactly once, by its last token or by [`cancel`](EngineModel::cancel). Those that run are in the
//! order in which they were given their places, so that at most the last has prompt left to compute; ids ascend through the waiting.
//! The first that runs is never preempted for another that runs, and a profile's KV holds any sequence on its own, so there is
//! always progress, as long as KV that is held or fetched is so for a while only.

mod cache;
mod handoff;
mod profile;
mod sequence;
mod stats;
mod transfer;

use std::{collections::VecDeque, time::Duration};

use self::{cache::BlockCache, handoff::Handoffs, sequence::Live};
pub use self::{
    cache::{BlockHash, CacheEvent, block_hash},
    handoff::Fetch,
    profile::{Pass, Profile, ProfileError},
    sequence::{Event, FinishReason, Sequence, SequenceId, SubmitError},
    stats::{Histogram, Snapshot, Stats},
    transfer::{Ended, KvLinks, Port, TransferId},
};

/// An engine.
#[derive(Debug)]
pub struct EngineModel {
    profile: Profile,
    cache: BlockCache,
    /// In the order of their admission, which is that of ids but for those that came late, by a fetch.
    running: Vec<Live>,
    waiting: VecDeque<Waiting>,
    /// Entries of `waiting` that are not cancelled.
    waiting_count: usize,
    handoffs: Handoffs,
    next_id: u64,
    step_end: Option<Duration>,
    /// How many times as long steps take.
    slow: f64,
    /// Free blocks when the first of the waiting found too few: until there are more, it is not tried again.
    head_blocked_at: Option<usize>,
    stats: Stats,
}

/// A place in the queue. A cancelled sequence leaves its place empty, so that cancelling moves nobody.
#[derive(Debug)]
struct Waiting {
    id: SequenceId,
    live: Option<Live>,
}

impl EngineModel {
    /// An idle engine.
    ///
    /// # Errors
    /// If no engine can have this profile.
    pub fn new(profile: Profile) -> Result<Self, ProfileError> {
        profile.validate()?;
        Ok(Self {
            cache: BlockCache::new(profile.kv_blocks),
            profile,
            running: Vec::new(),
            waiting: VecDeque::new(),
            waiting_count: 0,
            handoffs: Handoffs::default(),
            next_id: 0,
            step_end: None,
            slow: 1.0,
            head_blocked_at: None,
            stats: Stats::default(),
        })
    }

    /// What it can hold and how fast it is.
    #[must_use]
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// From the next step on, steps take `factor` times as long as the profile says.
    ///
    /// # Panics
    /// If it is not a number from 1 to 1,000,000.
    pub fn slow_down(&mut self, factor: f64) {
        assert!((1.0..=1e6).contains(&factor), "a factor of {factor}");
        self.slow = factor;
    }

    /// Queues a sequence.
    ///
    /// # Errors
    /// If it can never run.
    pub fn submit(&mut self, now: Duration, sequence: Sequence) -> Result<SequenceId, SubmitError> {
        sequence.check(&self.profile)?;
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.waiting.push_back(Waiting { id, live: Some(Live::new(id, sequence, now)) });
        self.waiting_count += 1;
        Ok(id)
    }

    /// Ends a sequence at once and frees its blocks. Returns whether there was such a one; one that has finished is none.
    pub fn cancel(&mut self, id: SequenceId) -> bool {
        if let Some(at) = self.running.iter().position(|live| live.id == id) {
            let mut live = self.running.remove(at);
            live.give_up_blocks(&mut self.cache);
        } else if let Some(mut live) = self.handoffs.cancel(id) {
            live.give_up_blocks(&mut self.cache);
        } else {
            let place = self.waiting.binary_search_by_key(&id, |waiting| waiting.id).ok();
            let Some(_cancelled) = place.and_then(|at| self.waiting[at].live.take()) else { return false };
            self.waiting_count -= 1;
            self.drop_empty_places();
            self.head_blocked_at = None;
        }
        self.stats.cancelled += 1;
        true
    }

    /// Begins a step, if there is anything to compute, and returns when it ends. Afterwards there may be
    /// [fetches](Self::take_fetches). If there is nothing, it may be otherwise after any of the other calls.
    ///
    /// # Panics
    /// If the last step has not ended.
    pub fn begin_step(&mut self, now: Duration) -> Option<Duration> {
        assert!(self.step_end.is_none(), "a step begins after the last one ended");
        let mut pass = Pass::default();
        let mut budget = self.profile.max_num_batched_tokens;
        let roomy = self.schedule_running(&mut pass, &mut budget);
        self.resume_arrived(now, &mut pass, &mut budget);
        // Where all were preempted for KV that is held or awaited, nobody would be there to make room.
        if roomy || self.running.is_empty() {
            self.admit_waiting(now, &mut pass, &mut budget);
        }
        if pass == Pass::default() {
            return None;
        }
        let end = now.saturating_add(self.profile.step_time(pass).mul_f64(self.slow));
        self.step_end = Some(end);
        Some(end)
    }

    /// Ends the step and appends the tokens that it generated, at most one for each sequence. Does nothing when there is no step.
    pub fn end_step(&mut self, events: &mut Vec<Event>) {
        let Some(end) = self.step_end.take() else { return };
        let Self { running, cache, stats, handoffs, .. } = self;
        stats.steps += 1;
        running.retain_mut(|live| {
            live.computed += std::mem::take(&mut live.scheduled);
            if live.computed < live.known() {
                return true;
            }
            let event = generate(live, end, stats);
            events.push(event);
            if event.finish.is_some() && live.sequence.hold {
                handoffs.hold(live);
            } else if event.finish.is_some() {
                live.give_up_blocks(cache);
            }
            event.finish.is_none()
        });
    }

    /// Drops the prefix cache. Refused, with `false`, while any block is in use.
    pub fn reset_prefix_cache(&mut self) -> bool {
        self.cache.clear()
    }

    /// Records changes of the prefix cache from now on, for [`take_cache_events`](Self::take_cache_events).
    pub fn record_cache_events(&mut self) {
        self.cache.record_events();
    }

    /// Changes of the prefix cache since the last call, in order. To be called about once a step: they pile up.
    #[must_use]
    pub fn take_cache_events(&mut self) -> Vec<CacheEvent> {
        self.cache.take_events()
    }

    /// Whether nothing runs or waits, not even for KV.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting() == 0
    }

    /// Sequences that wait: for room, for KV, or for a place among those that run.
    #[must_use]
    pub fn waiting(&self) -> u32 {
        (self.waiting_count + self.handoffs.waiting()) as u32
    }

    /// KV blocks that are free or hold only reusable cache.
    #[must_use]
    pub fn free_blocks(&self) -> u32 {
        self.cache.free() as u32
    }

    /// Sequences thrown out of the KV cache so far.
    #[must_use]
    pub fn preemptions(&self) -> u64 {
        self.stats.preemptions
    }

    /// Gauges and totals.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            running: self.running.len() as u32,
            waiting: self.waiting(),
            fetching: self.handoffs.fetching() as u32,
            held: self.handoffs.held() as u32,
            kv_blocks_held: self.held_blocks(),
            kv_blocks_used: self.cache.used() as u32,
            kv_blocks_total: self.cache.capacity() as u32,
            stats: self.stats.clone(),
        }
    }

    /// Gives every running sequence its tokens of this step. Returns whether nobody had to be preempted.
    fn schedule_running(&mut self, pass: &mut Pass, budget: &mut u32) -> bool {
        let mut roomy = true;
        let mut at = 0;
        while at < self.running.len() && *budget > 0 {
            let live = &self.running[at];
            let tokens = (live.known() - live.computed).min(*budget);
            let missing = self.profile.blocks_for(live.computed + tokens).saturating_sub(live.blocks.len());
            while missing > self.cache.free() {
                roomy = false;
                self.preempt_latest();
                if self.running.len() == at {
                    return false;
                }
            }
            let live = &mut self.running[at];
            live.blocks.extend((0..missing).map(|_| self.cache.allocate()));
            live.schedule(tokens, &mut self.cache, &self.profile);
            count(live, pass, budget);
            at += 1;
        }
        roomy
    }

    fn admit_waiting(&mut self, now: Duration, pass: &mut Pass, budget: &mut u32) {
        while *budget > 0 && self.running.len() < self.profile.max_num_seqs as usize {
            let free = self.cache.free();
            if self.head_blocked_at.is_some_and(|blocked_at| free <= blocked_at) {
                return;
            }
            let Some(live) = self.waiting.front_mut().and_then(|head| head.live.as_mut()) else { return };
            if !live.admit(&mut self.cache, &self.profile) {
                self.head_blocked_at = Some(free);
                return;
            }
            live.cached_tokens.get_or_insert(live.computed);
            let Some(admitted) = self.waiting.pop_front().and_then(|head| head.live) else { return };
            self.waiting_count -= 1;
            self.head_blocked_at = None;
            self.drop_empty_places();
            if admitted.awaits_kv {
                self.handoffs.fetch(admitted, now);
            } else {
                self.run(admitted, now, pass, budget);
            }
        }
    }

    /// Gives a sequence that has its blocks a place among those that run, and tokens of this step.
    fn run(&mut self, mut live: Live, now: Duration, pass: &mut Pass, budget: &mut u32) {
        if std::mem::take(&mut live.is_new) {
            self.stats.prompt_tokens += u64::from(live.known());
            self.stats.prefix_queries_tokens += u64::from(live.known());
            self.stats.prefix_hits_tokens += u64::from(live.cached_tokens.unwrap_or_default());
            self.stats.prompt_tokens_fetched += u64::from(live.fetched_tokens);
            self.stats.queue_time.observe(now.saturating_sub(live.submitted));
        }
        live.schedule((live.known() - live.computed).min(*budget), &mut self.cache, &self.profile);
        count(&live, pass, budget);
        self.running.push(live);
    }

    fn preempt_latest(&mut self) {
        let Some(mut live) = self.running.pop() else { return };
        live.give_up_blocks(&mut self.cache);
        let at = self.waiting.partition_point(|waiting| waiting.id < live.id);
        self.waiting.insert(at, Waiting { id: live.id, live: Some(live) });
        self.waiting_count += 1;
        self.head_blocked_at = None;
        self.stats.preemptions += 1;
    }

    /// Keeps both ends of the queue occupied.
    fn drop_empty_places(&mut self) {
        while self.waiting.front().is_some_and(|waiting| waiting.live.is_none()) {
            self.waiting.pop_front();
        }
        while self.waiting.back().is_some_and(|waiting| waiting.live.is_none()) {
            self.waiting.pop_back();
        }
    }
}

/// Takes what a sequence has scheduled from the step's budget.
fn count(live: &Live, pass: &mut Pass, budget: &mut u32) {
    *budget -= live.scheduled;
    if live.prefilling {
        pass.prefill_tokens += live.scheduled;
    } else {
        pass.decodes += 1;
        pass.context_tokens += u64::from(live.computed);
    }
}

/// The next token of a sequence whose known tokens are all computed.
fn generate(live: &mut Live, now: Duration, stats: &mut Stats) -> Event {
    let index = live.generated;
    live.generated += 1;
    live.prefilling = false;
    if index == 0 {
        stats.time_to_first_token.observe(now.saturating_sub(live.submitted));
    } else {
        stats.inter_token_latency.observe(now.saturating_sub(live.last_token));
    }
    live.last_token = now;
    stats.generation_tokens += 1;
    let finish = (live.generated == live.sequence.output_tokens).then_some(live.sequence.finish);
    if let Some(reason) = finish {
        stats.finished(reason);
        stats.e2e_latency.observe(now.saturating_sub(live.submitted));
    }
    Event {
        sequence: live.id,
        index,
        token: live.sequence.output_token(index),
        cached_tokens: live.cached_tokens.unwrap_or_default(),
        finish,
    }
}

#[cfg(test)]
mod tests;
