//! Trials: a policy decides for a probe or a bench, on scratch state, heard by nobody, and not counted.
//!
//! Also what a trial can find out: whether a policy's answers depend on what its instance remembers.

use std::sync::Arc;

use dynamo_host_core::answer::Verdict;

use crate::{
    blueprint::{Failure, Purpose, Routed, SetupError, decide},
    call::RouteCall,
    fault::{FaultCause, PolicyFault},
    pool::Instance,
    state::SlotState,
    synthetic::{self, SyntheticFleet},
    version::PolicyVersion,
};

/// How often a trial is tried that the backstop ends.
const TRIES: u32 = 5;
/// Made-up requests that a policy decides twice to see whether it decides alike: enough to fill what it may remember.
const REMEMBERED_CALLS: u64 = 24;
/// Sizes of the fleets of those.
const REMEMBERED_SIZES: [u32; 2] = [5, 16];

/// An instance that decides on trial, see [`PolicyVersion::trial`].
pub struct Trial {
    version: Arc<PolicyVersion>,
    state: Arc<SlotState>,
    instance: Instance,
}

/// A policy that answers otherwise when its instance is new: what [`Trial::memory_dependence`] found.
///
/// The host may replace an instance between any two calls, and runs several side by side, so that such a policy's
/// decisions depend on which one a request meets. What must last belongs into `state`.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryDependence {
    /// Which of the made-up requests it first showed at, from 0.
    pub call: u64,
    /// Candidates of that request.
    pub candidates: u32,
    /// What the instance answered that had decided all requests before.
    pub warm: Verdict,
    /// What a new instance answered, with the same state.
    pub fresh: Verdict,
}

impl Trial {
    /// # Errors
    /// Why an instance cannot be set up.
    pub(crate) fn new(version: Arc<PolicyVersion>) -> Result<Self, PolicyFault> {
        Self::with_state(version, Arc::default())
    }

    fn with_state(version: Arc<PolicyVersion>, state: Arc<SlotState>) -> Result<Self, PolicyFault> {
        let instance = instantiate(&version, &state)?;
        Ok(Self { version, state, instance })
    }

    /// Decides. A busy machine is not held against the policy: what the backstop ends is tried again.
    ///
    /// # Errors
    /// Why it did not decide. The trial is over then.
    pub fn route(&mut self, call: &RouteCall) -> Result<Routed, PolicyFault> {
        for tries_left in (0..TRIES).rev() {
            match decide(&mut self.instance, call.clone(), call.now(), call.seed, &self.version.blueprint().shared.limits) {
                Ok(routed) => return Ok(routed),
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

    /// Whether the policy's answers depend on its instance's memory: it decides a series of made-up requests with one
    /// instance, and the same series with a new instance for each. Both keep what they put into `state`, so that a policy
    /// that remembers only there answers alike. `None`: it did, which is no proof.
    ///
    /// # Errors
    /// Why it did not decide one of them.
    pub fn memory_dependence(version: &Arc<PolicyVersion>) -> Result<Option<MemoryDependence>, PolicyFault> {
        let fleets = REMEMBERED_SIZES.map(synthetic::fleet);
        let (mut warm, mut fresh) = (Self::new(Arc::clone(version))?, Self::new(Arc::clone(version))?);
        for call in 0..REMEMBERED_CALLS {
            // Two of each size in a row: what was remembered of a fleet is used, and outlived.
            let fleet = &fleets[(call / 2) as usize % fleets.len()];
            let made_up = made_up(fleet, call);
            let (of_warm, of_fresh) = (warm.route(&made_up)?.verdict, fresh.route(&made_up)?.verdict);
            if of_warm != of_fresh {
                let candidates = made_up.candidates.count();
                return Ok(Some(MemoryDependence { call, candidates, warm: of_warm, fresh: of_fresh }));
            }
            fresh.renew()?;
        }
        Ok(None)
    }
}

fn instantiate(version: &PolicyVersion, state: &Arc<SlotState>) -> Result<Instance, PolicyFault> {
    let mut instance = version.blueprint().instantiate(Purpose::Try).map_err(SetupError::into_fault)?;
    instance.store.data_mut().state = Arc::clone(state);
    Ok(instance)
}

/// Requests of a few sessions and prompts that come again, a moment apart.
fn made_up(fleet: &SyntheticFleet, call: u64) -> RouteCall {
    let mut made_up = synthetic::route_call(fleet, call + 1);
    let request = Arc::make_mut(&mut made_up.request);
    request.decision_id = call;
    request.session_key = Some(call % 3);
    request.prefix_key = call % 5;
    request.prompt.tokens = 100 + 700 * (call as u32 % 4);
    made_up.now_ms += call * 10;
    made_up.unix_ms += call * 10;
    made_up
}
