//! A policy version: one component with one set of settings, warm and ready to decide.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use dynamo_host_core::answer::{self, Verdict};
use wasmtime::{
    Store,
    component::{ComponentExportIndex, InstancePre, TypedFunc},
};

use crate::{
    call::{Explanation, Guest, OutcomeBatch, RouteCall, Subject},
    fault::{FaultCause, PolicyFault},
    identity::{Digest, PolicyName},
    inspect::Inspection,
    limits::Limits,
    pool::{Instance, Permit, Pool},
    runtime::{Now, PolicyRuntime, Shared},
    state::SlotState,
};

/// Ticks of the backstop that setting up may take: about a second.
const SETUP_TICKS: u64 = 40;
/// How often a trial is tried that the backstop ends.
const TRIES: u32 = 5;

/// A component with its settings: what decides, and what a request is pinned to.
pub struct PolicyVersion {
    this: Weak<Self>,
    inspection: Inspection,
    settings: String,
    /// `name@version`.
    label: Arc<str>,
    pre: InstancePre<Guest>,
    exports: Exports,
    pool: Pool,
    shared: Shared,
    state: Arc<SlotState>,
    revoked: AtomicBool,
    /// Whether it decides now, and its pool is kept full.
    is_active: AtomicBool,
    meters: Meters,
    faults: Mutex<Faults>,
}

struct Exports {
    configure: ComponentExportIndex,
    settings_schema: ComponentExportIndex,
    route: ComponentExportIndex,
    observe: ComponentExportIndex,
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

/// Why an instance could not be set up.
pub(crate) enum SetupError {
    /// The policy does not accept its settings.
    Refused(String),
    /// It failed.
    Fault(PolicyFault),
}

/// What a policy decided, and what that took.
#[derive(Debug)]
pub struct Routed {
    /// The answer, checked.
    pub verdict: Verdict,
    /// Its reasons, if they were asked for.
    pub explanations: Vec<Explanation>,
    /// Fuel that it used.
    pub fuel: u64,
}

impl PolicyVersion {
    pub(crate) fn new(
        runtime: &PolicyRuntime,
        inspection: Inspection,
        settings: String,
        pre: InstancePre<Guest>,
        state: Arc<SlotState>,
    ) -> wasmtime::Result<Arc<Self>> {
        let export = |interface: &str, function: &str| {
            let component = pre.component();
            inspection
                .export(interface)
                .and_then(|name| component.get_export_index(None, name))
                .and_then(|instance| component.get_export_index(Some(&instance), function))
                .ok_or_else(|| wasmtime::format_err!("it does not export {interface}.{function}"))
        };
        let exports = Exports {
            configure: export("lifecycle", "configure")?,
            settings_schema: export("lifecycle", "settings-schema")?,
            route: export("routing", "route")?,
            observe: export("routing", "observe")?,
        };
        let label: Arc<str> = inspection.name.to_string().into();
        let meters = Meters {
            calls: metrics::counter!("dynamo_host_policy_calls_total", "policy" => label.to_string()),
            seconds: metrics::histogram!("dynamo_host_policy_call_seconds", "policy" => label.to_string()),
            fuel: metrics::histogram!("dynamo_host_policy_call_fuel", "policy" => label.to_string()),
            total_calls: AtomicU64::new(0),
        };
        Ok(Arc::new_cyclic(|this| Self {
            this: Weak::clone(this),
            inspection,
            settings,
            label,
            exports,
            pool: Pool::new(runtime.shared().shards),
            shared: runtime.shared().clone(),
            state,
            revoked: AtomicBool::new(false),
            is_active: AtomicBool::new(true),
            meters,
            faults: Mutex::default(),
            pre,
        }))
    }

    /// Name, version and author.
    #[must_use]
    pub fn name(&self) -> &PolicyName {
        &self.inspection.name
    }

    /// `name@version`, as in metrics and headers.
    #[must_use]
    pub fn label(&self) -> &Arc<str> {
        &self.label
    }

    /// Digest of its bytes.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.inspection.digest
    }

    /// Its settings, a JSON object.
    #[must_use]
    pub fn settings(&self) -> &str {
        &self.settings
    }

    /// What it says of itself.
    #[must_use]
    pub fn inspection(&self) -> &Inspection {
        &self.inspection
    }

    /// Whether it learns from outcomes.
    #[must_use]
    pub fn observes(&self) -> bool {
        self.inspection.imports_interface("outcomes")
    }

    /// Decisions asked of it.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.meters.total_calls.load(Relaxed)
    }

    /// Fills its pool. Blocks: each instance reads the settings anew.
    pub(crate) fn warm_up(&self) -> Result<(), SetupError> {
        for shard in self.pool.vacancies() {
            self.pool.put_into(shard, self.instantiate(Purpose::Decide)?);
        }
        Ok(())
    }

    /// Brings its pool to what it should be: full if it decides, nearly empty if not. Off the request path.
    pub(crate) fn tend(&self) {
        if !self.is_active.load(Relaxed) || self.revoked.load(Relaxed) {
            self.pool.cool();
        } else if let Err(error) = self.warm_up() {
            // It shows again when it is asked to decide and has no instance.
            self.record(&error.into_fault());
        }
    }

    /// Makes it ready to decide again. Blocks while instances are made.
    pub(crate) fn wake(&self) {
        self.is_active.store(true, Relaxed);
        self.tend();
    }

    /// Lets go of what only an active version needs.
    pub(crate) fn retire(&self) {
        self.is_active.store(false, Relaxed);
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
        let decided = decide(&mut instance, call, now, seed, &self.shared.limits);
        self.give_back(instance, decided)
    }

    /// An instance for probes and benches: on scratch state, heard by nobody, and not counted.
    ///
    /// # Errors
    /// Why it cannot be set up.
    pub fn trial(self: &Arc<Self>) -> Result<Trial, PolicyFault> {
        let instance = self.instantiate(Purpose::Try).map_err(SetupError::into_fault)?;
        Ok(Trial { version: Arc::clone(self), instance })
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
        let observed = run(&mut instance, observe, Subject::Observe(outcomes), (self.shared.clock)(), seed, &self.shared.limits);
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
        let _ = self.shared.tending.try_send(Weak::clone(&self.this));
    }

    /// JSON Schema of its settings.
    ///
    /// # Errors
    /// Why it did not say.
    pub fn settings_schema(&self) -> Result<String, PolicyFault> {
        let mut store = self.store();
        let schema = self.pre.instantiate(&mut store).and_then(|instance| {
            let function = instance.get_typed_func::<(), (String,)>(&mut store, self.exports.settings_schema)?;
            function.call(&mut store, ())
        });
        schema.map(|(schema,)| schema).map_err(|error| PolicyFault::of(&error, store.data_mut().said.take()))
    }

    fn store(&self) -> Store<Guest> {
        let limits = &self.shared.limits;
        let guest = Guest::new(Arc::clone(limits), Arc::clone(&self.label), (self.shared.clock)());
        let mut store = Store::new(self.pre.engine(), guest);
        store.limiter(|guest| guest);
        store.set_hostcall_fuel(limits.argument_bytes);
        store.set_fuel(limits.setup_fuel).expect("the engine counts fuel");
        store.set_epoch_deadline(SETUP_TICKS);
        store
    }

    fn instantiate(&self, purpose: Purpose) -> Result<Instance, SetupError> {
        let max = self.shared.limits.instances;
        let permit = Permit::take(&self.shared.instances, max).ok_or_else(|| {
            let detail = format!("all {max} instances that this host may have are in use");
            SetupError::Fault(PolicyFault { cause: FaultCause::Busy, detail })
        })?;
        let mut store = self.store();
        let set_up = self.pre.instantiate(&mut store).and_then(|instance| {
            let configure = instance.get_typed_func::<(&str,), (Result<(), String>,)>(&mut store, self.exports.configure)?;
            let (configured,) = configure.call(&mut store, (&self.settings,))?;
            let route = instance.get_typed_func(&mut store, self.exports.route)?;
            let observe = instance.get_typed_func(&mut store, self.exports.observe)?;
            Ok((configured, route, observe))
        });
        match set_up {
            Ok((Ok(()), route, observe)) => {
                if purpose == Purpose::Decide {
                    store.data_mut().go_live(Arc::clone(&self.state));
                }
                Ok(Instance { store, route, observe, _permit: permit })
            }
            Ok((Err(reason), ..)) => Err(SetupError::Refused(store.data().printable(&reason))),
            Err(error) => Err(SetupError::Fault(PolicyFault::of(&error, store.data_mut().said.take()))),
        }
    }
}

/// What an instance is made for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Decide,
    Try,
}

/// An instance that decides on trial, see [`PolicyVersion::trial`].
pub struct Trial {
    version: Arc<PolicyVersion>,
    instance: Instance,
}

impl Trial {
    /// Decides. A busy machine is not held against the policy: what the backstop ends is tried again.
    ///
    /// # Errors
    /// Why it did not decide. The trial is over then.
    pub fn route(&mut self, call: &RouteCall) -> Result<Routed, PolicyFault> {
        for tries_left in (0..TRIES).rev() {
            match decide(&mut self.instance, call.clone(), call.now(), call.seed, &self.version.shared.limits) {
                Ok(routed) => return Ok(routed),
                Err(Failure::Guest(fault)) if fault.cause == FaultCause::HostStall && tries_left > 0 => {
                    self.instance = self.version.instantiate(Purpose::Try).map_err(SetupError::into_fault)?;
                }
                Err(Failure::Guest(fault) | Failure::Answer(fault)) => return Err(fault),
            }
        }
        unreachable!("the last try returns")
    }
}

impl SetupError {
    fn into_fault(self) -> PolicyFault {
        match self {
            Self::Refused(reason) => {
                PolicyFault { cause: FaultCause::Instantiate, detail: format!("it now refuses its settings: {reason}") }
            }
            Self::Fault(fault) if fault.cause == FaultCause::Busy => fault,
            Self::Fault(fault) => PolicyFault { cause: FaultCause::Instantiate, detail: fault.to_string() },
        }
    }
}

impl fmt::Debug for PolicyVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PolicyVersion({} {})", self.label, self.digest().short())
    }
}

/// Why there is no decision.
enum Failure {
    /// The guest failed: its instance cannot be trusted any more.
    Guest(PolicyFault),
    /// Its answer cannot be carried out: the instance is sound.
    Answer(PolicyFault),
}

fn decide(instance: &mut Instance, call: RouteCall, now: Now, seed: u64, limits: &Limits) -> Result<Routed, Failure> {
    let count = call.candidates.count();
    let route = instance.route;
    let fuel = run(instance, route, Subject::Route(call), now, seed, limits).map_err(Failure::Guest)?;
    let guest = instance.store.data_mut();
    let explanations = std::mem::take(&mut guest.explanations);
    let verdict = answer::validate(guest.answer.take(), count).map_err(|fault| Failure::Answer(fault.into()))?;
    Ok(Routed { verdict, explanations, fuel })
}

/// Calls into an instance under the bounds of one decision; returns the fuel that it took.
fn run(
    instance: &mut Instance,
    function: TypedFunc<(), ()>,
    subject: Subject,
    now: Now,
    seed: u64,
    limits: &Limits,
) -> Result<u64, PolicyFault> {
    let store = &mut instance.store;
    store.data_mut().begin(subject, now, seed);
    store.set_fuel(limits.decision_fuel).expect("the engine counts fuel");
    let ticks = limits.backstop.as_millis().div_ceil(Limits::BACKSTOP_TICK.as_millis()) as u64;
    // One tick more: the first may come at once.
    store.set_epoch_deadline(ticks + 1);
    let called = function.call(&mut *store, ());
    let fuel = limits.decision_fuel - store.get_fuel().expect("the engine counts fuel");
    let guest = store.data_mut();
    guest.end();
    match called {
        Ok(()) => Ok(fuel),
        Err(error) => Err(PolicyFault::of(&error, guest.said.take())),
    }
}
