//! Roster: the configured engines, what they serve, and whether they answer.
//!
//! One writer builds an immutable [`Snapshot`] at every change; requests load it and never wait. Each engine has a task
//! that probes it, and asks it for its models where the configuration names none.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use dynamo_engine_api::{Engine, EngineError};
use dynamo_engine_mock::MockEngine;
use dynamo_engine_openai::{OpenAiEngine, OpenAiOptions};
use dynamo_host_core::{Candidates, Fleet, Load, LoadBoard, RequestFacts, Role, Worker, WorkerId, WorkerSpec, WorkerState};
use serde::Serialize;
use tokio::sync::{Notify, watch};

use crate::{clock::Clock, config::WorkerConfig, error::RequestError, tasks};

/// How often an engine that answers is probed.
const PROBE_EVERY: Duration = Duration::from_secs(2);
/// How often one that does not is.
const RETRY_EVERY: Duration = Duration::from_millis(500);

/// All engines of a host.
pub(crate) struct Roster {
    namespace: String,
    clock: Clock,
    board: Arc<LoadBoard>,
    sources: Mutex<Vec<Source>>,
    snapshot: ArcSwap<Snapshot>,
    changed: watch::Sender<u64>,
}

/// All workers at one moment, with the engines behind them.
pub(crate) struct Snapshot {
    fleet: Fleet,
    engines: HashMap<WorkerId, Arc<dyn Engine>>,
}

/// One configured engine.
struct Source {
    config: WorkerConfig,
    engine: Arc<dyn Engine>,
    workers: Vec<Worker>,
    /// What its last probe failed with.
    trouble: Option<String>,
    probe_now: Arc<Notify>,
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
        let mut sources: Vec<Source> = Vec::new();
        for config in configs {
            if let Some(twin) = sources.iter().find(|source| source.config.name == config.name) {
                let (first, second) = (twin.config.url.clone(), config.url.clone());
                return Err(RosterError::Duplicate { name: config.name.clone(), first, second });
            }
            let engine = connect(&config.url).map_err(|reason| RosterError::Url { url: config.url.clone(), reason })?;
            sources.push(Source {
                config: config.clone(),
                engine,
                workers: Vec::new(),
                trouble: None,
                probe_now: Arc::default(),
            });
        }
        let empty = Snapshot { fleet: Fleet::new(0, Vec::new()).expect("no worker is there twice"), engines: HashMap::new() };
        let roster = Arc::new(Self {
            namespace: "default".to_owned(),
            clock,
            board: LoadBoard::new(max_workers),
            sources: Mutex::new(sources),
            snapshot: ArcSwap::from_pointee(empty),
            changed: watch::Sender::new(0),
        });
        for (index, config) in configs.iter().enumerate() {
            if let Some(model) = &config.model {
                roster.learn(index, std::slice::from_ref(model)).map_err(|_| RosterError::Full { max: max_workers })?;
            }
        }
        roster.publish();
        Ok(roster)
    }

    /// Starts probing, and waits until each engine has been probed once or `patience` is over.
    pub(crate) async fn start(self: &Arc<Self>, patience: Duration) {
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
    }

    async fn keep_probing(&self, index: usize) {
        loop {
            let (healthy, probe_now) = {
                let source = &self.sources()[index];
                (source.trouble.is_none(), Arc::clone(&source.probe_now))
            };
            let pause = if healthy { PROBE_EVERY } else { RETRY_EVERY };
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
        let found = match engine.probe().await {
            Ok(()) if model_is_set => Ok(None),
            Ok(()) => engine.models().await.map(|cards| Some(cards.into_iter().map(|card| card.id).collect::<Vec<_>>())),
            Err(error) => Err(error),
        };
        let trouble = match found {
            Ok(Some(models)) if models.is_empty() => Some("it lists no model; set model= for it".to_owned()),
            Ok(Some(models)) => self.learn(index, &models).err(),
            Ok(None) => None,
            Err(error) => Some(error.to_string()),
        };
        self.settle(index, trouble);
    }

    /// Makes a worker for each model that is new.
    fn learn(&self, index: usize, models: &[String]) -> Result<(), String> {
        let mut sources = self.sources();
        let source = &mut sources[index];
        source.workers.retain(|worker| models.contains(&worker.spec.model));
        for model in models {
            if source.workers.iter().any(|worker| worker.spec.model == *model) {
                continue;
            }
            let load = self.board.claim().ok_or("there is no room for another worker; raise limits.max_workers")?;
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
        Ok(())
    }

    /// Takes down whether an engine answers; publishes if that changed anything.
    fn settle(&self, index: usize, trouble: Option<String>) {
        {
            let mut sources = self.sources();
            let source = &mut sources[index];
            let state = if trouble.is_none() { WorkerState::Healthy } else { WorkerState::Unreachable };
            let known = self.snapshot.load();
            let is_news = source.trouble.is_some() != trouble.is_some()
                || source.workers.iter().any(|worker| worker.state != state)
                || source.workers.len()
                    != known.fleet.workers().iter().filter(|worker| worker.spec.name == source.config.name).count();
            let was_known = source.trouble.is_some();
            source.trouble = trouble;
            if !is_news {
                return;
            }
            match &source.trouble {
                Some(trouble) if !was_known => tracing::warn!(worker = source.config.name, "worker is out of service: {trouble}"),
                Some(_) => {}
                None => tracing::info!(worker = source.config.name, "worker is ready"),
            }
            for worker in &mut source.workers {
                worker.state = state;
            }
        }
        self.publish();
    }

    /// A request could not reach a worker: out of service until its probe says otherwise.
    pub(crate) fn report_unreachable(&self, worker: &WorkerSpec, error: &EngineError) {
        let Some(index) = self.sources().iter().position(|source| source.config.name == worker.name) else { return };
        self.settle(index, Some(error.to_string()));
        self.sources()[index].probe_now.notify_one();
    }

    fn publish(&self) {
        let sources = self.sources();
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
        self.snapshot.store(Arc::new(Snapshot { fleet, engines }));
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

    /// For people and tools.
    pub(crate) fn report(&self) -> Vec<WorkerReport> {
        let sources = self.sources();
        let without_model = |source: &Source| WorkerReport {
            id: None,
            name: source.config.name.clone(),
            url: source.config.url.clone(),
            kind: source.engine.kind(),
            model: None,
            role: source.config.role,
            state: WorkerState::Starting,
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

impl Snapshot {
    /// The workers.
    pub(crate) fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    /// The engine behind a worker of this snapshot.
    pub(crate) fn engine(&self, worker: WorkerId) -> &Arc<dyn Engine> {
        &self.engines[&worker]
    }

    /// The workers that may serve a request.
    pub(crate) fn candidates(&self, request: &RequestFacts) -> Result<Arc<Candidates>, RequestError> {
        let eligible = self.fleet.candidates(&request.model, Role::Aggregated);
        match eligible.and_then(|eligible| eligible.without(&request.failed_workers)) {
            Some(candidates) => Ok(candidates),
            None if self.fleet.models().contains(&request.model) => Err(RequestError::NoWorker { model: request.model.clone() }),
            None => Err(RequestError::ModelNotFound { model: request.model.clone() }),
        }
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

/// The adapter for a URL.
fn connect(url: &str) -> Result<Arc<dyn Engine>, String> {
    if url.starts_with("mock://") {
        return MockEngine::from_url(url).map(|engine| Arc::new(engine) as Arc<dyn Engine>).map_err(|error| error.to_string());
    }
    OpenAiEngine::new(url, OpenAiOptions::default())
        .map(|engine| Arc::new(engine) as Arc<dyn Engine>)
        .map_err(|error| error.to_string())
}
