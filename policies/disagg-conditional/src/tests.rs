use dynamo_policy_sdk::testing;

use super::*;

/// Two prefill workers, two decode workers and perhaps one that does all of it, idle; blocks of 16.
fn pools(aggregated: bool) -> Candidates {
    let mut roles = vec![role::PREFILL, role::PREFILL, role::DECODE, role::DECODE];
    roles.extend(aggregated.then_some(role::AGGREGATED));
    let count = roles.len();
    Candidates::test(count as u32)
        .with_role(roles)
        .with_active_prefill_tokens(vec![0; count])
        .with_active_uncached_tokens(vec![0; count])
        .with_active_decode_tokens(vec![0; count])
        .with_active_requests(vec![0; count])
}

fn request(tokens: u32) -> Request {
    Request::test().with_prompt_tokens(tokens)
}

fn rows(settings: Settings, request: &Request, candidates: &Candidates) -> Vec<u32> {
    match DisaggConditional::new(settings).unwrap().route(request, candidates) {
        Decision::Place(rows) => rows,
        other => panic!("not placed: {other:?}"),
    }
}

fn first(rule: Rule, request: &Request, candidates: &Candidates) -> u32 {
    rows(Settings { rule, ..Settings::default() }, request, candidates)[0]
}

fn is_local(rule: Rule, tokens: u32, candidates: &Candidates) -> bool {
    first(rule, &request(tokens), candidates) >= 2
}

#[test]
fn little_that_is_left_of_a_prompt_is_computed_where_it_is_decoded() {
    let held = |tokens| pools(false).with_cached_device_tokens([0, 0, tokens, 0]);
    let is_local = |prompt, cached| is_local(Rule::IslBounding, prompt, &held(cached));
    assert!(is_local(4096, 2049), "2047 of 4096 are left");
    assert!(!is_local(4096, 2048), "2048 are not less than 2048");
    assert!(is_local(1000, 301) && !is_local(1000, 300), "699 are less than 0.7 of 1000, and 700 are not");
    assert!(!is_local(100, 0), "a short prompt of which nothing is held is computed apart");
    assert_eq!(first(Rule::IslBounding, &request(1000), &held(900)), 2, "by the one that holds it");
}

#[test]
fn what_can_be_loaded_counts_by_its_tier() {
    let held = pools(false).with_cached_host_tokens([0, 0, 1000, 0]);
    assert!(is_local(Rule::IslBounding, 1000, &held));
    let ignored = Settings { host_cache_hit_weight: 0.0, ..Settings::default() };
    assert!(rows(ignored, &request(1000), &held)[0] < 2);
}

#[test]
fn a_busy_prefill_worker_is_left_alone_by_the_rules_that_look_at_it() {
    let busy = |tokens| pools(false).with_active_uncached_tokens([tokens, tokens, 0, 0]);
    for (rule, at_8192, above) in
        [(Rule::IslBounding, false, false), (Rule::PrefillLoad, false, true), (Rule::IslOrLoad, false, true)]
    {
        assert_eq!((is_local(rule, 1000, &busy(8192)), is_local(rule, 1000, &busy(8193))), (at_8192, above), "{rule:?}");
    }
    let one = pools(false).with_active_uncached_tokens([9000, 0, 0, 0]);
    assert_eq!(first(Rule::PrefillLoad, &request(1000), &one), 1, "the other one has nothing to do");
    let held = pools(false).with_cached_device_tokens([0, 0, 900, 0]);
    assert!(!is_local(Rule::PrefillLoad, 1000, &held) && is_local(Rule::IslOrLoad, 1000, &held));
}

#[test]
fn a_busy_decode_worker_never_prefills() {
    let held = || pools(false).with_cached_device_tokens([0, 0, 900, 900]).with_active_uncached_tokens([9000, 9000, 0, 0]);
    let total = [UNKNOWN, UNKNOWN, 10_000, 10_000];
    for (busy, why) in [
        (held().with_active_decode_tokens([0, 0, 9001, 9001]).with_kv_tokens_total(total), "by what the host counts"),
        (held().with_kv_tokens_free([0, 0, 999, 999]).with_kv_tokens_total(total), "by what the engine says"),
    ] {
        for rule in [Rule::IslBounding, Rule::PrefillLoad, Rule::IslOrLoad] {
            assert!(!is_local(rule, 1000, &busy), "{rule:?}, {why}");
        }
    }
    assert!(is_local(Rule::IslOrLoad, 1000, &held().with_active_decode_tokens([0, 0, 9000, 9000]).with_kv_tokens_total(total)));
    let bounded = Settings { decode_busy_above_tokens: Some(5000), ..Settings::default() };
    let of = |tokens| rows(bounded.clone(), &request(1000), &held().with_active_decode_tokens([0, 0, tokens, tokens]))[0];
    assert_eq!((of(5001) < 2, of(5000) < 2), (true, false), "where nobody knows the capacity");
}

#[test]
fn a_worker_that_does_all_of_it_is_taken_where_that_costs_less() {
    let mixed = pools(true);
    // Computing 1,000 tokens and a context of 1,000 is the same on either way: whoever holds more wins.
    assert_eq!(first(Rule::IslBounding, &request(1000), &mixed.with_cached_device_tokens([0, 0, 0, 0, 200])), 4);
    let loaded = pools(true).with_cached_device_tokens([0, 0, 0, 0, 200]).with_active_decode_tokens([0, 0, 0, 0, 300]);
    assert!(first(Rule::IslBounding, &request(1000), &loaded) < 2);
    let local = pools(true).with_cached_device_tokens([0, 0, 900, 0, 200]);
    assert_eq!(first(Rule::IslBounding, &request(1000), &local), 2);
}

#[test]
fn each_kind_of_worker_stands_in_for_the_others() {
    let settings = Settings::default;
    let mut ranked = rows(settings(), &request(1000), &pools(true));
    assert!(ranked[0] < 2 && ranked[1] < 2 && ranked[2] == 4, "{ranked:?}");
    ranked.sort_unstable();
    assert_eq!(ranked, [0, 1, 2, 3, 4]);
    let wide = Candidates::test(60).with_role([vec![role::PREFILL; 30], vec![role::DECODE; 30]].concat());
    let ranked = rows(settings(), &request(1000), &wide);
    assert_eq!((ranked.len(), ranked.iter().filter(|&&row| row < 30).count()), (16, 12));
    let only = Candidates::test(30).with_role([role::DECODE; 30]);
    assert_eq!(rows(settings(), &request(1000), &only).len(), 16);
}

#[test]
fn who_can_hand_kv_to_nobody_prefills_nothing() {
    let cut = pools(false).with_reachable(0, [0; 4]);
    for seed in 0..20 {
        testing::seed(seed);
        assert_eq!(rows(Settings::default(), &request(1000), &cut)[0], 1);
    }
    let none = pools(false).with_reachable(0, [0; 4]).with_reachable(1, [0; 4]);
    let ranked = rows(Settings::default(), &request(1000), &none);
    assert!(ranked[0] >= 2 && ranked.len() == 2, "{ranked:?}");
    let aggregated = Candidates::test(2).with_active_decode_tokens([10, 0]).with_active_prefill_tokens([0, 0]);
    assert_eq!(rows(Settings::default(), &request(1000), &aggregated), [1, 0], "a fleet without roles is ranked by cost");
}

#[test]
fn who_decodes_is_whoever_has_the_least_to_do_and_can_be_reached() {
    let decode = Candidates::test(3)
        .with_role([role::DECODE, role::BOTH, role::DECODE])
        .with_prefilled_by(99)
        .with_active_decode_tokens([500, 100, 300])
        .with_active_prefill_tokens([0, 0, 0])
        .with_cached_device_tokens([900, 0, 0]);
    let request = request(1000).with_stage(stage::DECODE);
    assert_eq!(rows(Settings::default(), &request, &decode), [1, 2, 0], "the prefix does not count, as in Dynamo");
    let avoided = decode.with_reachable(None, [1, 0, 1]);
    assert_eq!(rows(Settings::default(), &request, &avoided), [2, 0, 1]);
}

#[test]
fn a_setting_that_makes_no_sense_is_named_with_what_is_accepted() {
    let refused = |settings| DisaggConditional::new(settings).err().unwrap();
    let share = refused(Settings { local_below_ratio: 1.5, ..Settings::default() });
    assert_eq!(share, "local_below_ratio is 1.5; use a share from 0 to 1");
    let busy = refused(Settings { decode_busy_above_kv_ratio: f32::NAN, ..Settings::default() });
    assert!(busy.starts_with("decode_busy_above_kv_ratio is NaN"), "{busy}");
    let weight = refused(Settings { prefill_load_scale: -1.0, ..Settings::default() });
    assert_eq!(weight, "prefill_load_scale is -1; use a number of at least 0");
}
