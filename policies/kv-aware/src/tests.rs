use dynamo_policy_sdk::testing;

use super::*;

/// Workers with these uncached prefill, decode and device overlap tokens; blocks of 64.
fn fleet(queued: &[u32], decode: &[u32], cached: &[u32]) -> Candidates {
    Candidates::test(queued.len() as u32)
        .with_block_size(vec![64; queued.len()])
        .with_active_prefill_tokens(queued)
        .with_active_uncached_tokens(queued)
        .with_active_decode_tokens(decode)
        .with_cached_device_tokens(cached)
        .with_active_requests(vec![0; queued.len()])
}

fn request(tokens: u32) -> Request {
    Request::test().with_prompt_tokens(tokens)
}

fn route(settings: Settings, request: &Request, candidates: &Candidates) -> Vec<u32> {
    match KvAware::new(settings).unwrap().route(request, candidates) {
        Decision::Place(rows) => rows,
        other => panic!("not placed: {other:?}"),
    }
}

fn cost(settings: &Settings, request: &Request, candidates: &Candidates) -> Vec<f32> {
    costs(settings, request, candidates, &Blocks::of(request, candidates))
}

#[test]
fn a_cost_is_dynamos_in_blocks() {
    // 10 blocks of prompt, 6 of them held: 4 to compute and 10 of context; on the other worker 10 + 2 and 10 + 2 + 5.
    let candidates = fleet(&[0, 128], &[0, 320], &[384, 0]);
    assert_eq!(cost(&Settings::default(), &request(640), &candidates), [14.0, 29.0]);
    let weighted = Settings { prefill_load_scale: 2.0, decode_active_request_weight: 3.0, ..Settings::default() };
    let candidates = candidates.with_active_requests([1, 2]).with_preference([1.0, 2.0]);
    assert_eq!(cost(&weighted, &request(640), &candidates), [21.0, 94.0]);
}

#[test]
fn the_holder_is_first_until_its_load_outweighs_the_overlap() {
    let settings = Settings::default;
    assert_eq!(route(settings(), &request(640), &fleet(&[0, 0], &[0, 500], &[0, 640]))[0], 1);
    assert_eq!(route(settings(), &request(640), &fleet(&[0, 0], &[0, 700], &[0, 640]))[0], 0);
    let blind = Settings { overlap_score_credit: 0.0, ..settings() };
    assert_eq!(route(blind, &request(640), &fleet(&[0, 0], &[0, 1], &[0, 640]))[0], 0);
}

#[test]
fn an_overlap_is_worth_what_its_tier_is() {
    let candidates = fleet(&[0; 4], &[0; 4], &[64, 0, 0, 0])
        .with_cached_host_tokens([0, 64, 0, 0])
        .with_cached_disk_tokens([0, 0, 64, 0])
        .with_cached_remote_tokens([0, 0, 0, 64]);
    assert_eq!(cost(&Settings::default(), &request(640), &candidates), [19.0, 19.25, 19.75, 20.0]);
    let shared = Settings { shared_cache_multiplier: 0.5, ..Settings::default() };
    assert_eq!(cost(&shared, &request(640), &candidates)[3], 19.5);
}

#[test]
fn credit_pays_for_the_prompt_alone() {
    // Ten blocks held twice over are worth the ten of the prompt; the worker's own queue of five stays.
    let candidates = fleet(&[320, 0], &[0, 0], &[640, 0]).with_cached_host_tokens([640, 0]);
    let settings = Settings { router_track_active_blocks: false, overlap_score_credit: 3.0, ..Settings::default() };
    assert_eq!(cost(&settings, &request(640), &candidates), [5.0, 10.0]);
}

#[test]
fn a_busy_holders_overlap_decays() {
    // One prompt's length of prefill more than the least loaded: half the credit.
    let candidates = fleet(&[640, 1280], &[0, 0], &[0, 640]);
    let decaying = Settings { overlap_score_credit_decay: 1.0, router_track_active_blocks: false, ..Settings::default() };
    assert_eq!(cost(&decaying, &request(640), &candidates), [20.0, 25.0]);
}

#[test]
fn a_decode_stage_goes_by_load_alone() {
    let candidates = fleet(&[0, 0], &[0, 64], &[0, 6400]);
    assert_eq!(route(Settings::default(), &request(6400).with_stage(stage::DECODE), &candidates)[0], 0);
}

#[test]
fn equal_workers_share_and_a_temperature_prefers_the_cheaper() {
    testing::reset();
    let mut firsts = [0; 3];
    for _ in 0..3000 {
        firsts[route(Settings::default(), &request(64), &fleet(&[0; 3], &[0; 3], &[0; 3]))[0] as usize] += 1;
    }
    assert!(firsts.iter().all(|hits| (850..1150).contains(hits)), "{firsts:?}");
    let warm = Settings { router_temperature: 0.5, ..Settings::default() };
    let mut firsts = [0; 3];
    for _ in 0..3000 {
        firsts[route(warm.clone(), &request(64), &fleet(&[0; 3], &[0, 640, 1280], &[0; 3]))[0] as usize] += 1;
    }
    // Softmax of 0, 1 and 2: 66.5, 24.5 and 9 percent.
    assert!((1900..2100).contains(&firsts[0]) && (650..820).contains(&firsts[1]), "{firsts:?}");
}

#[test]
fn nothing_known_is_still_an_answer() {
    assert_eq!(route(Settings::default(), &Request::test(), &Candidates::test(20)).len(), 16);
    let warm = Settings { router_temperature: 1.0, overlap_score_credit_decay: 1.0, ..Settings::default() };
    assert_eq!(route(warm, &Request::test(), &Candidates::test(1)), [0]);
}

#[test]
fn a_request_overrides_what_the_operator_lets_it() {
    let settings = Settings { override_attribute: Some("x-router".to_owned()), ..Settings::default() };
    let of = |text: &str| settings.overridden(&request(1).with_attribute("x-router", text));
    let expected =
        Settings { overlap_score_credit: 0.5, router_temperature: 0.25, router_track_prefill_tokens: false, ..settings.clone() };
    assert_eq!(of("overlap_score_credit=0.5, router_temperature=0.25,track_prefill_tokens=false"), Some(expected));
    let reused = Settings { router_temperature: 0.5, ..settings.clone() };
    assert_eq!(of("assume_kv_reuse=false,router_temperature=0.5"), Some(reused), "what concerns the index is accepted");
    assert_eq!(Settings::default().overridden(&request(1).with_attribute("x-router", "router_temperature=1")), None);
    testing::reset();
    for wrong in ["", "router_temperature", "router_temperature=x", "router_temperature=-1", "prefil=1"] {
        assert_eq!(of(wrong), None, "{wrong}");
    }
    assert_eq!(testing::counter("invalid_overrides"), 5);
}

#[test]
fn a_setting_that_makes_no_sense_is_refused_by_name() {
    let error = |settings| KvAware::new(settings).err().unwrap();
    let negative = Settings { host_cache_hit_weight: -0.5, ..Settings::default() };
    assert_eq!(error(negative), "host_cache_hit_weight is -0.5; use a number of at least 0");
    let nan = Settings { router_temperature: f32::NAN, ..Settings::default() };
    assert!(error(nan).starts_with("router_temperature is NaN;"));
    assert!(
        error(Settings { override_attribute: Some(String::new()), ..Settings::default() })
            .starts_with("override_attribute is empty")
    );
}

#[test]
fn a_decision_explains_itself() {
    testing::reset();
    testing::set_explain_wanted(true);
    route(Settings::default(), &request(640), &fleet(&[0, 0], &[0, 0], &[0, 64]));
    let terms: Vec<String> = testing::explanations().into_iter().map(|(term, _)| term).collect();
    assert_eq!(terms, ["credit_blocks", "prefill_blocks", "total"]);
}
