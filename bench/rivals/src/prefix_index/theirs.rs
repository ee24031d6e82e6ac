//! Dynamo 1.6.1's production index.

use dynamo_kv_router::{
    ConcurrentRadixTreeCompressed,
    indexer::{KvIndexerInterface, SyncIndexer, ThreadPoolIndexer},
    protocols::{
        ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheRemoveData, KvCacheStoreData, KvCacheStoredBlockData,
        LocalBlockHash, RouterEvent,
    },
};

use crate::{contender::Contender, stream::Event};

pub(crate) struct Theirs {
    index: ThreadPoolIndexer<ConcurrentRadixTreeCompressed>,
    runtime: tokio::runtime::Runtime,
    workers: usize,
}

impl Contender for Theirs {
    type Key = Vec<LocalBlockHash>;
    type Event = RouterEvent;

    fn new(workers: usize, threads: usize, block_size: u32) -> Self {
        Self {
            index: ThreadPoolIndexer::new(ConcurrentRadixTreeCompressed::new(), threads, block_size),
            runtime: tokio::runtime::Builder::new_current_thread().build().expect("a runtime without drivers"),
            workers,
        }
    }

    fn key(blocks: &[u64], _: u32) -> Self::Key {
        blocks.iter().map(|&content| LocalBlockHash(content)).collect()
    }

    fn event(worker: usize, event: &Event, _: u32) -> RouterEvent {
        let data = match event {
            Event::Stored { parent, blocks } => KvCacheEventData::Stored(KvCacheStoreData {
                parent_hash: parent.map(ExternalSequenceBlockHash),
                start_position: None,
                blocks: blocks
                    .iter()
                    .map(|&(engine, content)| KvCacheStoredBlockData {
                        block_hash: ExternalSequenceBlockHash(engine),
                        tokens_hash: LocalBlockHash(content),
                        mm_extra_info: None,
                    })
                    .collect(),
            }),
            Event::Removed(hashes) => KvCacheEventData::Removed(KvCacheRemoveData {
                block_hashes: hashes.iter().copied().map(ExternalSequenceBlockHash).collect(),
            }),
        };
        RouterEvent::new(worker as u64, KvCacheEvent { event_id: 0, data, dp_rank: 0 })
    }

    fn lookup(&self, key: &Self::Key) -> u64 {
        // The backend at once, without the boxed future of the interface around it: its best.
        let scores = SyncIndexer::find_matches(self.index.backend(), key, false);
        scores.scores.values().map(|&blocks| u64::from(blocks)).sum()
    }

    fn send(&self, _: usize, event: RouterEvent) {
        self.index.enqueue_event(event).expect("its threads run");
    }

    fn drain(&mut self) {
        self.runtime.block_on(self.index.flush_and_wait()).expect("its threads run");
    }

    fn remove_workers(&mut self) {
        for worker in 0..self.workers {
            self.runtime.block_on(self.index.remove_worker(worker as u64));
        }
        self.drain();
    }
}
