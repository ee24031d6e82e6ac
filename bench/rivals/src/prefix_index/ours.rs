//! dynamo-host's index.

use std::{sync::Arc, thread::JoinHandle};

use dynamo_host_core::{EngineHash, KvEvent, StoredBlocks, Tier};
use dynamo_host_index::{PrefixIndexes, Prompt, Salt, WorkerKv};

use crate::{
    contender::Contender,
    stream::{Event, tokens},
};

const MODEL: &str = "bench";

pub(crate) struct Ours {
    indexes: Arc<PrefixIndexes>,
    block_size: u64,
    workers: Vec<Arc<WorkerKv>>,
    lanes: Vec<flume::Sender<Task>>,
    threads: Vec<JoinHandle<()>>,
}

enum Task {
    Apply(usize, KvEvent),
    Replace(usize, Arc<WorkerKv>),
    Flush(flume::Sender<()>),
}

impl Ours {
    fn join_all(indexes: &Arc<PrefixIndexes>, workers: usize) -> Vec<Arc<WorkerKv>> {
        (0..workers).map(|slot| Arc::new(indexes.join(MODEL, slot as u32))).collect()
    }
}

impl Contender for Ours {
    type Key = Prompt;
    type Event = KvEvent;

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
                            Task::Apply(worker, event) => workers[worker].apply(&event),
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
        let prompt = Prompt::new(Salt::new(MODEL, None, None), tokens(blocks, block_size).into(), true);
        // Theirs is asked with hashes, too.
        prompt.hashes(block_size);
        prompt
    }

    fn event(_: usize, event: &Event, block_size: u32) -> KvEvent {
        match event {
            Event::Stored { parent, blocks } => {
                let contents: Vec<u64> = blocks.iter().map(|&(_, content)| content).collect();
                KvEvent::Stored(StoredBlocks {
                    parent: parent.map(EngineHash),
                    hashes: blocks.iter().map(|&(engine, _)| EngineHash(engine)).collect(),
                    tokens: tokens(&contents, block_size),
                    block_size,
                    tier: Tier::Device,
                    adapter: None,
                    cache_salt: None,
                })
            }
            Event::Removed(hashes) => {
                KvEvent::Removed { hashes: hashes.iter().copied().map(EngineHash).collect(), tier: Tier::Device }
            }
        }
    }

    fn lookup(&self, key: &Prompt) -> u64 {
        let overlap = self.indexes.overlap(MODEL, key);
        overlap.held().iter().map(|held| u64::from(held.total()) / self.block_size).sum()
    }

    fn send(&self, worker: usize, event: KvEvent) {
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

impl Drop for Ours {
    fn drop(&mut self) {
        self.lanes.clear();
        for thread in self.threads.drain(..) {
            thread.join().expect("a thread that applies events does not panic");
        }
    }
}
