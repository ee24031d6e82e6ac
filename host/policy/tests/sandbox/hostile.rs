//! Each misbehaviour is bounded under its own name, and the next call works.

use std::sync::Arc;

use dynamo_host_core::{WorkerId, answer::Verdict};
use dynamo_host_policy::{FaultCause, Limits, OutcomeRow, synthetic};

use crate::{ask, component, cores, eventually, hostile, hostile_with, load, placed, provoking, raw, runtime};

#[test]
fn each_misbehaviour_has_its_own_cause_and_its_instance_is_replaced() {
    let fleet = synthetic::fleet(8);
    let runtime = runtime(Limits::default());
    let bytes = component("guests", "hostile");
    for (mode, cause) in [
        ("trap", FaultCause::Trap),
        ("loop", FaultCause::Fuel),
        ("memory", FaultCause::Memory),
        ("recursion", FaultCause::Stack),
        ("bulk", FaultCause::Fuel),
        ("host-calls", FaultCause::Fuel),
        ("huge-answer", FaultCause::ArgumentBytes),
        ("out-of-range", FaultCause::Answer("answer-out-of-range")),
        ("duplicate", FaultCause::Answer("answer-duplicate")),
        ("empty", FaultCause::Answer("answer-empty")),
        ("too-many", FaultCause::Answer("answer-too-many")),
        ("no-answer", FaultCause::Answer("no-answer")),
        ("bad-status", FaultCause::Answer("answer-status")),
    ] {
        let version = runtime.load(&bytes, &format!(r#"{{"mode":"{mode}"}}"#), Arc::default()).unwrap();
        assert_eq!(runtime.instance_count(), 2 * cores(), "{mode}");
        let fault = ask(&version, &provoking(&fleet)).unwrap_err();
        assert_eq!(fault.cause, cause, "{mode}: {fault}");
        // An instance that failed could not be entered again: all that there are can.
        for _ in 0..=2 * cores() {
            assert_eq!(placed(&version, synthetic::route_call(&fleet, 1)).len(), 8, "after {mode}");
        }
        eventually("the pool is full again", || runtime.instance_count() == 2 * cores());
        drop(version);
        eventually("all instances are let go", || runtime.instance_count() == 0);
    }
}

#[test]
fn a_panic_is_shown_in_the_guests_words() {
    let fault = ask(&hostile("trap"), &provoking(&synthetic::fleet(2))).unwrap_err();
    assert!(fault.detail.contains("configured to panic"), "{fault}");
}

#[test]
fn a_guest_that_keeps_growing_is_replaced_when_it_reaches_its_bound() {
    let (version, fleet) = (hostile("leak"), synthetic::fleet(8));
    let faults: Vec<_> = (0..100).filter_map(|_| ask(&version, &provoking(&fleet)).err()).collect();
    assert!(faults.iter().all(|fault| fault.cause == FaultCause::Memory), "{faults:?}");
    // A megabyte at a time, of sixteen.
    assert!((4..=10).contains(&faults.len()), "{} of 100 calls", faults.len());
}

#[test]
fn a_guest_that_fails_on_every_fifth_call_decides_the_others() {
    let (version, fleet) = (hostile_with(r#"{"mode":"trap","every":5}"#), synthetic::fleet(8));
    let causes: Vec<_> = (0..100).map(|_| ask(&version, &provoking(&fleet)).err().map(|fault| fault.cause)).collect();
    let trapped = causes.iter().filter(|cause| **cause == Some(FaultCause::Trap)).count();
    let decided = causes.iter().filter(|cause| cause.is_none()).count();
    assert_eq!(trapped + decided, 100, "{causes:?}");
    // Each instance counts for itself.
    assert!(trapped <= 20 && trapped + 2 * cores() as usize >= 20, "{causes:?}");
}

#[test]
fn floods_are_cut_and_the_decision_stands() {
    let fleet = synthetic::fleet(2);
    for mode in ["flood", "metric-flood", "state-flood", "not-finite"] {
        let version = hostile(mode);
        for _ in 0..20 {
            assert_eq!(placed(&version, provoking(&fleet)).len(), 2, "{mode}");
        }
    }
}

#[test]
fn what_a_policy_explains_has_an_end_and_may_be_no_number() {
    let fleet = synthetic::fleet(4);
    let mut call = provoking(&fleet);
    call.explain = true;
    let routed = ask(&hostile("not-finite"), &call).unwrap();
    assert!(matches!(routed.verdict, Verdict::Place(_)));
    let [scores, too_many] = &routed.explanations[..] else { panic!("{:?}", routed.explanations) };
    assert!(scores.values[0].is_nan() && scores.values[1].is_infinite(), "{scores:?}");
    assert_eq!((scores.values.len(), too_many.values.len()), (4, 256), "what is not about candidates may have a few more");
}

#[test]
fn a_guest_that_cannot_learn_still_decides() {
    let row = OutcomeRow {
        decision_id: 1,
        worker_id: WorkerId(2).0,
        ttft_ms: 3.0,
        itl_ms: f32::NAN,
        queue_ms: f32::NAN,
        output_tokens: 1,
        end: 2,
    };
    let fleet = synthetic::fleet(2);
    for (mode, cause) in [("trap-in-observe", FaultCause::Trap), ("loop-in-observe", FaultCause::Fuel)] {
        let version = hostile(mode);
        for _ in 0..50 {
            // Now and then all its instances are being replaced.
            let cause_now = version.observe([row].into()).unwrap_err().cause;
            assert!([cause, FaultCause::Busy, FaultCause::HostStall].contains(&cause_now), "{mode}: {cause_now}");
        }
        assert_eq!(placed(&version, provoking(&fleet)).len(), 2, "{mode}");
        assert!(version.is_open(), "{mode}");
    }
    let silent = load(&raw::component(&raw::Guest { observe: "unreachable", ..raw::Guest::default() }), "{}").unwrap();
    assert_eq!(silent.observe([row].into()).unwrap_err().cause, FaultCause::Trap);
    assert!(!silent.observes(), "a host never asks it");
}

#[test]
fn a_policy_may_reject_a_retry() {
    let (version, fleet) = (hostile_with(r#"{"mode":"reject","from_attempt":1}"#), synthetic::fleet(2));
    let mut call = provoking(&fleet);
    assert_eq!(placed(&version, call.clone()).len(), 2);
    Arc::make_mut(&mut call.request).attempt = 1;
    let Verdict::Reject(rejection) = ask(&version, &call).unwrap().verdict else { panic!("it should reject") };
    assert_eq!((rejection.status, rejection.reason.as_str()), (429, "configured to reject"));
}

#[test]
fn failed_instances_are_replaced_off_the_request_path() {
    let (version, fleet) = (hostile("trap"), synthetic::fleet(2));
    let mut causes = Vec::new();
    for _ in 0..200 {
        causes.push(version.decide(provoking(&fleet)).unwrap_err().cause);
    }
    assert!(causes.iter().all(|cause| matches!(cause, FaultCause::Trap | FaultCause::Busy)), "{causes:?}");
    assert_eq!(placed(&version, synthetic::route_call(&fleet, 1)).len(), 2);
}
