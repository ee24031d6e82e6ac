//! A run: one trace, one fleet, one policy, in virtual time.

mod admission;
mod books;
mod faults;
mod handoff;
mod placing;
mod scenario;
mod service;
mod steps;
mod tally;

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use dynamo_engine_mock::model::{Event, Fetch, KvLinks, Port, TransferId};
use dynamo_host_core::{Fleet, KvEvent, LinkBoard, LoadBoard, SlotName, load::READINGS_PER_SECOND};
use dynamo_host_index::{IndexLimits, PrefixIndexes};
use dynamo_host_policy::{Limits, Now, Pinned, PolicyRuntime, PolicyVersion, RoutingSlot, RuntimeError};

use self::service::Service;
pub use self::{
    faults::FaultTally,
    scenario::{Contender, Links, Options, SimulationError},
    service::{QueueTally, TenantTally},
    tally::{HandoffTally, PoolTally, Tally},
};
use crate::{
    engine::Engine,
    outcome::Outcomes,
    queue::{Happening, Queue},
    requests::{Before, Placed, Waiting},
    samples::Random,
    trace::{Trace, TraceRequest},
};

/// Where virtual time begins by the wall clock: a whole number, long ago.
const UNIX_START_MS: u64 = 1_700_000_000_000;
/// Keeps the seed of faults apart from others.
const FAULTS: u64 = 0xfa01;
/// Points of the load over time.
const SAMPLES: u32 = 240;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Served,
    /// By the policy.
    Rejected,
    /// After its last attempt.
    Failed,
    /// Its client left.
    Left,
    /// Its wait was over its deadline.
    Expired,
    /// The queue was full, when it came or when one with a better claim did.
    Refused,
    /// By the admission policy.
    Shed,
}

/// Runs a trace. `progress` is told now and then how many requests have ended.
///
/// # Errors
/// If the run cannot begin.
pub fn simulate(
    trace: &Trace,
    options: &Options,
    contender: &Contender,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Tally, SimulationError> {
    options.check(trace)?;
    let mut run = Run::new(trace, options, contender)?;
    run.run(progress)?;
    Ok(run.finish())
}

struct Run<'a> {
    trace: &'a [TraceRequest],
    options: &'a Options,
    now: Duration,
    /// The same moment, for the sandbox.
    clock: Arc<AtomicU64>,
    queue: Queue,
    /// The next request of the trace.
    next: usize,
    engines: Vec<Engine>,
    /// The engine of each slot of the load board.
    by_slot: Vec<u32>,
    fleet: Fleet,
    /// What the host knows of the ways between workers …
    links: Arc<LinkBoard>,
    /// … and what they are.
    wires: KvLinks,
    /// What is on its way: whose it is, how many tokens, and since when.
    under_way: HashMap<TransferId, (u32, u32, Duration)>,
    /// When the next of it may have come.
    transfers_due: Option<Duration>,
    fetches: Vec<Fetch>,
    indexes: Arc<PrefixIndexes>,
    /// Cache events under way, oldest first.
    kv_events: Vec<VecDeque<Vec<KvEvent>>>,
    slot: RoutingSlot,
    pinned: Pinned,
    version: Option<Arc<PolicyVersion>>,
    waiting: HashMap<u32, Waiting>,
    placed: Vec<Option<Box<Placed>>>,
    /// How many of them there are.
    on_engines: u64,
    /// Requests that have not ended, of those that have come.
    open: u64,
    service: Option<Service<'a>>,
    /// What faults are left to.
    chance: Random,
    /// Requests that wait for any worker at all.
    stranded: Vec<u32>,
    /// Everything that has happened.
    events: u64,
    outcomes: Outcomes,
    /// Engines that begin a step when all that happens at this moment has happened.
    ready: Vec<u32>,
    tokens: Vec<Event>,
    tally: Tally,
    begun: Instant,
    _runtime: Option<PolicyRuntime>,
}

impl<'a> Run<'a> {
    fn new(trace: &'a Trace, options: &'a Options, contender: &Contender) -> Result<Self, SimulationError> {
        let clock = Arc::new(AtomicU64::new(0));
        let slot = RoutingSlot::new(SlotName::ROUTING);
        let (runtime, version) = match &contender.policy {
            None => (None, None),
            Some((bytes, settings)) => {
                let runtime = runtime(&clock)?;
                let version = runtime
                    .load(bytes, settings, Arc::clone(slot.state()))
                    .map_err(|source| SimulationError::Policy { name: contender.name.clone(), source })?;
                slot.activate(Some(Arc::clone(&version)));
                (Some(runtime), Some(version))
            }
        };
        let board = LoadBoard::new(options.workers.len() as u32);
        // Twice what engines hold: events come late, so that what was pushed out is still there when what pushed it comes.
        let held: u64 = options.workers.iter().map(|worker| u64::from(worker.profile.kv_blocks)).sum();
        let indexes = PrefixIndexes::with_limits(IndexLimits { max_blocks: 2 * held });
        let engines: Vec<Engine> =
            options.workers.iter().map(|spec| Engine::new(spec, &board, &indexes)).collect::<Result<_, _>>()?;
        let mut by_slot = vec![0; engines.len()];
        engines.iter().enumerate().for_each(|(number, engine)| by_slot[engine.load.index() as usize] = number as u32);
        let port = Port::both(options.links.bytes_per_second as u64);
        let service = options.queueing.as_ref().map(|queueing| Service::new(queueing, options, &clock)).transpose()?;
        let policy = version.as_ref().map_or_else(|| "native".to_owned(), |version| version.label().to_string());
        Ok(Self {
            trace: &trace.requests,
            options,
            now: Duration::ZERO,
            clock,
            queue: Queue::default(),
            next: 0,
            kv_events: engines.iter().map(|_| VecDeque::new()).collect(),
            tally: Tally::new(&contender.name, policy, engines.len()),
            wires: KvLinks::new(vec![port; engines.len()], options.links.latency),
            fleet: fleet(1, &engines),
            engines,
            by_slot,
            links: Arc::default(),
            under_way: HashMap::new(),
            transfers_due: None,
            fetches: Vec::new(),
            indexes,
            pinned: slot.pin(),
            slot,
            version,
            waiting: HashMap::new(),
            placed: (0..trace.requests.len()).map(|_| None).collect(),
            on_engines: 0,
            open: 0,
            service,
            chance: Random::new(options.seed ^ FAULTS),
            stranded: Vec::new(),
            events: 0,
            outcomes: Outcomes::default(),
            ready: Vec::new(),
            tokens: Vec::new(),
            begun: Instant::now(),
            _runtime: runtime,
        })
    }

    fn run(&mut self, progress: &(dyn Fn(u64) + Sync)) -> Result<(), SimulationError> {
        self.begin();
        while let Some(at) = self.next_moment() {
            self.now = at;
            self.clock.store(self.now_ms(), Relaxed);
            while let Some(what) = self.queue.pop_until(at) {
                self.happen(what);
                self.serve();
                self.check()?;
            }
            while self.next < self.trace.len() && self.arrival(self.next) <= at {
                self.arrive(self.next as u32);
                self.next += 1;
                self.serve();
                self.check()?;
                progress(self.tally.ended());
            }
            self.begin_steps();
        }
        progress(self.tally.ended());
        self.audit_end()
    }

    /// Queues what repeats itself.
    fn begin(&mut self) {
        let count = self.engines.len() as u32;
        let span = self.arrival(self.trace.len().saturating_sub(1));
        self.tally.sample_every = (span / SAMPLES).max(Duration::from_millis(100));
        self.queue.push(Duration::ZERO, Happening::Sample);
        for worker in 0..count {
            self.engines[worker as usize].report_load(0);
            // Not all at once, as the host does not read them at once either.
            self.queue.push(self.load_interval() * (worker + 1) / count, Happening::LoadReport { worker });
        }
        self.begin_faults();
        self.measure_room();
    }

    /// When anything happens next; `None` when all requests have ended.
    fn next_moment(&self) -> Option<Duration> {
        let arrival = (self.next < self.trace.len()).then(|| self.arrival(self.next));
        if arrival.is_none() && self.open == 0 {
            return None;
        }
        [arrival, self.queue.next_at()].into_iter().flatten().min()
    }

    fn arrival(&self, request: usize) -> Duration {
        self.trace.get(request).map_or(Duration::ZERO, |request| request.at.div_f64(self.options.speed))
    }

    fn load_interval(&self) -> Duration {
        let least = Duration::from_secs_f64(self.engines.len() as f64 / READINGS_PER_SECOND);
        self.options.load_interval.max(least)
    }

    fn now_ms(&self) -> u64 {
        self.now.as_millis() as u64
    }

    fn happen(&mut self, what: Happening) {
        match what {
            Happening::StepEnd { worker } => self.end_step(worker),
            Happening::Transfers => self.end_transfers(),
            Happening::Lease { request } => self.end_lease(request),
            Happening::Wake => self.service.iter_mut().for_each(Service::wake),
            Happening::Leave { request } => self.leave(request),
            Happening::Fault { kind } => self.fail(kind),
            Happening::Stalled { worker } => self.stalled(worker),
            Happening::Recover { worker } => self.recover(worker),
            Happening::KvEvents { worker } => {
                let engine = &self.engines[worker as usize];
                let events = self.kv_events[worker as usize].pop_front();
                events.iter().flatten().for_each(|event| engine.kv.apply(event));
            }
            Happening::LoadReport { worker } => {
                let now_ms = self.now_ms();
                self.engines[worker as usize].report_load(now_ms);
                self.queue.push(self.now + self.load_interval(), what);
            }
            Happening::AskAgain { request } => self.place(request),
            Happening::Observe => {
                if let Some(version) = &self.version
                    && let Some(at) = self.outcomes.bring(version, self.now)
                {
                    self.queue.push(at, Happening::Observe);
                }
            }
            Happening::ObserveAdmitted => self.bring_to_admission(),
            Happening::Sample => {
                self.tally.sample(&self.engines);
                self.queue.push(self.now + self.tally.sample_every, what);
            }
        }
    }

    fn arrive(&mut self, number: u32) {
        self.open += 1;
        self.tally.come(&self.trace[number as usize], self.arrival(number as usize));
        let waiting = self.beginning(number, Before::default());
        self.waiting.insert(number, waiting);
        self.enter(number);
    }

    fn finish(mut self) -> Tally {
        self.tally.events = self.events;
        self.tally.queue = self.take_queue_tally();
        self.tally.close(&self.engines, self.begun.elapsed());
        self.tally.refused_blocks = self.indexes.stats().refused;
        self.tally
    }
}

/// The fleet as it is now.
fn fleet(generation: u64, engines: &[Engine]) -> Fleet {
    let workers = engines.iter().enumerate().map(|(number, engine)| engine.worker(number)).collect();
    Fleet::new(generation, workers).expect("names differ")
}

/// The sandbox in virtual time. The backstop by wall time is set far off: it would make a run depend on the machine.
fn runtime(clock: &Arc<AtomicU64>) -> Result<PolicyRuntime, RuntimeError> {
    let clock = Arc::clone(clock);
    let tell = move || {
        let monotonic_ms = clock.load(Relaxed);
        Now { monotonic_ms, unix_ms: UNIX_START_MS + monotonic_ms }
    };
    let limits = Limits { backstop: Duration::from_secs(60), ..Limits::default() };
    PolicyRuntime::new(limits, Arc::new(tell), None)
}
