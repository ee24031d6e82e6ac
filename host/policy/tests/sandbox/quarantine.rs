//! Quarantine, with time as the tests say.

use std::sync::{Arc, atomic::Ordering::Relaxed};

use dynamo_host_core::SlotName;
use dynamo_host_policy::{FaultCause, Pinned, PolicyFault, QuarantineReport, RoutingSlot, VersionState, synthetic};

use crate::{at, component, cores, decided_by, eventually, hostile_with, provoking, raw, slot_of, timed_runtime};

const QUARANTINED: &str = "native; fallback=quarantined; policy=hostile@0.1.0";
const TRAPPED: &str = "native; fallback=trap; policy=hostile@0.1.0";

/// Provokes it at one moment until it is not asked any more.
#[track_caller]
fn until_quarantined(slot: &RoutingSlot, now_ms: u64) {
    let fleet = synthetic::fleet(2);
    // While instances are replaced it is busy, which is not held against it.
    eventually("it is quarantined", || decided_by(slot, at(provoking(&fleet), now_ms)) == QUARANTINED);
}

fn quarantine(slot: &RoutingSlot) -> QuarantineReport {
    slot.report().active.quarantine.expect("it is quarantined")
}

#[test]
fn a_policy_that_keeps_failing_is_quarantined_tried_again_and_let_back() {
    let (runtime, now_ms) = timed_runtime();
    let fleet = synthetic::fleet(2);
    let slot = RoutingSlot::new(SlotName::ROUTING);
    let bytes = component("guests", "hostile");
    slot.activate(Some(runtime.load(&bytes, r#"{"mode":"trap"}"#, Arc::clone(slot.state())).unwrap()));
    let pinned = slot.pin();
    until_quarantined(&slot, 100);
    let calls = slot.report().active.calls;
    let trapped = slot.report().active.fallbacks["trap"];
    assert_eq!(trapped, 8);

    let settled = || eventually("its instances are there", || runtime.instance_count() == 2 * cores());
    // Whoever asks, whatever it asks, from whichever request: it is not asked.
    let good = |now_ms| at(synthetic::route_call(&fleet, 1), now_ms);
    assert_eq!(decided_by(&slot, good(1099)), QUARANTINED);
    assert_eq!(slot.decide(&pinned, good(1099)).by.to_string(), QUARANTINED);
    let report = slot.report().active;
    assert_eq!((report.calls, report.state, report.quarantines), (calls, VersionState::Quarantined, 1));
    assert_eq!(report.fallbacks["quarantined"], 3);

    // The trial fails: twice the time.
    settled();
    now_ms.store(1100, Relaxed);
    assert_eq!((quarantine(&slot).for_s, quarantine(&slot).next_trial_in_s), (1.0, 0.0));
    assert_eq!(quarantine(&slot).since_unix_ms, 1_000_100);
    assert_eq!(decided_by(&slot, at(provoking(&fleet), 1100)), TRAPPED);
    assert_eq!(decided_by(&slot, good(1101)), QUARANTINED);
    let report = quarantine(&slot);
    assert_eq!((report.cause.as_str(), report.failed_trials, report.backoff_s, report.next_trial_in_s), ("trap", 1, 2.0, 2.0));

    // It is good: the policy decides again, from the next request on.
    settled();
    assert_eq!(decided_by(&slot, good(3099)), QUARANTINED);
    assert_eq!(decided_by(&slot, good(3100)), "hostile@0.1.0");
    assert_eq!(decided_by(&slot, good(3100)), "hostile@0.1.0");
    let report = slot.report().active;
    assert!(report.quarantine.is_none() && report.state == VersionState::Ready);

    // A relapse waits longer.
    until_quarantined(&slot, 3200);
    now_ms.store(3200, Relaxed);
    assert_eq!((quarantine(&slot).next_trial_in_s, slot.report().active.quarantines), (4.0, 2));
}

#[test]
fn a_policy_that_fails_at_few_of_many_requests_is_not_quarantined() {
    let fleet = synthetic::fleet(2);
    let slot = slot_of([hostile_with(r#"{"mode":"out-of-range","every":12}"#)]);
    for n in 0..2000 {
        let by = decided_by(&slot, at(provoking(&fleet), n * 3));
        assert!(!by.contains("quarantined"), "at {n}");
    }
    assert_eq!(slot.report().active.fallbacks["answer-out-of-range"], 2000 / 12);
    assert_eq!(slot.report().active.quarantines, 0);
}

#[test]
fn wrong_answers_count_and_to_abstain_does_not() {
    let fleet = synthetic::fleet(2);
    let slot = slot_of([hostile_with(r#"{"mode":"duplicate"}"#)]);
    until_quarantined(&slot, 5);
    assert_eq!(slot.report().active.calls, 8);
    let slot = slot_of([hostile_with(r#"{"mode":"no-answer"}"#)]);
    for _ in 0..1000 {
        assert_eq!(decided_by(&slot, at(provoking(&fleet), 5)), "native; fallback=no-answer; policy=hostile@0.1.0");
    }
}

#[test]
fn a_policy_that_holds_for_too_long_is_quarantined_and_one_more_hold_is_no_good_trial() {
    let fleet = synthetic::fleet(2);
    let slot = slot_of([hostile_with(r#"{"mode":"hold"}"#)]);
    let exhausted = |pinned: &Pinned| {
        let fault = PolicyFault { cause: FaultCause::HoldExhausted, detail: String::new() };
        slot.decide_instead_of(pinned, &at(provoking(&fleet), 5), fault).by.to_string()
    };
    for _ in 0..8 {
        for _ in 0..8 {
            assert_eq!(decided_by(&slot, at(provoking(&fleet), 5)), "hostile@0.1.0");
        }
        assert_eq!(exhausted(&slot.pin()), "native; fallback=hold-exhausted; policy=hostile@0.1.0");
    }
    assert_eq!(decided_by(&slot, at(provoking(&fleet), 1000)), QUARANTINED);
    assert_eq!(decided_by(&slot, at(provoking(&fleet), 1005)), "hostile@0.1.0", "the trial");
    assert_eq!(decided_by(&slot, at(provoking(&fleet), 1006)), QUARANTINED, "and nothing is known yet");
    assert_eq!(decided_by(&slot, at(synthetic::route_call(&fleet, 1), 2100)), "hostile@0.1.0");
    assert_eq!(slot.report().active.state, VersionState::Ready);
}

#[test]
fn a_version_that_is_rolled_back_while_quarantined_is_revoked() {
    let fleet = synthetic::fleet(2);
    let slot = slot_of([hostile_with(r#"{"mode":"empty"}"#)]);
    let pinned = slot.pin();
    until_quarantined(&slot, 5);
    slot.prepare_rollback().unwrap();
    slot.rollback().unwrap();
    let by = slot.decide(&pinned, at(synthetic::route_call(&fleet, 1), 1_000_000)).by.to_string();
    assert_eq!(by, "native; fallback=revoked; policy=hostile@0.1.0");
}

#[test]
fn many_threads_quarantine_once_and_send_one_trial() {
    let fleet = synthetic::fleet(2);
    let slot =
        slot_of([crate::load(&raw::component(&raw::Guest::default()), "{}").unwrap(), hostile_with(r#"{"mode":"empty"}"#)]);
    let all_ask = |now_ms| {
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| (0..200).for_each(|_| drop(slot.decide(&slot.pin(), at(provoking(&fleet), now_ms)))));
            }
        });
    };
    all_ask(5);
    assert_eq!((slot.report().active.quarantines, slot.report().active.state), (1, VersionState::Quarantined));
    let calls = slot.report().active.calls;
    all_ask(1005);
    assert_eq!(slot.report().active.calls, calls + 1);
    assert_eq!(quarantine(&slot).failed_trials, 1);
}
