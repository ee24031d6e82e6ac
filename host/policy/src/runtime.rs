//! The engine that all policies share: what is configured in wasmtime, and why.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, Ordering::Relaxed},
        mpsc::{self, SyncSender},
    },
    thread,
};

use wasmtime::{
    Cache, CacheConfig, Config, Engine, EngineWeak, InstanceAllocationStrategy, PoolingAllocationConfig, component::Linker,
};

use crate::{abi, call::Guest, limits::Limits, pool, version::PolicyVersion};

/// A runtime that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// wasmtime refused the configuration or the machine lacks something.
    #[error("the policy sandbox cannot be set up on this machine: {0}")]
    Engine(String),
    /// The compilation cache's folder.
    #[error("the compilation cache {path:?} cannot be used: {reason}; make it a folder that this user can write")]
    Cache {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
}

/// A moment, by both clocks of the contract.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Milliseconds since an arbitrary start; never goes back.
    pub monotonic_ms: u64,
    /// Milliseconds since 1970-01-01 UTC.
    pub unix_ms: u64,
}

/// Tells the time to calls that are not decisions; a decision brings its own.
pub type Clock = Arc<dyn Fn() -> Now + Send + Sync>;

/// What all policies share. One per process.
pub struct PolicyRuntime {
    engine: Engine,
    linker: Linker<Guest>,
    shared: Shared,
}

/// What every version holds of the runtime.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) limits: Arc<Limits>,
    pub(crate) clock: Clock,
    /// Instances that exist.
    pub(crate) instances: Arc<AtomicU32>,
    /// Number of pools to spread callers over: one per core, as the server has a thread per core.
    pub(crate) shards: usize,
    /// Asks for a version's pool to be tended, off the request path.
    pub(crate) tending: SyncSender<Weak<PolicyVersion>>,
}

/// Versions that can wait to be tended. One more asks again at its next failure.
const TENDING_QUEUE: usize = 64;
/// Versions that every host must be able to keep warm: the active one, the next, and those that requests still hold.
const WARM_VERSIONS: u32 = 4;
/// Instances beyond those, on trial.
const TRIALS: u32 = 16;

impl PolicyRuntime {
    /// Sets up the sandbox. `clock` tells the time outside of decisions. `cache` is the folder of wasmtime's own compilation cache, if compiled code is to be kept;
    /// it becomes readable by this user alone, since what lies there is run.
    ///
    /// # Errors
    /// If this machine cannot run it, or the folder cannot be used.
    pub fn new(mut limits: Limits, clock: Clock, cache: Option<&Path>) -> Result<Self, RuntimeError> {
        let shards = thread::available_parallelism().map_or(1, usize::from);
        limits.instances = limits.instances.max(WARM_VERSIONS * (shards * pool::KEPT_PER_SHARD) as u32 + TRIALS);
        let engine = match Engine::new(&config(&limits, cache, true)?) {
            Ok(engine) => engine,
            // Pooling reserves much address space, which a container may not allow: slower instances then, same bounds.
            Err(error) => {
                tracing::warn!("policy instances are not pooled, since address space cannot be reserved: {error:#}");
                Engine::new(&config(&limits, cache, false)?).map_err(|error| RuntimeError::Engine(format!("{error:#}")))?
            }
        };
        tick(engine.weak());
        let mut linker = Linker::new(&engine);
        abi::link(&mut linker).map_err(|error| RuntimeError::Engine(format!("{error:#}")))?;
        let shared = Shared { limits: Arc::new(limits), clock, instances: Arc::default(), shards, tending: tend_pools() };
        Ok(Self { engine, linker, shared })
    }

    /// The bounds that policies run under.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.shared.limits
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    pub(crate) fn linker(&self) -> &Linker<Guest> {
        &self.linker
    }

    /// Instances that exist now.
    #[must_use]
    pub fn instance_count(&self) -> u32 {
        self.shared.instances.load(Relaxed)
    }
}

fn config(limits: &Limits, cache: Option<&Path>, pooling: bool) -> Result<Config, RuntimeError> {
    let mut config = Config::new();
    // Fuel is the bound on work: deterministic, so a decision ends at the same instruction here and in a replay.
    config.consume_fuel(true);
    // The backstop, see `Limits::backstop`.
    config.epoch_interruption(true);
    config.max_wasm_stack(limits.stack_bytes);
    // Decisions are synchronous calls on the request's task; without this, stores set up for async guests.
    config.concurrency_support(false);
    // Everything that could decide differently elsewhere stays off. SIMD is deterministic, its relaxed form is not.
    config.wasm_relaxed_simd(false);
    config.wasm_memory64(false);
    config.memory_init_cow(true);
    if let Some(path) = cache {
        config.cache(Some(open_cache(path)?));
    }
    if pooling {
        let mut pool = PoolingAllocationConfig::new();
        pool.total_component_instances(limits.instances)
            .total_core_instances(limits.instances * 4)
            .total_memories(limits.instances)
            .total_tables(limits.instances * 4)
            .max_memory_size(limits.memory_bytes)
            .table_elements(limits.table_elements)
            .max_component_instance_size(1 << 20)
            .max_core_instance_size(1 << 20);
        config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    }
    Ok(config)
}

fn open_cache(path: &Path) -> Result<Cache, RuntimeError> {
    let failed = |reason: String| RuntimeError::Cache { path: path.to_owned(), reason };
    fs::create_dir_all(path).map_err(|error| failed(error.to_string()))?;
    #[cfg(unix)]
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o700)).map_err(|error| failed(error.to_string()))?;
    let path = path.canonicalize().map_err(|error| failed(error.to_string()))?;
    let mut config = CacheConfig::new();
    config.with_directory(path);
    Cache::new(config).map_err(|error| failed(format!("{error:#}")))
}

/// Advances the epoch until the engine is gone. A thread of its own: a busy runtime could not be trusted to tick.
fn tick(engine: EngineWeak) {
    let ticker = thread::Builder::new().name("policy-backstop".to_owned()).spawn(move || {
        loop {
            thread::sleep(Limits::BACKSTOP_TICK);
            match engine.upgrade() {
                Some(engine) => engine.increment_epoch(),
                None => return,
            }
        }
    });
    // Without the thread fuel still bounds every policy.
    if let Err(error) = ticker {
        tracing::warn!("the policy backstop could not be started: {error}");
    }
}

/// Replaces instances that failed, and lets go of those that are not needed any more. A thread of its own, since setting
/// up an instance runs the guest's `configure`, which may take longer than a request should wait.
fn tend_pools() -> SyncSender<Weak<PolicyVersion>> {
    let (tending, due) = mpsc::sync_channel::<Weak<PolicyVersion>>(TENDING_QUEUE);
    let thread = thread::Builder::new().name("policy-pools".to_owned()).spawn(move || {
        while let Ok(version) = due.recv() {
            if let Some(version) = version.upgrade() {
                version.tend();
            }
        }
    });
    if let Err(error) = thread {
        tracing::warn!("policy instances that fail are not replaced, since no thread can be started: {error}");
    }
    tending
}
