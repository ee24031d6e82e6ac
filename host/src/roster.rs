//! Roster: the engines that there are, what they serve, and whether they answer.
//!
//! Sources (configuration, discovery) say which engines there are, each all of its own; the roster finds out what has
//! come, changed and gone. Each engine is looked after by one task, which ends when the engine goes. One writer builds an
//! immutable [`Snapshot`] after changes; requests load it and never wait. What a probe costs does not grow with the number
//! of workers; a snapshot does, so that changes that come together are published together.
//!
//! Invariants: an engine that goes is a candidate no more from the moment that its source is heard, and is there until its
//! last request has ended. What a source says and cannot be taken over yet is tried again. Locks are taken in the order said,
//! drained or publishing, members, one member's standing; none is held over an await, and the last two not over a file.

mod canary;
mod connect;
mod drained;
mod handoff;
mod hold;
mod judge;
mod links;
mod listen;
mod member;
mod pairs;
mod prove;
mod pulse;
mod report;
mod snapshot;
mod sources;
mod split;
mod tend;
mod vitals;

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use dynamo_engine_api::{Engine, EngineError};
use dynamo_host_core::{Fleet, LinkBoard, LoadBoard, Worker, WorkerId, WorkerState};
use dynamo_host_flow::RetryBudget;
use dynamo_host_index::PrefixIndexes;
use tokio::sync::{Notify, Semaphore, watch};

pub(crate) use self::{
    connect::{check, engine},
    drained::DrainedError,
    member::{GivenUp, Kept},
    report::{WorkerReport, WorkerTally},
    snapshot::Snapshot,
    sources::check_all,
    vitals::{Attempt, Outcome, Signs, failure},
};
use self::{
    drained::Drained,
    handoff::Disaggregation,
    member::{Home, Member},
    snapshot::Seat,
    sources::Said,
};
use crate::{
    clock::Clock,
    config::HealthConfig,
    discovery::{Origin, Problem},
    models::{Listings, ModelNames},
    tasks,
};

/// How often a snapshot is built at most: 10,000 workers that are found at once are a few snapshots, not 10,000.
const PUBLISH_EVERY: Duration = Duration::from_millis(50);

/// All engines of a host.
pub(crate) struct Roster {
    namespace: String,
    clock: Clock,
    board: Arc<LoadBoard>,
    links: Arc<LinkBoard>,
    indexes: Arc<PrefixIndexes>,
    max_workers: u32,
    /// What each source last said. Who holds it decides who is a member.
    said: Mutex<BTreeMap<Origin, Said>>,
    /// By name.
    members: Mutex<BTreeMap<String, Arc<Member>>>,
    drained: Mutex<Drained>,
    problems: Mutex<BTreeMap<Origin, Vec<Problem>>>,
    /// Sources that have not said anything yet.
    awaited: Mutex<HashSet<Origin>>,
    names: ArcSwap<ModelNames>,
    snapshot: ArcSwap<Snapshot>,
    /// Whether the snapshot is not up to date, and the call of whoever publishes it.
    is_stale: AtomicBool,
    publishing: Mutex<()>,
    publish_soon: Notify,
    changed: watch::Sender<u64>,
    is_started: AtomicBool,
    /// Engines that were probed once.
    probed: watch::Sender<usize>,
    probes: Semaphore,
    readings: Semaphore,
    canaries: Semaphore,
    health: ArcSwap<HealthConfig>,
    retries: Mutex<RetryBudget>,
    /// Wakes whoever proves hand-offs.
    prove_soon: Notify,
    /// Whether some worker is there for a part of requests only.
    has_roles: AtomicBool,
    /// How each model with such workers is served, as was last said.
    disaggregation: Mutex<Vec<Disaggregation>>,
    /// Links that are avoided, as was last said.
    avoided: Mutex<HashSet<(u32, u32)>>,
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

/// Why a worker is not drained or resumed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DrainError {
    #[error("there is no worker {name:?}; see dynamo-host worker list")]
    NoWorker { name: String },
    #[error(transparent)]
    Unkept(#[from] DrainedError),
}

impl Roster {
    /// A roster of nobody, with room for so many workers. It keeps in a state directory who is drained.
    pub(crate) fn new(clock: Clock, max_workers: u32, indexes: Arc<PrefixIndexes>, state_dir: Option<&Path>) -> Arc<Self> {
        let (drained, trouble) = Drained::open(state_dir);
        let mut problems = BTreeMap::new();
        if let Some(reason) = trouble {
            tracing::error!("{reason}");
            problems.insert(state_dir_problems(), vec![Problem { place: "drained workers".to_owned(), reason }]);
        }
        let snapshot = Snapshot {
            fleet: Fleet::new(0, Vec::new()).expect("no worker is there twice"),
            seats: Vec::new(),
            names: Arc::default(),
            listings: Listings::default(),
            has_unknown_models: true,
            awaits_models: true,
            has_starting: false,
            coming: HashSet::new(),
            trials: Vec::new(),
            rules: HealthConfig::default().breaker_rules(),
            clock,
        };
        Arc::new(Self {
            namespace: "default".to_owned(),
            clock,
            board: LoadBoard::new(max_workers),
            links: Arc::default(),
            indexes,
            max_workers,
            said: Mutex::default(),
            members: Mutex::default(),
            drained: Mutex::new(drained),
            problems: Mutex::new(problems),
            awaited: Mutex::default(),
            names: ArcSwap::default(),
            snapshot: ArcSwap::from_pointee(snapshot),
            is_stale: AtomicBool::new(true),
            publishing: Mutex::default(),
            publish_soon: Notify::new(),
            changed: watch::Sender::new(0),
            is_started: AtomicBool::new(false),
            probed: watch::Sender::new(0),
            probes: Semaphore::new(tend::PROBES),
            readings: Semaphore::new(tend::READINGS),
            canaries: Semaphore::new(canary::CANARIES),
            health: ArcSwap::default(),
            retries: Mutex::default(),
            prove_soon: Notify::new(),
            has_roles: AtomicBool::new(false),
            disaggregation: Mutex::default(),
            avoided: Mutex::default(),
        })
    }

    /// Starts to look after the engines, and waits until each was probed once or `patience` is over.
    pub(crate) async fn start(self: &Arc<Self>, patience: Duration) {
        tasks::spawn("publish", tend::keep_publishing(Arc::clone(self)));
        tasks::spawn("judge", judge::keep_judging(Arc::clone(self)));
        tasks::spawn("prove", prove::keep_proving(Arc::clone(self)));
        tasks::spawn("apply", sources::keep_applying(Arc::clone(self)));
        let mut probed = self.probed.subscribe();
        let count = {
            let members = self.members();
            self.is_started.store(true, Relaxed);
            members.values().for_each(|member| self.look_after(member));
            members.len()
        };
        let begun = Instant::now();
        let _ = tokio::time::timeout(patience, probed.wait_for(|probed| *probed >= count)).await;
        // What was found must be known before the first request.
        self.publish();
        // And who can hand over to whom.
        self.until(patience.saturating_sub(begun.elapsed()), |snapshot| snapshot.coming.is_empty()).await;
    }

    /// Starts the task of a member.
    fn look_after(self: &Arc<Self>, member: &Arc<Member>) {
        if !self.is_started.load(Relaxed) {
            return;
        }
        let (roster, tended) = (Arc::clone(self), Arc::clone(member));
        let task = tasks::spawn("tend", async move { roster.tend(&tended).await });
        let _ = member.task.set(task);
    }

    /// Drains a worker, or ends that: a drained one gets no new request and finishes what it has, until others continue it
    /// after `grace`, or after the configured one. Blocks on the disk.
    ///
    /// # Errors
    /// If there is no such worker, or it cannot be kept. Nothing is changed then.
    pub(crate) fn set_drained(
        &self,
        name: &str,
        drained: bool,
        grace: Option<Duration>,
    ) -> Result<Vec<WorkerReport>, DrainError> {
        {
            let mut kept = lock(&self.drained);
            let member = self.members().get(name).cloned();
            // One that is away, and was drained before, can be resumed.
            if member.is_none() && (drained || !kept.contains(name)) {
                return Err(DrainError::NoWorker { name: name.to_owned() });
            }
            kept.set(name, drained)?;
            // It has been written anew.
            lock(&self.problems).remove(&state_dir_problems());
            // Whoever took its place meanwhile was made with what is kept.
            if let Some(member) = self.members().get(name) {
                let mut standing = member.standing();
                if std::mem::replace(&mut standing.is_drained, drained) != drained {
                    tracing::info!(worker = name, "{}", if drained { "worker is drained" } else { "worker is resumed" });
                }
                standing.drains(drained, grace, self.clock.now_ms());
                standing.show();
                drop(standing);
                if !drained {
                    member.is_wanted_again();
                }
            }
        }
        self.is_stale.store(true, Relaxed);
        self.publish();
        Ok(self.report_of(name).unwrap_or_default())
    }

    /// A worker keeps the KV of one more prompt, for whoever decodes it. `None`: it is gone.
    pub(crate) fn keep(&self, worker: WorkerId) -> Option<Kept> {
        self.snapshot.load().find(worker).map(|seat| seat.member.keep())
    }

    /// Whether an operator drained it.
    pub(crate) fn is_drained(&self, name: &str) -> bool {
        lock(&self.drained).contains(name)
    }

    /// A request could not reach a worker's engine: it is out of service until its probe says otherwise. Nothing happens to
    /// another engine that has its place by now. Waits for nobody who changes the roster.
    fn report_unreachable(&self, worker: WorkerId, engine: &Arc<dyn Engine>, error: &EngineError) {
        let snapshot = self.snapshot.load();
        let Some(seat) = snapshot.find(worker).filter(|seat| Arc::ptr_eq(&seat.member.engine, engine)) else { return };
        seat.member.standing().is_fresh = true;
        self.settle(&seat.member, Err(error.to_string()), false);
        seat.member.probe_now.notify_one();
    }

    /// A request failed on a worker's engine: it is looked at soon, and out of service at once if it could not be reached.
    pub(crate) fn report_failed(&self, worker: WorkerId, engine: &Arc<dyn Engine>, error: &EngineError) {
        if matches!(error, EngineError::Connect { .. }) {
            return self.report_unreachable(worker, engine, error);
        }
        if let Some(seat) = self.snapshot.load().find(worker) {
            seat.member.probe_now.notify_one();
        }
    }

    fn publish_soon(&self) {
        self.is_stale.store(true, Relaxed);
        self.publish_soon.notify_one();
    }

    /// Builds a snapshot, if something has changed since the last one.
    fn publish(&self) {
        let _one_at_a_time = lock(&self.publishing);
        if !self.is_stale.swap(false, Relaxed) {
            return;
        }
        let members: Vec<Arc<Member>> = self.members().values().cloned().collect();
        let mut seated: Vec<(Worker, Seat)> = Vec::with_capacity(members.len());
        let mut listings = Listings::default();
        let now_ms = self.clock.now_ms();
        let mut awaits_models = !lock(&self.awaited).is_empty();
        let mut has_unknown_models = awaits_models;
        for member in &members {
            let standing = member.standing();
            let is_unknown = member.config.model.is_none() && !standing.has_listed();
            has_unknown_models |= is_unknown;
            awaits_models |= is_unknown && standing.state() == WorkerState::Starting;
            let has_ranks = standing.has_ranks;
            for worker in &standing.workers {
                let model = &worker.spec.model;
                listings.add(model, None, standing.max_model_len(model));
                for adapter in worker.adapters.iter() {
                    listings.add(adapter, Some(model), standing.max_model_len(adapter));
                }
            }
            for ((worker, feed), vitals) in standing.workers.iter().zip(&standing.feeds).zip(&standing.vitals) {
                let state = vitals.refine(worker.state, now_ms);
                let (member, feed, vitals) = (Arc::clone(member), Arc::clone(feed), Arc::clone(vitals));
                seated.push((Worker { state, ..worker.clone() }, Seat { member, has_ranks, feed, vitals }));
            }
        }
        for state in WorkerState::ALL {
            let count = seated.iter().filter(|(worker, _)| worker.state == state).count();
            let label = format!("{state:?}").to_lowercase();
            metrics::gauge!("dynamo_host_workers", "state" => label).set(count as f64);
        }
        let has_starting = seated.iter().any(|(worker, _)| worker.state == WorkerState::Starting);
        let trials = judge::try_all_where_nobody_is_healthy(&mut seated);
        let coming = self.pair(&mut seated);
        seated.sort_unstable_by_key(|(worker, _)| worker.id);
        let (workers, seats): (Vec<Worker>, Vec<Seat>) = seated.into_iter().unzip();
        let generation = self.snapshot.load().fleet.generation() + 1;
        let fleet = Fleet::new(generation, workers).expect("members have different names, and one worker per model and rank");
        let names = self.names.load_full();
        let (rules, clock) = (self.health().breaker_rules(), self.clock);
        self.snapshot.store(Arc::new(Snapshot {
            fleet,
            seats,
            names,
            listings,
            has_unknown_models,
            awaits_models,
            has_starting,
            coming,
            trials,
            rules,
            clock,
        }));
        self.changed.send_replace(generation);
    }

    /// All workers now.
    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// All workers as they are at this very moment, for whoever asks how they stand.
    pub(crate) fn latest(&self) -> Arc<Snapshot> {
        self.publish();
        self.snapshot()
    }

    /// What is known of the ways by which KV goes from one worker to another.
    pub(crate) fn links(&self) -> &Arc<LinkBoard> {
        &self.links
    }

    /// Workers that tell of their KV and are not heard now.
    pub(crate) fn stale_workers(&self) -> usize {
        self.snapshot().seats.iter().filter(|seat| seat.feed.is_stale()).count()
    }

    /// Tells of changes: the fleet's generation.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn home(&self) -> Home<'_> {
        Home {
            namespace: &self.namespace,
            board: &self.board,
            links: &self.links,
            indexes: &self.indexes,
            now_ms: self.clock.now_ms(),
        }
    }

    fn members(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Member>>> {
        lock(&self.members)
    }
}

/// Where it is said what is wrong with the state directory.
fn state_dir_problems() -> Origin {
    Origin::of_text("state_dir")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
