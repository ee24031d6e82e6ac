use std::collections::{BTreeMap, HashMap, HashSet};

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
    let store = (chain.clone(), 0..6_usize, prop_oneof![3 => Just(2_u32), 1 => Just(4)], tier(), salt(), salt(), 0..8_u64, 0..10_u32)
        .prop_map(|(tokens, from, block_size, tier, adapter, cache_salt, odd, strange)| {
            let size = block_size as usize;
            let blocks = tokens.len() / size;
            let from = from.min(blocks.saturating_sub(1));
            // Names differ for a few, so that one block has two names.
            let name = |end: usize| hash_of(&tokens[..end * size], odd) ^ u64::from(strange == 0) << 50 ^ u64::from(block_size) << 55;
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
    let remove = (chain, tier(), 0..8_u64, 0..3_u8, any::<proptest::sample::Index>()).prop_map(|(tokens, tier, odd, how, index)| {
        let all: Vec<u64> =
            (1..=tokens.len() / 2).map(|nth| hash_of(&tokens[..nth * 2], odd) ^ 2 << 55).collect();
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
        .flat_map(|tokens| [None, Some("a")].map(|salt| Prompt::new(Salt::new(MODEL, None, salt), tokens.as_slice().into(), true)))
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
