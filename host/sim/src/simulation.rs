//! A run: one trace, one fleet, one policy, in virtual time.

mod admission;
mod faults;
mod service;
mod tally;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use dynamo_engine_mock::{
    Profile, ProfileError,
    model::{Event, FinishReason, Sequence},
};
use dynamo_host_core::{
    Among, Candidates, Fleet, Held, LoadBoard, SlotName,
    answer::{MAX_HOLD, Verdict},
    load::{InFlight, READINGS_PER_SECOND, Recent},
};
use dynamo_host_index::{IndexLimits, PrefixIndexes, Prompt, Salt};
use dynamo_host_policy::{
    DecidedBy, Decision, Limits, LoadError, Now, OutcomeRow, Pinned, PolicyRuntime, PolicyVersion, RouteCall, RoutingSlot,
    RuntimeError,
};

use self::service::Service;
pub use self::{
    faults::FaultTally,
    service::{QueueTally, TenantTally},
    tally::Tally,
};
use crate::{
    engine::{Engine, MODEL},
    faults::Faults,
    outcome::Outcomes,
    queue::{Happening, Queue},
    queueing::Queueing,
    requests::{Before, Place, Placed, Waiting, facts, ms, shared_tokens},
    samples::Random,
    trace::{Trace, TraceRequest},
};

/// Where virtual time begins by the wall clock: a whole number, long ago.
const UNIX_START_MS: u64 = 1_700_000_000_000;
/// Keeps the seed of faults apart from others.
const FAULTS: u64 = 0xfa01;
/// Points of the load over time.
const SAMPLES: u32 = 240;

/// What is simulated.
#[derive(Clone, Debug)]
pub struct Options {
    /// The engines, one for each worker.
    pub workers: Vec<Profile>,
    /// Arrivals come this many times as fast as in the trace.
    pub speed: f64,
    /// Seed of all that is left to chance.
    pub seed: u64,
    /// How often each engine's load is read.
    pub load_interval: Duration,
    /// How long a cache event takes from the end of the engine's step to the index.
    pub kv_event_lag: Duration,
    /// The queue in front of the engines; `None`: there is none, and requests wait inside engines.
    pub queueing: Option<Queueing>,
    /// How engines fail; `None`: they do not.
    pub faults: Option<Faults>,
    /// After how many events all books are checked in full; the sums are after each. `None`: never.
    pub audit_every: Option<u64>,
}

impl Options {
    /// Engines that do not fail, with no queue before them.
    #[must_use]
    pub fn new(workers: Vec<Profile>) -> Self {
        let (load_interval, kv_event_lag) = (Duration::from_secs(1), Duration::from_millis(5));
        let (speed, seed) = (1.0, 0);
        Self { workers, speed, seed, load_interval, kv_event_lag, queueing: None, faults: None, audit_every: None }
    }
}

/// What decides in a run.
#[derive(Clone, Debug)]
pub struct Contender {
    /// Its name in reports.
    pub name: String,
    /// A component and its settings; the native fallback if `None`.
    pub policy: Option<(Vec<u8>, String)>,
}

/// A run that cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum SimulationError {
    /// The sandbox.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// A policy that cannot be loaded.
    #[error("policy {name}: {source}")]
    Policy {
        /// Its name in the report.
        name: String,
        /// Why.
        source: LoadError,
    },
    /// An engine that cannot be.
    #[error("the engine profile: {0}")]
    Profile(#[from] ProfileError),
    /// Requests that no worker could ever run.
    #[error(
        "the trace has a request of {tokens} tokens, more than max_model_len={max_model_len} of the engine profile; \
         raise it (and kv_blocks with it), for example with --workers {workers},max_model_len={tokens}"
    )]
    TooLong {
        /// The longest request.
        tokens: u32,
        /// What the engine takes.
        max_model_len: u32,
        /// Workers.
        workers: usize,
    },
    /// No worker at all.
    #[error("there is no worker; simulate at least 1")]
    NoWorker,
    /// The books do not agree: a mistake of the simulator or of the queue.
    #[error("after {events} events, at {at:?}: {what}")]
    Books {
        /// Events so far.
        events: u64,
        /// Virtual time.
        at: Duration,
        /// What does not agree.
        what: String,
    },
    /// The arrivals' speed.
    #[error("speed {0} is not possible; use a number above 0")]
    Speed(f64),
}

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
    check(trace, options)?;
    let mut run = Run::new(trace, options, contender)?;
    run.run(progress)?;
    Ok(run.finish())
}

fn check(trace: &Trace, options: &Options) -> Result<(), SimulationError> {
    if !(options.speed.is_finite() && options.speed > 0.0) {
        return Err(SimulationError::Speed(options.speed));
    }
    let max_model_len = options.workers.iter().map(|profile| profile.max_model_len).min().ok_or(SimulationError::NoWorker)?;
    let (tokens, workers) = (trace.longest(), options.workers.len());
    if tokens > max_model_len { Err(SimulationError::TooLong { tokens, max_model_len, workers }) } else { Ok(()) }
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
    /// The engine of each row; empty if there is no candidate.
    rows: Vec<u32>,
    candidates: Arc<Candidates>,
    /// Of the fleet that they are of.
    generation: u64,
    indexes: Arc<PrefixIndexes>,
    /// Cache events under way, oldest first.
    kv_events: Vec<std::collections::VecDeque<Vec<dynamo_host_core::KvEvent>>>,
    slot: RoutingSlot,
    pinned: Pinned,
    version: Option<Arc<PolicyVersion>>,
    waiting: std::collections::HashMap<u32, Waiting>,
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
        let held: u64 = options.workers.iter().map(|profile| u64::from(profile.kv_blocks)).sum();
        let indexes = PrefixIndexes::with_limits(IndexLimits { max_blocks: 2 * held });
        let engines: Vec<Engine> =
            options.workers.iter().map(|profile| Engine::new(profile, &board, &indexes)).collect::<Result<_, _>>()?;
        let workers = engines.iter().enumerate().map(|(number, engine)| engine.worker(number)).collect();
        let fleet = Fleet::new(1, workers).expect("names differ");
        let candidates = fleet.candidates(MODEL, Among::Everyone).ok_or(SimulationError::NoWorker)?;
        let mut by_slot = vec![0; engines.len()];
        engines.iter().enumerate().for_each(|(number, engine)| by_slot[engine.load.index() as usize] = number as u32);
        let rows = candidates.iter().map(|worker| by_slot[worker.load.index() as usize]).collect();
        let service = options.queueing.as_ref().map(|queueing| Service::new(queueing, options, &clock)).transpose()?;
        let policy = version.as_ref().map_or_else(|| "native".to_owned(), |version| version.label().to_string());
        Ok(Self {
            trace: &trace.requests,
            options,
            now: Duration::ZERO,
            clock,
            queue: Queue::default(),
            next: 0,
            kv_events: engines.iter().map(|_| std::collections::VecDeque::new()).collect(),
            tally: Tally::new(&contender.name, policy, engines.len()),
            engines,
            rows,
            candidates,
            generation: 1,
            indexes,
            pinned: slot.pin(),
            slot,
            version,
            waiting: std::collections::HashMap::new(),
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
        Ok(())
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
        let request = &self.trace[number as usize];
        let facts = facts(number, request, self.now_ms());
        let prompt = Prompt::new(Salt::new(MODEL, None, None), shared_tokens(request), true);
        self.open += 1;
        self.tally.come(request, self.arrival(number as usize));
        self.waiting.insert(number, Waiting { facts, prompt, holds: 0, before: Before::default() });
        self.enter(number);
    }

    /// Asks the policy where a request shall go, as `host/src/request.rs` does.
    fn place(&mut self, number: u32) {
        if self.rows.is_empty() {
            return self.stranded.push(number);
        }
        let Some(mut waiting) = self.waiting.remove(&number) else { return };
        waiting.facts.holds = waiting.holds;
        let begun = Instant::now();
        let overlap = Arc::new(self.indexes.overlap(MODEL, &waiting.prompt));
        let now_ms = self.now_ms();
        let call = RouteCall {
            request: Arc::new(waiting.facts.clone()),
            candidates: Arc::clone(&self.candidates),
            overlap: Some(Arc::clone(&overlap)),
            links: None,
            now_ms,
            unix_ms: UNIX_START_MS + now_ms,
            seed: self.options.seed.wrapping_add(waiting.facts.decision_id) ^ u64::from(waiting.holds) << 60,
            explain: false,
        };
        let decision = self.slot.decide(&self.pinned, call);
        self.tally.decided(&decision, begun.elapsed());
        let Decision { verdict, by, .. } = decision;
        match verdict {
            Verdict::Place(ranking) => {
                let row = ranking.rows()[0];
                let cached = overlap.of(self.candidates.worker(row).load.index()).map_or(0, Held::total);
                self.dispatch(number, waiting, row, cached, &by);
            }
            Verdict::PlacePairs(_) => unreachable!("all workers are aggregated"),
            Verdict::Hold { at_most_ms } => {
                waiting.holds += 1;
                let pause = Duration::from_millis(u64::from(at_most_ms.max(1))).min(MAX_HOLD);
                self.waiting.insert(number, waiting);
                self.queue.push(self.now + pause, Happening::AskAgain { request: number });
            }
            Verdict::Reject(_) => {
                self.tally.rejected += 1;
                self.gone(number, 0, End::Rejected);
            }
        }
    }

    fn dispatch(&mut self, number: u32, waiting: Waiting, row: u32, cached: u32, by: &DecidedBy) {
        let (at, now_ms) = (self.arrival(number as usize), self.now_ms());
        let worker = self.rows[row as usize];
        let engine = &mut self.engines[worker as usize];
        let tokens = waiting.facts.prompt.tokens;
        let in_flight = InFlight::dispatch(Arc::clone(&engine.load), tokens, tokens.saturating_sub(cached), now_ms);
        let is_observed = by.version().is_some_and(|version| version.observes());
        let sequence = Sequence {
            prompt: Arc::clone(waiting.prompt.tokens()),
            // Its tokens then tell whose they are, and no two requests' are alike at any place.
            first_output_token: number,
            output_tokens: self.trace[number as usize].output_tokens - waiting.before.tokens,
            finish: FinishReason::Stop,
            salt: 0,
            hold: false,
            remote: false,
        };
        let sequence = engine.model.submit(self.now, sequence).expect("the longest request was checked against the profile");
        engine.requests.insert(number);
        let place = Place { id: self.candidates.worker(row).id, worker, sequence };
        self.placed[number as usize] = Some(Box::new(Placed::new(waiting, in_flight, place, at, self.now, is_observed)));
        self.on_engines += 1;
        self.make_ready(worker);
    }

    fn make_ready(&mut self, worker: u32) {
        let engine = &mut self.engines[worker as usize];
        if !engine.is_stepping && !engine.is_ready {
            engine.is_ready = true;
            self.ready.push(worker);
        }
    }

    fn begin_steps(&mut self) {
        for worker in std::mem::take(&mut self.ready) {
            let engine = &mut self.engines[worker as usize];
            engine.is_ready = false;
            if let Some(end) = engine.begin_step(self.now) {
                self.queue.push(end, Happening::StepEnd { worker });
            }
        }
    }

    fn end_step(&mut self, worker: u32) {
        let engine = &mut self.engines[worker as usize];
        if !(engine.is_stepping && engine.step_ends == self.now) {
            return;
        }
        engine.is_stepping = false;
        engine.busy += self.now - engine.step_begun;
        engine.model.end_step(&mut self.tokens);
        let changes = engine.take_kv_events();
        if !changes.is_empty() {
            self.kv_events[worker as usize].push_back(changes);
            self.queue.push(self.now + self.options.kv_event_lag, Happening::KvEvents { worker });
        }
        let mut tokens = std::mem::take(&mut self.tokens);
        tokens.drain(..).for_each(|event| self.take_token(&event));
        self.tokens = tokens;
        self.make_ready(worker);
    }

    fn take_token(&mut self, event: &Event) {
        let number = event.token.wrapping_sub(event.index) as usize;
        let Some(placed) = &mut self.placed[number] else { return };
        match placed.token(event, self.now) {
            Some(since) => self.tally.itl.add(ms(since), 1),
            None => {
                let ttft_ms = ms(self.now - placed.at);
                self.tally.begun(ttft_ms, event.cached_tokens);
                self.service.iter_mut().for_each(|service| service.begun(number as u32, ttft_ms));
            }
        }
        if event.finish.is_some()
            && let Some(placed) = self.take_placed(number as u32)
        {
            self.end(&placed);
        }
    }

    /// Takes a request off its engine, which has nothing more to do for it.
    fn take_placed(&mut self, number: u32) -> Option<Box<Placed>> {
        let placed = self.placed[number as usize].take()?;
        self.engines[placed.worker as usize].requests.remove(&number);
        self.on_engines -= 1;
        Some(placed)
    }

    /// A request has ended: what the host takes down of it, and tells its policy.
    fn end(&mut self, placed: &Placed) {
        let (ttft_ms, itl_ms) = (placed.ttft_ms(), placed.itl_ms());
        self.tally.end(ms(self.now - placed.at), placed.all_tokens(), self.now);
        let load = placed.in_flight.slot();
        for (recent, value) in [(Recent::TtftMs, ttft_ms), (Recent::ItlMs, itl_ms), (Recent::ErrorRate, 0.0)] {
            if !value.is_nan() {
                load.observe(recent, value as f32);
                load.observed(self.now_ms());
            }
        }
        self.tell(placed, ttft_ms, 0);
        self.gone(placed.decision_id as u32, placed.all_tokens(), End::Served);
    }

    /// Tells the policy what came of a request on a worker.
    fn tell(&mut self, placed: &Placed, ttft_ms: f64, end: u32) {
        let row = OutcomeRow {
            decision_id: placed.decision_id,
            worker_id: placed.worker_id,
            ttft_ms: ttft_ms as f32,
            itl_ms: placed.itl_ms() as f32,
            queue_ms: f32::NAN,
            output_tokens: placed.tokens,
            end,
        };
        if placed.is_observed
            && let Some(at) = self.outcomes.tell(row, self.now)
        {
            self.queue.push(at, Happening::Observe);
        }
        self.tell_admission(row);
    }

    /// A request is no more, however it ended.
    fn gone(&mut self, number: u32, output_tokens: u32, end: End) {
        self.open -= 1;
        self.tally.turned_away += u64::from(matches!(end, End::Left | End::Expired | End::Refused | End::Shed));
        self.tell_admission_of_none(number, end);
        let work = self.trace[number as usize].prompt_tokens().saturating_add(output_tokens);
        let now_ms = self.now_ms();
        self.service.iter_mut().for_each(|service| service.gone(number, work, output_tokens, end, now_ms));
    }

    /// Whether everything that came is somewhere, once; and now and then, whether all books say so.
    fn check(&mut self) -> Result<(), SimulationError> {
        self.events += 1;
        let Some(every) = self.options.audit_every else { return Ok(()) };
        let wrong = |what: String| Err(SimulationError::Books { events: self.events, at: self.now, what });
        let (came, ended) = (self.next as u64, self.tally.ended());
        if ended + self.open != came {
            return wrong(format!("{came} came, {ended} ended and {} are open", self.open));
        }
        if self.waiting.len() as u64 + self.on_engines != self.open {
            return wrong(format!(
                "{} wait and {} are on engines, and {} are open",
                self.waiting.len(),
                self.on_engines,
                self.open
            ));
        }
        if let Some(service) = &self.service
            && let Err(what) = service.check(self.open)
        {
            return wrong(what);
        }
        if self.events.is_multiple_of(every.max(1))
            && let Err(what) = self.audit()
        {
            return wrong(what);
        }
        Ok(())
    }

    /// Whether all books agree, looked at in full.
    fn audit(&self) -> Result<(), String> {
        for (number, engine) in self.engines.iter().enumerate() {
            let has = engine.model.snapshot();
            if engine.requests.len() as u32 != has.running + has.waiting {
                return Err(format!(
                    "engine {number} runs {}, has {} waiting, and was given {}",
                    has.running,
                    has.waiting,
                    engine.requests.len()
                ));
            }
        }
        self.service.as_ref().map_or(Ok(()), |service| service.flow().audit())
    }

    fn finish(mut self) -> Tally {
        self.tally.events = self.events;
        self.tally.queue = self.take_queue_tally();
        self.tally.close(&self.engines, self.begun.elapsed());
        self.tally.refused_blocks = self.indexes.stats().refused;
        self.tally
    }
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
