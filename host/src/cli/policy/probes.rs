//! Probes: the made-up decisions that `policy check` asks for.
//!
//! Each stands for a situation that policies get wrong: one candidate, many, nothing known of anybody, some things of some,
//! a session, a retry, a very long prompt, recorded reasons, split pools.

use std::sync::Arc;

use dynamo_host_core::{
    Admitted, PoolState, RequestFacts, Slo, TokenCount, UNKNOWN, admission::Quantiles, id::WorkerId, load::Recent,
};
use dynamo_host_policy::{
    AdmissionCall, PolicyVersion, Question, RouteCall,
    synthetic::{self, SyntheticFleet},
};

/// Candidates of probes that are not about their number.
const SOME: u32 = 64;

/// Candidates that a policy should be able to decide for; one that cannot is warned about.
pub(super) const MANY: u32 = 10_000;

/// A made-up decision.
pub(super) struct Probe<Q: Question> {
    /// What it is about.
    pub(super) name: &'static str,
    pub(super) rows: u32,
    pub(super) call: Q,
    /// Keeps up what it is about.
    _scene: Q::Scene,
}

/// A question that there are probes for.
pub(super) trait Probed: Question {
    /// All probes of a policy, the cheapest first.
    fn probes(version: &PolicyVersion) -> Vec<Probe<Self>>;
}

impl Probed for RouteCall {
    fn probes(version: &PolicyVersion) -> Vec<Probe<Self>> {
        of_routing(version.tells_roles_apart())
    }
}

impl Probed for AdmissionCall {
    fn probes(_: &PolicyVersion) -> Vec<Probe<Self>> {
        of_admission()
    }
}

fn of_admission() -> Vec<Probe<AdmissionCall>> {
    let free = |_: &mut PoolState| {};
    let plain = |_: &mut RequestFacts| {};
    let full = |pool: &mut PoolState| {
        (pool.free_requests, pool.queued_requests, pool.queued_tokens) = (0, 5000, 10_000_000);
        (pool.oldest_age_ms, pool.predicted_wait_ms, pool.shed_rate) = (60_000, 120_000.0, 0.9);
    };
    let unknown = |pool: &mut PoolState| {
        (pool.free_requests, pool.predicted_wait_ms, pool.shed_rate) = (UNKNOWN, f32::NAN, f32::NAN);
        (pool.ttft, pool.itl) = (Quantiles::default(), Quantiles::default());
    };
    let dead = |pool: &mut PoolState| {
        (pool.ready_workers, pool.running_requests, pool.free_requests) = (0, 0, 0);
    };
    vec![
        admission("room for more", 1, free, plain),
        admission("prefill apart", 2, free, plain),
        admission("a full queue", 1, full, plain),
        admission("nothing observed", 1, unknown, plain),
        admission("no worker", 1, dead, plain),
        admission("no targets", 1, full, |request| request.slo = Slo::default()),
        admission("a tenant", 1, free, |request| request.tenant = Some("acme".to_owned())),
        admission("a low priority", 1, full, |request| request.priority = -10),
        admission("a long prompt", 1, free, |request| request.prompt = TokenCount { tokens: 2_000_000, exact: true }),
        admission("a short deadline", 1, full, |request| request.deadline_ms = Some(2)),
        admission("many pools", 64, free, plain),
    ]
}

/// A probe over pools of which the first is changed so.
fn admission(
    name: &'static str,
    rows: u32,
    change: impl FnOnce(&mut PoolState),
    change_request: impl FnOnce(&mut RequestFacts),
) -> Probe<AdmissionCall> {
    let mut pools = synthetic::pools(rows).to_vec();
    change(&mut pools[0]);
    let scene: Arc<[PoolState]> = pools.into();
    let mut call = synthetic::admission_call(&scene, 1);
    change_request(Arc::make_mut(&mut call.request));
    call.native = Admitted::of(&call.request);
    Probe { name, rows, call, _scene: scene }
}

fn of_routing(tells_roles_apart: bool) -> Vec<Probe<RouteCall>> {
    let plain = |_: &mut RequestFacts| {};
    let mut probes = vec![
        probe("one candidate", 1, 0, plain),
        probe("few candidates", 4, 0, plain),
        probe("nothing observed", SOME, 0, plain),
        probe("some observed", SOME, 2, plain),
        probe("all observed", SOME, 1, plain),
        probe("a session", SOME, 1, |request| request.session_key = Some(0x5e55_1044)),
        probe("an adapter", SOME, 1, |request| request.adapter = Some("adapter".to_owned())),
        probe("a retry", SOME, 1, |request| {
            request.attempt = 2;
            request.failed_workers = vec![WorkerId(1), WorkerId(2)];
        }),
        probe("a long prompt", SOME, 1, |request| request.prompt = TokenCount { tokens: 2_000_000, exact: true }),
        probe("limits and deadline", SOME, 1, |request| {
            request.max_output_tokens = Some(1);
            request.deadline_ms = Some(1);
            request.choices = 128;
        }),
    ];
    let mut explained = probe("recorded reasons", SOME, 1, plain);
    explained.call.explain = true;
    probes.push(explained);
    probes.push(probe("many candidates", 1024, 1, plain));
    probes.push(probe("very many candidates", MANY, 1, plain));
    // What it is shown of split pools follows from whether it tells roles apart.
    let split = |name, rows| of_fleet(name, synthetic::split(rows), 1, plain);
    if tells_roles_apart {
        probes.push(split("a prefill and a decode worker", 2));
        probes.push(split("split pools", SOME));
        probes.push(split("many in split pools", 1024));
    } else {
        probes.push(of_fleet("where to prefill", synthetic::prefilling(SOME), 1, plain));
    }
    probes.push(of_fleet("where to decode", synthetic::decoding(SOME), 1, plain));
    probes
}

/// A probe over a fleet of which every `observed`th worker has been observed, 0 for none.
fn probe(name: &'static str, candidates: u32, observed: u32, change: impl FnOnce(&mut RequestFacts)) -> Probe<RouteCall> {
    of_fleet(name, synthetic::fleet(candidates), observed, change)
}

fn of_fleet(
    name: &'static str,
    fleet: SyntheticFleet,
    observed: u32,
    change: impl FnOnce(&mut RequestFacts),
) -> Probe<RouteCall> {
    let rows = fleet.candidates.count();
    for row in (0..rows).filter(|row| observed > 0 && row % observed == 0) {
        let load = &fleet.candidates.worker(row).load;
        load.observe(Recent::TtftMs, 20.0 + (row % 50) as f32 * 7.0);
        load.observe(Recent::ItlMs, 5.0 + (row % 10) as f32);
        load.observe(Recent::ErrorRate, (row % 20) as f32 / 40.0);
        load.observed(0);
    }
    let mut call = synthetic::route_call(&fleet, 1);
    change(Arc::make_mut(&mut call.request));
    Probe { name, rows, call, _scene: fleet }
}
