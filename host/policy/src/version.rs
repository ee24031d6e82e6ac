//! A policy version: one component with one set of settings, warm and ready to decide.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use dynamo_host_core::answer::{self, Verdict};
use wasmtime::{
    Store,
    component::{ComponentExportIndex, InstancePre},
};

use crate::{
    call::{Explanation, Guest, OutcomeBatch, RouteCall, Subject},
    fault::{FaultCause, PolicyFault},
    identity::{Digest, PolicyName},
    inspect::Inspection,
    limits::Limits,
    pool::{Instance, Permit, Pool},
    runtime::PolicyRuntime,
    state::SlotState,
};

/// Ticks of the backstop that setting up may take: about a second.
const SETUP_TICKS: u64 = 40;
/// How often a probe is tried that the backstop ends.
const PROBE_TRIES: u32 = 5;

/// A component with its settings: what decides, and what a request is pinned to.
pub struct PolicyVersion {
    inspection: Inspection,
    settings: String,
    /// `name@version`.
    label: Arc<str>,
    pre: InstancePre<Guest>,
    exports: Exports,
    pool: Pool,
    limits: Arc<Limits>,
    instances: Arc<std::sync::atomic::AtomicU32>,
    state: Arc<SlotState>,
    revoked: AtomicBool,
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
    ) -> wasmtime::Result<Self> {
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
        Ok(Self {
            inspection,
            settings,
            label,
            exports,
            pool: Pool::new(runtime.shards()),
            limits: Arc::clone(runtime.limits()),
            instances: Arc::clone(runtime.instances()),
            state,
            revoked: AtomicBool::new(false),
            meters,
            faults: Mutex::default(),
            pre,
        })
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

    /// Makes one instance per shard.
    pub(crate) fn warm_up(&self) -> Result<(), SetupError> {
        for shard in 0..self.pool.shards() {
            self.pool.put_into(shard, self.instantiate()?);
        }
        Ok(())
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
        self.decide(call)
    }

    /// Decides without being counted: for probes and benches, which must not hold a busy machine against a policy.
    ///
    /// # Errors
    /// Why it did not decide.
    pub fn probe(&self, call: &RouteCall) -> Result<Routed, PolicyFault> {
        let mut tries = 0..PROBE_TRIES;
        loop {
            tries.next();
            match self.decide(call.clone()) {
                Err(PolicyFault { cause: FaultCause::HostStall, .. }) if !tries.is_empty() => {}
                decided => return decided,
            }
        }
    }

    fn decide(&self, call: RouteCall) -> Result<Routed, PolicyFault> {
        let count = call.candidates.count();
        let mut instance = self.instance()?;
        let fuel = run(&mut instance, |instance| &instance.route, Subject::Route(call), &self.limits)?;
        let guest = instance.store.data_mut();
        let answer = guest.answer.take();
        let explanations = std::mem::take(&mut guest.explanations);
        // An answer that cannot be carried out is a fault, but the instance is sound.
        self.pool.put(instance);
        Ok(Routed { verdict: answer::validate(answer, count)?, explanations, fuel })
    }

    /// Lets it learn from ended requests.
    ///
    /// # Errors
    /// Why it did not.
    pub fn observe(&self, outcomes: OutcomeBatch) -> Result<(), PolicyFault> {
        let mut instance = self.instance()?;
        run(&mut instance, |instance| &instance.observe, Subject::Observe(outcomes), &self.limits)?;
        self.pool.put(instance);
        Ok(())
    }

    /// JSON Schema of its settings.
    ///
    /// # Errors
    /// Why it did not say.
    pub fn settings_schema(&self) -> Result<String, PolicyFault> {
        let mut store = self.store();
        let schema = self.pre.instantiate(&mut store).and_then(|instance| {
            let function = instance.get_typed_func::<(), (String,)>(&mut store, &self.exports.settings_schema)?;
            function.call(&mut store, ())
        });
        schema.map(|(schema,)| schema).map_err(|error| PolicyFault::of(&error, store.data_mut().said.take()))
    }

    fn instance(&self) -> Result<Instance, PolicyFault> {
        if let Some(instance) = self.pool.take() {
            return Ok(instance);
        }
        self.instantiate().map_err(|error| match error {
            SetupError::Fault(fault) if fault.cause == FaultCause::Busy => fault,
            SetupError::Fault(fault) => PolicyFault { cause: FaultCause::Instantiate, detail: fault.to_string() },
            SetupError::Refused(reason) => {
                PolicyFault { cause: FaultCause::Instantiate, detail: format!("it now refuses its settings: {reason}") }
            }
        })
    }

    fn store(&self) -> Store<Guest> {
        let guest = Guest::new(Arc::clone(&self.limits), Arc::clone(&self.state), Arc::clone(&self.label));
        let mut store = Store::new(self.pre.engine(), guest);
        store.limiter(|guest| guest);
        store.set_fuel(self.limits.setup_fuel).expect("the engine counts fuel");
        store.set_epoch_deadline(SETUP_TICKS);
        store
    }

    fn instantiate(&self) -> Result<Instance, SetupError> {
        let permit = Permit::take(&self.instances, self.limits.instances).ok_or_else(|| {
            let detail = format!("all {} instances are in use", self.limits.instances);
            SetupError::Fault(PolicyFault { cause: FaultCause::Busy, detail })
        })?;
        let mut store = self.store();
        let set_up = self.pre.instantiate(&mut store).and_then(|instance| {
            let configure = instance.get_typed_func::<(&str,), (Result<(), String>,)>(&mut store, &self.exports.configure)?;
            let (configured,) = configure.call(&mut store, (&self.settings,))?;
            let route = instance.get_typed_func(&mut store, self.exports.route)?;
            let observe = instance.get_typed_func(&mut store, self.exports.observe)?;
            Ok((configured, route, observe))
        });
        match set_up {
            Ok((Ok(()), route, observe)) => Ok(Instance { store, route, observe, _permit: permit }),
            Ok((Err(reason), ..)) => Err(SetupError::Refused(reason)),
            Err(error) => Err(SetupError::Fault(PolicyFault::of(&error, store.data_mut().said.take()))),
        }
    }
}

impl fmt::Debug for PolicyVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PolicyVersion({} {})", self.label, self.digest().short())
    }
}

/// Calls into an instance under the bounds of one decision; returns the fuel that it took.
fn run(
    instance: &mut Instance,
    export: impl Fn(&Instance) -> &wasmtime::component::TypedFunc<(), ()>,
    subject: Subject,
    limits: &Limits,
) -> Result<u64, PolicyFault> {
    let function = *export(instance);
    let store = &mut instance.store;
    store.data_mut().begin(subject);
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
