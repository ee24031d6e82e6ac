//! What a slot holds: changes, what requests keep, instances, reports.

use std::sync::Arc;

use dynamo_host_core::SlotName;
use dynamo_host_policy::{DecidedBy, Limits, RoutingSlot, VersionState, synthetic};

use crate::{at, component, cores, decided_by, eventually, hostile, policy, provoking, runtime, slot_of, timed_runtime};

#[test]
fn a_slot_falls_back_rolls_back_and_keeps_what_requests_pinned() {
    let fleet = synthetic::fleet(4);
    let slot = RoutingSlot::new(SlotName::ROUTING);
    let by = |pinned: &_, call| slot.decide(pinned, call).by.to_string();
    let good = || synthetic::route_call(&fleet, 1);
    assert_eq!(by(&slot.pin(), good()), "native");

    slot.activate(Some(policy("round-robin", "{}")));
    let pinned = slot.pin();
    slot.activate(Some(hostile("trap")));
    assert_eq!(by(&pinned, good()), "round-robin@0.1.0", "a request keeps its version");
    let bad = slot.pin();
    assert_eq!(by(&bad, good()), "hostile@0.1.0");
    assert_eq!(by(&bad, provoking(&fleet)), "native; fallback=trap; policy=hostile@0.1.0");

    slot.prepare_rollback().unwrap();
    slot.rollback().unwrap();
    assert_eq!(by(&slot.pin(), good()), "round-robin@0.1.0");
    assert_eq!(by(&bad, good()), "native; fallback=revoked; policy=hostile@0.1.0", "what was found bad decides nothing more");
    slot.rollback().unwrap();
    assert_eq!(by(&slot.pin(), good()), "native");
    assert!(slot.rollback().unwrap_err().to_string().contains("policy activate routing"));
}

#[test]
fn a_report_says_what_happened() {
    let fleet = synthetic::fleet(4);
    let slot = slot_of([hostile("out-of-range")]);
    for _ in 0..3 {
        let _ = slot.decide(&slot.pin(), provoking(&fleet));
    }
    let report = slot.report();
    assert_eq!((report.active.policy.as_str(), report.active.state), ("hostile@0.1.0", VersionState::Ready));
    assert_eq!(report.active.fallbacks["answer-out-of-range"], 3);
    assert!(report.active.last_fault.unwrap().contains("row 4"));
    assert_eq!(report.previous[0].policy, "native");
}

#[test]
fn the_kill_switch_decides_at_once_for_pinned_requests_too() {
    let fleet = synthetic::fleet(4);
    let slot = slot_of([policy("round-robin", "{}")]);
    let (pinned, native) = (slot.pin(), RoutingSlot::new(SlotName::ROUTING));
    let calls = || slot.report().active.calls;
    for (is_on, by) in [(true, "native; bypass"), (false, "round-robin@0.1.0"), (true, "native; bypass")] {
        slot.set_bypass(is_on);
        let before = calls();
        assert_eq!(slot.decide(&pinned, synthetic::route_call(&fleet, 1)).by.to_string(), by);
        assert_eq!(decided_by(&slot, synthetic::route_call(&fleet, 1)), by);
        assert_eq!((slot.report().bypass, calls() - before), (is_on, if is_on { 0 } else { 2 }));
    }
    native.set_bypass(true);
    assert!(matches!(native.decide(&native.pin(), synthetic::route_call(&fleet, 1)).by, DecidedBy::Bypass));
}

#[test]
fn state_that_a_bad_policy_filled_is_empty_when_it_is_rolled_back() {
    let fleet = synthetic::fleet(64);
    let runtime = runtime(Limits::default());
    let slot = RoutingSlot::new(SlotName::ROUTING);
    let load = |kind, name, settings| runtime.load(&component(kind, name), settings, Arc::clone(slot.state())).unwrap();
    slot.activate(Some(load("policies", "round-robin", "{}")));
    // In turn, the seed decides nothing.
    let takes_turns = || {
        let first = |seed| match slot.decide(&slot.pin(), synthetic::route_call(&fleet, seed)).verdict {
            dynamo_host_core::answer::Verdict::Place(ranking) => ranking.rows()[0],
            other => panic!("{other:?}"),
        };
        let (one, other) = (first(7), first(7));
        other == (one + 1) % 64
    };
    // Before the turn has an entry, which could still change when there is no room for another.
    slot.activate(Some(load("guests", "hostile", r#"{"mode":"state-flood"}"#)));
    for _ in 0..12 {
        assert_eq!(decided_by(&slot, provoking(&fleet)), "hostile@0.1.0");
    }
    slot.prepare_rollback().unwrap();
    slot.rollback().unwrap();
    assert!(takes_turns());
}

#[test]
fn an_instance_that_cannot_be_made_again_is_tried_again_after_a_while() {
    let (runtime, now_ms) = timed_runtime();
    let fleet = synthetic::fleet(2);
    let slot = RoutingSlot::new(SlotName::ROUTING);
    let settings = r#"{"mode":"trap-in-configure","from_unix_ms":1005000,"until_unix_ms":1010000}"#;
    slot.activate(Some(runtime.load(&component("guests", "hostile"), settings, Arc::default()).unwrap()));
    slot.activate(None);
    slot.activate(None);
    eventually("it has no instances", || runtime.instance_count() == 0);
    now_ms.store(5000, std::sync::atomic::Ordering::Relaxed);
    slot.prepare_rollback().unwrap();
    slot.rollback().unwrap();
    slot.prepare_rollback().unwrap();
    slot.rollback().unwrap();
    let call = |now_ms| at(synthetic::route_call(&fleet, 1), now_ms);
    let tried = || slot.report().active.fallbacks["instantiate"];
    assert_eq!(tried(), 1);
    for _ in 0..100 {
        assert_eq!(decided_by(&slot, call(5500)), "native; fallback=busy; policy=hostile@0.1.0");
    }
    assert_eq!(tried(), 1, "not at each request");
    now_ms.store(6500, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(decided_by(&slot, call(6500)), "native; fallback=busy; policy=hostile@0.1.0");
    eventually("it is tried again", || tried() == 2);
    now_ms.store(11_000, std::sync::atomic::Ordering::Relaxed);
    eventually("it is there again", || decided_by(&slot, call(11_000)) == "hostile@0.1.0");
    assert_eq!(slot.report().active.quarantines, 0, "none of that was held against it");
}

#[test]
fn more_instances_than_a_host_may_have_are_refused_not_waited_for() {
    let runtime = runtime(Limits { instances: 1, ..Limits::default() });
    let bytes = component("policies", "round-robin");
    let mut loaded = Vec::new();
    let error = (0..64).find_map(|_| match runtime.load(&bytes, "{}", Arc::default()) {
        Ok(version) => {
            loaded.push(version);
            None
        }
        Err(error) => Some(error),
    });
    let error = error.expect("the bound on instances is reached");
    assert_eq!(error.cause(), "start");
    assert!(error.to_string().contains("instances that this host may have are in use"), "{error}");
    assert!(loaded.len() >= 4, "four versions fit, and {} did", loaded.len());
}

#[test]
fn versions_that_were_replaced_let_go_of_their_instances() {
    let runtime = runtime(Limits { instances: 1, ..Limits::default() });
    let slot = RoutingSlot::new(SlotName::ROUTING);
    let bytes = component("policies", "round-robin");
    for _ in 0..30 {
        slot.activate(Some(runtime.load(&bytes, "{}", Arc::clone(slot.state())).unwrap()));
        // The active one has two for each core, the one before it one.
        eventually("replaced versions let go", || runtime.instance_count() <= 3 * cores());
    }
    slot.prepare_rollback().unwrap();
    slot.rollback().unwrap();
    let decision = slot.decide(&slot.pin(), synthetic::route_call(&synthetic::fleet(2), 1));
    assert!(matches!(decision.by, DecidedBy::Policy(_)));
}
