//! Fair share: weights for tenants, and classes with tiers and weights.
//!
//! It sheds nobody; the host's queue does the sharing, in tokens of work, wherever there is more of it than fits. Within a
//! tier classes share by their weights, and within a class tenants by theirs.

use std::collections::BTreeMap;

use dynamo_policy_sdk::{
    Admission, Pools, Request, Verdict,
    classes::{Class, Classes, check_weight},
    schemars::{self, JsonSchema},
    serde::{self, Deserialize},
};

/// What an operator can set.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
#[schemars(crate = "schemars")]
pub struct Settings {
    /// Weights of tenants by their names, 0.001 to 1000.
    pub tenants: BTreeMap<String, f32>,
    /// Weight of a tenant that has none of its own, and of requests without one; what the host's configuration says if it is
    /// left out.
    pub default_weight: Option<f32>,
    /// Classes, the most important first.
    pub classes: Vec<Class>,
    /// Attribute by which requests name their class, such as an allowed header.
    pub class_attribute: Option<String>,
}

/// The policy.
pub struct FairShare {
    tenants: BTreeMap<String, f32>,
    default_weight: Option<f32>,
    classes: Classes,
}

impl Admission for FairShare {
    type Settings = Settings;

    fn new(settings: Settings) -> Result<Self, String> {
        let Settings { tenants, default_weight, classes, class_attribute } = settings;
        for (tenant, &weight) in &tenants {
            check_weight(&format!("tenants.{tenant}"), weight)?;
        }
        if let Some(weight) = default_weight {
            check_weight("default_weight", weight)?;
        }
        Ok(Self { tenants, default_weight, classes: Classes::new(classes, class_attribute)? })
    }

    fn admit(&self, request: &Request, _: &Pools) -> Verdict {
        let mut admit = Verdict::admit();
        if let Some(class) = self.classes.of(request) {
            admit = self.classes.list()[class].admit(admit);
        }
        match self.weight(request) {
            Some(weight) => admit.tenant_weight(weight).into(),
            None => admit.into(),
        }
    }
}

impl FairShare {
    fn weight(&self, request: &Request) -> Option<f32> {
        let own = || self.tenants.get(request.tenant()?).copied();
        if self.tenants.is_empty() { self.default_weight } else { own().or(self.default_weight) }
    }
}

dynamo_policy_sdk::register!(FairShare as Admission);

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(settings: &str) -> FairShare {
        FairShare::new(serde_json::from_str(settings).unwrap()).unwrap()
    }

    fn admit(policy: &FairShare, request: &Request) -> Verdict {
        policy.admit(request, &Pools::test(1))
    }

    #[test]
    fn tenants_have_their_weights_and_others_the_default() {
        let policy = policy(r#"{"tenants": {"a": 4, "b": 0.5}, "default_weight": 2}"#);
        for (request, weight) in
            [(Request::test().with_tenant("a"), 4.0), (Request::test().with_tenant("b"), 0.5), (Request::test(), 2.0)]
        {
            assert_eq!(admit(&policy, &request), Verdict::admit().tenant_weight(weight).into());
        }
        let none = self::policy(r#"{"tenants": {"a": 4}}"#);
        assert_eq!(admit(&none, &Request::test().with_tenant("c")), Verdict::admit().into(), "the host's own weight stays");
    }

    #[test]
    fn classes_have_their_tiers_and_weights() {
        let policy = policy(
            r#"{"classes": [{"name": "interactive", "weight": 3, "min_priority": 0}, {"name": "batch", "tier": 1}],
                "class_attribute": "x-class"}"#,
        );
        let interactive = Verdict::admit().class("interactive").tier(0).class_weight(3.0);
        assert_eq!(admit(&policy, &Request::test()), interactive.into());
        let batch = Verdict::admit().class("batch").tier(1).class_weight(1.0);
        assert_eq!(admit(&policy, &Request::test().with_attribute("x-class", "batch")), batch.into());
        assert_eq!(admit(&policy, &Request::test().with_priority(-1.0)), Verdict::admit().into());
    }

    #[test]
    fn weights_that_are_none_are_refused_by_their_key() {
        for (settings, says) in [
            (r#"{"tenants": {"a": 0}}"#, "tenants.a is 0; use 0.001 to 1000"),
            (r#"{"default_weight": 2000}"#, "default_weight is 2000"),
            (r#"{"classes": [{"name": "a", "weight": -1}]}"#, "classes[0].weight is -1"),
        ] {
            let error = FairShare::new(serde_json::from_str(settings).unwrap()).err().unwrap();
            assert!(error.contains(says), "{error}");
        }
    }
}
