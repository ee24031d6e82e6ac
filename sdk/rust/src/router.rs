//! The trait that a routing policy implements.

use schemars::JsonSchema;
use serde::{Deserialize, de::DeserializeOwned};

use crate::{Candidates, Decision, Outcomes, Request};

/// A routing policy: chooses the workers for a request.
pub trait Router: Sized + 'static {
    /// What an operator can set, from JSON. Reject unknown keys (`#[serde(deny_unknown_fields)]`) and give defaults
    /// (`#[serde(default)]`), since a policy without settings gets `{}`.
    type Settings: DeserializeOwned + JsonSchema;

    /// Makes the policy. Called once per instance; there are several, and each may vanish at any time.
    ///
    /// # Errors
    /// Which setting is wrong and what is accepted; the operator sees it and the policy is not activated.
    fn new(settings: Self::Settings) -> Result<Self, String>;

    /// Decides one request: read what matters of it and of the candidates, and answer.
    fn route(&self, request: &Request, candidates: &Candidates) -> Decision;

    /// Learns from what has ended. Called now and then, off the request path, on any one instance: keep what is learnt in
    /// [`state`](crate::state).
    fn observe(&self, _outcomes: &Outcomes) {}
}

/// For a policy that takes no settings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoSettings {}
