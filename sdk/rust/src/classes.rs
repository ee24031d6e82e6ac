//! Classes of requests by an operator's settings: what admission policies that have any share.
//!
//! Contract: the first of these that says something decides. The class that the host's configuration gives, if it is one of
//! the list; the value of an attribute, if one is named; the request's tenant; the request's priority. A request that none
//! of it fits has no class.

use schemars::JsonSchema;
use serde::Deserialize;

use crate::{Admit, Request};

/// Most classes: each is a queue, and a label of metrics.
pub const MAX_CLASSES: usize = 32;

/// One class, as an operator writes it.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Class {
    /// Its name: 1 to 64 letters, digits, `.`, `_` or `-`.
    pub name: String,
    /// Strict tier, 0 to 15: a lower one is served first, always.
    #[serde(default)]
    pub tier: u32,
    /// Its share among the classes of its tier, 0.001 to 1000.
    #[serde(default = "one")]
    pub weight: f32,
    /// Tenants whose requests are of it.
    #[serde(default)]
    pub tenants: Vec<String>,
    /// Requests of at least this priority are of it, and of no class that asks for a higher one that they have.
    #[serde(default)]
    pub min_priority: Option<i32>,
}

fn one() -> f32 {
    1.0
}

/// The classes of a policy, the most important first.
#[derive(Clone, Debug, Default)]
pub struct Classes {
    list: Vec<Class>,
    attribute: Option<String>,
}

impl Classes {
    /// Checks what an operator wrote. `attribute` is that by which requests name their class, such as an allowed header.
    ///
    /// # Errors
    /// Says which key is wrong and what is accepted.
    pub fn new(list: Vec<Class>, attribute: Option<String>) -> Result<Self, String> {
        if list.len() > MAX_CLASSES {
            return Err(format!("classes has {} classes; at most {MAX_CLASSES} are accepted", list.len()));
        }
        for (at, class) in list.iter().enumerate() {
            let Class { name, tier, weight, .. } = class;
            let is_safe = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            if !(1..=64).contains(&name.len()) || !name.bytes().all(is_safe) {
                return Err(format!("classes[{at}].name is {name:?}; use 1 to 64 letters, digits, `.`, `_` or `-`"));
            }
            if list[..at].iter().any(|earlier| earlier.name == *name) {
                return Err(format!("classes[{at}].name is {name:?}, as an earlier one's; names differ"));
            }
            if *tier > 15 {
                return Err(format!("classes[{at}].tier is {tier}; use 0 to 15, 0 served first"));
            }
            check_weight(&format!("classes[{at}].weight"), *weight)?;
        }
        Ok(Self { list, attribute })
    }

    /// The classes, the most important first.
    #[must_use]
    pub fn list(&self) -> &[Class] {
        &self.list
    }

    /// Which class a request is of.
    #[must_use]
    pub fn of(&self, request: &Request) -> Option<usize> {
        if self.list.is_empty() {
            return None;
        }
        self.by_name(request).or_else(|| self.by_tenant(request)).or_else(|| self.by_priority(request))
    }

    fn by_name(&self, request: &Request) -> Option<usize> {
        let named = |name: &str| self.list.iter().position(|class| class.name == name);
        let by_host = request.class().and_then(named);
        by_host.or_else(|| named(&request.attribute(self.attribute.as_deref()?)?))
    }

    fn by_tenant(&self, request: &Request) -> Option<usize> {
        if self.list.iter().all(|class| class.tenants.is_empty()) {
            return None;
        }
        let tenant = request.tenant()?;
        self.list.iter().position(|class| class.tenants.iter().any(|known| known == tenant))
    }

    fn by_priority(&self, request: &Request) -> Option<usize> {
        let least = |class: &Class| class.min_priority.filter(|&least| request.priority() >= least as f32);
        let fitting = self.list.iter().enumerate().filter_map(|(at, class)| Some((least(class)?, at)));
        // Of two that ask for the same, the first.
        fitting.max_by_key(|&(least, at)| (least, std::cmp::Reverse(at))).map(|(_, at)| at)
    }
}

impl Class {
    /// Lets a request in as one of this class.
    pub fn admit(&self, admit: Admit) -> Admit {
        admit.class(&self.name).tier(self.tier).class_weight(self.weight)
    }
}

/// Checks a weight that an operator wrote under `key`.
///
/// # Errors
/// If the host would not take it.
pub fn check_weight(key: &str, weight: f32) -> Result<(), String> {
    if (0.001..=1000.0).contains(&weight) { Ok(()) } else { Err(format!("{key} is {weight}; use 0.001 to 1000")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(name: &str) -> Class {
        Class { name: name.to_owned(), tier: 0, weight: 1.0, tenants: Vec::new(), min_priority: None }
    }

    fn classes() -> Classes {
        let list = vec![
            Class { min_priority: Some(5), ..class("urgent") },
            Class { min_priority: Some(0), ..class("normal") },
            Class { tenants: vec!["crawler".to_owned()], ..class("batch") },
        ];
        Classes::new(list, Some("x-class".to_owned())).unwrap()
    }

    #[track_caller]
    fn check(request: &Request, expected: Option<&str>) {
        let classes = classes();
        assert_eq!(classes.of(request).map(|at| classes.list()[at].name.as_str()), expected);
    }

    #[test]
    fn the_first_that_says_something_decides() {
        check(&Request::test(), Some("normal"));
        check(&Request::test().with_priority(4.0), Some("normal"));
        check(&Request::test().with_priority(7.0), Some("urgent"));
        check(&Request::test().with_priority(-1.0), None);
        check(&Request::test().with_priority(9.0).with_tenant("crawler"), Some("batch"));
        check(&Request::test().with_tenant("crawler").with_attribute("x-class", "urgent"), Some("urgent"));
        check(&Request::test().with_attribute("x-class", "royal").with_tenant("acme"), Some("normal"));
        check(&Request::test().with_class("batch").with_attribute("x-class", "urgent"), Some("batch"));
        assert_eq!(Classes::default().of(&Request::test()), None);
    }

    #[test]
    fn a_class_that_a_queue_cannot_work_with_is_refused_by_its_key() {
        let refused = |class: Class, says: &str| {
            let error = Classes::new(vec![super::tests::class("good"), class], None).unwrap_err();
            assert!(error.contains(says), "{error}");
        };
        refused(class(""), "classes[1].name is \"\"");
        refused(class("a b"), "classes[1].name");
        refused(class("good"), "names differ");
        refused(Class { tier: 16, ..class("x") }, "classes[1].tier is 16; use 0 to 15");
        refused(Class { weight: f32::NAN, ..class("x") }, "classes[1].weight is NaN");
        assert!(Classes::new((0..33).map(|i| class(&i.to_string())).collect(), None).unwrap_err().contains("at most 32"));
    }
}
