//! A policy version: one component with one set of settings, warm and ready to decide.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};

use crate::{
    blueprint::{Blueprint, Failure, Purpose, Routed, SetupError, decide, run},
    call::{OutcomeBatch, RouteCall, Subject},
    fault::{FaultCause, PolicyFault},
    identity::{Digest, PolicyName},
    inspect::Inspection,
    pool::{Instance, KEPT_PER_SHARD, Pool},
    trial::Trial,
};

/// A component with its settings: what decides, and what a request is pinned to.
pub struct PolicyVersion {
    this: Weak<Self>,
    blueprint: Blueprint,
    pool: Pool,
    revoked: AtomicBool,
    /// Instances that its pool keeps in each shard: all it can while it decides, none when it has not for a while.
    kept_per_shard: AtomicUsize,
    meters: Meters,
    faults: Mutex<Faults>,
}

struct Meters {
    calls: metrics::Counter,
    seconds: metrics::Histogram,
    fuel: metrics::Histogram,
    total_calls: AtomicU64,
}

/// Faults so far: how many of each cause, and what the last one said.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    pub(crate) by_cause: BTreeMap<FaultCause, u64>,
    pub(crate) last: Option<PolicyFault>,
}

impl PolicyVersion {
    pub(crate) fn new(blueprint: Blueprint) -> Arc<Self> {
        let policy = || blueprint.label.to_string();
        let meters = Meters {
            calls: metrics::counter!("dynamo_host_policy_calls_total", "policy" => policy()),
            seconds: metrics::histogram!("dynamo_host_policy_call_seconds", "policy" => policy()),
            fuel: metrics::histogram!("dynamo_host_policy_call_fuel", "policy" => policy()),
            total_calls: AtomicU64::new(0),
        };
        Arc::new_cyclic(|this| Self {
            this: Weak::clone(this),
            pool: Pool::new(blueprint.shared.shards),
            blueprint,
            revoked: AtomicBool::new(false),
            kept_per_shard: AtomicUsize::new(KEPT_PER_SHARD),
            meters,
            faults: Mutex::default(),
        })
    }

    /// Name, version and author.
    #[must_use]
    pub fn name(&self) -> &PolicyName {
        &self.blueprint.inspection.name
    }

    /// `name@version`, as in metrics and headers.
    #[must_use]
    pub fn label(&self) -> &Arc<str> {
        &self.blueprint.label
    }

    /// Digest of its bytes.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.blueprint.inspection.digest
    }

    /// Its settings, a JSON object.
    #[must_use]
    pub fn settings(&self) -> &str {
        &self.blueprint.settings
    }

    /// What it says of itself.
    #[must_use]
    pub fn inspection(&self) -> &Inspection {
        &self.blueprint.inspection
    }

    /// Whether it learns from outcomes.
    #[must_use]
    pub fn observes(&self) -> bool {
        self.blueprint.inspection.imports_interface("outcomes")
    }

    /// Decisions asked of it.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.meters.total_calls.load(Relaxed)
    }

    /// Fills its pool. Blocks: each instance reads the settings anew.
    pub(crate) fn warm_up(&self) -> Result<(), SetupError> {
        for shard in self.pool.vacancies() {
            self.pool.put_into(shard, self.blueprint.instantiate(Purpose::Decide)?);
        }
        Ok(())
    }

    /// Brings its pool to what its standing asks for. Off the request path.
    pub(crate) fn tend(&self) {
        let kept = if self.revoked.load(Relaxed) { 0 } else { self.kept_per_shard.load(Relaxed) };
        self.pool.trim(kept);
        if kept == KEPT_PER_SHARD
            && let Err(error) = self.warm_up()
        {
            // It shows again when it is asked to decide and has no instance.
            self.record(&error.into_fault());
        }
    }

    /// Makes it ready to decide again. Blocks while instances are made.
    pub(crate) fn wake(&self) {
        self.kept_per_shard.store(KEPT_PER_SHARD, Relaxed);
        self.tend();
    }

    /// It was replaced just now: requests may have pinned it and not asked it yet.
    pub(crate) fn step_down(&self) {
        self.keep(1);
    }

    /// It was replaced a while ago: all that it needs can be made anew.
    pub(crate) fn retire(&self) {
        self.keep(0);
    }

    fn keep(&self, per_shard: usize) {
        self.kept_per_shard.store(per_shard, Relaxed);
        self.ask_for_tending();
    }

    /// Takes it out of use for good: requests that are pinned to it are decided natively from now on.
    pub(crate) fn revoke(&self) {
        self.revoked.store(true, Relaxed);
    }

    pub(crate) fn faults(&self) -> Faults {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Counts a fault; `true` if it is the first of its cause.
    pub(crate) fn record(&self, fault: &PolicyFault) -> bool {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let count = faults.by_cause.entry(fault.cause).or_default();
        *count += 1;
        let is_first = *count == 1;
        faults.last = Some(fault.clone());
        is_first
    }

    /// Decides one request.
    ///
    /// # Errors
    /// Why it did not decide. The fault is not recorded here: the slot does, with what it did instead.
    pub fn route(&self, call: RouteCall) -> Result<Routed, PolicyFault> {
        self.meters.calls.increment(1);
        self.meters.total_calls.fetch_add(1, Relaxed);
        let start = Instant::now();
        let routed = self.route_unmetered(call);
        self.meters.seconds.record(start.elapsed().as_secs_f64());
        if let Ok(routed) = &routed {
            self.meters.fuel.record(routed.fuel as f64);
        }
        routed
    }

    fn route_unmetered(&self, call: RouteCall) -> Result<Routed, PolicyFault> {
        if self.revoked.load(Relaxed) {
            let detail = "it was rolled back while the request was under way".to_owned();
            return Err(PolicyFault { cause: FaultCause::Revoked, detail });
        }
        let mut instance = self.take()?;
        let (now, seed) = (call.now(), call.seed);
        let decided = decide(&mut instance, call, now, seed, &self.blueprint.shared.limits);
        self.give_back(instance, decided)
    }

    /// An instance for probes and benches: on scratch state, heard by nobody, and not counted.
    ///
    /// # Errors
    /// Why it cannot be set up.
    pub fn trial(self: &Arc<Self>) -> Result<Trial, PolicyFault> {
        Trial::new(Arc::clone(self))
    }

    /// Lets it learn from what has ended.
    ///
    /// # Errors
    /// Why it did not.
    pub fn observe(&self, outcomes: OutcomeBatch) -> Result<(), PolicyFault> {
        if self.revoked.load(Relaxed) {
            return Ok(());
        }
        let mut instance = self.take()?;
        let seed = outcomes.first().map_or(0, |row| row.decision_id);
        let observe = instance.observe;
        let observed = run(
            &mut instance,
            observe,
            Subject::Observe(outcomes),
            (self.blueprint.shared.clock)(),
            seed,
            &self.blueprint.shared.limits,
        );
        let result = self.give_back(instance, observed.map_err(Failure::Guest)).map(drop);
        if let Err(fault) = &result {
            self.record(fault);
        }
        result
    }

    fn take(&self) -> Result<Instance, PolicyFault> {
        self.pool.take().ok_or_else(|| {
            self.ask_for_tending();
            let detail = "all its instances are in use or being replaced".to_owned();
            PolicyFault { cause: FaultCause::Busy, detail }
        })
    }

    /// Keeps an instance that is sound; one that failed is replaced off the request path.
    fn give_back<T>(&self, instance: Instance, result: Result<T, Failure>) -> Result<T, PolicyFault> {
        match result {
            Ok(value) => {
                self.pool.put(instance);
                Ok(value)
            }
            Err(Failure::Answer(fault)) => {
                self.pool.put(instance);
                Err(fault)
            }
            Err(Failure::Guest(fault)) => {
                drop(instance);
                self.ask_for_tending();
                Err(fault)
            }
        }
    }

    fn ask_for_tending(&self) {
        // A full queue: it is asked again at the next failure, and a retired version ends with its last request.
        let _ = self.blueprint.shared.tending.try_send(Weak::clone(&self.this));
    }

    /// JSON Schema of its settings.
    ///
    /// # Errors
    /// Why it did not say.
    pub fn settings_schema(&self) -> Result<String, PolicyFault> {
        self.blueprint.settings_schema()
    }

    pub(crate) fn blueprint(&self) -> &Blueprint {
        &self.blueprint
    }
}

impl fmt::Debug for PolicyVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PolicyVersion({} {})", self.blueprint.label, self.digest().short())
    }
}
