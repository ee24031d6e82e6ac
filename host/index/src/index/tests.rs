use std::{
    collections::{BTreeMap, HashMap},
    sync::atomic::AtomicBool,
};

use dynamo_host_core::{EngineHash, KvEvent, StoredBlocks, Tier};
use proptest::prelude::*;

use super::*;
use crate::{Salt, SequenceHash, sequence_hashes};

const MODEL: &str = "m";

fn stored(parent: Option<u64>, hashes: &[u64], tokens: &[u32], tier: Tier) -> KvEvent {
    KvEvent::Stored(StoredBlocks {
        parent: parent.map(EngineHash),
        hashes: hashes.iter().copied().map(EngineHash).collect(),
        tokens: tokens.to_vec(),
        block_size: 2,
        tier,
        adapter: None,
        cache_salt: None,
    })
}

fn removed(hashes: &[u64], tier: Tier) -> KvEvent {
    KvEvent::Removed { hashes: hashes.iter().copied().map(EngineHash).collect(), tier }
}

fn prompt(tokens: &[u32]) -> Prompt {
    Prompt::new(Salt::new(MODEL, None, None), tokens.into(), true)
}

/// What a worker holds, said as plainly as it can be: every engine's hash with its content and tiers.
#[derive(Default)]
struct Naive {
    blocks: HashMap<(u32, u64), (SequenceHash, u8)>,
}

impl Naive {
    fn apply(&mut self, event: &KvEvent) {
        match event {
            KvEvent::Stored(StoredBlocks { parent, hashes, tokens, block_size, tier, adapter, cache_salt }) => {
                let parent = match parent {
                    None => Salt::new(MODEL, adapter.as_deref(), cache_salt.as_deref()).0,
                    Some(parent) => match self.blocks.get(&(*block_size, parent.0)) {
                        Some((ours, _)) => *ours,
                        None => return,
                    },
                };
                for (hash, ours) in hashes.iter().zip(sequence_hashes(parent, *block_size, tokens)) {
                    let block = self.blocks.entry((*block_size, hash.0)).or_insert((ours, 0));
                    if block.0 != ours {
                        *block = (ours, 0);
                    }
                    block.1 |= 1 << *tier as u8;
                }
            }
            KvEvent::Removed { hashes, tier } => {
                for (key, block) in &mut self.blocks {
                    if hashes.contains(&EngineHash(key.1)) {
                        block.1 &= !(1 << *tier as u8);
                    }
                }
                self.blocks.retain(|_, (_, tiers)| *tiers != 0);
            }
            KvEvent::Cleared => self.blocks.clear(),
        }
    }

    fn held(&self, prompt: &Prompt, block_size: u32) -> [u32; 4] {
        let mut tokens = [0; 4];
        for hash in prompt.hashes(block_size).iter() {
            let of_size = self.blocks.iter().filter(|((size, _), _)| *size == block_size);
            let tiers = of_size.filter(|(_, (ours, _))| ours == hash).fold(0, |all, (_, (_, tiers))| all | tiers);
            if tiers == 0 {
                break;
            }
            tokens[tiers.trailing_zeros() as usize] += block_size;
        }
        tokens
    }
}

#[derive(Clone, Debug)]
enum Step {
    Apply { worker: u32, event: KvEvent },
    Rejoin { worker: u32 },
}

fn tier() -> impl Strategy<Value = Tier> {
    prop_oneof![5 => Just(Tier::Device), 2 => Just(Tier::Host), 1 => Just(Tier::Disk)]
}

fn salt() -> impl Strategy<Value = Option<Arc<str>>> {
    prop_oneof![4 => Just(None), 1 => Just(Some(Arc::from("a")))]
}

/// Hashes of blocks of `chain` tokens as an engine makes them; a few numbers, so that they collide now and then, in one worker and
/// between workers.
fn hash_of(tokens: &[u32], odd: u64) -> u64 {
    let spread = tokens.iter().fold(7_u64, |sum, token| sum.wrapping_mul(31).wrapping_add(u64::from(*token) + 1));
    if odd == 0 { spread % 40 } else { spread }
}

fn events() -> impl Strategy<Value = KvEvent> {
    // Few tokens: chains meet, part and come again.
    let chain = proptest::collection::vec(0..2_u32, 2..40);
    let store =
        (chain.clone(), 0..6_usize, prop_oneof![3 => Just(2_u32), 1 => Just(4)], tier(), salt(), salt(), 0..8_u64, 0..10_u32)
            .prop_map(|(tokens, from, block_size, tier, adapter, cache_salt, odd, strange)| {
                let size = block_size as usize;
                let blocks = tokens.len() / size;
                let from = from.min(blocks.saturating_sub(1));
                // Names differ for a few, so that one block has two names.
                let name = |end: usize| {
                    hash_of(&tokens[..end * size], odd) ^ u64::from(strange == 0) << 50 ^ u64::from(block_size) << 55
                };
                KvEvent::Stored(StoredBlocks {
                    parent: (from > 0).then(|| EngineHash(name(from))),
                    hashes: (from..blocks).map(|nth| EngineHash(name(nth + 1))).collect(),
                    tokens: tokens[from * size..].to_vec(),
                    block_size,
                    tier,
                    adapter: if from == 0 { adapter } else { None },
                    cache_salt: if from == 0 { cache_salt } else { None },
                })
            });
    let remove =
        (chain, tier(), 0..8_u64, 0..3_u8, any::<proptest::sample::Index>()).prop_map(|(tokens, tier, odd, how, index)| {
            let all: Vec<u64> = (1..=tokens.len() / 2).map(|nth| hash_of(&tokens[..nth * 2], odd) ^ 2 << 55).collect();
            let at = index.index(all.len().max(1));
            let hashes = match how {
                0 => all.get(at).map(|hash| vec![*hash]).unwrap_or_default(),
                1 => all[at.min(all.len())..].iter().rev().copied().collect(),
                _ => all,
            };
            removed(&hashes, tier)
        });
    prop_oneof![60 => store, 40 => remove, 1 => Just(KvEvent::Cleared)]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let apply = (0..4_u32, events()).prop_map(|(worker, event)| Step::Apply { worker, event });
    proptest::collection::vec(prop_oneof![50 => apply, 1 => (0..4_u32).prop_map(|worker| Step::Rejoin { worker })], 1..80)
}

fn check_against_naive(steps: &[Step], prompts: &[Vec<u32>]) -> Result<(), TestCaseError> {
    let indexes = PrefixIndexes::new();
    let mut workers: Vec<WorkerKv> = (0..4).map(|slot| indexes.join(MODEL, slot)).collect();
    let mut naive: Vec<Naive> = (0..4).map(|_| Naive::default()).collect();
    let prompts: Vec<Prompt> = prompts
        .iter()
        .flat_map(|tokens| {
            [None, Some("a")].map(|salt| Prompt::new(Salt::new(MODEL, None, salt), tokens.as_slice().into(), true))
        })
        .collect();
    for step in steps {
        match step {
            Step::Apply { worker, event } => {
                workers[*worker as usize].apply(event);
                naive[*worker as usize].apply(event);
            }
            Step::Rejoin { worker } => {
                workers[*worker as usize] = indexes.join(MODEL, *worker);
                naive[*worker as usize] = Naive::default();
            }
        }
        for prompt in &prompts {
            let overlap = indexes.overlap(MODEL, prompt);
            for (slot, naive) in naive.iter().enumerate() {
                let sizes = [2, 4].map(|size| naive.held(prompt, size));
                let best = sizes.into_iter().max_by_key(|tokens| tokens.iter().sum::<u32>()).unwrap_or_default();
                let held = overlap.of(slot as u32).map_or(0, Held::total);
                prop_assert_eq!(held, best.iter().sum::<u32>(), "slot {} of {:?}", slot, prompt.tokens());
                let tokens = overlap.of(slot as u32).map_or([0; 4], |held| held.tokens);
                prop_assert!(sizes.contains(&tokens), "{:?} is none of {:?}", tokens, sizes);
            }
        }
        let blocks: usize = naive.iter().map(|naive| naive.blocks.len()).sum();
        prop_assert_eq!(indexes.stats().blocks, blocks as u64);
    }
    drop(workers);
    let stats = indexes.stats();
    prop_assert_eq!((stats.blocks, stats.workers, stats.bytes), (0, 0, 0));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn overlaps_are_those_of_a_naive_model(
        steps in steps(),
        prompts in proptest::collection::vec(proptest::collection::vec(0..2_u32, 2..40), 1..8),
    ) {
        check_against_naive(&steps, &prompts)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn workers_that_apply_at_the_same_time_end_up_exact(
        streams in proptest::collection::vec(proptest::collection::vec(events(), 1..150), 4),
        prompts in proptest::collection::vec(proptest::collection::vec(0..2_u32, 2..40), 1..20),
    ) {
        let indexes = PrefixIndexes::new();
        let workers: Vec<(WorkerKv, Naive)> = std::thread::scope(|scope| {
            let apply = |(slot, stream): (u32, &Vec<KvEvent>)| {
                let (worker, mut naive) = (indexes.join(MODEL, slot), Naive::default());
                for event in stream {
                    worker.apply(event);
                    naive.apply(event);
                }
                (worker, naive)
            };
            let threads: Vec<_> = (0..).zip(&streams).map(|each| scope.spawn(move || apply(each))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for tokens in &prompts {
            let prompt = prompt(tokens);
            let overlap = indexes.overlap(MODEL, &prompt);
            for (slot, (_, naive)) in (0..).zip(&workers) {
                let best = [2, 4].map(|size| naive.held(&prompt, size).iter().sum::<u32>()).into_iter().max();
                prop_assert_eq!(Some(overlap.of(slot).map_or(0, Held::total)), best);
            }
        }
        drop(workers);
        prop_assert_eq!((indexes.stats().blocks, indexes.stats().bytes), (0, 0));
    }
}

#[test]
fn a_prompt_of_hashed_blocks_is_the_prompt_of_their_tokens() {
    let tokens: Vec<u32> = (0..100).collect();
    let salt = Salt::new(MODEL, None, None);
    let hashed = Prompt::of_blocks(salt, 16, &crate::block_hashes(16, &tokens));
    assert_eq!(hashed.hashes(16), prompt(&tokens).hashes(16));
    assert_eq!((hashed.hashes(16).len(), hashed.hashes(32).len()), (6, 0));
    assert_eq!(sequence_hashes(salt.0, 0, &tokens), [] as [u64; 0]);
}

#[test]
fn a_worker_holds_what_its_events_say_until_they_say_otherwise() {
    let indexes = PrefixIndexes::new();
    let prompt = prompt(&[1, 2, 3, 4, 5, 6, 7]);
    let held = |slot| indexes.overlap(MODEL, &prompt).of(slot).map(|held| held.tokens);
    let a = indexes.join(MODEL, 3);
    a.apply(&stored(None, &[10], &[1, 2], Tier::Device));
    a.apply(&stored(Some(10), &[11], &[3, 4], Tier::Host));
    a.apply(&stored(Some(99), &[12], &[5, 6], Tier::Device));
    assert_eq!(held(3), Some([2, 2, 0, 0]));
    // A device block after a host block counts as what it is.
    a.apply(&stored(Some(11), &[12], &[5, 6], Tier::Device));
    assert_eq!(held(3), Some([4, 2, 0, 0]));
    let b = indexes.join(MODEL, 4);
    b.apply(&stored(None, &[7], &[1, 2], Tier::Device));
    assert_eq!(held(4), Some([2, 0, 0, 0]));
    // The middle goes: what is behind it is no prefix until it is back.
    a.apply(&removed(&[11], Tier::Host));
    assert_eq!(held(3), Some([2, 0, 0, 0]));
    a.apply(&stored(Some(10), &[11], &[3, 4], Tier::Device));
    assert_eq!(held(3), Some([6, 0, 0, 0]));
    a.apply(&removed(&[10], Tier::Device));
    assert_eq!((held(3), held(4)), (None, Some([2, 0, 0, 0])));
    let expected =
        IndexStats { blocks: 3, workers: 2, bytes: indexes.stats().bytes, unknown_parents: 1, ..IndexStats::default() };
    assert_eq!(indexes.stats(), expected);
    drop((a, b));
    assert_eq!(indexes.stats(), IndexStats { unknown_parents: 1, ..IndexStats::default() });
}

#[test]
fn a_hash_that_an_engine_gives_to_other_tokens_means_those_from_then_on() {
    let indexes = PrefixIndexes::new();
    let worker = indexes.join(MODEL, 0);
    let held = |tokens: &[u32]| indexes.overlap(MODEL, &prompt(tokens)).of(0).map_or(0, Held::total);
    worker.apply(&stored(None, &[1, 2], &[1, 1, 2, 2], Tier::Device));
    worker.apply(&stored(None, &[1], &[7, 7], Tier::Device));
    assert_eq!((held(&[1, 1, 2, 2]), held(&[7, 7]), indexes.stats().hash_collisions), (0, 2, 1));
    worker.apply(&removed(&[1], Tier::Device));
    assert_eq!((held(&[7, 7]), indexes.stats().blocks), (0, 1));
}

#[test]
fn other_models_salts_and_adapters_share_nothing() {
    let indexes = PrefixIndexes::new();
    let worker = indexes.join(MODEL, 0);
    let mut event = stored(None, &[1], &[1, 1], Tier::Device);
    if let KvEvent::Stored(stored) = &mut event {
        stored.adapter = Some("lora".into());
        stored.cache_salt = Some("tenant".into());
    }
    worker.apply(&event);
    let held = |model: &str, salt| indexes.overlap(model, &Prompt::new(salt, [1, 1].into(), true)).of(0).map_or(0, Held::total);
    assert_eq!(held(MODEL, Salt::new(MODEL, Some("lora"), Some("tenant"))), 2);
    assert_eq!(held(MODEL, Salt::new(MODEL, Some("tenant"), Some("lora"))), 0);
    assert_eq!(held(MODEL, Salt::new(MODEL, Some("lora"), None)), 0);
    assert_eq!(held(MODEL, Salt::new(MODEL, None, None)), 0);
    assert_eq!(held("other", Salt::new(MODEL, Some("lora"), Some("tenant"))), 0);
}

#[test]
fn when_it_is_full_blocks_are_refused_and_counted_and_room_comes_back() {
    let indexes = PrefixIndexes::with_limits(IndexLimits { max_blocks: 3 });
    let (a, b) = (indexes.join(MODEL, 0), indexes.join(MODEL, 1));
    let held = |slot, tokens: &[u32]| indexes.overlap(MODEL, &prompt(tokens)).of(slot).map_or(0, Held::total);
    a.apply(&stored(None, &[1, 2], &[1, 1, 2, 2], Tier::Device));
    b.apply(&stored(None, &[1, 2, 3], &[1, 1, 2, 2, 3, 3], Tier::Device));
    assert_eq!((held(0, &[1, 1, 2, 2, 3, 3]), held(1, &[1, 1, 2, 2, 3, 3])), (4, 2));
    assert_eq!((indexes.stats().blocks, indexes.stats().refused), (3, 2));
    b.expect(&prompt(&[5, 5]), 2, None);
    assert_eq!((held(1, &[5, 5]), indexes.stats().blocks, indexes.stats().refused), (0, 3, 3));
    a.apply(&removed(&[2], Tier::Device));
    b.apply(&stored(Some(1), &[2], &[2, 2], Tier::Device));
    assert_eq!((held(1, &[1, 1, 2, 2]), indexes.stats().refused), (4, 3));
}

#[test]
fn when_it_is_full_what_was_expected_before_makes_room_and_what_is_known_stays() {
    let indexes = PrefixIndexes::with_limits(IndexLimits { max_blocks: 4 });
    let worker = indexes.join(MODEL, 0);
    let held = |tokens: &[u32]| indexes.overlap(MODEL, &prompt(tokens)).of(0).map_or(0, Held::total);
    for tokens in [&[1, 1, 2, 2][..], &[5, 5], &[6, 6], &[1, 1, 2, 2], &[1, 1, 2, 2, 3, 3]] {
        worker.expect(&prompt(tokens), 2, None);
    }
    assert_eq!((held(&[1, 1, 2, 2, 3, 3]), held(&[5, 5]), held(&[6, 6])), (6, 0, 2));
    assert_eq!((indexes.stats().blocks, indexes.stats().refused, worker.blocks()), (4, 0, 4));
    // More than there ever is room for.
    worker.expect(&prompt(&[1, 1, 7, 7, 8, 8, 9, 9, 10, 10]), 2, None);
    assert_eq!((held(&[1, 1, 7, 7, 8, 8, 9, 9, 10, 10]), indexes.stats().blocks, indexes.stats().refused), (8, 4, 1));
}

#[test]
fn a_worker_has_parts_of_few_block_sizes_and_none_for_what_builds_upon_nothing() {
    let indexes = PrefixIndexes::new();
    let worker = indexes.join(MODEL, 0);
    let of_size = |parent, block_size: u32| {
        let mut event = stored(parent, &[1], &vec![1; block_size as usize], Tier::Device);
        if let KvEvent::Stored(stored) = &mut event {
            stored.block_size = block_size;
        }
        event
    };
    for block_size in 1..=100 {
        worker.apply(&of_size(Some(9), block_size));
    }
    assert_eq!((indexes.indexes.load().len(), indexes.stats().unknown_parents), (0, 100));
    for block_size in 1..=100 {
        worker.apply(&of_size(None, block_size));
        worker.expect(&prompt(&[2; 100]), block_size, None);
    }
    assert_eq!((indexes.indexes.load().len(), indexes.stats().refused), (4, 96));
}

#[test]
fn events_that_make_no_sense_change_nothing() {
    let indexes = PrefixIndexes::new();
    let worker = indexes.join(MODEL, 0);
    let mut nothing = stored(None, &[1], &[1, 1], Tier::Device);
    if let KvEvent::Stored(stored) = &mut nothing {
        stored.block_size = 0;
    }
    worker.apply(&nothing);
    worker.apply(&stored(None, &[1, 2], &[1], Tier::Device));
    worker.apply(&stored(None, &[], &[1, 1, 2, 2], Tier::Device));
    worker.apply(&removed(&[1, 2], Tier::Disk));
    worker.expect(&prompt(&[1, 1]), 0, None);
    assert_eq!(indexes.stats().blocks, 0);
    // More hashes than tokens: as many as have tokens.
    worker.apply(&stored(None, &[1, 2, 3], &[1, 1, 2, 2, 3], Tier::Device));
    assert_eq!((indexes.stats().blocks, indexes.overlap(MODEL, &prompt(&[1, 1, 2, 2, 3, 3])).held()[0].total()), (2, 4));
}

/// Least recently used blocks of whole chains, leaf first, said plainly.
#[derive(Default)]
struct NaiveExpected {
    /// When each was used last, and how deep it lies.
    used: BTreeMap<SequenceHash, (u64, std::cmp::Reverse<usize>)>,
    time: u64,
}

impl NaiveExpected {
    fn touch(&mut self, chain: &[SequenceHash], capacity: usize) {
        self.time += 1;
        for (depth, hash) in chain.iter().take(capacity).enumerate() {
            self.used.insert(*hash, (self.time, std::cmp::Reverse(depth)));
        }
        while self.used.len() > capacity {
            let oldest = self.used.iter().min_by_key(|(_, used)| **used).map(|(hash, _)| *hash);
            self.used.remove(&oldest.expect("more than none"));
        }
    }
}

proptest! {
    #[test]
    fn what_is_expected_is_the_least_recently_used_cache_of_what_was_sent(
        prompts in proptest::collection::vec(proptest::collection::vec(0..2_u32, 0..60), 1..40),
        capacity in 0..60_usize,
        others in proptest::collection::vec(proptest::collection::vec(0..2_u32, 0..60), 0..10),
    ) {
        let indexes = PrefixIndexes::new();
        let (worker, other) = (indexes.join(MODEL, 0), indexes.join(MODEL, 1));
        let mut naive = NaiveExpected::default();
        for (nth, tokens) in prompts.iter().enumerate() {
            if let Some(tokens) = others.get(nth) {
                other.expect(&prompt(tokens), 1, Some(20));
            }
            let sent = prompt(tokens);
            worker.expect(&sent, 1, Some(capacity as u32));
            naive.touch(&sent.hashes(1), capacity);
            for tokens in &prompts {
                let prompt = prompt(tokens);
                let held = prompt.hashes(1).iter().take_while(|hash| naive.used.contains_key(hash)).count();
                prop_assert_eq!(indexes.overlap(MODEL, &prompt).of(0).map_or(0, Held::total) as usize, held);
            }
        }
        other.clear();
        prop_assert_eq!(indexes.stats().blocks, naive.used.len() as u64);
        drop((worker, other));
        prop_assert_eq!((indexes.stats().blocks, indexes.stats().bytes), (0, 0));
    }
}

/// Token ids of a prompt: a beginning that all have, and a part of its own.
fn conversation(shared: u32, own: u32, blocks: u32) -> Vec<u32> {
    (0..blocks * 2).map(|nth| if nth < shared * 2 { nth } else { own * 100_000 + nth }).collect()
}

#[test]
fn a_block_costs_what_is_stated_and_churn_leaves_nothing() {
    let indexes = PrefixIndexes::new();
    let mut most = 0;
    for round in 0..20 {
        let workers: Vec<WorkerKv> = (0..8).map(|slot| indexes.join(MODEL, slot)).collect();
        for (nth, worker) in workers.iter().enumerate() {
            for chat in 0..50 {
                let tokens = conversation(8, round * 1_000 + nth as u32 * 50 + chat, 40);
                let hashes: Vec<u64> = sequence_hashes(1, 2, &tokens);
                worker.apply(&stored(None, &hashes, &tokens, Tier::Device));
            }
        }
        let IndexStats { blocks, bytes, .. } = indexes.stats();
        assert_eq!(blocks, 8 * (8 + 50 * 32));
        assert!(bytes <= blocks * BYTES_PER_BLOCK, "{} bytes a block", bytes / blocks);
        // Numbers of runs are used again: memory does not grow from round to round.
        most = if round == 0 { bytes } else { most };
        assert!(bytes <= most + most / 50, "{bytes} bytes in round {round}, {most} in the first");
        drop(workers);
        assert_eq!(indexes.stats(), IndexStats::default());
    }
}

#[test]
fn lookups_beside_a_stream_of_events_find_nothing_that_was_never_there() {
    let indexes = PrefixIndexes::new();
    let is_done = AtomicBool::new(false);
    // Slot 0 never holds more than the shared beginning, slot 1 always all of the first.
    let steady = [indexes.join(MODEL, 0), indexes.join(MODEL, 1)];
    let whole = conversation(8, 7, 64);
    let hashes = sequence_hashes(1, 2, &whole);
    steady[0].apply(&stored(None, &hashes[..8], &whole[..16], Tier::Device));
    steady[1].apply(&stored(None, &hashes, &whole, Tier::Device));
    std::thread::scope(|scope| {
        for slot in 2..4 {
            let (indexes, is_done) = (&indexes, &is_done);
            scope.spawn(move || {
                for round in 0..300_u32 {
                    let worker = indexes.join(MODEL, slot);
                    for chat in [7, round, round * 2 + 1] {
                        let tokens = conversation(8, chat, 64);
                        let hashes = sequence_hashes(1, 2, &tokens);
                        worker.apply(&stored(None, &hashes, &tokens, Tier::Device));
                        let leaves: Vec<u64> = hashes[20..].iter().rev().copied().collect();
                        worker.apply(&removed(&leaves, Tier::Device));
                    }
                }
                is_done.store(true, Ordering::Relaxed);
            });
        }
        let prompt = prompt(&whole);
        while !is_done.load(Ordering::Relaxed) {
            let overlap = indexes.overlap(MODEL, &prompt);
            assert_eq!((overlap.of(0).map(Held::total), overlap.of(1).map(Held::total)), (Some(16), Some(128)));
            for held in overlap.held() {
                assert!(held.slot < 2 || held.total() <= 128, "{held:?}");
            }
        }
    });
    drop(steady);
    assert_eq!(indexes.stats(), IndexStats::default());
}
