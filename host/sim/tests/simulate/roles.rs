//! Prefill on one engine, decode on another: times and bytes that were computed by hand, and books that agree whatever fails.

use dynamo_host_core::Role;
use dynamo_host_sim::{Faults, Links, Queueing, SimulationError, report::Row, simulate};

use crate::*;

/// Engines of these roles; a token's KV takes a millisecond through a port, and each transfer five more.
fn roles(roles: &[Role]) -> Options {
    let profile = Profile { kv_bytes_per_token: 1000, ..profile() };
    let workers = roles.iter().map(|&role| EngineSpec { role, profile: profile.clone() });
    let links = Links { bytes_per_second: 1e6, latency: Duration::from_millis(5) };
    Options { links, audit_every: Some(1), ..Options::new(workers) }
}

const PAIR: &[Role] = &[Role::Prefill, Role::Decode];

#[test]
fn a_first_token_comes_after_prefill_transfer_and_one_step_of_decode() {
    let row = Row::new(run(&trace(&[(0, &[(1, 512)], 3)]), &roles(PAIR), &native()));
    // 100 + 512, 512 + 5, 10.
    assert_eq!((row.ttft.mean, row.itl.mean, row.e2e.max), (1139.0, 10.0, 1159.0));
    assert_eq!((row.itl.count, row.served, row.decisions, row.reuse), (2, 1, 2, 0.0));
    let handoffs = row.handoffs.unwrap();
    assert_eq!((handoffs.remote_share, handoffs.transfers, handoffs.fetched_tokens, handoffs.bytes), (1.0, 1, 512, 512_000));
    assert_eq!((handoffs.handoff.mean, handoffs.transfer.mean), (527.0, 517.0));
    let pools: Vec<_> = row.pools.iter().map(|pool| (pool.role, pool.prompt_tokens, pool.output_tokens)).collect();
    assert_eq!(pools, [(Role::Prefill, 512, 1), (Role::Decode, 0, 3)]);
    assert_eq!(row.pools[0].utilization, 612.0 / 1159.0);
    assert_eq!(row.pools[1].utilization, 30.0 / 1159.0);
}

#[test]
fn transfers_through_one_port_share_it() {
    let row = Row::new(run(&trace(&[(0, &[(1, 512)], 2), (0, &[(2, 512)], 2)]), &roles(PAIR), &native()));
    // Both are prefilled in one step of 100 + 1024, and take twice as long on their way.
    assert_eq!((row.ttft.mean, row.ttft.max), (1124.0 + 1024.0 + 5.0 + 10.0, 1124.0 + 1024.0 + 5.0 + 10.0));
    // To different engines from different ones, they do not meet.
    let two = [Role::Prefill, Role::Prefill, Role::Decode, Role::Decode];
    let row = Row::new(run(&trace(&[(0, &[(1, 512)], 2), (0, &[(2, 512)], 2)]), &roles(&two), &native()));
    assert_eq!((row.ttft.mean, row.ttft.max), (1139.0, 1139.0));
}

#[test]
fn what_the_decode_engine_has_cached_is_not_fetched_and_what_the_prefill_engine_has_is_not_computed() {
    let row = Row::new(run(&trace(&[(0, &[(1, 512)], 2), (3000, &[(1, 512), (2, 64)], 2)]), &roles(PAIR), &native()));
    assert_eq!(row.reuse, 512.0 / 1088.0);
    let handoffs = row.handoffs.unwrap();
    assert_eq!((handoffs.fetched_tokens, handoffs.bytes), (512 + 64, 576_000));
    // 100 + 64, 64 + 5, 10.
    assert_eq!(row.ttft.p50, 243.0);
}

#[test]
fn an_answer_of_one_token_is_the_prefill_engines() {
    let row = Row::new(run(&trace(&[(0, &[(1, 512)], 1)]), &roles(PAIR), &native()));
    assert_eq!((row.ttft.mean, row.e2e.max, row.decisions), (612.0, 612.0, 1));
    let handoffs = row.handoffs.unwrap();
    assert_eq!((handoffs.remote_share, handoffs.transfers), (0.0, 0));
}

#[test]
fn who_is_blind_to_roles_places_whole_requests_on_those_that_serve_them() {
    let mixed = [Role::Aggregated, Role::Prefill, Role::Decode];
    let requests: Vec<Line<'_>> = vec![(0, &[(1, 64)], 4); 8];
    let row = Row::new(run(&trace(&requests), &roles(&mixed), &component("policies", "round-robin", "{}")));
    let handoffs = row.handoffs.unwrap();
    assert_eq!((handoffs.remote_share, handoffs.aggregated_share, handoffs.local_share), (0.5, 0.5, 0.0));
    assert_eq!(row.pools.iter().map(|pool| pool.legs).collect::<Vec<_>>(), [4, 4, 4]);
    let both = Row::new(run(&trace(&requests), &roles(&[Role::Both, Role::Both]), &component("policies", "round-robin", "{}")));
    assert_eq!(both.handoffs.unwrap().aggregated_share, 1.0);
}

/// Requests enough for every kind of fault to meet every part of a hand-off.
fn many() -> Trace {
    Trace::open("synthetic:requests=1500,rate=12,prefixes=5,prefix_tokens=128,turns=3,think_s=4,input=200,output=20", 3).unwrap()
}

#[test]
fn engines_of_either_role_fail_and_no_request_or_block_is_lost() {
    let faults = Faults::parse("die_every_s=3,down_s=4,slow_every_s=15,hang_every_s=9,hang_s=5,attempts=100").unwrap();
    let fleet = [Role::Prefill, Role::Prefill, Role::Decode, Role::Decode, Role::Both, Role::Aggregated];
    for fleet in [&fleet[..4], &fleet[..]] {
        let mut options = Options { faults: Some(faults.clone()), audit_every: Some(50), ..roles(fleet) };
        options.links.bytes_per_second = 2e8;
        options.workers.iter_mut().for_each(|worker| worker.profile.speedup = 20.0);
        let row = Row::new(run(&many(), &options, &native()));
        let faults = row.faults.unwrap();
        assert_eq!((row.served, faults.failed), (1500, 0));
        assert!(faults.faults.died > 10 && faults.faults.migrated > 0 && faults.faults.interrupted > faults.faults.migrated);
        let handoffs = row.handoffs.unwrap();
        assert!(handoffs.remote_share > 0.3, "{handoffs:?}");
        // What came over came in whole blocks.
        assert_eq!(handoffs.bytes % 64_000, 0);
        assert!(
            handoffs.bytes >= handoffs.fetched_tokens * 1000
                && handoffs.bytes < (handoffs.fetched_tokens + handoffs.transfers * 64) * 1000
        );
    }
}

#[test]
fn the_same_seed_gives_the_same_report_and_clients_that_leave_leave_nothing_behind() {
    let fleet = [Role::Prefill, Role::Prefill, Role::Decode, Role::Decode];
    let queueing = Queueing::parse("max_running=4,leave=0.5,leave_s=1").unwrap();
    let options = Options { queueing: Some(queueing), audit_every: Some(1), ..roles(&fleet) };
    let once = || serde_json::to_string(&Row::new(run(&many(), &options, &component("policies", "round-robin", "{}")))).unwrap();
    let (one, other) = (once(), once());
    assert_eq!(one, other);
    let row: serde_json::Value = serde_json::from_str(&one).unwrap();
    assert!(row["queue"]["tenants"][0]["left"].as_u64().unwrap() > 100, "{one}");
}

#[test]
fn half_a_pair_says_what_is_missing() {
    #[track_caller]
    fn check(options: &Options, expected: &str) {
        let error: SimulationError = simulate(&trace(&[(0, &[(1, 64)], 1)]), options, &native(), &|_| ()).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    check(&roles(&[Role::Prefill, Role::Aggregated]), "1 workers have the role prefill, and there is none to share");
    check(&roles(&[Role::Decode, Role::Decode]), "--workers 2,role=prefill");
    let mut mixed = roles(PAIR);
    mixed.workers[1].profile.block_size = 32;
    check(&mixed, "the role prefill has block_size=64 and kv_bytes_per_token=1000, as no worker of the role decode has");
    check(&Options { links: Links { bytes_per_second: 0.0, ..Links::default() }, ..roles(PAIR) }, "use at least 1");
}
