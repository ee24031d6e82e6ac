//! What happens to a request that the policy fails to decide.

use std::sync::Arc;

use dynamo_host_core::{OnError, SlotName, answer::Verdict};
use dynamo_host_policy::{DecidedBy, FaultCause, PolicyFault, RoutingSlot, synthetic};

use crate::{at, component, decided_by, eventually, hostile, hostile_with, policy, provoking, slot_of, timed_runtime};

#[test]
fn the_newest_sound_version_decides_and_native_when_that_fails_too() {
    let fleet = synthetic::fleet(4);
    let slot = slot_of([policy("round-robin", "{}"), hostile("duplicate"), hostile("trap")]);
    let by = |now_ms| decided_by(&slot, at(provoking(&fleet), now_ms));
    assert_eq!(by(1), "native; fallback=trap; policy=hostile@0.1.0", "unless it is said otherwise");
    slot.set_on_error(OnError::LastGood);
    assert_eq!(slot.report().on_error, OnError::LastGood);

    // The one before it is bad in its own way, and is passed over once that is known.
    eventually("the third last decides", || by(2) == "round-robin@0.1.0; fallback=quarantined; policy=hostile@0.1.0");
    let report = slot.report();
    assert!(report.previous[0].fallbacks["answer-duplicate"] >= 8, "{report:?}");
    assert!(report.active.quarantine.is_some() && report.previous[0].quarantine.is_some(), "{report:?}");
    assert!(report.previous[1].calls > 0 && report.previous[1].fallbacks.keys().all(|cause| cause == "busy"), "{report:?}");
}

#[test]
fn the_last_good_version_is_warm_before_it_is_needed() {
    let (runtime, _) = timed_runtime();
    let slot = RoutingSlot::new(SlotName::ROUTING);
    let load = |kind, name, settings| runtime.load(&component(kind, name), settings, Arc::clone(slot.state())).unwrap();
    slot.set_on_error(OnError::LastGood);
    slot.activate(Some(load("policies", "round-robin", "{}")));
    slot.activate(Some(load("policies", "least-loaded", "{}")));
    slot.activate(Some(load("guests", "hostile", r#"{"mode":"trap"}"#)));
    // The one before the last replaced has none.
    eventually("instances settle", || runtime.instance_count() == 3 * crate::cores());
    slot.prepare_rollback().unwrap();
    slot.rollback().unwrap();
    slot.activate(Some(load("guests", "hostile", r#"{"mode":"trap"}"#)));
    eventually("instances settle", || runtime.instance_count() == 3 * crate::cores());
    let fleet = synthetic::fleet(4);
    assert_eq!(decided_by(&slot, provoking(&fleet)), "least-loaded@0.1.0; fallback=trap; policy=hostile@0.1.0");

    // A rollback leaves an older one in its place.
    slot.prepare_rollback().unwrap();
    slot.rollback().unwrap();
    eventually("the older one is warm", || runtime.instance_count() == 3 * crate::cores());
}

#[test]
fn the_same_component_with_the_same_settings_is_no_last_good_and_native_may_be() {
    let fleet = synthetic::fleet(4);
    let bad = || hostile("trap");
    let slot = slot_of([policy("round-robin", "{}"), bad(), bad()]);
    slot.set_on_error(OnError::LastGood);
    eventually("the one before both decides", || {
        decided_by(&slot, provoking(&fleet)).starts_with("round-robin@0.1.0; fallback=")
    });

    let slot = slot_of([policy("round-robin", "{}")]);
    slot.activate(None);
    slot.activate(Some(bad()));
    slot.set_on_error(OnError::LastGood);
    assert_eq!(decided_by(&slot, provoking(&fleet)), "native; fallback=trap; policy=hostile@0.1.0");
    let first = slot_of([bad()]);
    first.set_on_error(OnError::LastGood);
    assert_eq!(decided_by(&first, provoking(&fleet)), "native; fallback=trap; policy=hostile@0.1.0");
}

#[test]
fn nobody_decides_instead_where_the_slot_is_closed() {
    let fleet = synthetic::fleet(4);
    let slot = slot_of([policy("round-robin", "{}"), hostile("trap")]);
    slot.set_on_error(OnError::Closed);
    let decision = slot.decide(&slot.pin(), at(provoking(&fleet), 1));
    assert_eq!(decision.by.to_string(), "closed; fallback=trap; policy=hostile@0.1.0");
    let Verdict::Reject(rejection) = decision.verdict else { panic!("{:?}", decision.verdict) };
    assert_eq!((rejection.status, rejection.retry_after_ms), (503, Some(1000)));
    assert!(rejection.reason.contains("try again") && !rejection.reason.contains("hostile"), "{}", rejection.reason);
    assert_eq!(decided_by(&slot, at(synthetic::route_call(&fleet, 1), 1)), "hostile@0.1.0");

    // Clients come again when the next trial is due.
    let quarantined = "closed; fallback=quarantined; policy=hostile@0.1.0";
    eventually("it is quarantined", || decided_by(&slot, at(provoking(&fleet), 2)) == quarantined);
    assert_eq!(decided_by(&slot, at(provoking(&fleet), 1002)), "closed; fallback=trap; policy=hostile@0.1.0", "the trial");
    let Verdict::Reject(rejection) = slot.decide(&slot.pin(), at(provoking(&fleet), 1003)).verdict else { panic!("placed") };
    assert_eq!(rejection.retry_after_ms, Some(1999));
    // The kill switch is stronger.
    slot.set_bypass(true);
    assert_eq!(decided_by(&slot, at(provoking(&fleet), 1004)), "native; bypass");
}

#[test]
fn a_rollback_refuses_nobody() {
    let fleet = synthetic::fleet(4);
    for mode in [OnError::Closed, OnError::LastGood] {
        let slot = slot_of([policy("round-robin", "{}"), hostile("trap")]);
        slot.set_on_error(mode);
        let pinned = slot.pin();
        let by = || slot.decide(&pinned, synthetic::route_call(&fleet, 1)).by.to_string();
        slot.prepare_rollback().unwrap();
        slot.rollback().unwrap();
        assert_eq!(by(), "round-robin@0.1.0; fallback=revoked; policy=hostile@0.1.0", "{mode}");
        slot.rollback().unwrap();
        assert_eq!(by(), "native; fallback=revoked; policy=hostile@0.1.0", "{mode}: native is what was put back");
    }
}

#[test]
fn a_policy_that_could_not_be_brought_back_is_missed_until_something_is_activated() {
    let fleet = synthetic::fleet(4);
    let slot = slot_of([policy("round-robin", "{}")]);
    slot.activate(None);
    slot.set_missing("kv@7");
    let by = || decided_by(&slot, synthetic::route_call(&fleet, 1));
    assert_eq!(by(), "native");
    slot.set_on_error(OnError::LastGood);
    eventually("the last good one decides", || by() == "round-robin@0.1.0; fallback=missing; policy=kv@7");
    slot.set_on_error(OnError::Closed);
    assert_eq!(by(), "closed; fallback=missing; policy=kv@7");
    slot.activate(None);
    assert_eq!(by(), "native", "that is somebody's wish");
}

#[test]
fn whoever_decides_after_too_many_holds_does_not_hold() {
    let fleet = synthetic::fleet(4);
    let slot = slot_of([hostile_with(r#"{"mode":"hold"}"#), hostile_with(r#"{"mode":"hold","from_attempt":0}"#)]);
    slot.set_on_error(OnError::LastGood);
    let fault = PolicyFault { cause: FaultCause::HoldExhausted, detail: String::new() };
    let decision = slot.decide_instead_of(&slot.pin(), &provoking(&fleet), fault);
    assert!(matches!((&decision.verdict, &decision.by), (Verdict::Place(_), DecidedBy::Fallback(_))), "{decision:?}");
}
