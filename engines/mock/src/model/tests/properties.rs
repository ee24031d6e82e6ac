//! What holds under any schedule: random submissions, cancellations and steps, with a KV cache far too small.

use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Act {
    Submit {
        kind: u32,
        prompt_tokens: u32,
        output_tokens: u32,
        hold: bool,
        remote: bool,
    },
    /// The sequence with this number, modulo how many there are; in the middle of a step, if one runs.
    Cancel(usize),
    /// What is fetched: it is there, or is not to be had.
    Fetched {
        at: usize,
        failed: bool,
    },
    /// What a finished one holds is not needed any more.
    Release(usize),
    Begin,
    End,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => (0..3_u32, 1..25_u32, 1..15_u32, any::<bool>(), any::<bool>()).prop_map(
            |(kind, prompt_tokens, output_tokens, hold, remote)| Act::Submit { kind, prompt_tokens, output_tokens, hold, remote }
        ),
        1 => any::<usize>().prop_map(Act::Cancel),
        2 => (any::<usize>(), prop::bool::weighted(0.2)).prop_map(|(at, failed)| Act::Fetched { at, failed }),
        1 => any::<usize>().prop_map(Act::Release),
        4 => Just(Act::Begin),
        4 => Just(Act::End),
    ]
}

fn tiny() -> impl Strategy<Value = Profile> {
    (1..5_u32, 0..6_u32, 1..6_u32, 0..20_u32).prop_map(|(block_size, more_blocks, max_num_seqs, more_tokens)| Profile {
        block_size,
        kv_blocks: 40_u32.div_ceil(block_size) + more_blocks,
        max_num_seqs,
        max_num_batched_tokens: max_num_seqs + more_tokens,
        max_model_len: 40,
        ..profile()
    })
}

/// A schedule carried out, with what came of it.
struct Trial {
    model: EngineModel,
    now: Duration,
    step_end: Option<Duration>,
    /// Output tokens asked for, by sequence.
    submitted: BTreeMap<SequenceId, u32>,
    cancelled: Vec<SequenceId>,
    fetching: Vec<Fetch>,
    /// Tokens whose KV came from elsewhere.
    fetched_tokens: u64,
    events: Vec<Event>,
    cached: CachedBlocks,
}

impl Trial {
    fn new(profile: Profile) -> Self {
        let mut model = EngineModel::new(profile).unwrap();
        model.record_cache_events();
        Self {
            model,
            now: Duration::ZERO,
            step_end: None,
            submitted: BTreeMap::new(),
            cancelled: Vec::new(),
            fetching: Vec::new(),
            fetched_tokens: 0,
            events: Vec::new(),
            cached: CachedBlocks::default(),
        }
    }

    fn carry_out(&mut self, act: &Act) {
        match *act {
            Act::Submit { kind, prompt_tokens, output_tokens, hold, remote } => {
                let sequence = Sequence { hold, remote, ..sequence(kind, prompt_tokens, output_tokens) };
                let id = self.model.submit(self.now, sequence).unwrap();
                self.submitted.insert(id, output_tokens);
            }
            Act::Cancel(at) if !self.submitted.is_empty() => {
                let id = *self.submitted.keys().nth(at % self.submitted.len()).unwrap();
                if self.model.cancel(id) {
                    self.cancelled.push(id);
                    self.fetching.retain(|fetch| fetch.sequence != id);
                }
            }
            Act::Fetched { at, failed } if !self.fetching.is_empty() => {
                let Fetch { sequence, tokens } = self.fetching.remove(at % self.fetching.len());
                assert!(if failed { self.model.fetch_failed(sequence) } else { self.model.fetched(sequence, self.now) });
                assert!(!self.model.fetched(sequence, self.now) && !self.model.fetch_failed(sequence), "a fetch ends once");
                self.fetched_tokens += if failed { 0 } else { u64::from(tokens) };
            }
            Act::Release(at) => {
                let held: Vec<_> = self.submitted.keys().copied().filter(|&id| self.model.held(id).is_some()).collect();
                if let Some(&id) = held.get(at % held.len().max(1)) {
                    assert!(self.model.release(id) && !self.model.release(id));
                }
            }
            Act::Begin if self.step_end.is_none() => {
                self.step_end = self.model.begin_step(self.now);
                self.model.take_fetches(&mut self.fetching);
                assert!(self.fetching.iter().all(|fetch| fetch.tokens > 0));
            }
            Act::End => {
                self.now = self.step_end.take().unwrap_or(self.now);
                self.model.end_step(&mut self.events);
            }
            Act::Cancel(_) | Act::Fetched { .. } | Act::Begin => {}
        }
        self.check();
    }

    fn finish(&mut self) {
        // Each step computes at least a token of the oldest; preemptions only take from the others.
        for _ in 0..100_000 {
            self.carry_out(&Act::End);
            self.carry_out(&Act::Begin);
            if self.step_end.is_none() && self.fetching.is_empty() && self.model.snapshot().held == 0 {
                return;
            }
            // Only where nothing else goes on: with as little room as there can be.
            if self.step_end.is_none() && self.fetching.is_empty() {
                self.carry_out(&Act::Release(0));
            } else if self.step_end.is_none() {
                self.carry_out(&Act::Fetched { at: 0, failed: false });
            }
        }
        panic!("no end: {:?}", self.model.snapshot());
    }

    fn check(&mut self) {
        let EngineModel { running, waiting, waiting_count, cache, profile, handoffs, .. } = &self.model;
        assert!(waiting.iter().is_sorted_by_key(|waiting| waiting.id), "ids ascend through the waiting");
        let unfinished = running.iter().rposition(|live| live.computed + live.scheduled < live.known());
        assert!(unfinished.is_none_or(|at| at + 1 == running.len()) || self.step_end.is_none(), "one prompt after the other");
        assert_eq!(waiting.iter().filter(|waiting| waiting.live.is_some()).count(), *waiting_count);
        let uses = running.iter().map(|live| live.blocks.len()).sum::<usize>() + handoffs.uses();
        assert_eq!(uses, cache.users(), "every use is counted");
        assert_eq!(handoffs.fetching(), self.fetching.len(), "every fetch is told of");
        assert!(self.model.held_blocks() as usize <= cache.used());
        assert!(waiting.iter().flat_map(|waiting| &waiting.live).all(|live| live.blocks.is_empty()));
        assert!(running.len() <= profile.max_num_seqs as usize);
        let scheduled: u32 = running.iter().map(|live| live.scheduled).sum();
        assert!(scheduled <= profile.max_num_batched_tokens);
        if self.step_end.is_some() {
            let caught_up = running.iter().filter(|live| !live.prefilling);
            assert!(caught_up.clone().all(|live| live.scheduled == 1), "a step takes every decode");
        }
        for event in self.model.take_cache_events() {
            self.cached.apply(event, self.model.profile.block_size);
        }
    }
}

/// What a router would believe to be cached.
#[derive(Default)]
struct CachedBlocks {
    parents: HashMap<BlockHash, Option<BlockHash>>,
}

impl CachedBlocks {
    fn apply(&mut self, event: CacheEvent, block_size: u32) {
        match event {
            CacheEvent::Stored { mut parent, hashes, tokens } => {
                assert_eq!(tokens.len(), hashes.len() * block_size as usize);
                for (hash, block) in hashes.into_iter().zip(tokens.chunks(block_size as usize)) {
                    assert_eq!(hash, block_hash(parent.unwrap_or(0), block));
                    assert!(parent.is_none_or(|parent| self.parents.contains_key(&parent)), "no block without its prefix");
                    assert_eq!(self.parents.insert(hash, parent), None, "a block is stored once");
                    parent = Some(hash);
                }
            }
            CacheEvent::Removed { hash } => {
                assert!(self.parents.remove(&hash).is_some(), "what is removed was stored");
                assert!(!self.parents.values().any(|&parent| parent == Some(hash)), "leaves are evicted before their parents");
            }
            CacheEvent::Cleared => self.parents.clear(),
        }
    }
}

fn trial(profile: &Profile, acts: &[Act]) -> Trial {
    let mut trial = Trial::new(profile.clone());
    acts.iter().for_each(|act| trial.carry_out(act));
    trial.finish();
    trial
}

proptest! {
    #[test]
    fn every_sequence_ends_once_with_all_its_tokens_in_order(profile in tiny(), acts in prop::collection::vec(act(), 0..200)) {
        let trial = trial(&profile, &acts);
        for (&id, &output_tokens) in &trial.submitted {
            let events: Vec<_> = trial.events.iter().filter(|event| event.sequence == id).collect();
            let cancelled = trial.cancelled.iter().filter(|&&cancelled| cancelled == id).count();
            let finished = events.iter().filter(|event| event.finish.is_some()).count();
            prop_assert_eq!(finished + cancelled, 1);
            prop_assert!(events.iter().zip(0..).all(|(event, index)| event.index == index && event.token == 1_000_000 + index));
            if cancelled == 0 {
                prop_assert_eq!(events.len(), output_tokens as usize);
            }
        }
        let Snapshot { running, waiting, kv_blocks_used, stats, .. } = trial.model.snapshot();
        prop_assert_eq!((running, waiting, kv_blocks_used), (0, 0, 0));
        prop_assert!(stats.prompt_tokens_fetched <= trial.fetched_tokens, "less only by what was cancelled before it ran");
        prop_assert!(stats.prompt_tokens >= stats.prefix_hits_tokens + stats.prompt_tokens_fetched);
        prop_assert_eq!(stats.generation_tokens, trial.events.len() as u64);
        prop_assert_eq!(stats.finished_length + stats.cancelled, trial.submitted.len() as u64);
        prop_assert_eq!(trial.cached.parents.len(), trial.model.cache.cached(), "the events tell all");
    }

    #[test]
    fn the_same_schedule_gives_the_same_run(profile in tiny(), acts in prop::collection::vec(act(), 0..100)) {
        let (one, other) = (trial(&profile, &acts), trial(&profile, &acts));
        prop_assert_eq!(one.events, other.events);
        prop_assert_eq!(one.now, other.now);
    }
}
