//! Member: one engine of the roster, the workers that it is, and how it stands.
//!
//! A worker is an endpoint (engine, model, rank). What makes it is known in parts: the configuration, the engine's list of
//! models, the ranks that its load names. Whenever a part changes the workers are made anew of all parts, and each that was
//! there before keeps its place on the load board, with what runs on it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use dynamo_engine_api::{Engine, ModelCard, Protocol, RankLoad};
use dynamo_host_core::{
    Handoff, LinkBoard, Load, LoadBoard, LoadReport, Role, Worker, WorkerSpec, WorkerState,
    load::{Recent, Reported, Throughput},
};
use dynamo_host_index::PrefixIndexes;
use tokio::{
    sync::{Notify, watch},
    task::AbortHandle,
};

use super::{
    Origin,
    connect::{Connection, Credentials},
    handoff::Fit,
    prove::Proof,
    vitals::Vitals,
};
use crate::{
    config::{MAX_RANKS, WorkerConfig},
    kv::KvFeed,
};

/// Most models and adapters that are taken from one engine's list.
const MAX_CARDS: usize = 4096;
/// Longest name of a model that is taken from an engine's list.
const MAX_NAME_BYTES: usize = 256;

/// One engine, with a configuration that does not change: another configuration is another member.
pub(super) struct Member {
    pub(super) config: WorkerConfig,
    pub(super) origin: Origin,
    pub(super) engine: Arc<dyn Engine>,
    /// What its connection was made of.
    pub(super) credentials: Credentials,
    /// The connection before this one to the same engine, which some of what runs may need to its end.
    previous: Option<Arc<dyn Engine>>,
    /// Woken when a request failed to reach it.
    pub(super) probe_now: Notify,
    /// Woken when its workers are others: what its engine told may be with the wrong ones, or with none.
    pub(super) relisten: Notify,
    /// Changes when requests that it has are to be given to others; see [`GivenUp`].
    pub(super) given_up: Arc<watch::Sender<GivenUp>>,
    /// Prompts whose KV it keeps for whoever decodes.
    kept: Arc<AtomicU32>,
    /// Requests that it was ever given.
    given: Arc<AtomicU64>,
    /// What looks after it; ended when it goes.
    pub(super) task: OnceLock<AbortHandle>,
    standing: Mutex<Standing>,
}

/// What a member has in common with the one before it.
#[derive(Default)]
struct Shared {
    given_up: Arc<watch::Sender<GivenUp>>,
    kept: Arc<AtomicU32>,
    given: Arc<AtomicU64>,
}

/// One prompt whose KV a worker keeps for whoever decodes. Dropped, it has been fetched, or nobody comes for it.
pub(crate) struct Kept(Arc<AtomicU32>);

impl Drop for Kept {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Why requests that a worker has are to be given to others, without waiting for what it may still say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum GivenUp {
    /// They are not.
    #[default]
    Not,
    /// It does not answer any more.
    Unresponsive,
    /// It was drained, and the grace is over.
    Drained,
}

impl GivenUp {
    fn label(self) -> &'static str {
        match self {
            Self::Not => "not",
            Self::Unresponsive => "unresponsive",
            Self::Drained => "drained",
        }
    }
}

/// How a member stands.
pub(super) struct Standing {
    pub(super) workers: Vec<Worker>,
    /// By its last probe or request.
    state: WorkerState,
    /// What is wrong with it, by its last probe or request.
    pub(super) trouble: Option<String>,
    /// Why its load was not learnt last time.
    pub(super) load_trouble: Option<String>,
    /// Models that it lists; `None`: it never said.
    cards: Option<Vec<ModelCard>>,
    /// Ranks that its load names.
    ranks: Vec<u32>,
    pub(super) was_probed: bool,
    /// It was not there, and has not been healthy since: one that answers that it cannot serve is starting.
    pub(super) is_fresh: bool,
    /// Since when it is draining, in milliseconds of the host's clock, and how long it may until others continue what it has.
    pub(super) draining_since_ms: Option<u64>,
    pub(super) grace_ms: Option<u64>,
    /// An operator drains it.
    pub(super) is_drained: bool,
    /// Its source has it no more, or another engine has its place: it goes when its last request has ended.
    pub(super) is_leaving: bool,
    /// A task waits for that.
    is_awaited: bool,
    /// Whether there are several ranks, so that requests must say which.
    pub(super) has_ranks: bool,
    /// Workers for which the board has no room.
    pub(super) left_out: usize,
    /// How the KV of each worker is known, in the order of workers.
    pub(super) feeds: Vec<Arc<KvFeed>>,
    /// How each worker fared, in the order of workers.
    pub(super) vitals: Vec<Arc<Vitals>>,
    /// How its engine hands KV over, as was last seen.
    protocol: Option<Protocol>,
    /// Key of the tokens that it makes of a text that is the same for all.
    pub(super) tokens: Option<u64>,
    /// Whom each worker fits, in the order of workers, as was last published.
    pub(super) fits: Vec<Fit>,
    /// What was seen of its hand-offs.
    pub(super) proof: Proof,
    /// Whether there are other workers than those that were listened for.
    is_other_lineup: bool,
    /// Samples of each worker's output, in the order of workers.
    throughputs: Vec<Throughput>,
}

/// Where a member's workers live.
pub(super) struct Home<'a> {
    pub(super) namespace: &'a str,
    pub(super) board: &'a Arc<LoadBoard>,
    pub(super) links: &'a LinkBoard,
    pub(super) indexes: &'a Arc<PrefixIndexes>,
    pub(super) now_ms: u64,
}

impl Member {
    /// A new engine.
    pub(super) fn new(config: WorkerConfig, origin: Origin, connection: Connection, home: &Home<'_>) -> Self {
        let standing = Standing {
            workers: Vec::new(),
            state: WorkerState::Starting,
            trouble: None,
            load_trouble: None,
            cards: None,
            ranks: vec![0],
            was_probed: false,
            is_fresh: true,
            draining_since_ms: None,
            grace_ms: None,
            is_drained: false,
            is_leaving: false,
            is_awaited: false,
            has_ranks: false,
            left_out: 0,
            feeds: Vec::new(),
            vitals: Vec::new(),
            protocol: None,
            tokens: None,
            fits: Vec::new(),
            proof: Proof::default(),
            is_other_lineup: false,
            throughputs: Vec::new(),
        };
        Self::with(config, origin, connection, None, Shared::default(), standing, home)
    }

    /// The same engine under another configuration, or through another connection: what runs on it goes on.
    pub(super) fn succeed(&self, config: WorkerConfig, origin: Origin, connection: Connection, home: &Home<'_>) -> Self {
        let standing = {
            let mut old = self.standing();
            // Nobody waits for the end of what goes on.
            old.is_leaving = false;
            Standing {
                workers: old.workers.clone(),
                trouble: old.trouble.clone(),
                load_trouble: old.load_trouble.clone(),
                cards: old.cards.clone(),
                ranks: old.ranks.clone(),
                feeds: old.feeds.clone(),
                vitals: old.vitals.clone(),
                throughputs: old.throughputs.clone(),
                fits: old.fits.clone(),
                // With another part to play, it has that to show.
                proof: if config.role == self.config.role { old.proof.clone() } else { Proof::default() },
                is_awaited: false,
                ..*old
            }
        };
        let is_rotated = !Arc::ptr_eq(&self.engine, &connection.engine);
        let previous = if is_rotated { Some(Arc::clone(&self.engine)) } else { self.previous.clone() };
        let (given_up, kept, given) = (Arc::clone(&self.given_up), Arc::clone(&self.kept), Arc::clone(&self.given));
        let shared = Shared { given_up, kept, given };
        Self::with(config, origin, connection, previous, shared, standing, home)
    }

    fn with(
        config: WorkerConfig,
        origin: Origin,
        connection: Connection,
        previous: Option<Arc<dyn Engine>>,
        shared: Shared,
        standing: Standing,
        home: &Home<'_>,
    ) -> Self {
        let Connection { engine, credentials } = connection;
        let Shared { given_up, kept, given } = shared;
        let (probe_now, relisten, task) = (Notify::new(), Notify::new(), OnceLock::new());
        let standing = Mutex::new(standing);
        let member =
            Self { config, origin, engine, credentials, previous, probe_now, relisten, given_up, kept, given, task, standing };
        member.standing().make_workers(&member.config, home);
        member
    }

    pub(super) fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes down what it lists; returns whether its workers are others now. An empty list is taken for a fault, not for
    /// news, and so is none where the configuration names the model.
    pub(super) fn learn_models(&self, cards: Option<Vec<ModelCard>>, home: &Home<'_>) -> bool {
        let mut standing = self.standing();
        let is_first = standing.cards.is_none();
        let mut cards = cards.unwrap_or_default();
        cards.retain(|card| !card.id.is_empty() && card.id.len() <= MAX_NAME_BYTES);
        cards.truncate(MAX_CARDS);
        let is_news = (is_first || !cards.is_empty()) && standing.cards.as_ref() != Some(&cards);
        if is_news {
            standing.cards = Some(cards);
        }
        // There may be room by now for those that were left out.
        let is_other = (is_news || standing.left_out > 0) && standing.make_workers(&self.config, home) | is_first;
        self.relisten_if_needed(&mut standing);
        is_other
    }

    /// Takes down how its engine hands KV over; returns whether that is news, and of any interest.
    pub(super) fn learn_protocol(&self) -> bool {
        let protocol = self.engine.handoff();
        std::mem::replace(&mut self.standing().protocol, protocol) != protocol && self.config.role != Role::Aggregated
    }

    fn relisten_if_needed(&self, standing: &mut Standing) {
        if std::mem::take(&mut standing.is_other_lineup) {
            self.relisten.notify_one();
        }
    }

    /// Takes down what it says of its load; returns whether its workers are others now.
    pub(super) fn learn_load(&self, loads: &[RankLoad], home: &Home<'_>) -> bool {
        let mut standing = self.standing();
        standing.load_trouble = None;
        let mut is_other = false;
        if self.config.ranks.is_none() && !loads.is_empty() {
            let mut ranks: Vec<u32> = loads.iter().map(|load| load.rank).filter(|rank| *rank < MAX_RANKS).collect();
            ranks.sort_unstable();
            ranks.dedup();
            // One rank alone is the whole engine, whatever number it gives itself.
            if ranks.len() < 2 {
                ranks = vec![0];
            }
            if ranks != standing.ranks {
                standing.ranks = ranks;
                is_other = standing.make_workers(&self.config, home);
                self.relisten_if_needed(&mut standing);
            }
        }
        for worker in &standing.workers {
            let load = match loads {
                [only] if standing.ranks.len() == 1 && self.config.ranks.is_none_or(|ranks| ranks == 1) => Some(only),
                _ => loads.iter().find(|load| load.rank == worker.spec.rank),
            };
            let Some(load) = load else { continue };
            let report = LoadReport {
                running_requests: load.running,
                queued_requests: load.queued,
                max_running_requests: load.max_running,
                max_batched_tokens: load.max_batched_tokens,
                kv_tokens_total: load.kv_tokens_total,
                kv_tokens_free: load.kv_tokens_free,
                block_size: load.block_size,
            };
            // It decides who can hand KV to whom.
            is_other |= self.config.role != Role::Aggregated
                && load.block_size.is_some()
                && load.block_size != worker.load.get_reported(Reported::BlockSize);
            worker.load.report(&report, home.now_ms);
            // An idle engine's zero is no observation of its speed.
            if let Some(speed) = load.tokens_per_second.filter(|speed| speed.is_finite() && *speed > 0.0) {
                worker.load.set_recent(Recent::TokensPerSecond, speed);
            }
        }
        is_other
    }

    /// Observes the output of each worker by what came through this host.
    pub(super) fn sample_output(&self, now_ms: u64) {
        let mut standing = self.standing();
        let Standing { workers, throughputs, .. } = &mut *standing;
        for (worker, throughput) in workers.iter().zip(throughputs) {
            let is_busy = worker.load.get(Load::ActiveRequests) > 0;
            if let Some(speed) = throughput.sample(worker.load.output_tokens(), is_busy, now_ms) {
                worker.load.observe(Recent::TokensPerSecond, speed);
                worker.load.observed(now_ms);
            }
        }
    }

    /// Its place is another's, or nobody's: it is probed no more.
    pub(super) fn end_task(&self) {
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }

    /// Whether a task is to wait for its last request: no other does yet.
    pub(super) fn begin_await(&self) -> bool {
        !std::mem::replace(&mut self.standing().is_awaited, true)
    }

    /// Whether it is wanted again, so that the task that waits for its last request ends.
    pub(super) fn ends_await(&self) -> bool {
        let mut standing = self.standing();
        if !standing.is_leaving {
            standing.is_awaited = false;
        }
        !standing.is_leaving
    }

    /// Tokens that all its workers ever made for this host.
    pub(super) fn output_tokens(&self) -> u64 {
        self.standing().workers.iter().map(|worker| worker.load.output_tokens()).sum()
    }

    /// Has its requests given to others, or leaves them again.
    pub(super) fn give_up(&self, given_up: GivenUp) {
        let is_news = self.given_up.send_if_modified(|now| std::mem::replace(now, given_up) != given_up);
        if is_news && given_up != GivenUp::Not {
            let (cause, requests) = (given_up.label(), self.active_requests());
            // Of one that has nothing, nothing is to be told.
            if requests == 0 {
                return;
            }
            metrics::counter!("dynamo_host_given_up_total", "cause" => cause).increment(1);
            tracing::warn!(worker = self.config.name, cause, requests, "worker is given up: others continue what it has");
        }
    }

    /// It drains no more: it keeps what it has, unless it is dead.
    pub(super) fn is_wanted_again(&self) {
        if *self.given_up.borrow() == GivenUp::Drained {
            self.give_up(GivenUp::Not);
        }
    }

    /// Whether it drains for longer than it may, in milliseconds of the host's clock.
    pub(super) fn is_past_grace(&self, grace_ms: u64, now_ms: u64) -> bool {
        let standing = self.standing();
        let grace_ms = standing.grace_ms.unwrap_or(grace_ms);
        standing.draining_since_ms.is_some_and(|since| now_ms.saturating_sub(since) >= grace_ms)
    }

    /// It keeps the KV of one more prompt.
    pub(super) fn keep(&self) -> Kept {
        self.kept.fetch_add(1, Relaxed);
        Kept(Arc::clone(&self.kept))
    }

    /// Prompts whose KV it keeps.
    pub(super) fn kept(&self) -> u32 {
        self.kept.load(Relaxed)
    }

    /// It is given a request.
    pub(super) fn note_given(&self) {
        self.given.fetch_add(1, Relaxed);
    }

    /// Requests that it was ever given.
    pub(super) fn given(&self) -> u64 {
        self.given.load(Relaxed)
    }

    /// Requests on all its workers.
    pub(super) fn active_requests(&self) -> u32 {
        self.standing().workers.iter().map(|worker| worker.load.get(Load::ActiveRequests)).sum()
    }
}

impl Standing {
    /// What requests may know: a worker that is drained or leaves is draining, whatever its probe says.
    pub(super) fn state(&self) -> WorkerState {
        if self.is_drained || self.is_leaving { WorkerState::Draining } else { self.state }
    }

    /// Takes down that it drains from now on, or does not any more.
    pub(super) fn drains(&mut self, drains: bool, grace: Option<Duration>, now_ms: u64) {
        let since = self.draining_since_ms.filter(|_| grace.is_none()).unwrap_or(now_ms);
        self.draining_since_ms = (drains || self.is_leaving).then_some(since);
        let grace_ms = grace.map(|grace| grace.as_millis() as u64).or(self.grace_ms);
        self.grace_ms = grace_ms.filter(|_| drains);
    }

    /// Its source has it no more.
    pub(super) fn leaves(&mut self, now_ms: u64) {
        self.is_leaving = true;
        self.draining_since_ms.get_or_insert(now_ms);
    }

    /// What its last probe or request found.
    pub(super) fn found(&self) -> WorkerState {
        self.state
    }

    /// Sets what was found; returns whether the workers' state is another now.
    pub(super) fn find(&mut self, state: WorkerState) -> bool {
        let before = self.state();
        self.state = state;
        self.show() | (before != self.state())
    }

    /// Brings the state to the workers; returns whether one of them had another.
    pub(super) fn show(&mut self) -> bool {
        let state = self.state();
        let mut is_other = false;
        for worker in &mut self.workers {
            is_other |= std::mem::replace(&mut worker.state, state) != state;
        }
        is_other
    }

    /// Its engine is another, or may be: whether it can hand over is to be seen again.
    pub(super) fn forget_handoffs(&mut self, links: &LinkBoard) {
        (self.tokens, self.proof) = (None, Proof::default());
        self.workers.iter().for_each(|worker| links.forget(worker.load.index()));
    }

    /// Whether it has ever said what it serves.
    pub(super) fn has_listed(&self) -> bool {
        self.cards.is_some()
    }

    /// Longest context that it states for a model or an adapter.
    pub(super) fn max_model_len(&self, name: &str) -> Option<u32> {
        self.cards.iter().flatten().find(|card| card.id == name)?.max_model_len
    }

    /// Makes the workers of all that is known; returns whether they are others than before.
    fn make_workers(&mut self, config: &WorkerConfig, home: &Home<'_>) -> bool {
        let ranks: Vec<u32> = config.ranks.map_or_else(|| self.ranks.clone(), |ranks| (0..ranks).collect());
        self.has_ranks = ranks.len() > 1;
        let old = std::mem::take(&mut self.workers);
        let old_throughputs = std::mem::take(&mut self.throughputs);
        let old_feeds = std::mem::take(&mut self.feeds);
        let old_vitals = std::mem::take(&mut self.vitals);
        let mut is_other = false;
        let known = old.len();
        self.left_out = 0;
        for (model, adapters) in models(config, self.cards.as_deref().unwrap_or_default()) {
            let adapters: Arc<[String]> = adapters.into();
            for &rank in &ranks {
                let spec = WorkerSpec {
                    name: config.name.clone(),
                    model: model.clone(),
                    role: config.role,
                    rank,
                    block_size: config.block_size,
                    labels: config.labels.clone(),
                };
                let before = old.iter().position(|worker| worker.spec.model == spec.model && worker.spec.rank == rank);
                let (load, joined_ms) = match before {
                    Some(place) => {
                        is_other |= *old[place].spec != spec || old[place].adapters != adapters;
                        (Arc::clone(&old[place].load), old[place].joined_ms)
                    }
                    None => {
                        let Some(load) = home.board.claim() else {
                            self.left_out += 1;
                            continue;
                        };
                        home.links.forget(load.index());
                        is_other = true;
                        self.is_other_lineup = true;
                        (load, home.now_ms)
                    }
                };
                let fresh = || Throughput::new(load.output_tokens(), home.now_ms);
                self.throughputs.push(before.and_then(|place| old_throughputs.get(place).copied()).unwrap_or_else(fresh));
                let known_feed = before.and_then(|place| old_feeds.get(place).cloned());
                let known_vitals = before.and_then(|place| old_vitals.get(place).cloned());
                self.vitals.push(known_vitals.unwrap_or_else(|| Vitals::new(&config.name)));
                self.feeds.push(known_feed.unwrap_or_else(|| KvFeed::new(home.indexes, &model, &load)));
                self.workers.push(Worker {
                    id: spec.id(home.namespace),
                    spec: Arc::new(spec),
                    state: self.state(),
                    adapters: Arc::clone(&adapters),
                    handoff: Handoff::default(),
                    joined_ms,
                    load,
                });
            }
        }
        self.is_other_lineup |= self.workers.len() != known;
        is_other | (self.workers.len() != known)
    }
}

/// The models that an engine serves, each with the adapters that it has loaded on it.
fn models(config: &WorkerConfig, cards: &[ModelCard]) -> BTreeMap<String, Vec<String>> {
    let is_adapter = |card: &&ModelCard| card.parent.as_ref().is_some_and(|parent| *parent != card.id);
    let mut models: BTreeMap<String, Vec<String>> = match &config.model {
        Some(model) => BTreeMap::from([(model.clone(), Vec::new())]),
        None => cards.iter().filter(|card| !is_adapter(card)).map(|card| (card.id.clone(), Vec::new())).collect(),
    };
    // A server that gives each model a parent has no adapters that could be told.
    if models.is_empty() {
        return cards.iter().map(|card| (card.id.clone(), Vec::new())).collect();
    }
    let only = (models.len() == 1).then(|| models.keys().next().cloned()).flatten();
    for card in cards.iter().filter(is_adapter) {
        // Some name the base by its path; where there is one base, that is it.
        let parent = card.parent.clone().filter(|parent| models.contains_key(parent)).or_else(|| only.clone());
        if let Some(adapters) =
            parent.and_then(|parent| models.get_mut(&parent)).filter(|_| config.model.as_ref() != Some(&card.id))
        {
            adapters.push(card.id.clone());
        }
    }
    for adapters in models.values_mut() {
        adapters.sort_unstable();
        adapters.dedup();
    }
    models
}
