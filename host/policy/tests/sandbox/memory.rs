//! What an instance remembers is its own: whether a policy's answers depend on it can be found out.

use crate::{component, hostile, hostile_with, load, policy, raw};

#[test]
fn a_policy_whose_answers_depend_on_its_instance_is_found_out() {
    let found = hostile("remember").memory_dependence().unwrap().expect("it answers otherwise when it is new");
    assert!(found.call < 2 && found.rows == 5, "{found:?}");
    assert_ne!(found.warm, found.fresh);
    let later = hostile_with(r#"{"mode":"remember","every":7}"#).memory_dependence().unwrap();
    assert_eq!(later.map(|found| found.call), Some(6), "the seventh");
}

#[test]
fn a_policy_that_remembers_in_state_alone_is_not() {
    let witness = load(&component("guests", "witness"), "{}").unwrap();
    let kv_cost = load(&component("guests", "kv-cost"), "{}").unwrap();
    let raw = load(&raw::component(&raw::Guest::default()), "{}").unwrap();
    for version in [policy("round-robin", "{}"), policy("least-loaded", "{}"), witness, kv_cost, raw, hostile("good")] {
        assert_eq!(version.memory_dependence().unwrap(), None, "{version:?}");
    }
}
