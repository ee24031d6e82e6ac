use dynamo_policy_sdk::{Candidates, Decision, Request, Router, role, stage, testing, topology};

use crate::{Adaptive, HandoffSettings, Settings};

const P: u32 = role::PREFILL;
const D: u32 = role::DECODE;
const B: u32 = role::BOTH;

/// An idle fleet of these roles.
fn idle<const N: usize>(roles: [u32; N]) -> Candidates {
    decoding(roles, [0; N])
}

/// A fleet where each worker decodes so many requests of 10,000 tokens.
fn decoding<const N: usize>(roles: [u32; N], requests: [u32; N]) -> Candidates {
    Candidates::test(N as u32)
        .with_role(roles)
        .with_cached_device_tokens([0; N])
        .with_active_prefill_tokens([0; N])
        .with_active_uncached_tokens([0; N])
        .with_prefill_busy_ms([0; N])
        .with_active_requests(requests)
        .with_active_decode_tokens(requests.map(|requests| requests * 10_000))
}

fn request(tokens: u32) -> Request {
    Request::test().with_prompt_tokens(tokens).with_holds(1)
}

fn decide(request: &Request, candidates: &Candidates) -> Decision {
    decide_by(Settings::default(), request, candidates)
}

fn decide_by(settings: Settings, request: &Request, candidates: &Candidates) -> Decision {
    Adaptive::new(settings).unwrap().route(request, candidates)
}

fn first(request: &Request, candidates: &Candidates) -> u32 {
    match decide(request, candidates) {
        Decision::Place(rows) => rows[0],
        other => panic!("not placed on one: {other:?}"),
    }
}

/// Queues prompts on the workers.
fn queued<const N: usize>(candidates: Candidates, tokens: [u32; N]) -> Candidates {
    candidates.with_active_prefill_tokens(tokens).with_active_uncached_tokens(tokens)
}

#[test]
fn a_long_prompt_is_prefilled_apart_when_it_would_stall_those_who_decode() {
    assert_eq!(first(&request(8000), &decoding([P, D], [0, 20])), 0);
    assert_eq!(first(&request(8000), &idle([P, D])), 1, "nobody is stalled, and the hand-off takes its time");
}

#[test]
fn a_prompt_of_which_the_decoder_holds_nearly_all_is_served_there() {
    let fleet = |held: u32| decoding([P, D], [0, 4]).with_cached_device_tokens([0, held]);
    assert_eq!(first(&request(20_000), &fleet(19_840)), 1);
    assert_eq!(first(&request(20_000), &fleet(0)), 0);
}

#[test]
fn a_decode_worker_prefills_for_itself_when_prefill_workers_have_long_queues() {
    let fleet = |waiting: u32| queued(decoding([P, D], [0, 3]), [waiting, 0]);
    assert_eq!(first(&request(4000), &fleet(0)), 0);
    assert_eq!(first(&request(4000), &fleet(100_000)), 1);
}

#[test]
fn the_prefill_worker_that_holds_the_prefix_is_taken_until_its_queue_is_longer_than_a_recompute() {
    let fleet = |waiting: u32| queued(decoding([P, P, D], [0, 0, 30]), [waiting, 0, 0]).with_cached_device_tokens([8000, 0, 0]);
    assert_eq!(first(&request(8192), &fleet(0)), 0);
    assert_eq!(first(&request(8192), &fleet(16_000)), 1);
}

#[test]
fn aggregated_workers_are_weighed_against_pools() {
    let fleet = |requests| decoding([role::AGGREGATED, P, D], requests);
    assert_eq!(first(&request(8000), &fleet([0, 0, 5])), 0);
    // 60 requests decode on two workers: stalls matter.
    assert_eq!(first(&request(8000), &fleet([40, 0, 20])), 1);
}

#[test]
fn workers_that_do_both_serve_whole_at_low_load_and_in_pairs_under_pressure() {
    assert!(matches!(decide(&request(8000), &decoding([B; 4], [1, 1, 0, 1])), Decision::Place(rows) if rows[0] == 2));
    let Decision::PlaceDisaggregated(pairs) = decide(&request(8000), &decoding([B; 4], [0, 0, 25, 24])) else {
        panic!("no pair")
    };
    assert!(pairs[0].0 < 2 && pairs[0].1 == 3, "{pairs:?}");
    assert!(pairs.iter().all(|(prefill, decode)| prefill != decode), "{pairs:?}");
    assert!(
        pairs.iter().any(|&(prefill, _)| prefill != pairs[0].0),
        "another prefill worker is there to fall back on: {pairs:?}"
    );
}

#[test]
fn under_pressure_the_first_workers_are_kept_free_to_prefill() {
    // Who is last has no place to keep, and takes decodes until it has many more than the others.
    let Decision::PlaceDisaggregated(pairs) = decide(&request(2000), &decoding([B; 8], [0, 0, 0, 0, 12, 12, 12, 13])) else {
        panic!("no pair")
    };
    assert!(pairs[0].0 < 4 && pairs[0].1 >= 4, "{pairs:?}");
    let all = Settings { handoff: HandoffSettings { keep_free: 0.0, ..HandoffSettings::default() }, ..Settings::default() };
    let decision = decide_by(all, &request(2000), &decoding([B; 8], [0, 0, 0, 0, 12, 12, 12, 13]));
    let onto = match decision {
        Decision::PlaceDisaggregated(pairs) => pairs[0].1,
        Decision::Place(rows) => rows[0],
        other => panic!("{other:?}"),
    };
    assert!(onto < 4, "without a price it decodes where least is: {onto}");
}

#[test]
fn what_may_not_be_handed_over_is_served_whole() {
    let fleet = || decoding([B; 4], [0, 0, 25, 24]);
    for request in [
        request(8000).with_choices(2),
        request(8000).with_generated_tokens(5),
        request(8000).with_max_output_tokens(1),
        request(8000).with_multimodal_items(1),
    ] {
        assert!(matches!(decide(&request, &fleet()), Decision::Place(_)));
    }
}

#[test]
fn without_a_way_for_its_kv_a_request_stays_whole() {
    let cut = decoding([P, D, D], [0, 20, 20]).with_reachable(0, [0, 0, 0]);
    assert!(matches!(decide(&request(8000), &cut), Decision::Place(rows) if rows.iter().all(|&row| row != 0)));
    let only_prefill = idle([P, P]);
    assert!(matches!(decide(&request(8000), &only_prefill), Decision::Place(rows) if rows.len() == 2), "there is an answer");
}

#[test]
fn who_prefills_is_ranked_even_after_many_who_decode() {
    let mut roles = [D; 40];
    roles[7] = P;
    let fleet = queued::<40>(idle(roles), std::array::from_fn(|row| if row == 7 { 100_000 } else { 0 }));
    let Decision::Place(rows) = decide(&request(4000), &fleet) else { panic!("not placed") };
    assert_eq!((rows.len(), rows[15]), (16, 7), "a host whose decode engines serve nothing whole takes it: {rows:?}");
    assert!(rows[..15].iter().all(|row| *row != 7));
}

#[test]
fn who_goes_on_is_found_among_many() {
    // More than a block, and some beyond the last whole one; whoever is best, wherever it is.
    for best in [0, 15, 16, 31, 36] {
        let fleet = || decoding([D; 37], std::array::from_fn(|row| if row == best { 3 } else { 5 + row as u32 % 3 }));
        let from = fleet().with_prefilled_by(99).with_reachable(None, [1; 37]);
        assert_eq!(first(&request(20_000).with_stage(stage::DECODE), &from), best as u32);
        let cut =
            fleet().with_prefilled_by(99).with_reachable(None, std::array::from_fn::<u32, 37, _>(|row| u32::from(row != best)));
        assert_ne!(first(&request(20_000).with_stage(stage::DECODE), &cut), best as u32);
    }
}

#[test]
fn who_goes_on_decodes_little_holds_much_and_is_near() {
    let stage = |candidates: &Candidates| first(&request(20_000).with_stage(stage::DECODE), candidates);
    let from = |candidates: Candidates| candidates.with_prefilled_by(9).with_reachable(None, [1, 1, 1]);
    assert_eq!(stage(&from(decoding([D; 3], [20, 5, 20]))), 1);
    assert_eq!(stage(&from(decoding([D; 3], [8, 8, 8]).with_cached_device_tokens([0, 0, 19_000]))), 2);
    assert_eq!(stage(&from(queued(decoding([B; 3], [5, 5, 5]), [9000, 9000, 0]))), 2, "the others prefill");
    assert_eq!(
        stage(&from(decoding([D; 3], [9, 9, 9]).with_kv_tokens_free([100, 500_000, 100]))),
        1,
        "the others have no memory"
    );
    let slow = from(idle([D; 3])).with_link_tokens_per_second(None, [5e5, 5e3, 5e3]).with_link_handoff_ms(None, [40.0, 4e3, 4e3]);
    assert_eq!(stage(&slow), 0);
    let failing = from(idle([D; 3])).with_link_error_rate(None, [0.5, 0.0, 0.5]);
    assert_eq!(stage(&failing.with_active_decode_tokens([0, 10, 0]).with_active_requests([1, 1, 1])), 1);
    let cut = idle([D; 3]).with_prefilled_by(9).with_reachable(None, [0, 1, 0]);
    assert!(matches!(decide(&request(100).with_stage(stage::DECODE), &cut), Decision::Place(rows) if rows == [1]));
}

#[test]
fn topology_says_how_quick_a_way_is_until_it_was_measured() {
    let fleet = |zones: [&str; 3]| decoding([P, D, D], [0, 4, 4]).with_topology(topology::ZONE, zones);
    assert_eq!(first(&request(30_000), &fleet(["a", "b", "a"])), 0);
    assert_ne!(first(&request(30_000), &fleet(["a", "b", "b"])), 0, "three seconds to another zone");
    let near = fleet(["a", "a", "a"]).with_topology(topology::RACK, ["r", "s", "r"]);
    for candidates in [fleet(["a", "b", "a"]), near] {
        assert_eq!(first(&request(30_000).with_stage(stage::DECODE), &candidates.with_prefilled_by(0)), 2);
    }
}

#[test]
fn a_way_that_was_slow_by_chance_is_not_told_from_others() {
    let fleet = decoding([D, D], [4, 5])
        .with_prefilled_by(9)
        .with_reachable(None, [1, 1])
        .with_link_tokens_per_second(None, [1.5e5, 4e5])
        .with_link_handoff_ms(None, [66.0, 25.0]);
    assert_eq!(first(&request(10_000).with_stage(stage::DECODE), &fleet), 0);
}

#[test]
fn a_target_for_the_first_token_makes_waiting_dear() {
    let fleet = || queued(decoding([P, D], [0, 6]), [8000, 0]);
    assert_eq!(first(&request(3000), &fleet()), 0);
    assert_eq!(first(&request(3000).with_slo_ttft_ms(50.0), &fleet()), 1);
}

#[test]
fn a_target_between_tokens_keeps_requests_from_workers_that_would_miss_it() {
    let fleet = || {
        let decoders = decoding([D, D], [30, 24]).with_active_requests([1, 1]).with_cached_device_tokens([99_968, 0]);
        decoders.with_prefilled_by(9).with_reachable(None, [1, 1])
    };
    let stage = |request: Request| first(&request.with_stage(stage::DECODE), &fleet());
    assert_eq!(stage(request(100_000)), 0, "it has the KV, and steps of 24 ms");
    assert_eq!(stage(request(100_000).with_slo_itl_ms(16.0)), 1);
}

#[test]
fn workers_that_only_decode_are_kept_level() {
    // One long context is slower than many short ones, though there a request slows down few.
    let contexts = |roles: [u32; 2]| {
        let fleet = decoding(roles, [8, 1]).with_active_decode_tokens([60_000, 100_000]);
        first(&request(20_000).with_stage(stage::DECODE), &fleet.with_prefilled_by(9).with_reachable(None, [1, 1]))
    };
    assert_eq!(contexts([D, D]), 0);
    assert_eq!(contexts([B, B]), 1);
}

#[test]
fn memory_that_others_wait_for_is_not_free() {
    let fleet = decoding([D, D], [20, 25])
        .with_active_prefill_tokens([200_000, 0])
        .with_kv_tokens_free([100_000, 100_000])
        .with_prefilled_by(9)
        .with_reachable(None, [1, 1]);
    assert_eq!(first(&request(10_000).with_stage(stage::DECODE), &fleet), 1);
}

#[test]
fn a_decision_explains_all_ways() {
    testing::reset();
    testing::set_explain_wanted(true);
    decide(&request(8000), &decoding([P, D], [0, 20]));
    let terms = testing::explanations();
    let names: Vec<&str> = terms.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names[7..], ["whole_ms", "prefill_leg_ms", "onward_ms"]);
    assert!(
        terms[7].1[0].is_infinite() && terms[8].1[1].is_infinite() && terms[9].1[0].is_infinite(),
        "what is no way: {terms:?}"
    );
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let error = |handoff| Adaptive::new(Settings { handoff, ..Settings::default() }).err().unwrap();
    let default = HandoffSettings::default;
    assert_eq!(error(HandoffSettings { stall: -1.0, ..default() }), "handoff.stall is -1; use a number of at least 0");
    assert_eq!(error(HandoffSettings { late_ms: 0.0, ..default() }), "handoff.late_ms is 0; use a number above 0");
    let mut handoff = default();
    handoff.tokens_per_second.rack = 0.0;
    assert_eq!(error(handoff), "handoff.tokens_per_second.rack is 0; use a number above 0");
}
