//! dynamo-host's index, fed with token ids or, as Dynamo's, with hashes of the blocks' tokens.

use std::{sync::Arc, thread::JoinHandle};

use dynamo_host_core::{EngineHash, KvEvent, StoredBlocks, Tier};
use dynamo_host_index::{HashedBlocks, PrefixIndexes, Prompt, Salt, WorkerKv};

use crate::{
    contender::Contender,
    stream::{Event, tokens},
};

const MODEL: &str = "bench";

pub(crate) struct Ours<const TOKENS: bool> {
    indexes: Arc<PrefixIndexes>,
    block_size: u64,
    workers: Vec<Arc<WorkerKv>>,
    lanes: Vec<flume::Sender<Task>>,
    threads: Vec<JoinHandle<()>>,
}

pub(crate) enum Fed {
    Tokens(KvEvent),
    Hashes(HashedBlocks<'static>),
}

enum Task {
    Apply(usize, Fed),
    Replace(usize, Arc<WorkerKv>),
    Flush(flume::Sender<()>),
}

impl<const TOKENS: bool> Ours<TOKENS> {
    fn join_all(indexes: &Arc<PrefixIndexes>, workers: usize) -> Vec<Arc<WorkerKv>> {
        (0..workers).map(|slot| Arc::new(indexes.join(MODEL, slot as u32))).collect()
    }
}

impl<const TOKENS: bool> Contender for Ours<TOKENS> {
    type Key = Prompt;
    type Event = Fed;

    fn new(workers: usize, threads: usize, block_size: u32) -> Self {
        let indexes = PrefixIndexes::new();
        let workers = Self::join_all(&indexes, workers);
        let (lanes, receivers): (Vec<_>, Vec<_>) = (0..threads).map(|_| flume::unbounded::<Task>()).unzip();
        let threads = receivers
            .into_iter()
            .map(|tasks| {
                let mut workers = workers.clone();
                std::thread::spawn(move || {
                    for task in tasks {
                        match task {
                            Task::Apply(worker, Fed::Tokens(event)) => workers[worker].apply(&event),
                            Task::Apply(worker, Fed::Hashes(stored)) => workers[worker].apply_hashed(&stored),
                            Task::Replace(worker, kv) => workers[worker] = kv,
                            Task::Flush(done) => done.send(()).expect("the main thread waits"),
                        }
                    }
                })
            })
            .collect();
        Self { indexes, block_size: block_size.into(), workers, lanes, threads }
    }

    fn key(blocks: &[u64], block_size: u32) -> Prompt {
        let salt = Salt::new(MODEL, None, None);
        let prompt = match TOKENS {
            true => Prompt::new(salt, tokens(blocks, block_size).into(), true),
            false => Prompt::of_blocks(salt, block_size, blocks),
        };
        // Theirs is asked with hashes, too.
        drop(prompt.hashes(block_size));
        prompt
    }

    fn event(_: usize, event: &Event, block_size: u32) -> Fed {
        let (parent, blocks) = match event {
            Event::Stored { parent, blocks } => (parent.map(EngineHash), blocks),
            Event::Removed(hashes) => {
                let hashes = hashes.iter().copied().map(EngineHash).collect();
                return Fed::Tokens(KvEvent::Removed { hashes, tier: Tier::Device });
            }
        };
        let hashes: Vec<EngineHash> = blocks.iter().map(|&(engine, _)| EngineHash(engine)).collect();
        let contents: Vec<u64> = blocks.iter().map(|&(_, content)| content).collect();
        match TOKENS {
            true => Fed::Tokens(KvEvent::Stored(StoredBlocks {
                parent,
                hashes,
                tokens: tokens(&contents, block_size),
                block_size,
                tier: Tier::Device,
                adapter: None,
                cache_salt: None,
            })),
            false => Fed::Hashes(HashedBlocks {
                parent,
                hashes: hashes.into(),
                blocks: contents.into(),
                block_size,
                tier: Tier::Device,
                salt: Salt::new(MODEL, None, None),
            }),
        }
    }

    fn lookup(&self, key: &Prompt) -> u64 {
        let overlap = self.indexes.overlap(MODEL, key);
        overlap.held().iter().map(|held| u64::from(held.total()) / self.block_size).sum()
    }

    fn send(&self, worker: usize, event: Fed) {
        self.lanes[worker % self.lanes.len()].send(Task::Apply(worker, event)).expect("its threads run");
    }

    fn drain(&mut self) {
        let (done, finished) = flume::unbounded();
        for lane in &self.lanes {
            lane.send(Task::Flush(done.clone())).expect("its threads run");
        }
        for _ in &self.lanes {
            finished.recv().expect("its threads run");
        }
    }

    fn remove_workers(&mut self) {
        let fresh = Self::join_all(&self.indexes, self.workers.len());
        for (worker, kv) in fresh.iter().enumerate() {
            for lane in &self.lanes {
                lane.send(Task::Replace(worker, Arc::clone(kv))).expect("its threads run");
            }
        }
        self.workers = fresh;
        self.drain();
    }
}

impl<const TOKENS: bool> Drop for Ours<TOKENS> {
    fn drop(&mut self) {
        self.lanes.clear();
        for thread in self.threads.drain(..) {
            thread.join().expect("a thread that applies events does not panic");
        }
    }
}
