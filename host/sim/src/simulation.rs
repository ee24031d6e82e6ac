//! A run: one trace, one fleet, one policy, in virtual time.

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
    Candidates, Fleet, Held, LoadBoard, Role, SlotName,
    answer::{MAX_HOLD, Verdict},
    load::{InFlight, READINGS_PER_SECOND, Recent},
};
use dynamo_host_index::{IndexLimits, PrefixIndexes, Prompt, Salt};
use dynamo_host_policy::{
    DecidedBy, Decision, Limits, LoadError, Now, OutcomeRow, Pinned, PolicyRuntime, PolicyVersion, RouteCall, RoutingSlot,
    RuntimeError,
};

pub use self::tally::Tally;
use crate::{
    engine::{Engine, MODEL},
    outcome::Outcomes,
    queue::{Happening, Queue},
    requests::{Placed, Waiting, facts, ms, shared_tokens},
    trace::{Trace, TraceRequest},
};

/// Where virtual time begins by the wall clock: a whole number, long ago.
const UNIX_START_MS: u64 = 1_700_000_000_000;
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
    /// The arrivals' speed.
    #[error("speed {0} is not possible; use a number above 0")]
    Speed(f64),
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
    run.run(progress);
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
    /// The engine of each row.
    rows: Vec<u32>,
    candidates: Arc<Candidates>,
    indexes: Arc<PrefixIndexes>,
    /// Cache events under way, oldest first.
    kv_events: Vec<std::collections::VecDeque<Vec<dynamo_host_core::KvEvent>>>,
    slot: RoutingSlot,
    pinned: Pinned,
    version: Option<Arc<PolicyVersion>>,
    waiting: std::collections::HashMap<u32, Waiting>,
    placed: Vec<Option<Box<Placed>>>,
    /// Requests that have not ended, of those that have come.
    open: u64,
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
        let candidates = fleet.candidates(MODEL, Role::Aggregated).ok_or(SimulationError::NoWorker)?;
        let mut by_slot = vec![0; engines.len()];
        engines.iter().enumerate().for_each(|(number, engine)| by_slot[engine.load.index() as usize] = number as u32);
        let rows = candidates.iter().map(|worker| by_slot[worker.load.index() as usize]).collect();
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
            indexes,
            pinned: slot.pin(),
            slot,
            version,
            waiting: std::collections::HashMap::new(),
            placed: (0..trace.requests.len()).map(|_| None).collect(),
            open: 0,
            outcomes: Outcomes::default(),
            ready: Vec::new(),
            tokens: Vec::new(),
            begun: Instant::now(),
            _runtime: runtime,
        })
    }

    fn run(&mut self, progress: &(dyn Fn(u64) + Sync)) {
        self.begin();
        while let Some(at) = self.next_moment() {
            self.now = at;
            self.clock.store(self.now_ms(), Relaxed);
            while let Some(what) = self.queue.pop_until(at) {
                self.happen(what);
            }
            while self.next < self.trace.len() && self.arrival(self.next) <= at {
                self.arrive(self.next as u32);
                self.next += 1;
                progress(self.tally.ended());
            }
            self.begin_steps();
        }
        progress(self.tally.ended());
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
        self.waiting.insert(number, Waiting { facts, prompt, holds: 0 });
        self.place(number);
    }

    /// Asks the policy where a request shall go, as `host/src/request.rs` does.
    fn place(&mut self, number: u32) {
        let Some(mut waiting) = self.waiting.remove(&number) else { return };
        waiting.facts.holds = waiting.holds;
        let begun = Instant::now();
        let overlap = Arc::new(self.indexes.overlap(MODEL, &waiting.prompt));
        let now_ms = self.now_ms();
        let call = RouteCall {
            request: Arc::new(waiting.facts.clone()),
            candidates: Arc::clone(&self.candidates),
            overlap: Some(Arc::clone(&overlap)),
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
                self.dispatch(number, &waiting, row, cached, &by);
            }
            Verdict::Hold { at_most_ms } => {
                waiting.holds += 1;
                let pause = Duration::from_millis(u64::from(at_most_ms.max(1))).min(MAX_HOLD);
                self.waiting.insert(number, waiting);
                self.queue.push(self.now + pause, Happening::AskAgain { request: number });
            }
            Verdict::Reject(_) => {
                self.tally.rejected += 1;
                self.open -= 1;
            }
        }
    }

    fn dispatch(&mut self, number: u32, waiting: &Waiting, row: u32, cached: u32, by: &DecidedBy) {
        let (at, now_ms) = (self.arrival(number as usize), self.now_ms());
        let worker = self.rows[row as usize];
        let engine = &mut self.engines[worker as usize];
        let tokens = waiting.facts.prompt.tokens;
        let in_flight = InFlight::dispatch(Arc::clone(&engine.load), tokens, tokens.saturating_sub(cached), now_ms);
        let is_observed = by.version().is_some_and(|version| version.observes());
        let id = self.candidates.worker(row).id.0;
        self.placed[number as usize] = Some(Box::new(Placed::new(waiting, in_flight, id, at, self.now, is_observed)));
        let sequence = Sequence {
            prompt: Arc::clone(waiting.prompt.tokens()),
            // Its tokens then tell whose they are, and no two requests' are alike at any place.
            first_output_token: number,
            output_tokens: self.trace[number as usize].output_tokens,
            finish: FinishReason::Stop,
            salt: 0,
        };
        engine.model.submit(self.now, sequence).expect("the longest request was checked against the profile");
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
            if let Some(end) = engine.model.begin_step(self.now) {
                engine.is_stepping = true;
                engine.step_begun = self.now;
                self.queue.push(end, Happening::StepEnd { worker });
            }
        }
    }

    fn end_step(&mut self, worker: u32) {
        let engine = &mut self.engines[worker as usize];
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
            None => self.tally.begun(ms(self.now - placed.at), event.cached_tokens),
        }
        if event.finish.is_some()
            && let Some(placed) = self.placed[number].take()
        {
            self.end(&placed);
        }
    }

    /// A request has ended: what the host takes down of it, and tells its policy.
    fn end(&mut self, placed: &Placed) {
        let (ttft_ms, itl_ms) = (placed.ttft_ms(), placed.itl_ms());
        self.open -= 1;
        self.tally.end(ms(self.now - placed.at), placed.tokens, self.now);
        let load = placed.in_flight.slot();
        for (recent, value) in [(Recent::TtftMs, ttft_ms), (Recent::ItlMs, itl_ms), (Recent::ErrorRate, 0.0)] {
            if !value.is_nan() {
                load.observe(recent, value as f32);
                load.observed(self.now_ms());
            }
        }
        if placed.is_observed {
            let row = OutcomeRow {
                decision_id: placed.decision_id,
                worker_id: placed.worker_id,
                ttft_ms: ttft_ms as f32,
                itl_ms: itl_ms as f32,
                queue_ms: f32::NAN,
                output_tokens: placed.tokens,
                end: 0,
            };
            if let Some(at) = self.outcomes.tell(row, self.now) {
                self.queue.push(at, Happening::Observe);
            }
        }
    }

    fn finish(mut self) -> Tally {
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
