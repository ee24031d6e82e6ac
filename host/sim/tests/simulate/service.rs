//! The queue in front of the engines, and engines that fail.

use dynamo_host_sim::{AdmissionPolicy, Faults, Queueing, Tenant, report::Row};

use crate::*;

fn queueing(text: &str, tenants: &[&str]) -> Option<Queueing> {
    let mut queueing = Queueing::parse(text).unwrap();
    if !tenants.is_empty() {
        queueing.tenants = tenants.iter().map(|text| Tenant::parse(text).unwrap()).collect();
    }
    Some(queueing)
}

/// Everything is checked after each event.
fn with_queue(workers: usize, text: &str, tenants: &[&str]) -> Options {
    Options { queueing: queueing(text, tenants), audit_every: Some(1), ..options(workers) }
}

#[test]
fn what_finds_room_is_as_without_a_queue() {
    let trace = trace(&[(0, &[(1, 500)], 3), (50, &[(2, 100)], 20), (2000, &[(1, 500)], 3)]);
    let plain = Row::new(run(&trace, &options(2), &native()));
    let mut queued = Row::new(run(&trace, &with_queue(2, "", &[]), &native()));
    let queue = queued.queue.take().unwrap();
    assert_eq!((queue.tenants[0].served, queue.tenants[0].wait.max, queue.longest), (3, 0.0, 0));
    assert_eq!(serde_json::to_string(&queued).unwrap(), serde_json::to_string(&plain).unwrap());
}

#[test]
fn who_finds_no_room_waits_for_an_end_and_not_inside_an_engine() {
    // Each alone takes 100 + 100 ms.
    let requests = [(0, &[(1, 100)][..], 1), (0, &[(2, 100)], 1), (0, &[(3, 100)], 1)];
    let row = Row::new(run(&trace(&requests), &with_queue(1, "max_running=1", &[]), &native()));
    assert_eq!((row.ttft.p50, row.ttft.max), (400.0, 600.0));
    let queue = row.queue.unwrap();
    assert!((queue.tenants[0].wait.mean - 200.0).abs() < 0.5 && queue.longest == 2, "{queue:?}");
}

#[test]
fn what_is_refused_expires_or_leaves_is_counted_as_that_and_the_rest_is_served() {
    let requests: Vec<Line<'_>> = (0..10).map(|nth| (nth, &[(1, 100)][..], 1)).collect();
    let ends = |text| {
        let row = Row::new(run(&trace(&requests), &with_queue(1, text, &[]), &native()));
        let tenant = &row.queue.unwrap().tenants[0];
        assert_eq!((tenant.came, tenant.served), (10, row.served));
        (tenant.served, tenant.refused, tenant.expired, tenant.left)
    };
    assert_eq!(ends("max_running=1,max_requests=3"), (4, 6, 0, 0));
    assert_eq!(ends("max_running=1,max_tokens=250"), (3, 7, 0, 0));
    assert_eq!(ends("max_running=1,timeout_s=0.3"), (2, 0, 8, 0));
    assert_eq!(ends("max_running=1,leave=1,leave_s=0"), (0, 0, 0, 10));
}

/// Three times what the engines can do, of three tenants who send alike.
#[test]
fn under_overload_tenants_share_the_work_by_weight_and_the_first_tier_does_not_wait() {
    let trace =
        Trace::open("synthetic:requests=6000,rate=300,prefixes=1,prefix_tokens=64,turns=1,input=200,output=40", 5).unwrap();
    let tenants = ["a,weight=1,tier=1", "b,weight=2,tier=1", "c,weight=4,tier=1", "vip,share=0.03"];
    let options = with_queue(2, "max_running=8,max_requests=400,timeout_s=3600", &tenants);
    let options = Options { audit_every: Some(100), ..options };
    let queue = Row::new(run(&trace, &options, &native())).queue.unwrap();
    let vip = &queue.tenants[3];
    assert_eq!((vip.refused + vip.expired, vip.served), (0, vip.came));
    for (tenant, weight) in [(0, 1.0), (1, 2.0), (2, 4.0)] {
        let share = queue.tenants[tenant].contended_share;
        assert!((share / (weight / 7.0) - 1.0).abs() < 0.03, "{tenant} {share}: {queue:?}");
        assert!(queue.tenants[tenant].wait.p50 > 10.0 * vip.wait.p99.max(1.0), "{queue:?}");
    }
}

#[test]
fn a_request_whose_engine_dies_goes_on_elsewhere_with_the_tokens_that_it_has() {
    // 100 + 100 ms to the first token, 10 for each other one; on the second worker 100 more and what was generated.
    let trace = trace(&[(0, &[(1, 100)], 1000)]);
    let faults = Faults::parse("die_every_s=1,down_s=0.01,attempts=1000").unwrap();
    let row = Row::new(run(&trace, &Options { faults: Some(faults), ..with_queue(2, "", &[]) }, &native()));
    let faults = row.faults.clone().unwrap();
    assert!(faults.faults.migrated > 0 && faults.faults.tokens_kept > 100, "{faults:?}");
    assert_eq!((row.served, faults.failed, row.itl.count, row.ttft.count), (1, 0, 999, 1));
    assert!(row.itl.max > 100.0 && row.e2e.max > 200.0 + 9990.0, "{row:?}");
}

#[test]
fn a_request_fails_when_its_attempts_are_used_up_and_waits_while_all_are_dead() {
    let trace = trace(&[(0, &[(1, 100)], 1000)]);
    let dies = |attempts: u32| {
        let faults = Faults::parse(&format!("die_every_s=1,down_s=0.5,attempts={attempts}")).unwrap();
        Row::new(run(&trace, &Options { faults: Some(faults), ..with_queue(1, "", &[]) }, &native()))
    };
    let row = dies(1);
    assert_eq!((row.served, row.faults.unwrap().failed, row.queue.unwrap().tenants[0].failed), (0, 1, 1));
    let row = dies(1000);
    let died = row.faults.unwrap().faults.interrupted as f64;
    assert!(row.served == 1 && row.e2e.max > 10_190.0 + 500.0 * died, "{died} {:?}", row.e2e);
}

#[test]
fn a_hang_is_found_out_after_the_stall_bound_and_a_short_one_is_waited_for() {
    let requests: Vec<Line<'_>> = vec![(0, &[(1, 100)], 2000); 16];
    let trace = trace(&requests);
    let hangs = |stall_s: f64| {
        let faults = Faults::parse(&format!("hang_every_s=2,hang_s=1,stall_s={stall_s},attempts=1000")).unwrap();
        // What was generated is computed again in no time.
        let workers = vec![Profile { prefill_ms_per_token: 0.0, ..profile() }; 8];
        Row::new(run(&trace, &Options { workers: specs(&workers), faults: Some(faults), ..with_queue(8, "", &[]) }, &native()))
    };
    let (found, waited) = (hangs(0.2), hangs(5.0));
    assert!(found.faults.unwrap().faults.migrated > 0 && found.itl.max < 1000.0, "{:?}", found.itl);
    assert!(waited.itl.max > 1000.0 && waited.faults.unwrap().faults.interrupted == 0, "{:?}", waited.itl);
}

#[test]
fn a_slow_spell_makes_steps_longer_for_its_time() {
    let trace = trace(&[(0, &[(1, 100)], 2000)]);
    let faults = Faults::parse("slow_every_s=5,slow_s=1,slow_factor=5").unwrap();
    let row = Row::new(run(&trace, &Options { faults: Some(faults), ..with_queue(1, "", &[]) }, &native()));
    assert!((row.itl.max - 50.0).abs() < 0.1 && row.itl.p50 < 10.1, "{:?}", row.itl);
}

/// The short form of the run of ten million that docs/simulator.md tells of.
#[test]
fn a_hundred_thousand_requests_with_every_kind_of_fault_end_once_each() {
    let source = "synthetic:requests=100000,rate=200,prefixes=20,prefix_tokens=64,turns=2,think_s=5,input=64,output=8";
    let trace = Trace::open(source, 3).unwrap();
    let profile = Profile { kv_blocks: 512, max_num_seqs: 32, max_model_len: 32_768, ..dynamo_host_sim::default_profile() };
    let tenants = ["a,class=gold,class_weight=3", "b,weight=2", "c,weight=4,share=2", "d,tier=1,share=2"];
    let options = Options {
        queueing: queueing("max_running=16,max_requests=500,timeout_s=20,leave=0.02,leave_s=1", &tenants),
        faults: Some(Faults::parse("die_every_s=5,slow_every_s=7,hang_every_s=6,attempts=4").unwrap()),
        audit_every: Some(20_000),
        ..Options::new(vec![profile; 4])
    };
    let row = Row::new(run(&trace, &options, &native()));
    let (queue, faults) = (row.queue.as_ref().unwrap(), row.faults.as_ref().unwrap());
    let ended = |tenant: &dynamo_host_sim::report::TenantRow| {
        tenant.served + tenant.rejected + tenant.shed + tenant.refused + tenant.expired + tenant.left + tenant.failed
    };
    assert_eq!(queue.tenants.iter().map(ended).sum::<u64>(), 100_000);
    assert!(queue.tenants.iter().all(|tenant| tenant.came == ended(tenant) && tenant.served > 0 && tenant.left > 0));
    assert!(queue.tenants.iter().map(|tenant| tenant.refused + tenant.expired).sum::<u64>() > 0, "{queue:?}");
    let counts = &faults.faults;
    assert!(counts.died > 10 && counts.slow > 10 && counts.hung > 10 && counts.migrated > 100, "{faults:?}");
}

#[test]
fn the_same_seed_fails_in_the_same_way() {
    let trace = Trace::open("synthetic:requests=2000,rate=20,input=64,output=20", 3).unwrap();
    let run = |seed| {
        let options = Options {
            seed,
            faults: Some(Faults::parse("die_every_s=5,slow_every_s=7,hang_every_s=6").unwrap()),
            ..with_queue(4, "max_running=4,timeout_s=5,leave=0.1", &["a", "b,tier=1"])
        };
        serde_json::to_string(&Row::new(run(&trace, &options, &native()))).unwrap()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn an_admission_policy_sheds_before_the_queue() {
    // One in 100 ms, for ten seconds, of which one in a second may come, and five at once.
    let requests: Vec<Line<'_>> = (0..100).map(|nth| (nth * 100, &[(1, 100)][..], 1)).collect();
    let mut options = with_queue(1, "", &["a"]);
    let Contender { name, policy } = component("policies", "token-bucket", r#"{"requests_per_minute": 60, "request_burst": 5}"#);
    let (bytes, settings) = policy.unwrap();
    options.queueing.as_mut().unwrap().admission = Some(AdmissionPolicy { name, bytes, settings });
    let row = Row::new(run(&trace(&requests), &options, &native()));
    let tenant = &row.queue.unwrap().tenants[0];
    assert_eq!((tenant.came, tenant.shed + tenant.served, tenant.refused), (100, 100, 0));
    assert!((14..=15).contains(&tenant.served), "{tenant:?}");
}
