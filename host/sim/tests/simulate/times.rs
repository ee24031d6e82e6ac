//! Times that were computed by hand.

use dynamo_host_sim::{SimulationError, bounds::bounds, report::Row, simulate};

use crate::*;

#[test]
fn a_request_alone_takes_its_prefill_and_its_decode_steps() {
    let row = Row::new(run(&trace(&[(0, &[(1, 500)], 3)]), &options(1), &native()));
    assert_eq!((row.ttft.mean, row.itl.mean, row.e2e.max), (600.0, 10.0, 620.0));
    assert_eq!((row.itl.count, row.reuse, row.served), (2, 0.0, 1));
    assert_eq!((row.requests_per_second * 0.62, row.output_tokens_per_second * 0.62), (1.0, 3.0));
    assert_eq!((row.utilization, row.imbalance), (1.0, 1.0));
}

#[test]
fn a_prefix_that_is_cached_is_not_computed_again() {
    // 512 of 612 tokens are held: 100 are left.
    let trace = trace(&[(0, &[(1, 512)], 1), (1000, &[(1, 512), (2, 100)], 1)]);
    let row = Row::new(run(&trace, &options(1), &native()));
    assert_eq!((row.ttft.max, row.ttft.p50), (612.0, 200.0));
    assert_eq!(row.reuse, 512.0 / 1124.0);
}

#[test]
fn what_comes_at_one_moment_shares_a_step_and_what_comes_later_waits_for_its_end() {
    // 100 + 100 + 200 ms together; the third waits for 300 of them, and takes 100 + 50.
    let trace = trace(&[(0, &[(1, 100)], 1), (0, &[(2, 200)], 1), (100, &[(3, 50)], 1)]);
    let row = Row::new(run(&trace, &options(1), &native()));
    assert_eq!((row.ttft.mean, row.ttft.max), ((400.0 + 400.0 + 450.0) / 3.0, 450.0));
}

#[test]
fn requests_come_faster_by_the_speed() {
    let trace = trace(&[(0, &[(1, 100)], 1), (400, &[(2, 100)], 1)]);
    assert_eq!(Row::new(run(&trace, &options(1), &native())).ttft.max, 200.0);
    let faster = Options { speed: 4.0, ..options(1) };
    // It comes after 100 ms, and waits for as long.
    assert_eq!(Row::new(run(&trace, &faster, &native())).ttft.max, 300.0);
}

#[test]
fn a_long_prompt_is_computed_in_chunks() {
    let row = Row::new(run(&trace(&[(0, &[(1, 1500)], 1)]), &options(1), &native()));
    assert_eq!(row.ttft.mean, 1124.0 + 576.0);
}

#[test]
fn too_little_kv_memory_preempts_and_loses_nobody() {
    let profile = Profile { kv_blocks: 20, max_model_len: 1280, ..profile() };
    let requests: Vec<_> = (0..8).map(|stream| (0, [(stream, 256)], 200)).collect();
    let requests: Vec<_> = requests.iter().map(|(at, streams, output)| (*at, &streams[..], *output)).collect();
    let row = Row::new(run(&trace(&requests), &Options { workers: vec![profile.into()], ..options(1) }, &native()));
    assert!(row.preemptions > 0);
    assert_eq!((row.served, row.itl.count), (8, 8 * 199));
}

#[test]
fn bounds_of_a_mixed_fleet_are_those_of_its_fastest_worker() {
    let trace = trace(&[(0, &[(1, 640)], 1)]);
    let mean = |workers: &[Profile]| bounds(&trace, &specs(workers)).unwrap().infinite.ttft.mean;
    let fast = Profile { speedup: 4.0, ..profile() };
    assert_eq!(mean(&[profile(), fast.clone()]), mean(&[fast]));
}

#[test]
fn bounds_are_those_of_one_cache_and_no_queue() {
    let trace = trace(&[(0, &[(1, 640)], 1), (0, &[(2, 640)], 1), (0, &[(1, 640), (3, 64)], 1), (1, &[(2, 640), (4, 64)], 1)]);
    let found = bounds(&trace, &options(2).workers).unwrap();
    assert_eq!((found.infinite.ttft.mean, found.infinite.ttft.max), ((740.0 + 740.0 + 164.0 + 164.0) / 4.0, 740.0));
    assert_eq!((found.infinite.reuse, found.pooled.reuse), (1280.0 / 2688.0, 1280.0 / 2688.0));
    // Two engines of 12 blocks hold both of the prompts of ten blocks. In one engine alone the second prompt leaves two
    // blocks of the first, and the third request, of eleven blocks, one of the second.
    let small = Profile { kv_blocks: 12, max_model_len: 768, ..profile() };
    let pooled = |workers: &[Profile]| bounds(&trace, &specs(workers)).unwrap().pooled.reuse;
    assert_eq!(pooled(&[small.clone(), small.clone()]), 1280.0 / 2688.0);
    assert_eq!(pooled(&[small]), (2.0 + 1.0) * 64.0 / 2688.0);
}

#[test]
fn a_mixed_fleet_has_engines_of_its_own_kinds() {
    let fast = Profile { speedup: 2.0, ..profile() };
    let trace = trace(&[(0, &[(1, 300)], 1), (0, &[(2, 300)], 1)]);
    let row = Row::new(run(&trace, &Options { workers: vec![profile().into(), fast.into()], ..options(0) }, &native()));
    assert_eq!((row.ttft.p50, row.ttft.max), (200.0, 400.0));
}

#[test]
fn what_cannot_be_simulated_says_what_to_change() {
    let trace = trace(&[(0, &[(1, 63_999)], 2)]);
    #[track_caller]
    fn check(trace: &Trace, options: &Options, expected: &str) {
        let error: SimulationError = simulate(trace, options, &native(), &|_| ()).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    check(&trace, &options(3), "--workers 3,max_model_len=64001");
    check(&trace, &options(0), "simulate at least 1");
    check(&trace, &Options { speed: 0.0, ..options(1) }, "speed 0 is not possible");
    let broken = Profile { kv_blocks: 1001, max_model_len: 64_064, decode_ms_base: f64::NAN, ..profile() };
    check(&trace, &Options { workers: vec![broken.into()], ..options(1) }, "decode_ms_base=NaN is not a time");
}
