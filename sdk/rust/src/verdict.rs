//! What an admission policy decides.

use std::time::Duration;

use crate::{bindings::admission::dynamo::policy::admission_answer as host, decision::millis};

/// What an admission policy decides. Later hosts may offer further kinds of verdict.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Verdict {
    /// Let the request in.
    Admit(Admit),
    /// Answer the client with an error.
    Shed(Shed),
    /// What the slot does on errors decides; it is counted as `no-answer`.
    Abstain,
}

/// How a request is let in: where it stands among those that wait. What is not said is as the host's configuration has
/// it, or else as it is stated here.
#[must_use]
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Admit {
    class: Option<String>,
    tier: Option<u32>,
    class_weight: Option<f32>,
    tenant_weight: Option<f32>,
    priority: Option<f32>,
    deadline: Option<Duration>,
}

/// An error for the client.
#[must_use]
#[derive(Clone, Debug, PartialEq)]
pub struct Shed {
    status: u16,
    reason: String,
    retry_after: Option<Duration>,
}

impl Verdict {
    /// Lets the request in.
    pub fn admit() -> Admit {
        Admit::default()
    }

    /// Answers the client with an error: a status from 400 to 599, and a reason for the client. By custom, 429 is the
    /// client's own limit, 503 ours.
    pub fn shed(status: u16, reason: impl Into<String>) -> Shed {
        Shed { status, reason: reason.into(), retry_after: None }
    }

    /// Tells the host.
    pub(crate) fn answer(self) {
        match self {
            Self::Admit(admit) => admit.answer(),
            Self::Shed(Shed { status, reason, retry_after }) => host::shed(status, retry_after.map(millis), &reason),
            Self::Abstain => {}
        }
    }
}

impl Admit {
    /// Class by name: for fair sharing, as a metric label, and for the routing policy. 1 to 64 ASCII letters, digits, `.`,
    /// `_` or `-`. Use few.
    pub fn class(self, class: impl Into<String>) -> Self {
        Self { class: Some(class.into()), ..self }
    }

    /// Strict tier, 0 to 15: a lower one is served first, always. 0 if it is not said.
    pub fn tier(self, tier: u32) -> Self {
        Self { tier: Some(tier), ..self }
    }

    /// Share of service of the class among the classes of its tier, 0.001 to 1000. 1 if it is not said.
    pub fn class_weight(self, weight: f32) -> Self {
        Self { class_weight: Some(weight), ..self }
    }

    /// Share of service of the tenant among the tenants of its class, 0.001 to 1000. 1 if it is not said.
    pub fn tenant_weight(self, weight: f32) -> Self {
        Self { tenant_weight: Some(weight), ..self }
    }

    /// Place among the requests of its tenant: higher is sooner. The request's own priority if it is not said.
    pub fn priority(self, priority: f32) -> Self {
        Self { priority: Some(priority), ..self }
    }

    /// Time from now after which it must not wait any more. The host's bound if it is not said.
    pub fn deadline(self, from_now: Duration) -> Self {
        Self { deadline: Some(from_now), ..self }
    }

    /// Only what is said is called for: what is never called vanishes from the component's imports.
    fn answer(self) {
        if let Some(class) = &self.class {
            host::set_class(class);
        }
        self.tier.into_iter().for_each(host::set_tier);
        self.class_weight.into_iter().for_each(host::set_class_weight);
        self.tenant_weight.into_iter().for_each(host::set_tenant_weight);
        self.priority.into_iter().for_each(host::set_priority);
        self.deadline.map(millis).into_iter().for_each(host::set_deadline_ms);
        host::admit();
    }
}

impl Shed {
    /// When the client should try again. It is told in whole seconds, rounded up.
    pub fn retry_after(self, after: Duration) -> Self {
        Self { retry_after: Some(after), ..self }
    }
}

impl From<Admit> for Verdict {
    fn from(admit: Admit) -> Self {
        Self::Admit(admit)
    }
}

impl From<Shed> for Verdict {
    fn from(shed: Shed) -> Self {
        Self::Shed(shed)
    }
}
