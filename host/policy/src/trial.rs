//! Trials: a policy decides for a probe or a bench, on scratch state, heard by nobody, and not counted.

use std::sync::Arc;

use crate::{
    blueprint::{Failure, Purpose, Routed, SetupError, decide},
    call::RouteCall,
    fault::{FaultCause, PolicyFault},
    pool::Instance,
    version::PolicyVersion,
};

/// How often a trial is tried that the backstop ends.
const TRIES: u32 = 5;

/// An instance that decides on trial, see [`PolicyVersion::trial`].
pub struct Trial {
    version: Arc<PolicyVersion>,
    instance: Instance,
}

impl Trial {
    /// # Errors
    /// Why an instance cannot be set up.
    pub(crate) fn new(version: Arc<PolicyVersion>) -> Result<Self, PolicyFault> {
        let instance = version.blueprint().instantiate(Purpose::Try).map_err(SetupError::into_fault)?;
        Ok(Self { version, instance })
    }

    /// Decides. A busy machine is not held against the policy: what the backstop ends is tried again.
    ///
    /// # Errors
    /// Why it did not decide. The trial is over then.
    pub fn route(&mut self, call: &RouteCall) -> Result<Routed, PolicyFault> {
        for tries_left in (0..TRIES).rev() {
            match decide(&mut self.instance, call.clone(), call.now(), call.seed, &self.version.blueprint().shared.limits) {
                Ok(routed) => return Ok(routed),
                Err(Failure::Guest(fault)) if fault.cause == FaultCause::HostStall && tries_left > 0 => {
                    self.instance = self.version.blueprint().instantiate(Purpose::Try).map_err(SetupError::into_fault)?;
                }
                Err(Failure::Guest(fault) | Failure::Answer(fault)) => return Err(fault),
            }
        }
        unreachable!("the last try returns")
    }
}
