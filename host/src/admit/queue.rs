//! The queue of a running host: the flow behind one short lock, those who wait for it, and what tells it of the workers.
//!
//! Locks are taken in the order line-up, pools, state, and `booking` alone; none is held over an await. A request that finds room takes the last
//! one alone, once to come and once to go.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use dynamo_host_core::{Admitted, Candidates, Load, RequestFacts, UNKNOWN, Worker};
use dynamo_host_flow::{Action, Arrival, Bounds, Demand, Flow, PoolLoad, Refusal, Room, Ticket};
use serde::Serialize;
use tokio::sync::{Notify, oneshot};

use super::{
    meters::{Meters, Waiting, Waits, class_label},
    pool::{Part, Pool, work},
    pools::Pools,
    room::{Assumed, Limits, Lineup},
};
use crate::{
    clock::Clock,
    config::{Config, QueueConfig, SloConfig},
    place::Way,
    roster::Roster,
    tasks,
};

/// How often room is measured while somebody waits, and while nobody does.
const MEASURE_EVERY: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(1)];
/// How long that may take for each worker of all this time: with many workers it is measured less often.
const MEASURE_EVERY_PER_WORKER: Duration = Duration::from_micros(50);
/// Workers at most for which room is measured when a request ends, where that makes no room by itself.
const MEASURED_AT_ONCE: usize = 256;

/// Who waits, who runs, and how much may.
pub(crate) struct Queue {
    clock: Clock,
    roster: Arc<Roster>,
    settings: ArcSwap<Settings>,
    pools: Pools,
    limits: Limits,
    lineup: Mutex<Lineup>,
    /// Of the fleet that room was last measured for.
    generation: AtomicU64,
    state: Mutex<State>,
    /// Held while a worker is chosen that has room, and booked.
    booking: Mutex<()>,
    /// Something may have to be done sooner than was thought.
    nudge: Notify,
    pub(super) meters: Meters,
}

/// What the configuration says.
pub(crate) struct Settings {
    queue: QueueConfig,
    slo: SloConfig,
    timeout: Duration,
    hold: Duration,
}

struct State {
    flow: Flow,
    waiting: HashMap<Ticket, Waiter>,
    rooms: HashMap<u64, Room>,
    /// When the task looks again, in milliseconds of the host's clock.
    looks_at_ms: u64,
}

struct Waiter {
    tell: oneshot::Sender<Told>,
    pool: Arc<Pool>,
    class: Box<str>,
    tenant: Option<u64>,
    /// It is counted as waiting until it is told, not until it hears that: so the metrics keep within the bounds as well.
    waits: Option<Waits>,
}

/// What a request that waits is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// It runs.
    Start,
    /// It has waited for too long.
    Late,
    /// There is no worker, and none came back.
    NoWorker,
    /// The queue is full, and another with a better claim has its place.
    Displaced,
}

/// What became of a request that came.
pub(super) enum Came {
    /// It runs.
    Started(Ticket),
    /// It is told when it may.
    Waits(Ticket, oneshot::Receiver<Told>),
    /// It cannot wait.
    Refused(Refusal),
}

impl Settings {
    fn of(config: &Config) -> Self {
        let timeout = config.queue.timeout(&config.limits);
        Self { queue: config.queue.clone(), slo: config.slo.clone(), timeout, hold: config.health.hold().min(timeout) }
    }

    /// How a request is let in where no policy says so.
    pub(super) fn natively(&self, facts: &RequestFacts) -> Admitted {
        let tenant = facts.tenant.as_deref().and_then(|tenant| self.queue.tenants.get(tenant));
        let class = facts.class.clone().or_else(|| tenant?.class.as_deref().map(Arc::from));
        let of_class = class.as_deref().and_then(|class| self.queue.classes.get(class)).copied().unwrap_or_default();
        Admitted {
            class,
            tier: of_class.tier,
            class_weight: of_class.weight,
            tenant_weight: tenant.map_or(1.0, |tenant| tenant.weight),
            priority: facts.priority as f32,
            deadline_ms: None,
        }
    }

    /// Puts where a request stands into its facts, and what its latencies are to be there.
    pub(super) fn stand(&self, facts: &mut RequestFacts, admitted: &Admitted) {
        facts.tier = admitted.tier;
        facts.class.clone_from(&admitted.class);
        facts.slo = self.slo.of(&facts.model, facts.class.as_deref());
    }

    fn bounds(&self) -> Bounds {
        Bounds { max_requests: self.queue.max_requests, max_tokens: self.queue.max_tokens }
    }

    fn assumed(&self) -> Assumed {
        Assumed { max_running: self.queue.max_running, prefill_steps: self.queue.prefill_steps }
    }
}

impl Queue {
    /// The queue in front of a roster's workers, and the task that looks after it.
    pub(crate) fn start(roster: &Arc<Roster>, clock: Clock, config: &Config) -> Arc<Self> {
        let queue = Arc::new(Self::new(roster, clock, config));
        queue.measure();
        tasks::spawn("queue", keep_looking(Arc::clone(&queue)));
        queue
    }

    fn new(roster: &Arc<Roster>, clock: Clock, config: &Config) -> Self {
        let settings = Settings::of(config);
        let flow = Flow::new(settings.bounds());
        Self {
            clock,
            roster: Arc::clone(roster),
            settings: ArcSwap::from_pointee(settings),
            pools: Pools::default(),
            limits: Limits::new(config.limits.max_workers),
            lineup: Mutex::default(),
            generation: AtomicU64::new(u64::MAX),
            state: Mutex::new(State { flow, waiting: HashMap::new(), rooms: HashMap::new(), looks_at_ms: 0 }),
            booking: Mutex::default(),
            nudge: Notify::new(),
            meters: Meters::default(),
        }
    }

    /// Takes over another configuration, for those that come from now on.
    pub(crate) fn configure(&self, config: &Config) {
        let settings = Settings::of(config);
        lock(&self.state).flow.set_bounds(settings.bounds());
        self.settings.store(Arc::new(settings));
        self.measure();
    }

    pub(super) fn settings(&self) -> Arc<Settings> {
        self.settings.load_full()
    }

    pub(super) fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }

    /// A model's pool.
    pub(super) fn pool(&self, model: &str) -> Arc<Pool> {
        self.pools.of(model, self.now_ms())
    }

    /// How much waits and runs in a pool.
    pub(super) fn load(&self, pool: &Pool) -> PoolLoad {
        lock(&self.state).flow.pool(pool.key, self.now_ms())
    }

    /// The same, with the wait of one of this standing.
    pub(super) fn load_for(&self, pool: &Pool, tenant: u64, admitted: &Admitted) -> PoolLoad {
        lock(&self.state).flow.pool_for(pool.key, tenant, admitted, self.now_ms())
    }

    /// What is known of each role's workers must not be old.
    pub(super) fn refresh(&self, pool: &Pool) {
        if pool.is_older_than(MEASURE_EVERY[0].as_millis() as u64, self.now_ms()) {
            self.measure();
        }
    }

    /// Room must be that of the workers that the request sees.
    pub(super) fn catch_up(&self) {
        if self.generation.load(Relaxed) != self.roster.snapshot().fleet().generation() {
            self.measure();
        }
    }

    /// A request comes.
    pub(super) fn come(&self, pool: &Arc<Pool>, facts: &RequestFacts, admitted: Admitted, settings: &Settings) -> Came {
        let now_ms = self.now_ms();
        let patience_ms = admitted.deadline_ms.map_or(u64::MAX, u64::from).min(settings.timeout.as_millis() as u64);
        let deadline_ms = (now_ms + patience_ms).min(facts.deadline_ms.unwrap_or(u64::MAX));
        let class = class_label(admitted.class.as_deref()).into();
        let demand = Demand {
            pool: pool.key,
            tenant: facts.tenant_key().unwrap_or(0),
            admitted,
            prompt_tokens: facts.prompt.tokens,
            work: work(facts),
            deadline_ms,
        };
        let mut state = lock(&self.state);
        match state.flow.arrive(demand, now_ms) {
            Ok(Arrival::Started(ticket)) => Came::Started(ticket),
            Ok(Arrival::Queued(ticket)) => {
                let (tell, told) = oneshot::channel();
                let waiter = Waiter { tell, pool: Arc::clone(pool), class, tenant: facts.tenant_key(), waits: None };
                state.waiting.insert(ticket, waiter);
                if deadline_ms < state.looks_at_ms || state.waiting.len() == 1 {
                    self.nudge.notify_one();
                }
                // It may have taken another's place.
                state.act(now_ms);
                Came::Waits(ticket, told)
            }
            Err(refusal) => Came::Refused(refusal),
        }
    }

    /// Counts one that was to wait, if it still does. Apart from [`come`](Self::come), since metrics are looked up by their names.
    pub(super) fn count_waiting(&self, ticket: Ticket, waiting: Waiting) {
        if let Some(waiter) = lock(&self.state).waiting.get_mut(&ticket) {
            waiter.waits = Some(waiting.count());
        }
    }

    /// The prompt of one that runs has been computed.
    pub(super) fn prefilled(&self, ticket: Ticket) {
        let now_ms = self.now_ms();
        let mut state = lock(&self.state);
        state.flow.prefilled(ticket);
        state.act(now_ms);
    }

    /// One that ran has ended, and was this many tokens of work; or one that waited is gone.
    pub(super) fn go(&self, ticket: Ticket, pool: &Pool, work: u32) {
        let now_ms = self.now_ms();
        {
            let mut state = lock(&self.state);
            state.waiting.remove(&ticket);
            state.flow.finish(ticket, work, now_ms);
            if !pool.is_strained.load(Relaxed) {
                return state.act(now_ms);
            }
        }
        // What ended may have run on a worker that takes nothing more: who is next is decided when that is known.
        if lock(&self.lineup).count() <= MEASURED_AT_ONCE {
            self.measure();
        }
    }

    /// Measures the room that there is, tells it to the flow, and starts whoever may run now.
    fn measure(&self) {
        let settings = self.settings();
        let now_ms = self.now_ms();
        let mut lineup = lock(&self.lineup);
        // Read behind the lock: of two that measure at once, the later one has the later fleet.
        let snapshot = self.roster.snapshot();
        let gone = if lineup.is_of(&snapshot) { Vec::new() } else { lineup.take(&snapshot, |model| self.pool(model)) };
        gone.iter().for_each(|pool| pool.left());
        let rooms = lineup.measure(settings.assumed(), &self.limits, now_ms);
        let mut state = lock(&self.state);
        for (pool, room) in gone.into_iter().map(|pool| (pool, Room::default())).chain(rooms) {
            match room.workers {
                0 => drop(pool.empty_since_ms.compare_exchange(u64::MAX, now_ms, Relaxed, Relaxed)),
                _ => pool.empty_since_ms.store(u64::MAX, Relaxed),
            }
            if state.rooms.get(&pool.key) != Some(&room) {
                state.flow.set_room(pool.key, room);
                state.rooms.insert(pool.key, room);
            }
        }
        state.act(now_ms);
        let State { rooms, .. } = &mut *state;
        rooms.retain(|_, room| *room != Room::default());
        drop(state);
        self.pools.forget(now_ms);
        self.generation.store(snapshot.fleet().generation(), Relaxed);
    }

    /// Tells those who wait for a worker that did not come back in time; returns when to look again.
    fn look(&self) -> Duration {
        let (hold_ms, now_ms) = (self.settings().hold.as_millis() as u64, self.now_ms());
        let workers = lock(&self.lineup).count();
        let mut state = lock(&self.state);
        let is_over = |pool: &Pool| {
            let since = pool.empty_since_ms.load(Relaxed);
            since != u64::MAX && now_ms >= since.saturating_add(hold_ms)
        };
        let hopeless: Vec<Ticket> =
            state.waiting.iter().filter(|(_, waiter)| is_over(&waiter.pool)).map(|(&ticket, _)| ticket).collect();
        for ticket in hopeless {
            state.flow.finish(ticket, 0, now_ms);
            state.tell(ticket, Told::NoWorker);
        }
        state.act(now_ms);
        let [busy, idle] = MEASURE_EVERY;
        let pause = if state.waiting.is_empty() { idle } else { busy }.max(MEASURE_EVERY_PER_WORKER * workers as u32);
        let wakes_at = state.flow.wake_at().unwrap_or(u64::MAX).max(now_ms + 1);
        state.looks_at_ms = wakes_at.min(now_ms + pause.as_millis() as u64);
        Duration::from_millis(state.looks_at_ms - now_ms)
    }

    /// Those of the candidates that have room, while some have: an engine that is full would only have the request wait.
    pub(crate) fn with_room(&self, candidates: Arc<Candidates>, facts: &RequestFacts) -> Arc<Candidates> {
        if !self.may_be_full(facts) {
            return candidates;
        }
        candidates.kept(|slot, active| self.limits.has_room(slot, active)).unwrap_or(candidates)
    }

    /// Books a request on the first worker of its ways that has room, which becomes the first of them all; if none has, on the first.
    /// Whoever decided at the same time saw the same room: those who may fill a worker take turns, so that none is given more
    /// than it runs while another has room.
    pub(crate) fn book<B>(
        &self,
        ways: &mut [Way],
        candidates: &Candidates,
        facts: &RequestFacts,
        book: impl FnOnce(&Worker) -> B,
    ) -> Option<B> {
        let _turn = self.may_be_full(facts).then(|| {
            let turn = lock(&self.booking);
            ways.sort_by_key(|way| {
                let load = &candidates.worker(way.first()).load;
                !self.limits.has_room(load.index(), load.get(Load::ActiveRequests))
            });
            turn
        });
        ways.first().map(|way| book(candidates.worker(way.first())))
    }

    /// Whether some worker could be full, and the request is one that looks for room: not one that is counted only, and not
    /// one that has had its place already and must go on somewhere.
    fn may_be_full(&self, facts: &RequestFacts) -> bool {
        if facts.attempt > 0 || !super::takes_room(facts.endpoint) {
            return false;
        }
        let pool = self.pool(&facts.model);
        // The request itself has its permit by now.
        pool.running.load(Relaxed) > pool.least.load(Relaxed)
    }

    /// What waits, for people and tools.
    pub(crate) fn report(&self) -> QueueReport {
        let (settings, now_ms) = (self.settings(), self.now_ms());
        let pools = self.pools.all();
        let state = lock(&self.state);
        let mut waiting: HashMap<u64, [BTreeMap<String, u32>; 2]> = HashMap::new();
        for waiter in state.waiting.values() {
            let [classes, tenants] = waiting.entry(waiter.pool.key).or_default();
            *classes.entry(waiter.class.to_string()).or_default() += 1;
            let tenant = waiter.tenant.map_or_else(|| "none".to_owned(), |key| format!("{key:016x}"));
            *tenants.entry(tenant).or_default() += 1;
        }
        let of_pool = |pool: &Arc<Pool>| {
            let [classes, tenants] = waiting.remove(&pool.key).unwrap_or_default();
            let known = |ms: f32| Some(ms).filter(|ms| ms.is_finite());
            let it = pool.state(state.flow.pool(pool.key, now_ms), now_ms);
            PoolReport {
                model: pool.model.clone(),
                ready_workers: it.ready_workers,
                running: it.running_requests,
                free: Some(it.free_requests).filter(|&free| free != UNKNOWN),
                queued: it.queued_requests,
                queued_tokens: it.queued_tokens,
                oldest_age_ms: it.oldest_age_ms,
                predicted_wait_ms: known(it.predicted_wait_ms),
                shed_rate: it.shed_rate,
                ttft_p50_ms: known(it.ttft.at(50.0)),
                ttft_p99_ms: known(it.ttft.at(99.0)),
                itl_p50_ms: known(it.itl.at(50.0)),
                itl_p99_ms: known(it.itl.at(99.0)),
                roles: pool.parts(),
                classes,
                tenants,
            }
        };
        let pools = pools.iter().map(of_pool).collect();
        QueueReport { max_requests: settings.queue.max_requests, max_tokens: settings.queue.max_tokens, pools }
    }
}

impl State {
    /// Does what is to be done now.
    fn act(&mut self, now_ms: u64) {
        // Nobody waits: nothing is to be done.
        while !self.waiting.is_empty()
            && let Some(action) = self.flow.select(now_ms)
        {
            self.flow.apply(action, now_ms);
            match action {
                Action::Start(ticket) => self.tell(ticket, Told::Start),
                Action::Expire(ticket) => self.tell(ticket, Told::Late),
                Action::Refuse(ticket) => self.tell(ticket, Told::Displaced),
            }
        }
    }

    fn tell(&mut self, ticket: Ticket, told: Told) {
        if let Some(waiter) = self.waiting.remove(&ticket) {
            // One that has just left gives its place back itself.
            let _ = waiter.tell.send(told);
        }
    }
}

/// Looks after the queue, until the task is ended.
async fn keep_looking(queue: Arc<Queue>) {
    let mut changes = queue.roster.changes();
    loop {
        let pause = queue.look();
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = queue.nudge.notified() => continue,
            changed = changes.changed() => if changed.is_err() { return },
        }
        queue.measure();
    }
}

/// What waits.
#[derive(Debug, Serialize)]
pub(crate) struct QueueReport {
    max_requests: u32,
    max_tokens: u64,
    pools: Vec<PoolReport>,
}

/// What waits for one model.
#[derive(Debug, Serialize)]
struct PoolReport {
    model: String,
    ready_workers: u32,
    running: u32,
    /// Requests that could start at once; `None`: nothing limits them.
    free: Option<u32>,
    queued: u32,
    queued_tokens: u32,
    oldest_age_ms: u32,
    /// `None`: it cannot be said; so of the latencies, which are of the last minute.
    predicted_wait_ms: Option<f32>,
    /// Share of the last seconds' requests that were not let in, or waited for nothing.
    shed_rate: f32,
    /// From a request's start to its first token.
    ttft_p50_ms: Option<f32>,
    ttft_p99_ms: Option<f32>,
    itl_p50_ms: Option<f32>,
    itl_p99_ms: Option<f32>,
    /// The workers of each role, those first where requests begin; none where all are aggregated.
    roles: Vec<Part>,
    /// Requests that wait, by class.
    classes: BTreeMap<String, u32>,
    /// The same by the key of their tenant, as receipts have it.
    tenants: BTreeMap<String, u32>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
