//! Blueprint: what instances of a policy version are made from, and how a call into one is run.
//!
//! Set-up (`configure`) runs with bounds of its own and on scratch state; an instance that is to decide goes live after it.

use std::sync::Arc;

use dynamo_host_core::answer;
use wasmtime::{
    Store,
    component::{ComponentExportIndex, InstancePre, TypedFunc},
};

use crate::{
    call::{Explanation, Guest, Reading, Subject},
    fault::{FaultCause, PolicyFault},
    inspect::Inspection,
    limits::Limits,
    pool::{Instance, Permit},
    question::Question,
    runtime::{Now, Shared},
    state::SlotState,
    world::LIFECYCLE,
};

/// Ticks of the backstop that setting up may take: about ten seconds. Fuel bounds it to 0.1 s of work, for which a busy machine may
/// take many times as long; it is off the requests' path.
const SETUP_TICKS: u64 = 400;

/// What instances are made from.
pub(crate) struct Blueprint {
    pub(crate) inspection: Inspection,
    pub(crate) settings: String,
    /// `name@version`.
    pub(crate) label: Arc<str>,
    pub(crate) shared: Shared,
    pre: InstancePre<Guest>,
    exports: Exports,
    state: Arc<SlotState>,
}

struct Exports {
    configure: ComponentExportIndex,
    settings_schema: ComponentExportIndex,
    decide: ComponentExportIndex,
    observe: ComponentExportIndex,
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
pub struct Decided<V = answer::Verdict> {
    /// The answer, checked.
    pub verdict: V,
    /// Its reasons, if they were asked for.
    pub explanations: Vec<Explanation>,
    /// What it read of the candidates, if that was asked for.
    pub readings: Vec<Reading>,
    /// Fuel that it used.
    pub fuel: u64,
}

/// What an instance is made for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Decide,
    Try,
}

impl Blueprint {
    pub(crate) fn new(
        inspection: Inspection,
        settings: String,
        pre: InstancePre<Guest>,
        shared: Shared,
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
        let (interface, function) = inspection.world.decides;
        let exports = Exports {
            configure: export(LIFECYCLE, "configure")?,
            settings_schema: export(LIFECYCLE, "settings-schema")?,
            decide: export(interface, function)?,
            observe: export(interface, "observe")?,
        };
        let label = inspection.name.to_string().into();
        Ok(Self { inspection, settings, label, shared, pre, exports, state })
    }

    /// Name of the slot that it decides in, for logs and metrics.
    pub(crate) fn slot(&self) -> &Arc<str> {
        self.state.slot()
    }

    /// Makes an instance. Blocks for as long as the policy needs to read its settings.
    pub(crate) fn instantiate(&self, purpose: Purpose) -> Result<Instance, SetupError> {
        let max = self.shared.limits.instances;
        let permit = Permit::take(&self.shared.instances, max).ok_or_else(|| {
            let detail = format!("all {max} instances that this host may have are in use");
            SetupError::Fault(PolicyFault { cause: FaultCause::Busy, detail })
        })?;
        let mut store = self.store();
        let set_up = self.pre.instantiate(&mut store).and_then(|instance| {
            let configure = instance.get_typed_func::<(&str,), (Result<(), String>,)>(&mut store, self.exports.configure)?;
            let (configured,) = configure.call(&mut store, (&self.settings,))?;
            let decide = instance.get_typed_func(&mut store, self.exports.decide)?;
            let observe = instance.get_typed_func(&mut store, self.exports.observe)?;
            Ok((configured, decide, observe))
        });
        match set_up {
            Ok((Ok(()), decide, observe)) => {
                if purpose == Purpose::Decide {
                    store.data_mut().go_live(Arc::clone(&self.state));
                }
                Ok(Instance { store, decide, observe, _permit: permit })
            }
            Ok((Err(reason), ..)) => Err(SetupError::Refused(store.data().printable(&reason))),
            Err(error) => Err(SetupError::Fault(PolicyFault::of(&error, store.data_mut().said.take()))),
        }
    }

    /// JSON Schema of its settings.
    ///
    /// # Errors
    /// Why it did not say.
    pub(crate) fn settings_schema(&self) -> Result<String, PolicyFault> {
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
}

impl SetupError {
    pub(crate) fn into_fault(self) -> PolicyFault {
        match self {
            Self::Refused(reason) => {
                PolicyFault { cause: FaultCause::Instantiate, detail: format!("it now refuses its settings: {reason}") }
            }
            Self::Fault(fault) if fault.cause == FaultCause::Busy => fault,
            Self::Fault(fault) => PolicyFault { cause: FaultCause::Instantiate, detail: fault.to_string() },
        }
    }
}

/// Why there is no decision.
pub(crate) enum Failure {
    /// The guest failed: its instance cannot be trusted any more.
    Guest(PolicyFault),
    /// Its answer cannot be carried out: the instance is sound.
    Answer(PolicyFault),
}

/// Has an instance decide.
pub(crate) fn decide<Q: Question>(instance: &mut Instance, call: Q, limits: &Limits) -> Result<Decided<Q::Verdict>, Failure> {
    let (rows, now, seed) = (call.rows(), call.now(), call.seed());
    let function = instance.decide;
    let fuel = run(instance, function, call.into_subject(), now, seed, limits).map_err(Failure::Guest)?;
    let guest = instance.store.data_mut();
    let (explanations, readings) = (std::mem::take(&mut guest.explanations), std::mem::take(&mut guest.readings));
    // Some answers are checked against what was asked, which the guest has.
    let verdict = Q::verdict(guest, rows);
    guest.end();
    let verdict = verdict.map_err(Failure::Answer)?;
    Ok(Decided { verdict, explanations, readings, fuel })
}

/// Calls into an instance under the bounds of one decision; returns the fuel that it took. What it was about is let go by
/// [`Guest::end`], which the caller sees to if all went well.
pub(crate) fn run(
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
    match called {
        Ok(()) => Ok(fuel),
        Err(error) => {
            let guest = store.data_mut();
            guest.end();
            Err(PolicyFault::of(&error, guest.said.take()))
        }
    }
}
