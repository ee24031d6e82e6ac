//! A worker of the simulated fleet: a modelled engine, its place on the load board, and its part in the prefix index.

use std::{sync::Arc, time::Duration};

use dynamo_engine_mock::{
    Profile, ProfileError,
    model::{CacheEvent, EngineModel},
};
use dynamo_host_core::{
    EngineHash, KvEvent, Load, LoadBoard, LoadReport, Role, StoredBlocks, Tier, Worker, WorkerSpec, WorkerState,
    load::{LoadSlot, Recent, Throughput},
};
use dynamo_host_index::{PrefixIndexes, WorkerKv};

/// The model that all simulated workers serve.
pub(crate) const MODEL: &str = "simulated";

/// The engine that is simulated if nothing else is said: prefill takes what it takes in Dynamo's `mocker`, and decode what
/// makes round-robin come to the figures of Dynamo's own replay (`docs/simulator.md`).
#[must_use]
pub fn default_profile() -> Profile {
    Profile {
        block_size: 64,
        kv_blocks: 16_384,
        max_num_seqs: 256,
        max_num_batched_tokens: 8192,
        max_model_len: 131_072,
        decode_ms_base: 6.0,
        decode_ms_per_sequence: 0.0,
        decode_ms_per_context_token: 4.5e-5,
        ..Profile::default()
    }
}

/// One worker.
pub(crate) struct Engine {
    pub(crate) model: EngineModel,
    pub(crate) load: Arc<LoadSlot>,
    pub(crate) kv: WorkerKv,
    /// Begun and not ended: a step that has its end in the queue.
    pub(crate) is_stepping: bool,
    /// Whether it is among those that are to begin a step at the present moment.
    pub(crate) is_ready: bool,
    /// Time spent in steps.
    pub(crate) busy: Duration,
    pub(crate) step_begun: Duration,
    throughput: Throughput,
}

impl Engine {
    pub(crate) fn new(profile: &Profile, board: &Arc<LoadBoard>, indexes: &Arc<PrefixIndexes>) -> Result<Self, ProfileError> {
        let mut model = EngineModel::new(profile.clone())?;
        model.record_cache_events();
        let load = board.claim().expect("the board has a slot for each worker");
        let kv = indexes.join(MODEL, load.index());
        let throughput = Throughput::new(0, 0);
        let (busy, step_begun) = (Duration::ZERO, Duration::ZERO);
        Ok(Self { model, load, kv, is_stepping: false, is_ready: false, busy, step_begun, throughput })
    }

    /// The row of the fleet that it is.
    pub(crate) fn worker(&self, number: usize) -> Worker {
        let profile = self.model.profile();
        let spec = WorkerSpec {
            name: format!("engine-{number}"),
            model: MODEL.to_owned(),
            role: Role::Aggregated,
            rank: 0,
            block_size: Some(profile.block_size),
            labels: profile.labels(),
        };
        Worker {
            id: spec.id("simulated"),
            spec: Arc::new(spec),
            state: WorkerState::Healthy,
            adapters: Arc::default(),
            joined_ms: 0,
            load: Arc::clone(&self.load),
        }
    }

    /// Has the load board know what the engine says of itself, and what output came of it since the last time.
    pub(crate) fn report_load(&mut self, now_ms: u64) {
        let is_busy = self.load.get(Load::ActiveRequests) > 0;
        if let Some(speed) = self.throughput.sample(self.load.output_tokens(), is_busy, now_ms) {
            self.load.observe(Recent::TokensPerSecond, speed);
            self.load.observed(now_ms);
        }
        let profile = self.model.profile();
        let (waiting, free_blocks) = (self.model.waiting(), self.model.free_blocks());
        let tokens = |blocks: u32| Some(blocks.saturating_mul(profile.block_size));
        let report = LoadReport {
            running_requests: None,
            queued_requests: Some(waiting),
            max_running_requests: Some(profile.max_num_seqs),
            max_batched_tokens: Some(profile.max_num_batched_tokens),
            kv_tokens_total: tokens(profile.kv_blocks),
            kv_tokens_free: tokens(free_blocks),
            block_size: Some(profile.block_size),
        };
        self.load.report(&report, now_ms);
    }

    /// What changed in its cache since the last call, as it publishes it.
    pub(crate) fn take_kv_events(&mut self) -> Vec<KvEvent> {
        let block_size = self.model.profile().block_size;
        self.model.take_cache_events().into_iter().map(|event| published(event, block_size)).collect()
    }
}

fn published(event: CacheEvent, block_size: u32) -> KvEvent {
    match event {
        CacheEvent::Stored { parent, hashes, tokens } => KvEvent::Stored(StoredBlocks {
            parent: parent.map(EngineHash),
            hashes: hashes.into_iter().map(EngineHash).collect(),
            tokens,
            block_size,
            tier: Tier::Device,
            adapter: None,
            cache_salt: None,
        }),
        CacheEvent::Removed { hash } => KvEvent::Removed { hashes: vec![EngineHash(hash)], tier: Tier::Device },
        CacheEvent::Cleared => KvEvent::Cleared,
    }
}
