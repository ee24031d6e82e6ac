//! Roster: the configured engines, what they serve, and whether they answer.
//!
//! One writer builds an immutable [`Snapshot`] after changes; requests load it and never wait. Each engine has a task
//! that probes it, and asks it for its models where the configuration names none. What a probe costs does not grow with
//! the number of workers; a snapshot does, so that changes that come together are published together.

mod snapshot;

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use dynamo_engine_api::{Engine, EngineError};
use dynamo_engine_mock::MockEngine;
use dynamo_engine_openai::{OpenAiEngine, OpenAiOptions};
use dynamo_host_core::{Fleet, Load, LoadBoard, Role, Worker, WorkerSpec, WorkerState};
use serde::Serialize;
use tokio::sync::{Notify, watch};

pub(crate) use self::snapshot::Snapshot;
use crate::{clock::Clock, config::WorkerConfig, tasks, text::plain};

/// How often an engine that answers is probed.
const PROBE_EVERY: Duration = Duration::from_secs(2);
/// How often one that does not is.
const RETRY_EVERY: Duration = Duration::from_millis(500);
/// How often a snapshot is built at most: 10,000 workers that are found at once are a few snapshots, not 10,000.
const PUBLISH_EVERY: Duration = Duration::from_millis(50);

/// All engines of a host.
pub(crate) struct Roster {
    namespace: String,
    clock: Clock,
    board: Arc<LoadBoard>,
    sources: Mutex<Vec<Source>>,
    /// Places in `sources`, by name.
    places: HashMap<String, usize>,
    snapshot: ArcSwap<Snapshot>,
    /// Whether the snapshot is not up to date, and the call of whoever publishes it.
    is_stale: AtomicBool,
    publish_soon: Notify,
    changed: watch::Sender<u64>,
}

/// One configured engine.
struct Source {
    config: WorkerConfig,
    engine: Arc<dyn Engine>,
    workers: Vec<Worker>,
    /// Of all its workers alike.
    state: WorkerState,
    /// What is wrong with it, by its last probe or request.
    trouble: Option<String>,
    /// Whether it has ever said what it serves.
    has_listed: bool,
    probe_now: Arc<Notify>,
}

/// What a probe found.
struct Finding {
    state: WorkerState,
    trouble: Option<String>,
    /// Whether the source's workers are others now.
    is_other: bool,
}

/// What came of an engine's list of models.
#[derive(Default)]
struct Learned {
    /// Whether workers came or went, or the list is its first.
    is_other: bool,
    /// Models for which there was no room.
    left_out: usize,
}

/// Engines that cannot be a roster.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RosterError {
    #[error("worker {name:?} is there twice ({first} and {second}); give one of them another name=, or remove it")]
    Duplicate { name: String, first: String, second: String },
    #[error("worker {url:?}: {reason}")]
    Url { url: String, reason: String },
    #[error("there are more than {max} workers; raise limits.max_workers")]
    Full { max: u32 },
}

impl Roster {
    /// Makes the engines; probing starts with [`start`](Self::start).
    pub(crate) fn new(configs: &[WorkerConfig], clock: Clock, max_workers: u32) -> Result<Arc<Self>, RosterError> {
        let mut sources: Vec<Source> = Vec::with_capacity(configs.len());
        let mut places = HashMap::new();
        for (place, config) in configs.iter().enumerate() {
            if let Some(twin) = places.insert(config.name.clone(), place) {
                let (first, second) = (configs[twin].url.clone(), config.url.clone());
                return Err(RosterError::Duplicate { name: config.name.clone(), first, second });
            }
            let engine = connect(&config.url).map_err(|reason| RosterError::Url { url: config.url.clone(), reason })?;
            sources.push(Source {
                config: config.clone(),
                engine,
                workers: Vec::new(),
                state: WorkerState::Starting,
                trouble: None,
                has_listed: false,
                probe_now: Arc::default(),
            });
        }
        let fleet = Fleet::new(0, Vec::new()).expect("no worker is there twice");
        let empty = Snapshot { fleet, engines: HashMap::new(), has_unknown_models: true };
        let roster = Arc::new(Self {
            namespace: "default".to_owned(),
            clock,
            board: LoadBoard::new(max_workers),
            sources: Mutex::new(sources),
            places,
            snapshot: ArcSwap::from_pointee(empty),
            is_stale: AtomicBool::new(true),
            publish_soon: Notify::new(),
            changed: watch::Sender::new(0),
        });
        for (index, config) in configs.iter().enumerate() {
            if let Some(model) = &config.model {
                let Learned { left_out, .. } = roster.learn(index, std::slice::from_ref(model));
                if left_out > 0 {
                    return Err(RosterError::Full { max: max_workers });
                }
            }
        }
        roster.publish();
        Ok(roster)
    }

    /// Starts probing, and waits until each engine has been probed once or `patience` is over.
    pub(crate) async fn start(self: &Arc<Self>, patience: Duration) {
        let roster = Arc::clone(self);
        tasks::spawn("publish", async move { roster.keep_publishing().await });
        let (probed, mut first_round) = watch::channel(0usize);
        let count = self.sources().len();
        for index in 0..count {
            let (roster, probed) = (Arc::clone(self), probed.clone());
            tasks::spawn("probe", async move {
                roster.probe(index).await;
                probed.send_modify(|probed| *probed += 1);
                roster.keep_probing(index).await;
            });
        }
        let _ = tokio::time::timeout(patience, first_round.wait_for(|probed| *probed == count)).await;
        // What was found must be known before the first request.
        self.publish();
    }

    async fn keep_publishing(&self) {
        loop {
            self.publish_soon.notified().await;
            self.publish();
            tokio::time::sleep(PUBLISH_EVERY).await;
        }
    }

    async fn keep_probing(&self, index: usize) {
        loop {
            let (state, probe_now) = {
                let source = &self.sources()[index];
                (source.state, Arc::clone(&source.probe_now))
            };
            let pause = jittered(if state.is_eligible() { PROBE_EVERY } else { RETRY_EVERY });
            // Woken early by a request that failed; not more often than a dead engine is retried anyway.
            if tokio::time::timeout(pause, probe_now.notified()).await.is_ok() {
                tokio::time::sleep(RETRY_EVERY).await;
            }
            self.probe(index).await;
        }
    }

    /// Probes one engine and takes down what it found.
    async fn probe(&self, index: usize) {
        let (engine, model_is_set) = {
            let source = &self.sources()[index];
            (Arc::clone(&source.engine), source.config.model.is_some())
        };
        let models = match engine.probe().await {
            Ok(()) if model_is_set => Ok(None),
            Ok(()) => engine.models().await.map(|cards| Some(cards.into_iter().map(|card| card.id).collect::<Vec<_>>())),
            Err(error) => Err(error),
        };
        let Learned { is_other, left_out } = match &models {
            Ok(Some(models)) => self.learn(index, models),
            _ => Learned::default(),
        };
        let (state, trouble) = match models {
            Ok(Some(models)) if models.is_empty() => {
                (WorkerState::Unreachable, Some("it lists no model; set model= for it".to_owned()))
            }
            // Those that there was room for are served all the same.
            Ok(_) if left_out > 0 => {
                let trouble = format!("there is no room for {left_out} of its models; raise limits.max_workers");
                (WorkerState::Healthy, Some(trouble))
            }
            Ok(_) => (WorkerState::Healthy, None),
            Err(error) => (WorkerState::Unreachable, Some(error.to_string())),
        };
        self.settle(index, Finding { state, trouble, is_other });
    }

    /// Makes a worker for each model that is new, and lets go of those whose model is gone. An empty list is taken for a
    /// fault, not for news.
    fn learn(&self, index: usize, models: &[String]) -> Learned {
        let mut sources = self.sources();
        let source = &mut sources[index];
        let mut learned = Learned { is_other: !source.has_listed, left_out: 0 };
        source.has_listed = true;
        if models.is_empty() {
            return learned;
        }
        let known = source.workers.len();
        source.workers.retain(|worker| models.contains(&worker.spec.model));
        learned.is_other |= source.workers.len() < known;
        for model in models {
            if source.workers.iter().any(|worker| worker.spec.model == *model) {
                continue;
            }
            let Some(load) = self.board.claim() else {
                learned.left_out += 1;
                continue;
            };
            learned.is_other = true;
            let spec = WorkerSpec {
                name: source.config.name.clone(),
                model: model.clone(),
                role: source.config.role,
                rank: 0,
                block_size: None,
                labels: source.config.labels.clone(),
            };
            source.workers.push(Worker {
                id: spec.id(&self.namespace),
                spec: Arc::new(spec),
                state: WorkerState::Starting,
                joined_ms: self.clock.now_ms(),
                load,
            });
        }
        learned
    }

    /// Takes down what was found of an engine; has it published if that changed anything.
    fn settle(&self, index: usize, finding: Finding) {
        let Finding { state, trouble, is_other } = finding;
        // An engine's words may be in it.
        let trouble = trouble.as_deref().map(plain);
        let mut sources = self.sources();
        let source = &mut sources[index];
        let is_news = source.state != state;
        let was_in_trouble = source.trouble.is_some();
        match &trouble {
            None if is_news => tracing::info!(worker = source.config.name, "worker is ready"),
            Some(trouble) if is_news && !state.is_eligible() => {
                tracing::warn!(worker = source.config.name, "worker is out of service: {trouble}");
            }
            Some(trouble) if !was_in_trouble || is_news => tracing::warn!(worker = source.config.name, "{trouble}"),
            _ => {}
        }
        source.trouble = trouble;
        source.state = state;
        if is_news || is_other {
            for worker in &mut source.workers {
                worker.state = state;
            }
            self.is_stale.store(true, Relaxed);
            self.publish_soon.notify_one();
        }
    }

    /// A request could not reach a worker: out of service until its probe says otherwise.
    pub(crate) fn report_unreachable(&self, worker: &WorkerSpec, error: &EngineError) {
        let Some(&index) = self.places.get(&worker.name) else { return };
        let trouble = Some(error.to_string());
        self.settle(index, Finding { state: WorkerState::Unreachable, trouble, is_other: false });
        self.sources()[index].probe_now.notify_one();
    }

    fn publish(&self) {
        let sources = self.sources();
        if !self.is_stale.swap(false, Relaxed) {
            return;
        }
        let workers: Vec<Worker> = sources.iter().flat_map(|source| source.workers.iter().cloned()).collect();
        let engines = sources
            .iter()
            .flat_map(|source| source.workers.iter().map(|worker| (worker.id, Arc::clone(&source.engine))))
            .collect();
        for state in [WorkerState::Starting, WorkerState::Healthy, WorkerState::Unreachable] {
            let count = workers.iter().filter(|worker| worker.state == state).count();
            let label = format!("{state:?}").to_lowercase();
            metrics::gauge!("dynamo_host_workers", "state" => label).set(count as f64);
        }
        let generation = self.snapshot.load().fleet.generation() + 1;
        let fleet = Fleet::new(generation, workers).expect("sources have different names, and a source one worker per model");
        let has_unknown_models = sources.iter().any(|source| source.config.model.is_none() && !source.has_listed);
        self.snapshot.store(Arc::new(Snapshot { fleet, engines, has_unknown_models }));
        self.changed.send_replace(generation);
    }

    /// All workers now.
    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Tells of changes: the fleet's generation.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// For people and tools: what the next request sees.
    pub(crate) fn report(&self) -> Vec<WorkerReport> {
        self.publish();
        let sources = self.sources();
        let without_model = |source: &Source| WorkerReport {
            id: None,
            name: source.config.name.clone(),
            url: source.config.url.clone(),
            kind: source.engine.kind(),
            model: None,
            role: source.config.role,
            state: source.state,
            active_requests: 0,
            served: 0,
            trouble: source.trouble.clone(),
        };
        let mut reports = Vec::new();
        for source in sources.iter() {
            if source.workers.is_empty() {
                reports.push(without_model(source));
            }
            reports.extend(source.workers.iter().map(|worker| WorkerReport {
                id: Some(worker.id.to_string()),
                model: Some(worker.spec.model.clone()),
                state: worker.state,
                active_requests: worker.load.get(Load::ActiveRequests),
                served: worker.load.served(),
                ..without_model(source)
            }));
        }
        reports
    }

    fn sources(&self) -> MutexGuard<'_, Vec<Source>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A worker, for people and tools.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct WorkerReport {
    pub(crate) id: Option<String>,
    pub(crate) name: String,
    pub(crate) url: String,
    pub(crate) kind: &'static str,
    pub(crate) model: Option<String>,
    pub(crate) role: Role,
    pub(crate) state: WorkerState,
    pub(crate) active_requests: u32,
    pub(crate) served: u64,
    pub(crate) trouble: Option<String>,
}

/// A pause between three quarters and five quarters of this: engines that were started together are not probed together.
fn jittered(pause: Duration) -> Duration {
    // A hash under keys from the system's randomness, which std draws for every map.
    let random = RandomState::new().hash_one(0u8) as u32;
    pause.mul_f64(0.75 + 0.5 * f64::from(random) / f64::from(u32::MAX))
}

/// The adapter for a URL.
fn connect(url: &str) -> Result<Arc<dyn Engine>, String> {
    if url.starts_with("mock://") {
        return MockEngine::from_url(url).map(|engine| Arc::new(engine) as Arc<dyn Engine>).map_err(|error| error.to_string());
    }
    OpenAiEngine::new(url, OpenAiOptions::default())
        .map(|engine| Arc::new(engine) as Arc<dyn Engine>)
        .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests;
