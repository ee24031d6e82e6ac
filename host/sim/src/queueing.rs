//! The queue in front of the engines, and the tenants whose requests come to it.

use std::sync::Arc;

use dynamo_host_core::{Admitted, RequestFacts, admission::TIERS, id};
use dynamo_host_flow::Bounds;

use crate::{
    options::{self, Value},
    samples::Random,
    trace::TraceRequest,
};

/// What waits before the engines, and how long.
#[derive(Clone, Debug)]
pub struct Queueing {
    /// How much the queue takes.
    pub bounds: Bounds,
    /// Requests that a worker runs at once; `None`: as many as its engine does.
    pub max_running: Option<u32>,
    /// Tokens of prompts that may wait for their prefill on each worker; `None`: any number.
    pub prefill_tokens: Option<u32>,
    /// Seconds after which a request waits no more.
    pub timeout_s: f64,
    /// Share of the clients that leave, and the seconds after which they do, on average.
    pub leave: (f64, f64),
    /// Who sends the requests, at least one.
    pub tenants: Vec<Tenant>,
    /// What lets requests in; `None`: all are, as their tenants have it.
    pub admission: Option<AdmissionPolicy>,
}

/// A component for the slot `admission`.
#[derive(Clone, Debug)]
pub struct AdmissionPolicy {
    /// Its name in errors and in the report.
    pub name: String,
    /// The component.
    pub bytes: Vec<u8>,
    /// Its settings as JSON.
    pub settings: String,
}

/// A tenant, and how its requests are let in.
#[derive(Clone, Debug)]
pub struct Tenant {
    /// Its name.
    pub name: Arc<str>,
    /// How it is let in.
    pub admitted: Admitted,
    /// Its share of the sessions, or of the requests that belong to none, by weight.
    pub share: f64,
}

impl Default for Queueing {
    fn default() -> Self {
        Self {
            bounds: Bounds { max_requests: 10_000, max_tokens: 100_000_000 },
            max_running: None,
            prefill_tokens: None,
            timeout_s: 60.0,
            leave: (0.0, 10.0),
            tenants: vec![Tenant { name: "all".into(), admitted: Admitted::default(), share: 1.0 }],
            admission: None,
        }
    }
}

impl Queueing {
    /// Keys of the text form.
    pub const KEYS: &str = "max_requests, max_tokens, max_running, prefill_tokens, timeout_s, leave, leave_s";

    /// Reads `KEY=VALUE,…`.
    ///
    /// # Errors
    /// Names the key that is not known or the value that is not possible.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut queueing = Self::default();
        let any = 0..=u64::from(u32::MAX);
        let some = 1..=u64::from(u32::MAX);
        let set = |key: &str, value: Value<'_>| {
            match key {
                "max_requests" => queueing.bounds.max_requests = value.whole(any.clone())? as u32,
                "max_tokens" => queueing.bounds.max_tokens = value.whole(0..=u64::MAX)?,
                "max_running" => queueing.max_running = Some(value.whole(some.clone())? as u32),
                "prefill_tokens" => queueing.prefill_tokens = Some(value.whole(some.clone())? as u32),
                "timeout_s" => queueing.timeout_s = value.some_seconds()?,
                "leave" if value.number()? > 1.0 => return Err(format!("leave={} is more than all", value.text)),
                "leave" => queueing.leave.0 = value.number()?,
                "leave_s" => queueing.leave.1 = value.seconds()?,
                _ => return Err(format!("{key:?} is not known; use {}", Self::KEYS)),
            }
            Ok(())
        };
        options::read(text, set)?;
        Ok(queueing)
    }

    /// The tenant of a request: the same one for all of a session's, and for the same seed.
    pub(crate) fn tenant_of(&self, number: u32, request: &TraceRequest, seed: u64) -> usize {
        let place = request.session.map_or(u64::from(number) << 32, u64::from);
        let all: f64 = self.tenants.iter().map(|tenant| tenant.share).sum();
        let mut left = Random::new(id::key(&[seed.to_le_bytes(), place.to_le_bytes()].concat())).unit() * all;
        let is_it = |tenant: &Tenant| {
            left -= tenant.share;
            left < 0.0
        };
        self.tenants.iter().position(is_it).unwrap_or(self.tenants.len() - 1)
    }
}

impl Tenant {
    /// Keys of the text form.
    pub const KEYS: &str = "weight, class, class_weight, tier, priority, share";

    /// Reads `NAME[,KEY=VALUE…]`.
    ///
    /// # Errors
    /// Names the key that is not known or the value that is not possible.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, rest) = text.split_once(',').unwrap_or((text, ""));
        if name.is_empty() || name.contains('=') {
            return Err(format!("{text:?} does not begin with a tenant's name, as in acme,weight=2"));
        }
        let mut tenant = Self { name: name.into(), admitted: Admitted::default(), share: 1.0 };
        let set = |key: &str, value: Value<'_>| {
            match key {
                "weight" => tenant.admitted.tenant_weight = value.weight()?,
                "class" => tenant.admitted.class = Some(value.class()?),
                "class_weight" => tenant.admitted.class_weight = value.weight()?,
                "tier" => tenant.admitted.tier = value.whole(0..=u64::from(TIERS - 1))? as u32,
                "priority" => tenant.admitted.priority = value.priority()?,
                "share" => tenant.share = value.number()?,
                _ => return Err(format!("{key:?} is not known; use {}", Self::KEYS)),
            }
            Ok(())
        };
        options::read(rest, set)?;
        Ok(tenant)
    }

    /// Puts into a request's facts whose it is, and how it was let in.
    pub(crate) fn mark(&self, facts: &mut RequestFacts) {
        facts.tenant = Some(self.name.to_string());
        facts.class.clone_from(&self.admitted.class);
        facts.tier = self.admitted.tier;
        facts.priority = self.admitted.priority as i32;
    }

    /// Its key, as the host makes it of the name.
    pub(crate) fn key(&self) -> u64 {
        id::key(self.name.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_or_not_possible_is_named() {
        let queueing = Queueing::parse("max_requests=5,max_running=2,timeout_s=1.5,leave=0.25").unwrap();
        assert_eq!((queueing.bounds.max_requests, queueing.max_running, queueing.leave.0), (5, Some(2), 0.25));
        for (text, says) in [
            ("max_requests=-1", "max_requests=-1 is not a whole number of 0 to 4294967295"),
            ("max_running=0", "of 1 to"),
            ("leave=2", "leave=2 is more than all"),
            ("timeout_s=1e9", "more than a year"),
            ("timeout_s=0", "less than a millisecond"),
            ("depth=1", "\"depth\" is not known; use max_requests"),
            ("depth", "not KEY=VALUE"),
        ] {
            let error = Queueing::parse(text).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
        assert_eq!(Tenant::parse("a,priority=-2.5,class=b-1").unwrap().admitted.priority, -2.5);
        for (text, says) in [
            ("weight=1", "a tenant's name"),
            ("a,weight=0", "no weight from 0.001 to 1000"),
            ("a,tier=16", "of 0 to 15"),
            ("a,class=b{c", "class=b{c is no class"),
            ("a,class=", "is no class"),
            ("a,priority=1e300", "priority=1e300 is not a number from"),
        ] {
            let error = Tenant::parse(text).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn tenants_have_their_shares_of_the_sessions() {
        let tenants = ["a,share=1", "b,share=3", "c,share=0"].map(|text| Tenant::parse(text).unwrap()).to_vec();
        let queueing = Queueing { tenants, ..Queueing::default() };
        let request = |session| TraceRequest { at: std::time::Duration::ZERO, prompt: Box::default(), output_tokens: 1, session };
        let mut counts = [0; 3];
        (0..10_000).for_each(|session| counts[queueing.tenant_of(0, &request(Some(session)), 1)] += 1);
        assert!((2300..2700).contains(&counts[0]) && counts[2] == 0, "{counts:?}");
        let of = |number| queueing.tenant_of(number, &request(Some(5)), 1);
        assert!((0..100).all(|number| of(number) == of(0)));
    }
}
