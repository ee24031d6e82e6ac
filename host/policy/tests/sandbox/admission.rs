//! Admission policies: what they see, what they may say, and what happens when they say nothing that can be done.

use std::sync::Arc;

use dynamo_host_core::{Admitted, OnError, Rejection, SlotName, admission::Verdict};
use dynamo_host_policy::{AdmissionCall, AdmissionSlot, DecidedBy, FaultCause, OutcomeRow, PolicyVersion, SlotState, synthetic};

use crate::{RUNTIME, component, eventually, hostile, policy, raw, slot_of};

fn call(pools: u32) -> AdmissionCall {
    synthetic::admission_call(&synthetic::pools(pools), 1)
}

/// The answer, asked until it is neither busy nor pre-empted.
#[track_caller]
pub(crate) fn verdict(version: &PolicyVersion, call: &AdmissionCall) -> Verdict {
    let decided = std::cell::RefCell::new(None);
    eventually("it is neither busy nor pre-empted", || match version.decide(call.clone()) {
        Ok(answer) => decided.replace(Some(answer.verdict)).is_none(),
        Err(fault) => {
            assert!(matches!(fault.cause, FaultCause::Busy | FaultCause::HostStall), "{fault}");
            false
        }
    });
    decided.into_inner().unwrap()
}

/// What a witness must say about a request of which every fact is known that this host knows, on any host that speaks its
/// contract.
pub(crate) fn check_witness(bytes: &[u8]) {
    let state = Arc::new(SlotState::of(&SlotName::ADMISSION));
    let version = RUNTIME.load(bytes, "{}", state).unwrap();
    let mut call = call(3);
    let request = Arc::make_mut(&mut call.request);
    request.decision_id = 7;
    request.tenant = Some("acme".to_owned());
    request.session_key = Some(1);
    request.max_output_tokens = Some(64);
    request.expected_output_tokens = Some(32);
    request.choices = 2;
    request.flags = 5;
    request.priority = -3;
    request.deadline_ms = Some(501);
    request.attributes.insert("x-test".to_owned(), "abc".to_owned());
    (call.now_ms, call.unix_ms) = (101, 1000);
    let stands = Admitted {
        class: Some("seen".into()),
        tier: 2,
        class_weight: 3.0,
        tenant_weight: 0.5,
        priority: -1.5,
        deadline_ms: Some(700),
    };
    assert_eq!(verdict(&version, &call), Verdict::Admit(stands));

    Arc::make_mut(&mut call.request).attributes.insert("x-shed".to_owned(), String::new());
    let Verdict::Shed(Rejection { status: 429, retry_after_ms: Some(1500), reason }) = verdict(&version, &call) else {
        panic!("it sheds")
    };
    let saw = "request: 7 9 -1 0 0 4 1 1 -1 0 1000 0 0 64 32 2 5 0 0 0 -3 -1 101 400 500 50 0 0 0 -1 -1 0 3; \
               pools: 3 0 3 12 96 96 30 30000 300 450 0.30000000447034836 240 180; services: 1 5 4 1 101 1000 1";
    assert_eq!(reason, saw);

    let row = OutcomeRow {
        decision_id: 7,
        worker_id: u64::MAX,
        ttft_ms: 3.0,
        itl_ms: f32::NAN,
        queue_ms: 5.0,
        output_tokens: 0,
        end: 4,
    };
    version.observe([row, row].into()).unwrap();
    version.observe(Vec::new().into()).unwrap();
    assert!(version.observes());
}

#[test]
fn an_admission_policy_sees_every_fact_and_column_as_the_host_knows_it() {
    check_witness(&component("guests", "witness-admission"));
}

#[test]
fn what_a_world_does_not_have_cannot_be_asked_for() {
    let text = |interface: &str, function: &str| {
        raw::admission(&raw::Admission { asks: Some((interface, function)), ..raw::Admission::default() })
    };
    let load = |bytes: &[u8]| RUNTIME.load(bytes, "{}", Arc::default());
    let error = load(&text("candidates", "count")).unwrap_err();
    assert_eq!(error.cause(), "forbidden-import");
    assert!(error.to_string().contains("the world `admission` may not"), "{error}");
    load(&text("outcomes", "count")).unwrap();
}

#[test]
fn a_slot_takes_policies_of_its_own_world_alone() {
    let admission = Arc::new(SlotState::of(&SlotName::ADMISSION));
    let routing = Arc::new(SlotState::of(&SlotName::ROUTING));
    for (bytes, state, says) in [
        (component("policies", "round-robin"), admission, "policy activate routing FILE"),
        (component("guests", "witness-admission"), routing, "policy activate admission FILE"),
    ] {
        let error = RUNTIME.load(&bytes, "{}", state).unwrap_err();
        assert_eq!(error.cause(), "wrong-world");
        assert!(error.to_string().contains(says), "{error}");
    }
}

/// A policy written by hand that answers so.
fn answering(answer: &str) -> Arc<PolicyVersion> {
    RUNTIME.load(&raw::admission(&raw::Admission { answer, ..raw::Admission::default() }), "{}", Arc::default()).unwrap()
}

/// How it is answered by a slot that has such a policy, but only where it is provoked: probes it must pass.
#[track_caller]
fn check(answer: &str, cause: &str) {
    let version = answering(&format!("(if (i32.eq (call $count) (i32.const 3)) (then {answer}) (else (call $admit)))"));
    let fault = version.decide(call(3)).map(|decided| decided.verdict).unwrap_err();
    assert_eq!(fault.cause.as_str(), cause, "{fault}");
}

#[test]
fn an_answer_that_cannot_be_carried_out_is_a_fault_with_a_name() {
    check("", "no-answer");
    check("(call $set_tier (i32.const 16)) (call $admit)", "answer-tier");
    check("(call $set_weight (f32.const nan)) (call $admit)", "answer-weight");
    check("(call $set_weight (f32.const 0)) (call $admit)", "answer-weight");
    check("(call $set_class (i32.const 64) (i32.const 0)) (call $admit)", "answer-class");
    check("(call $set_class (i32.const 64) (i32.const 4)) (call $admit)", "answer-class");
    check("(call $set_class (i32.const 64) (i32.const 60000)) (call $admit)", "answer-class");
    check("(call $set_deadline (i32.const 0)) (call $admit)", "answer-deadline");
    check("(call $shed (i32.const 200) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0))", "answer-status");
    check("unreachable", "trap");
    check("(loop $l (br $l))", "fuel");
}

#[test]
fn the_last_word_counts_and_what_is_not_said_is_left_as_it_is() {
    let mut call = call(1);
    call.native = Admitted { priority: -2.0, class: Some("by-configuration".into()), tier: 1, ..Admitted::default() };
    assert_eq!(verdict(&answering("(call $admit)"), &call), Verdict::Admit(call.native.clone()));
    let late = "(call $shed (i32.const 503) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)) (call $admit)
                (call $set_tier (i32.const 9)) (call $set_tier (i32.const 3))";
    assert!(matches!(verdict(&answering(late), &call), Verdict::Admit(Admitted { tier: 3, priority: -2.0, .. })));
}

#[test]
fn a_retry_after_of_a_lifetime_is_a_day() {
    let version = answering("(call $shed (i32.const 429) (i32.const 1) (i32.const -1) (i32.const 0) (i32.const 0))");
    let day = 24 * 60 * 60 * 1000;
    assert!(matches!(verdict(&version, &call(1)), Verdict::Shed(Rejection { retry_after_ms: Some(ms), .. }) if ms == day));
}

#[test]
fn a_slot_without_a_policy_admits_all_and_one_whose_policy_fails_does_what_it_is_told() {
    let slot = AdmissionSlot::new(SlotName::ADMISSION);
    let admitted = Verdict::Admit(Admitted::default());
    let decide = || slot.decide(&slot.pin(), call(3));
    assert_eq!((decide().verdict, decide().by.to_string()), (admitted.clone(), "native".to_owned()));

    let good = answering("(call $set_tier (i32.const 5)) (call $admit)");
    let bad = answering("(if (i32.eq (call $count) (i32.const 3)) (then unreachable) (else (call $admit)))");
    slot.activate(Some(good));
    assert!(matches!(decide().verdict, Verdict::Admit(Admitted { tier: 5, .. })));
    slot.activate(Some(Arc::clone(&bad)));
    assert_eq!(
        (decide().verdict, decide().by.to_string()),
        (admitted.clone(), "native; fallback=trap; policy=raw@1.0.0".to_owned())
    );

    slot.set_on_error(OnError::LastGood);
    eventually("the one before decides", || matches!(decide().verdict, Verdict::Admit(Admitted { tier: 5, .. })));

    slot.set_on_error(OnError::Closed);
    let closed = decide();
    assert!(matches!(closed.by, DecidedBy::Nobody(_)));
    let Verdict::Shed(Rejection { status: 503, retry_after_ms: Some(_), reason }) = closed.verdict else {
        panic!("closed is a refusal")
    };
    assert!(reason.contains("the admission policy failed"), "{reason}");

    slot.set_bypass(true);
    assert_eq!((decide().verdict, decide().by.to_string()), (admitted, "native; bypass".to_owned()));
    slot.set_bypass(false);
    slot.prepare_rollback().unwrap();
    slot.rollback().unwrap();
    assert!(matches!(decide().verdict, Verdict::Admit(Admitted { tier: 5, .. })));
    assert_eq!(slot.report().slot, "admission");
}

#[test]
fn a_policy_of_another_world_fails_and_the_slot_goes_on() {
    let slot = slot_of([policy("round-robin", "{}"), hostile("good")]);
    let version = slot.pin().0.unwrap();
    let fault = version.decide(call(3)).map(|decided| decided.verdict).unwrap_err();
    assert_eq!(fault.cause, FaultCause::Trap);
    assert!(fault.detail.contains("outside of route"), "{fault}");
}
