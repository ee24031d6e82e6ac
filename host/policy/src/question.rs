//! Questions: what the host asks policies, one kind for each world of the contract.
//!
//! A question brings all that a policy may read to decide it, knows how the answer is checked, and can be answered without
//! any policy. Whatever else policies need, their versions, slots, instances, trials and benches, is the same for all worlds.

mod admission;
mod routing;

use std::fmt;

use dynamo_host_core::{Rejection, RequestFacts};

pub use self::{
    admission::AdmissionCall,
    routing::{RouteCall, native_route},
};
use crate::{
    call::{Guest, Reading, Subject},
    fault::PolicyFault,
    runtime::Now,
    version::PolicyVersion,
    world::World,
};

/// What policies of one world are asked.
pub trait Question: Clone + fmt::Debug + Send + 'static {
    /// What is decided, checked: it can be carried out.
    type Verdict: Clone + fmt::Debug + PartialEq + Send;

    /// What made-up questions are about, kept up for as long as this lives.
    type Scene;

    /// The world whose policies answer it.
    const WORLD: &'static World;

    /// Facts of the request that it is about.
    fn request(&self) -> &RequestFacts;

    /// The time of the decision.
    fn now(&self) -> Now;

    /// Seed of the decision's randomness.
    fn seed(&self) -> u64;

    /// Gives the decision's randomness another seed.
    fn set_seed(&mut self, seed: u64);

    /// Number of rows of its columns.
    fn rows(&self) -> u32;

    /// What is decided without a policy, and what was read for it if that is asked for.
    fn native(&self) -> (Self::Verdict, Vec<Reading>);

    /// The verdict that refuses the request.
    fn refusal(rejection: Rejection) -> Self::Verdict;

    /// Whether a verdict only asks for more time.
    fn is_put_off(_verdict: &Self::Verdict) -> bool {
        false
    }

    /// Why no policy is asked any more: it had its turns.
    fn out_of_turns(&self) -> Option<PolicyFault> {
        None
    }

    /// The call's subject: what the guest may read.
    #[doc(hidden)]
    fn into_subject(self) -> Subject;

    /// What the guest has answered to a question with this many rows, checked.
    ///
    /// # Errors
    /// Why it cannot be carried out.
    #[doc(hidden)]
    fn verdict(guest: &mut Guest, rows: u32) -> Result<Self::Verdict, PolicyFault>;

    /// Something to ask about, with this many rows. The same for the same number.
    fn scene(rows: u32) -> Self::Scene;

    /// What a policy is probed with, with this many rows each.
    fn scenes(_version: &PolicyVersion, rows: u32) -> Vec<Self::Scene> {
        vec![Self::scene(rows)]
    }

    /// What a policy is measured with: the one of these that asks the most of it.
    fn measured(_version: &PolicyVersion, rows: u32) -> Self::Scene {
        Self::scene(rows)
    }

    /// A made-up question about it, with its reasons if that is wanted and the world has any.
    fn plain(scene: &Self::Scene, seed: u64, explain: bool) -> Self;

    /// One of a series of questions about it that differ as those of clients do, a moment apart.
    fn nth(scene: &Self::Scene, nth: u64) -> Self;
}
