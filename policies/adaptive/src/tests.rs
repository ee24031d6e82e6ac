use dynamo_policy_sdk::{stage, testing};

use super::*;

/// An idle fleet with the default profile, which holds nothing.
fn idle(count: u32) -> Candidates {
    let zeros = vec![0; count as usize];
    Candidates::test(count)
        .with_cached_device_tokens(zeros.clone())
        .with_active_prefill_tokens(zeros.clone())
        .with_active_uncached_tokens(zeros.clone())
        .with_prefill_busy_ms(zeros.clone())
        .with_active_decode_tokens(zeros.clone())
        .with_active_requests(zeros)
}

/// A request that does not give way, or not again.
fn request(tokens: u32) -> Request {
    Request::test().with_prompt_tokens(tokens).with_holds(1)
}

fn rows(request: &Request, candidates: &Candidates) -> Vec<u32> {
    match policy(Settings::default()).route(request, candidates) {
        Decision::Place(rows) => rows,
        other => panic!("not placed: {other:?}"),
    }
}

fn policy(settings: Settings) -> Adaptive {
    Adaptive::new(settings).unwrap()
}

fn total(request: &Request, candidates: &Candidates) -> Vec<f32> {
    let settings = Settings::default();
    Costs::of(&settings, request, candidates).total(&Profiles::read(candidates, &settings.profile))
}

#[test]
fn a_prompt_takes_as_many_passes_as_it_needs() {
    let profile =
        Profile { prefill_ms_per_token_squared: 0.0, prefill_ms_per_token: 0.01, prefill_ms_base: 10.0, ..Profile::default() };
    let speed = profile::Speed::of(profile);
    let times = [0.0, 1.0, 100.0, 8192.0, 8292.0, 16384.0].map(|tokens| speed.prefill_ms(tokens));
    assert_eq!(times, [0.0, 10.01, 11.0, 91.92, 102.92, 183.84]);
}

#[test]
fn the_holder_is_first_as_long_as_its_queue_is_shorter_than_a_recompute() {
    // 8000 tokens take about 165 ms, 4000 about 84.
    let holder = |queued: u32| {
        idle(3)
            .with_cached_device_tokens([0, 7936, 0])
            .with_active_prefill_tokens([0, queued, 0])
            .with_active_uncached_tokens([0, queued, 0])
            .with_active_requests([0, 1, 0])
    };
    assert_eq!(rows(&request(8000), &holder(0))[0], 1);
    assert_eq!(rows(&request(8000), &holder(4000))[0], 1);
    assert_ne!(rows(&request(8000), &holder(12_000))[0], 1);
    assert_eq!(rows(&request(8000), &holder(12_000).with_prefill_busy_ms([0, 200, 0]))[0], 1, "most of it is done");
}

#[test]
fn a_prefill_under_way_is_never_taken_for_done() {
    let overdue = idle(2)
        .with_active_prefill_tokens([1000, 0])
        .with_active_uncached_tokens([1000, 0])
        .with_prefill_busy_ms([60_000, 0])
        .with_active_requests([1, 0]);
    assert_eq!(rows(&request(500), &overdue), [1, 0]);
}

#[test]
fn a_hot_prefix_is_copied_when_its_holder_decodes_much_more_than_others() {
    // 2048 tokens of a system prompt are about 34 ms.
    let fleet = |decoding: u32| {
        idle(2)
            .with_cached_device_tokens([2048, 0])
            .with_active_requests([decoding, 0])
            .with_active_decode_tokens([decoding * 3000, 0])
    };
    assert_eq!(rows(&request(2400), &fleet(1))[0], 0);
    assert_eq!(rows(&request(2400), &fleet(30))[0], 1);
}

#[test]
fn a_long_prompt_goes_where_it_stalls_fewer() {
    let candidates = idle(2).with_active_requests([8, 2]).with_active_decode_tokens([4000, 4000]);
    assert_eq!(rows(&request(20_000), &candidates), [1, 0]);
}

#[test]
fn a_slower_tier_saves_less() {
    let candidates = idle(4)
        .with_cached_device_tokens([0, 0, 0, 6400])
        .with_cached_host_tokens([0, 6400, 0, 0])
        .with_cached_disk_tokens([0, 0, 6400, 0]);
    assert_eq!(rows(&request(8000), &candidates), [3, 1, 2, 0]);
}

#[test]
fn a_worker_without_memory_is_avoided() {
    let candidates =
        idle(2).with_active_requests([4, 4]).with_active_decode_tokens([40_000, 42_000]).with_kv_tokens_free([100, 50_000]);
    assert_eq!(rows(&request(8000), &candidates), [1, 0]);
}

#[test]
fn a_slow_worker_is_known_by_its_profile() {
    let slow = idle(3).with_signal("profile.prefill_ms_per_token", [0.05, 0.015, f32::NAN]);
    assert_eq!(rows(&request(8000), &slow)[2], 0);
    let quick = idle(2).with_signal("profile.speedup", [1.0, 2.0]);
    assert_eq!(rows(&request(8000), &quick), [1, 0]);
    let costs = total(&request(8000), &quick);
    assert!((costs[0] - 2.0 * costs[1]).abs() < 0.1, "{costs:?}");
}

#[test]
fn a_stuck_worker_is_not_nearly_done() {
    // Half a million tokens wait, about ten seconds; and it has done nothing for a minute.
    let stuck = |tokens: u32| {
        idle(2)
            .with_active_prefill_tokens([tokens, 60_000])
            .with_active_uncached_tokens([tokens, 60_000])
            .with_prefill_busy_ms([60_000, 0])
            .with_active_requests([1, 1])
    };
    assert_eq!(rows(&request(1000), &stuck(500_000)), [1, 0]);
    let wait = |tokens| total(&request(1000), &stuck(tokens))[0];
    assert!(wait(500_000) > wait(250_000) + 1000.0 && wait(250_000) > wait(100_000) + 500.0, "it grows with what waits");
}

#[test]
fn labels_that_cannot_be_leave_the_default() {
    let plain = total(&request(8000), &idle(2));
    for value in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -1.0] {
        for signal in ["profile.prefill_ms_per_token", "profile.max_num_batched_tokens", "profile.speedup"] {
            assert_eq!(total(&request(8000), &idle(2).with_signal(signal, [value, value])), plain, "{signal} = {value}");
        }
    }
}

#[test]
fn preference_and_errors_weigh() {
    assert_eq!(rows(&request(1000), &idle(2).with_preference([1.5, 1.0])), [1, 0]);
    assert_eq!(rows(&request(1000), &idle(3).with_error_rate([0.5, 0.0, f32::NAN]))[2], 0);
}

#[test]
fn stages_have_costs_of_their_own() {
    let candidates =
        idle(2).with_cached_device_tokens([8000, 0]).with_active_requests([20, 0]).with_active_decode_tokens([100_000, 0]);
    assert_eq!(rows(&request(8000).with_stage(stage::PREFILL), &candidates)[0], 0);
    assert_eq!(rows(&request(8000).with_stage(stage::DECODE), &candidates)[0], 1);
}

#[test]
fn a_prompt_gives_way_once_for_a_share_of_its_time() {
    let decide = |settings: Settings, tokens: u32, holds: u32, workers: u32| {
        policy(settings).route(&Request::test().with_prompt_tokens(tokens).with_holds(holds), &idle(workers))
    };
    let Decision::Hold(pause) = decide(Settings::default(), 8192, 0, 4) else { panic!("it does not wait") };
    assert!((1690..1700).contains(&pause.as_micros()), "{pause:?}");
    let places = |decision| matches!(decision, Decision::Place(_));
    assert!(places(decide(Settings::default(), 8192, 1, 4)), "once");
    assert!(places(decide(Settings::default(), 8192, 0, 1)), "one worker has one queue");
    assert!(places(decide(Settings::default(), 100, 0, 4)), "it is short itself");
    assert!(places(decide(Settings::default(), 60_000, 0, 4)), "it is so long that it had better begin");
    assert!(places(decide(Settings { give_way: 0.0, ..Settings::default() }, 8192, 0, 4)));
}

#[test]
fn nothing_known_is_still_an_answer() {
    assert_eq!(rows(&Request::test().with_holds(1), &Candidates::test(20)).len(), 16);
    assert_eq!(rows(&Request::test(), &Candidates::test(1)), [0]);
}

#[test]
fn equal_workers_share() {
    let mut firsts = [0; 4];
    for _ in 0..4000 {
        firsts[rows(&request(1000), &idle(4))[0] as usize] += 1;
    }
    assert!(firsts.iter().all(|hits| (850..1150).contains(hits)), "{firsts:?}");
}

#[test]
fn a_decision_explains_itself_in_milliseconds() {
    testing::reset();
    testing::set_explain_wanted(true);
    let candidates = idle(2).with_active_requests([3, 0]).with_active_decode_tokens([9000, 0]);
    rows(&request(1000), &candidates);
    let terms = testing::explanations();
    let names: Vec<&str> = terms.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["wait_ms", "prefill_ms", "interference_ms", "decode_ms", "cache_ms", "memory_ms", "total_ms"]);
    for row in 0..2 {
        let sum: f32 = terms[..6].iter().map(|(_, values)| values[row]).sum();
        assert!((sum - terms[6].1[row]).abs() < 1e-3);
    }
    assert_eq!(terms[6].1, total(&request(1000), &candidates));
}

#[test]
fn a_setting_that_makes_no_sense_is_refused_by_name() {
    let error = |settings| Adaptive::new(settings).err().unwrap();
    assert_eq!(error(Settings { decode_weight: -1.0, ..Settings::default() }), "decode_weight is -1; use a number of at least 0");
    assert_eq!(error(Settings { give_way: 2.0, ..Settings::default() }), "give_way is 2; use a number from 0 to 1");
    let with = |profile| error(Settings { profile, ..Settings::default() });
    assert!(with(Profile { prefill_ms_base: f32::NAN, ..Profile::default() }).starts_with("profile.prefill_ms_base is NaN;"));
    assert!(with(Profile { max_batched_tokens: 0.0, ..Profile::default() }).starts_with("profile.max_batched_tokens is 0;"));
}
