//! The trait that an admission policy implements.

use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use crate::{Outcomes, Pools, Request, Verdict};

/// An admission policy: lets requests in, says where they stand among those that wait, or sheds them.
///
/// ```
/// use std::time::Duration;
///
/// use dynamo_policy_sdk::{Admission, NoSettings, Pools, Request, Verdict};
///
/// /// Requests that nobody is waiting for go last, and not at all while there is a long queue.
/// struct BatchLast;
///
/// impl Admission for BatchLast {
///     type Settings = NoSettings;
///
///     fn new(_: NoSettings) -> Result<Self, String> {
///         Ok(Self)
///     }
///
///     fn admit(&self, request: &Request, pools: &Pools) -> Verdict {
///         if request.priority() >= 0.0 {
///             return Verdict::admit().into();
///         }
///         if pools.queued_requests()[0] > 100 {
///             return Verdict::shed(503, "batch work is not taken now").retry_after(Duration::from_secs(30)).into();
///         }
///         Verdict::admit().class("batch").tier(1).into()
///     }
/// }
///
/// dynamo_policy_sdk::register!(BatchLast as Admission);
///
/// let verdict = BatchLast.admit(&Request::test().with_priority(-1.0), &Pools::test(1).with_queued_requests([7]));
/// assert_eq!(verdict, Verdict::admit().class("batch").tier(1).into());
/// ```
pub trait Admission: Sized + 'static {
    /// What an operator can set, from JSON. Reject unknown keys (`#[serde(deny_unknown_fields)]`) and give defaults
    /// (`#[serde(default)]`), since a policy without settings gets `{}`.
    type Settings: DeserializeOwned + JsonSchema;

    /// Makes the policy. Called once per instance; there are several, and each may vanish at any time.
    ///
    /// # Errors
    /// Which setting is wrong and what is accepted; the operator sees it and the policy is not activated.
    fn new(settings: Self::Settings) -> Result<Self, String>;

    /// Decides one request, once: read what matters of it and of the pools, and answer.
    fn admit(&self, request: &Request, pools: &Pools) -> Verdict;

    /// Learns from what has ended. Called now and then, off the request path, on any one instance: keep what is learnt in
    /// [`state`](crate::state).
    fn observe(&self, _outcomes: &Outcomes) {}
}
