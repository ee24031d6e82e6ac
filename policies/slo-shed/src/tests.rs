//! What cannot meet its target is shed, the lowest class first, and not now and then.

use dynamo_policy_sdk::testing;

use super::*;

const CLASSES: &str = r#""classes": [{"name": "high", "min_priority": 1}, {"name": "mid", "min_priority": 0}, {"name": "low", "min_priority": -9}]"#;

fn policy(settings: &str) -> SloShed {
    testing::reset();
    SloShed::new(serde_json::from_str(settings).unwrap()).unwrap()
}

/// A pool with this wait, whose requests take 100 ms once they are sent.
fn waiting(ms: f32) -> Pools {
    Pools::test(1).with_ready_workers([4]).with_predicted_wait_ms([ms]).with_recent_ttft_ms(50.0, [100.0])
}

fn is_shed(policy: &SloShed, request: &Request, wait_ms: f32) -> bool {
    match policy.admit(request, &waiting(wait_ms)) {
        Verdict::Admit(_) => false,
        Verdict::Shed(shed) => {
            assert_eq!(shed.status, 503);
            assert!(shed.retry_after.unwrap() >= Duration::from_secs(1));
            true
        }
        Verdict::Abstain | _ => panic!("it always says something"),
    }
}

#[test]
fn only_what_can_still_meet_its_target_is_let_in() {
    let policy = policy("{}");
    let request = Request::test().with_slo_ttft_ms(500.0);
    assert!(!is_shed(&policy, &request, 0.0));
    assert!(!is_shed(&policy, &request, 399.0));
    assert!(is_shed(&policy, &request, 401.0), "with the 100 ms that it takes once it is sent");
}

#[test]
fn a_class_that_is_shed_comes_back_when_there_is_room_and_not_before() {
    let policy = policy(r#"{"ttft_ms": 500}"#);
    let request = Request::test();
    let shed: Vec<bool> = [300.0, 450.0, 390.0, 300.0, 260.0, 240.0, 300.0, 390.0, 450.0]
        .map(|wait_ms| is_shed(&policy, &request, wait_ms))
        .to_vec();
    assert_eq!(shed, [false, true, true, true, true, false, false, false, true]);
    let other = SloShed::new(serde_json::from_str(r#"{"ttft_ms": 500}"#).unwrap()).unwrap();
    assert!(is_shed(&other, &request, 390.0), "another instance goes on from there");
    testing::advance(REMEMBERED);
    assert!(!is_shed(&other, &request, 390.0), "after a while that is forgotten");
}

#[test]
fn the_lowest_class_is_shed_first_and_comes_back_last() {
    let policy = policy(&format!(r#"{{"ttft_ms": 1000, {CLASSES}}}"#));
    let of = |priority| Request::test().with_priority(priority);
    let mut seen = Vec::new();
    for wait_ms in [0.0, 750.0, 850.0, 950.0, 650.0, 570.0, 500.0, 400.0] {
        seen.push([1.0, 0.0, -1.0].map(|priority| is_shed(&policy, &of(priority), wait_ms)));
    }
    let [none, low, mid_and_low, all] = [[false, false, false], [false, false, true], [false, true, true], [true, true, true]];
    assert_eq!(seen, [none, low, mid_and_low, all, all, mid_and_low, low, none]);
}

#[test]
fn a_lower_class_is_not_let_in_where_a_higher_one_is_shed() {
    let policy = policy(&format!(r#"{{"class_ttft_ms": {{"high": 200, "low": 60000}}, {CLASSES}}}"#));
    let low = Request::test().with_priority(-1.0);
    assert!(!is_shed(&policy, &low, 300.0), "300 ms are nothing to it");
    assert!(is_shed(&policy, &Request::test().with_priority(1.0), 150.0));
    assert!(is_shed(&policy, &low, 50.0), "but the high ones cannot wait so long");
    testing::advance(REMEMBERED);
    assert!(!is_shed(&policy, &low, 300.0), "and none of them came for a while");
}

#[test]
fn who_is_let_in_stands_where_its_class_does() {
    let policy = policy(&format!(r#"{{"ttft_ms": 1000, {CLASSES}}}"#));
    let verdict = policy.admit(&Request::test().with_priority(3.0), &waiting(0.0));
    assert_eq!(verdict, Verdict::admit().class("high").tier(0).class_weight(1.0).into());
}

#[test]
fn what_is_not_known_is_let_in() {
    let policy = policy("{}");
    let with_target = Request::test().with_slo_ttft_ms(1.0);
    assert!(!is_shed(&policy, &Request::test(), 1e9), "no target");
    for pools in [
        Pools::test(1).with_ready_workers([4]),
        waiting(f32::NAN),
        Pools::test(1).with_ready_workers([0]).with_predicted_wait_ms([1e9]),
    ] {
        assert_eq!(policy.admit(&with_target, &pools), Verdict::admit().into());
    }
    let no_history = Pools::test(1).with_ready_workers([4]).with_predicted_wait_ms([5.0]);
    assert!(matches!(policy.admit(&with_target, &no_history), Verdict::Shed(_)), "the wait alone is too long");
}

#[test]
fn clients_are_told_when_it_may_be_better() {
    let policy = policy(r#"{"ttft_ms": 500, "resume_at": 0.5}"#);
    let retry_after = |wait_ms| match policy.admit(&Request::test(), &waiting(wait_ms)) {
        Verdict::Shed(shed) => shed.retry_after.unwrap(),
        other => panic!("{other:?}"),
    };
    assert_eq!(retry_after(500.0), Duration::from_secs(1));
    assert_eq!(retry_after(10_150.0), Duration::from_secs(10));
    assert_eq!(retry_after(1e9), Duration::from_secs(60));
}

#[test]
fn without_state_each_request_is_judged_alone() {
    let policy = policy(r#"{"ttft_ms": 500}"#);
    testing::set_state_error(Some(state::StateError::QUOTA));
    assert!(is_shed(&policy, &Request::test(), 450.0));
    assert!(!is_shed(&policy, &Request::test(), 390.0));
}

#[test]
fn impossible_settings_are_refused_by_their_key() {
    for (settings, says) in [
        (r#"{"ttft_ms": 0}"#, "ttft_ms is 0; use 1 to 3600000"),
        (r#"{"percentile": 101}"#, "percentile is 101; use 0 to 100"),
        (r#"{"resume_at": 1.5}"#, "resume_at is 1.5"),
        (r#"{"class_ttft_ms": {"a": 5}}"#, "class_ttft_ms.a is of no class"),
        (r#"{"shed_at": 0}"#, "shed_at is 0"),
    ] {
        let error = SloShed::new(serde_json::from_str(settings).unwrap()).err().unwrap();
        assert!(error.contains(says), "{error}");
    }
}
