//! Trials: a policy decides for a probe or a bench, on scratch state, heard by nobody, and not counted.
//!
//! Also what a trial can find out: whether a policy decides at all, and whether its answers depend on what its instance
//! remembers.

use std::sync::Arc;

use crate::{
    blueprint::{Decided, Failure, Purpose, SetupError, decide},
    fault::{FaultCause, PolicyFault},
    pool::Instance,
    question::Question,
    state::SlotState,
    version::PolicyVersion,
};

/// How often a trial is tried that the backstop ends.
const TRIES: u32 = 5;
/// Made-up requests that a policy decides twice to see whether it decides alike: enough to fill what it may remember.
const REMEMBERED_CALLS: u64 = 24;
/// Numbers of rows of those.
const REMEMBERED_SIZES: [u32; 2] = [5, 16];

/// An instance that decides on trial, see [`PolicyVersion::trial`].
pub struct Trial {
    version: Arc<PolicyVersion>,
    state: Arc<SlotState>,
    instance: Instance,
}

/// A policy that answers otherwise when its instance is new: what [`PolicyVersion::memory_dependence`] found.
///
/// The host may replace an instance between any two calls, and runs several side by side, so that such a policy's
/// decisions depend on which one a request meets. What must last belongs into `state`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryDependence {
    /// Which of the made-up requests it first showed at, from 0.
    pub call: u64,
    /// Rows of that request's columns.
    pub rows: u32,
    /// What the instance answered that had decided all requests before.
    pub warm: String,
    /// What a new instance answered, with the same state.
    pub fresh: String,
}

/// A policy that did not decide what it was probed with.
#[derive(Debug)]
pub(crate) struct ProbeFailure {
    /// With how many rows; `None`: it could not even be asked.
    pub(crate) rows: Option<u32>,
    pub(crate) fault: PolicyFault,
}

impl Trial {
    /// # Errors
    /// Why an instance cannot be set up.
    pub(crate) fn new(version: Arc<PolicyVersion>) -> Result<Self, PolicyFault> {
        let state = Arc::default();
        let instance = instantiate(&version, &state)?;
        Ok(Self { version, state, instance })
    }

    /// Decides. A busy machine is not held against the policy: what the backstop ends is tried again.
    ///
    /// # Errors
    /// Why it did not decide. The trial is over then.
    pub fn decide<Q: Question>(&mut self, call: &Q) -> Result<Decided<Q::Verdict>, PolicyFault> {
        for tries_left in (0..TRIES).rev() {
            match decide(&mut self.instance, call.clone(), &self.version.blueprint().shared.limits) {
                Ok(decided) => return Ok(decided),
                Err(Failure::Guest(fault)) if fault.cause == FaultCause::HostStall && tries_left > 0 => self.renew()?,
                Err(Failure::Guest(fault) | Failure::Answer(fault)) => return Err(fault),
            }
        }
        unreachable!("the last try returns")
    }

    /// Goes on with a new instance and the same state, as a host does when it has replaced one.
    fn renew(&mut self) -> Result<(), PolicyFault> {
        self.instance = instantiate(&self.version, &self.state)?;
        Ok(())
    }
}

impl PolicyVersion {
    /// An instance for probes and benches: on scratch state, heard by nobody, and not counted.
    ///
    /// # Errors
    /// Why it cannot be set up.
    pub fn trial(self: &Arc<Self>) -> Result<Trial, PolicyFault> {
        Trial::new(Arc::clone(self))
    }

    /// Whether the policy's answers depend on its instance's memory: it decides a series of made-up requests with one
    /// instance, and the same series with a new instance for each. Both keep what they put into `state`, so that a policy
    /// that remembers only there answers alike. `None`: it did, which is no proof.
    ///
    /// # Errors
    /// Why it did not decide one of them.
    pub fn memory_dependence(self: &Arc<Self>) -> Result<Option<MemoryDependence>, PolicyFault> {
        (self.world().tried.memory)(self)
    }
}

/// Whether it decides made-up requests, of each size that its world is probed with.
pub(crate) fn probe<Q: Question>(version: &Arc<PolicyVersion>) -> Result<(), ProbeFailure> {
    let mut trial = version.trial().map_err(|fault| ProbeFailure { rows: None, fault })?;
    for &rows in Q::WORLD.probes {
        for scene in Q::scenes(version, rows) {
            // With its reasons too: a host that writes receipts asks for them.
            for explain in [false, true] {
                let call = Q::plain(&scene, 1, explain);
                trial.decide(&call).map_err(|fault| ProbeFailure { rows: Some(rows), fault })?;
            }
        }
    }
    Ok(())
}

pub(crate) fn memory_dependence<Q: Question>(version: &Arc<PolicyVersion>) -> Result<Option<MemoryDependence>, PolicyFault> {
    let scenes: Vec<Q::Scene> = REMEMBERED_SIZES.into_iter().flat_map(|rows| Q::scenes(version, rows)).collect();
    let (mut warm, mut fresh) = (version.trial()?, version.trial()?);
    for nth in 0..REMEMBERED_CALLS {
        // Two of each size in a row: what was remembered of a fleet is used, and outlived.
        let call = Q::nth(&scenes[(nth / 2) as usize % scenes.len()], nth);
        let (of_warm, of_fresh) = (warm.decide(&call)?.verdict, fresh.decide(&call)?.verdict);
        if of_warm != of_fresh {
            let [warm, fresh] = [of_warm, of_fresh].map(|verdict| format!("{verdict:?}"));
            return Ok(Some(MemoryDependence { call: nth, rows: call.rows(), warm, fresh }));
        }
        fresh.renew()?;
    }
    Ok(None)
}

fn instantiate(version: &PolicyVersion, state: &Arc<SlotState>) -> Result<Instance, PolicyFault> {
    let mut instance = version.blueprint().instantiate(Purpose::Try).map_err(SetupError::into_fault)?;
    instance.store.data_mut().state = Arc::clone(state);
    Ok(instance)
}
