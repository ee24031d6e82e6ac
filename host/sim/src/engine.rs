//! A worker of the simulated fleet: a modelled engine, its place on the load board, and its part in the prefix index.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use dynamo_engine_mock::{
    Profile, ProfileError,
    model::{CacheEvent, EngineModel, SequenceId},
};
use dynamo_host_core::{
    EngineHash, Handoff, KvEvent, Load, LoadBoard, LoadReport, Role, StoredBlocks, Tier, Worker, WorkerSpec, WorkerState, id,
    load::{LoadSlot, Recent, Throughput},
};
use dynamo_host_index::{PrefixIndexes, WorkerKv};

use crate::faults::Fault;

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

/// One engine of the fleet.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineSpec {
    /// Its part of the work.
    pub role: Role,
    /// What it holds and how fast it is.
    pub profile: Profile,
}

impl EngineSpec {
    /// Key of those that it can hand KV to and take it from, as the host makes it of what engines say of themselves.
    pub(crate) fn handoff_group(&self) -> u64 {
        let Profile { block_size, kv_bytes_per_token, .. } = self.profile;
        id::key(format!("nixl\0{block_size}\0{kv_bytes_per_token}").as_bytes())
    }
}

/// One worker.
pub(crate) struct Engine {
    pub(crate) role: Role,
    group: u64,
    pub(crate) model: EngineModel,
    /// How often it began anew: what one life kept, another has not.
    pub(crate) life: u32,
    /// Requests whose KV it keeps until it is fetched.
    pub(crate) kept: BTreeSet<u32>,
    /// Requests by their sequences, of those whose KV comes from elsewhere.
    pub(crate) remote: HashMap<SequenceId, u32>,
    /// What it was given to do, and did.
    pub(crate) work: Work,
    pub(crate) load: Arc<LoadSlot>,
    pub(crate) kv: WorkerKv,
    /// Begun and not ended: a step that has its end in the queue.
    pub(crate) is_stepping: bool,
    /// Whether it is among those that are to begin a step at the present moment.
    pub(crate) is_ready: bool,
    /// Sequences thrown out of the memory of engines that were here before.
    pub(crate) preemptions: u64,
    /// Time spent in steps.
    pub(crate) busy: Duration,
    pub(crate) step_begun: Duration,
    /// When the present step ends: what the queue says of another moment is no longer so.
    pub(crate) step_ends: Duration,
    /// Requests that it was given and that have not ended.
    pub(crate) requests: BTreeSet<u32>,
    pub(crate) fault: Option<Fault>,
    /// Whether it is a candidate.
    pub(crate) is_up: bool,
    pub(crate) hung_until: Duration,
    /// How many times as long its steps take.
    pub(crate) slow: f64,
    throughput: Throughput,
}

/// What an engine was given to do, and did.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Work {
    /// Whole requests and parts of them.
    pub(crate) legs: u64,
    /// Prompt tokens that it was to compute …
    pub(crate) prompt_tokens: u64,
    /// … of which it had so many in its cache.
    pub(crate) cached_tokens: u64,
    /// Tokens of output.
    pub(crate) output_tokens: u64,
}

impl Engine {
    pub(crate) fn new(spec: &EngineSpec, board: &Arc<LoadBoard>, indexes: &Arc<PrefixIndexes>) -> Result<Self, ProfileError> {
        let mut model = EngineModel::new(spec.profile.clone())?;
        model.record_cache_events();
        let load = board.claim().expect("the board has a slot for each worker");
        let kv = indexes.join(MODEL, load.index());
        let throughput = Throughput::new(0, 0);
        Ok(Self {
            role: spec.role,
            group: spec.handoff_group(),
            model,
            life: 0,
            kept: BTreeSet::new(),
            remote: HashMap::new(),
            work: Work::default(),
            load,
            kv,
            is_stepping: false,
            is_ready: false,
            preemptions: 0,
            busy: Duration::ZERO,
            step_begun: Duration::ZERO,
            step_ends: Duration::ZERO,
            requests: BTreeSet::new(),
            fault: None,
            is_up: true,
            hung_until: Duration::ZERO,
            slow: 1.0,
            throughput,
        })
    }

    /// Begins a step, if there is anything to do, and returns when it ends.
    pub(crate) fn begin_step(&mut self, now: Duration) -> Option<Duration> {
        let mut end = self.model.begin_step(now)?;
        if self.slow > 1.0 {
            end = now + (end - now).mul_f64(self.slow);
        }
        self.step_ends = end + self.hung_until.saturating_sub(now);
        self.is_stepping = true;
        self.step_begun = now;
        Some(self.step_ends)
    }

    /// All that it had is lost.
    pub(crate) fn die(&mut self) {
        let mut model = EngineModel::new(self.model.profile().clone()).expect("it was made of this profile before");
        model.record_cache_events();
        self.preemptions += self.model.preemptions();
        self.model = model;
        self.life += 1;
        self.kept.clear();
        self.remote.clear();
        self.kv.clear();
        self.is_stepping = false;
    }

    /// The row of the fleet that it is.
    pub(crate) fn worker(&self, number: usize) -> Worker {
        let profile = self.model.profile();
        let spec = WorkerSpec {
            name: format!("engine-{number}"),
            model: MODEL.to_owned(),
            role: self.role,
            rank: 0,
            block_size: Some(profile.block_size),
            labels: profile.labels(),
        };
        Worker {
            id: spec.id("simulated"),
            spec: Arc::new(spec),
            state: if self.is_up { WorkerState::Healthy } else { WorkerState::Unreachable },
            adapters: Arc::default(),
            handoff: Handoff { serves_whole: true, group: (self.role != Role::Aggregated).then_some(self.group) },
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
