//! What an instance remembers is its own: whether a policy's answers depend on it can be found out.

use dynamo_host_policy::Trial;

use crate::{component, hostile, hostile_with, load, policy, raw};

#[test]
fn a_policy_whose_answers_depend_on_its_instance_is_found_out() {
    let found = Trial::memory_dependence(&hostile("remember")).unwrap().expect("it answers otherwise when it is new");
    assert!(found.call < 2 && found.candidates == 5, "{found:?}");
    assert_ne!(found.warm, found.fresh);
    let later = Trial::memory_dependence(&hostile_with(r#"{"mode":"remember","every":7}"#)).unwrap();
    assert_eq!(later.map(|found| found.call), Some(6), "the seventh");
}

#[test]
fn a_policy_that_remembers_in_state_alone_is_not() {
    let witness = load(&component("guests", "witness"), "{}").unwrap();
    let kv_cost = load(&component("guests", "kv-cost"), "{}").unwrap();
    let raw = load(&raw::component(&raw::Guest::default()), "{}").unwrap();
    for version in [policy("round-robin", "{}"), policy("least-loaded", "{}"), witness, kv_cost, raw, hostile("good")] {
        assert_eq!(Trial::memory_dependence(&version).unwrap(), None, "{version:?}");
    }
}
