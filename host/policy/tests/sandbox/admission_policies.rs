//! The admission policies that are shipped, as components: they decide in the sandbox as they do natively, on shared state.

use std::sync::Arc;

use dynamo_host_core::{PoolState, Rejection, SlotName, admission::Verdict};
use dynamo_host_policy::{AdmissionCall, AdmissionSlot, PolicyVersion, synthetic};

use crate::{RUNTIME, component, eventually};

fn call(now_ms: u64, tenant: &str) -> AdmissionCall {
    let mut call = synthetic::admission_call(&synthetic::pools(1), now_ms);
    let request = Arc::make_mut(&mut call.request);
    request.tenant = Some(tenant.to_owned());
    request.expected_output_tokens = Some(0);
    AdmissionCall { now_ms, ..call }
}

/// A version of a shipped policy for this slot.
#[track_caller]
fn load(slot: &AdmissionSlot, name: &str, settings: &str) -> Arc<PolicyVersion> {
    RUNTIME.load(&component("policies", name), settings, Arc::clone(slot.state())).unwrap()
}

/// The slot's decision by its policy; asked again while instances are busy or pre-empted.
#[track_caller]
fn decide(slot: &AdmissionSlot, call: &AdmissionCall) -> Verdict {
    let mut verdict = None;
    let cell = std::cell::RefCell::new(&mut verdict);
    eventually("the policy decides", || {
        let decision = slot.decide(&slot.pin(), call.clone());
        let by_policy = decision.by.version().is_some();
        **cell.borrow_mut() = Some(decision.verdict);
        by_policy
    });
    verdict.unwrap()
}

#[test]
fn a_token_bucket_holds_over_instances_and_a_swap() {
    let slot = AdmissionSlot::new(SlotName::ADMISSION);
    let settings = r#"{"requests_per_minute": 60, "request_burst": 40}"#;
    slot.activate(Some(load(&slot, "token-bucket", settings)));
    let admitted = std::sync::atomic::AtomicU32::new(0);
    let ask = |times: u32| {
        for _ in 0..times {
            if matches!(decide(&slot, &call(1000, "acme")), Verdict::Admit(_)) {
                admitted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }
    };
    // From several threads, so that several instances decide.
    std::thread::scope(|scope| drop([(); 4].map(|()| scope.spawn(|| ask(8)))));
    slot.activate(Some(load(&slot, "token-bucket", settings)));
    std::thread::scope(|scope| drop([(); 4].map(|()| scope.spawn(|| ask(8)))));
    assert_eq!(admitted.into_inner(), 40, "as many as the bucket holds, of 64");
    let refused = decide(&slot, &call(1000, "acme"));
    assert!(matches!(refused, Verdict::Shed(Rejection { status: 429, retry_after_ms: Some(1000), .. })), "{refused:?}");
    assert!(matches!(decide(&slot, &call(1000, "other")), Verdict::Admit(_)));
    assert!(matches!(decide(&slot, &call(2000, "acme")), Verdict::Admit(_)));
}

#[test]
fn slo_shed_sheds_what_comes_too_late() {
    let slot = AdmissionSlot::new(SlotName::ADMISSION);
    slot.activate(Some(load(&slot, "slo-shed", "{}")));
    let at = |wait_ms: f32| {
        let mut call = call(1000, "acme");
        call.pools = [PoolState { predicted_wait_ms: wait_ms, ..call.pools[0].clone() }].into();
        decide(&slot, &call)
    };
    // The target is 500 ms, and requests take 80 ms once they are sent.
    assert!(matches!(at(400.0), Verdict::Admit(_)));
    assert!(matches!(at(450.0), Verdict::Shed(Rejection { status: 503, retry_after_ms: Some(1000), .. })));
    assert!(matches!(at(400.0), Verdict::Shed(_)), "not until it has room again");
    assert!(matches!(at(200.0), Verdict::Admit(_)));
}

#[test]
fn fair_share_says_where_requests_stand() {
    let slot = AdmissionSlot::new(SlotName::ADMISSION);
    let settings = r#"{"tenants": {"acme": 4}, "classes": [{"name": "batch", "tier": 1, "weight": 0.5, "tenants": ["acme"]}]}"#;
    slot.activate(Some(load(&slot, "fair-share", settings)));
    let Verdict::Admit(admitted) = decide(&slot, &call(1000, "acme")) else { panic!("it sheds nobody") };
    assert_eq!((admitted.class.as_deref(), admitted.tier), (Some("batch"), 1));
    assert_eq!((admitted.class_weight, admitted.tenant_weight), (0.5, 4.0));
}

#[test]
fn what_they_remember_they_remember_in_state_and_a_decision_costs_little_fuel() {
    let token_bucket = r#"{"requests_per_minute": 600, "tokens_per_minute": 100000, "per": "session"}"#;
    let slo_shed = r#"{"ttft_ms": 200, "classes": [{"name": "a", "min_priority": 1}, {"name": "b", "min_priority": -5}]}"#;
    let fair_share = r#"{"tenants": {"tenant-1": 4}, "classes": [{"name": "a", "min_priority": 0}]}"#;
    for (name, settings) in [("token-bucket", token_bucket), ("slo-shed", slo_shed), ("fair-share", fair_share)] {
        let slot = AdmissionSlot::new(SlotName::ADMISSION);
        let version = load(&slot, name, settings);
        assert_eq!(version.memory_dependence().unwrap(), None, "{name}");
        let fuel = version.trial().unwrap().decide(&call(1000, "tenant-1")).unwrap().fuel;
        assert!(fuel < RUNTIME.limits().decision_fuel / 20, "{name}: {fuel}");
    }
}
