//! Limits hold, wait as long as they say, and leak nothing.

use dynamo_policy_sdk::testing;

use super::*;

fn policy(settings: &str) -> TokenBucket {
    testing::reset();
    again(settings)
}

/// One more instance: the state stays.
fn again(settings: &str) -> TokenBucket {
    TokenBucket::new(serde_json::from_str(settings).unwrap()).unwrap()
}

fn of(tenant: &str, key: u64, prompt: u32) -> Request {
    Request::test()
        .with_tenant(tenant)
        .with_tenant_key(key)
        .with_prompt_tokens(prompt)
        .with_expected_output_tokens(0)
        .with_choices(1)
}

#[track_caller]
fn check(policy: &TokenBucket, request: &Request, wait_ms: Option<u64>) {
    let verdict = policy.admit(request, &Pools::test(1));
    match wait_ms {
        None => assert_eq!(verdict, Verdict::admit().into()),
        Some(ms) => {
            let Verdict::Shed(shed) = &verdict else { panic!("{verdict:?}") };
            assert_eq!((shed.status, shed.retry_after), (429, Some(Duration::from_millis(ms))), "{shed:?}");
        }
    }
}

#[test]
fn a_tenant_has_its_burst_and_then_as_much_as_flows_in() {
    let policy = policy(r#"{"requests_per_minute": 60, "request_burst": 3}"#);
    for _ in 0..3 {
        check(&policy, &of("a", 1, 10), None);
    }
    check(&policy, &of("a", 1, 10), Some(1000));
    check(&policy, &of("b", 2, 10), None);
    testing::advance(Duration::from_millis(750));
    check(&policy, &of("a", 1, 10), Some(250));
    testing::advance(Duration::from_millis(250));
    check(&policy, &of("a", 1, 10), None);
    check(&policy, &of("a", 1, 10), Some(1000));
}

#[test]
fn what_one_bucket_gave_is_given_back_where_another_refuses() {
    // Ten requests at once, but only 100 tokens.
    let policy = policy(r#"{"requests_per_minute": 60, "request_burst": 10, "tokens_per_minute": 600, "token_burst": 100}"#);
    check(&policy, &of("a", 1, 100), None);
    for _ in 0..50 {
        check(&policy, &of("a", 1, 100), Some(10_000));
    }
    testing::advance(Duration::from_secs(10));
    for _ in 0..9 {
        check(&policy, &of("a", 1, 10), None);
    }
    check(&policy, &of("a", 1, 10), None);
    // And the other way around: requests are out, tokens are not touched.
    let policy =
        self::policy(r#"{"requests_per_minute": 60, "request_burst": 1, "tokens_per_minute": 60000, "token_burst": 1000}"#);
    check(&policy, &of("a", 1, 0), None);
    for _ in 0..50 {
        check(&policy, &of("a", 1, 900), Some(1000));
    }
    testing::advance(Duration::from_secs(1));
    check(&policy, &of("a", 1, 1000), None);
}

#[test]
fn who_is_refused_is_told_of_the_bucket_that_takes_longest() {
    let policy = policy(r#"{"requests_per_minute": 60, "request_burst": 1, "tokens_per_minute": 60, "token_burst": 50}"#);
    check(&policy, &of("a", 1, 50), None);
    check(&policy, &of("a", 1, 30), Some(30_000));
    check(&policy, &of("a", 1, 0), Some(1000));
}

#[test]
fn the_answer_counts_as_long_as_it_is_expected_for_each_choice() {
    let policy = policy(r#"{"tokens_per_minute": 1000, "output_tokens": 7}"#);
    let tokens = |request: Request| policy.tokens(&request);
    assert_eq!(tokens(of("a", 1, 10).with_expected_output_tokens(50).with_max_output_tokens(90).with_choices(3)), 160.0);
    assert_eq!(tokens(Request::test().with_prompt_tokens(10).with_max_output_tokens(90).with_choices(1)), 100.0);
    assert_eq!(tokens(Request::test().with_prompt_tokens(10).with_choices(1)), 17.0);
    let prompts = again(r#"{"tokens_per_minute": 1000, "count_output": false}"#);
    assert_eq!(prompts.tokens(&of("a", 1, 10).with_expected_output_tokens(50)), 10.0);
}

#[test]
fn what_never_fits_is_refused_without_a_time_to_come_back() {
    let policy = policy(r#"{"tokens_per_minute": 100}"#);
    let Verdict::Shed(shed) = policy.admit(&of("a", 1, 101), &Pools::test(1)) else { panic!("it is too large") };
    assert!(shed.retry_after.is_none() && shed.reason.contains("counts 101 tokens, and at most 100"), "{shed:?}");
    check(&policy, &of("a", 1, 100), None);
}

#[test]
fn instances_and_versions_share_buckets() {
    let first = policy(r#"{"requests_per_minute": 60, "request_burst": 2}"#);
    check(&first, &of("a", 1, 1), None);
    let second = again(r#"{"requests_per_minute": 60, "request_burst": 2}"#);
    check(&second, &of("a", 1, 1), None);
    check(&first, &of("a", 1, 1), Some(1000));
    // With other settings after a swap, what was used stays used.
    check(&again(r#"{"requests_per_minute": 120, "request_burst": 2}"#), &of("a", 1, 1), Some(500));
}

#[test]
fn single_tenants_have_limits_of_their_own() {
    let policy = policy(
        r#"{"requests_per_minute": 60, "request_burst": 1,
            "tenants": {"big": {"requests_per_minute": 600, "request_burst": 5}, "free": {}, "none": {"requests_per_minute": 0}}}"#,
    );
    for _ in 0..5 {
        check(&policy, &of("big", 1, 1), None);
    }
    check(&policy, &of("big", 1, 1), Some(100));
    for _ in 0..100 {
        check(&policy, &of("free", 2, 1), None);
    }
    assert!(matches!(policy.admit(&of("none", 3, 1), &Pools::test(1)), Verdict::Shed(_)));
    check(&policy, &of("other", 4, 1), None);
    check(&policy, &of("other", 4, 1), Some(1000));
}

#[test]
fn clients_are_told_apart_as_the_operator_says() {
    let by_header = policy(r#"{"requests_per_minute": 60, "request_burst": 1, "per": "attribute:x-team"}"#);
    check(&by_header, &of("a", 1, 1).with_attribute("x-team", "red"), None);
    check(&by_header, &of("b", 2, 1).with_attribute("x-team", "red"), Some(1000));
    check(&by_header, &of("b", 2, 1).with_attribute("x-team", "blue"), None);
    check(&by_header, &of("b", 2, 1), None);
    check(&by_header, &of("c", 3, 1), Some(1000));
    let all = again(r#"{"requests_per_minute": 60, "request_burst": 1, "per": "all"}"#);
    check(&all, &of("a", 1, 1), None);
    check(&all, &of("b", 2, 1), Some(1000));
}

#[test]
fn without_room_for_buckets_nobody_is_limited() {
    let policy = policy(r#"{"requests_per_minute": 60, "request_burst": 1}"#);
    testing::set_state_error(Some(state::StateError::QUOTA));
    check(&policy, &of("a", 1, 1), None);
    check(&policy, &of("a", 1, 1), None);
    assert_eq!(testing::counter("buckets_not_kept"), 2);
}

#[test]
fn impossible_settings_are_refused_by_their_key() {
    for (settings, says) in [
        (r#"{"requests_per_minute": -1}"#, "requests_per_minute is -1; use a number from 0"),
        (r#"{"tokens_per_minute": 1e300}"#, "tokens_per_minute is"),
        (r#"{"token_burst": 5}"#, "token_burst is set without tokens_per_minute"),
        (r#"{"per": "planet"}"#, "per is \"planet\"; use tenant, session, all or attribute:NAME"),
        (r#"{"tenants": {"a": {"request_burst": -2, "requests_per_minute": 1}}}"#, "tenants.a.request_burst is -2"),
    ] {
        let error = TokenBucket::new(serde_json::from_str(settings).unwrap()).err().unwrap();
        assert!(error.contains(says), "{error}");
    }
}
