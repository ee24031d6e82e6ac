//! What good policies decide.

use std::sync::Arc;

use dynamo_host_core::Load;
use dynamo_host_policy::{OutcomeRow, PolicyVersion, SlotState, synthetic};

use crate::{RUNTIME, component, placed, policy};

#[test]
fn round_robin_takes_turns_across_instances() {
    let fleet = synthetic::fleet(5);
    let version = policy("round-robin", "{}");
    let mut hits = [0; 5];
    for seed in 0..50 {
        hits[placed(&version, synthetic::route_call(&fleet, seed))[0] as usize] += 1;
    }
    assert_eq!(hits, [10; 5]);
}

#[test]
fn least_loaded_ranks_an_idle_worker_first_and_obeys_its_settings() {
    let fleet = synthetic::fleet(4);
    let version = policy("least-loaded", "{}");
    let first = placed(&version, synthetic::route_call(&fleet, 1))[0];
    let idle = (0..4).min_by_key(|&row| fleet.candidates.worker(row).load.get(Load::ActiveRequests)).unwrap();
    assert_eq!(first, idle);
    assert_eq!(version.name().to_string(), format!("least-loaded@{}", env!("CARGO_PKG_VERSION")));
    assert!(version.settings_schema().unwrap().contains("prefill_token"));
}

#[test]
fn a_decision_depends_on_its_seed_alone() {
    let fleet = synthetic::fleet(100);
    let (one, other) = (policy("least-loaded", "{}"), policy("least-loaded", "{}"));
    for seed in 0..20 {
        let call = synthetic::route_call(&fleet, seed);
        assert_eq!(placed(&one, call.clone()), placed(&other, call));
    }
}

#[test]
fn a_probe_leaves_no_trace_in_the_slots_state() {
    let state = Arc::new(SlotState::default());
    let fleet = synthetic::fleet(64);
    let first = |version: &PolicyVersion| placed(version, synthetic::route_call(&fleet, 1))[0];
    let bytes = component("policies", "round-robin");
    let one = RUNTIME.load(&bytes, "{}", Arc::clone(&state)).unwrap();
    let turn = first(&one);
    let other = RUNTIME.load(&bytes, "{}", Arc::clone(&state)).unwrap();
    assert_eq!(first(&other), turn + 1, "the probe's turns are its own");
}

#[test]
fn what_a_policy_reads_can_be_told_from_its_bytes() {
    let imports = policy("round-robin", "{}").inspection().imports.clone();
    assert!(imports.iter().any(|import| import.contains("/state@")), "{imports:?}");
    assert!(!imports.iter().any(|import| import.contains("/outcomes@")), "{imports:?}");
    assert!(!policy("round-robin", "{}").observes());
}

#[test]
fn outcomes_reach_a_policy_that_has_nothing_to_learn_without_harm() {
    let row =
        OutcomeRow { decision_id: 1, worker_id: 2, ttft_ms: 3.0, itl_ms: f32::NAN, queue_ms: f32::NAN, output_tokens: 1, end: 0 };
    policy("least-loaded", "{}").observe([row].into()).unwrap();
}
