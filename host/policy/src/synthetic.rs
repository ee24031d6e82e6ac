//! Made-up fleets, pools and requests: what policies are probed and measured with.

use std::{collections::BTreeMap, sync::Arc};

use dynamo_host_core::{
    Admitted, Among, Candidates, Endpoint, Fleet, Handoff, LinkBoard, LoadBoard, PoolState, RequestFacts, Role, Slo, Stage,
    TokenCount, Worker, WorkerId, WorkerSpec, WorkerState, admission::Quantiles, links::FAILURES, load::InFlight,
};

use crate::question::{AdmissionCall, RouteCall};

/// Model that the made-up workers serve.
const MODEL: &str = "synthetic";

/// Key of those made-up workers that can hand KV to each other.
const GROUP: u64 = 1;

/// Candidates with their load kept up for as long as this lives, and what is asked about them.
#[derive(Debug)]
pub struct SyntheticFleet {
    /// The candidates.
    pub candidates: Arc<Candidates>,
    /// What is known of the ways between them, if there are any.
    pub links: Option<Arc<LinkBoard>>,
    stage: Stage,
    prefilled_by: Option<WorkerId>,
    _in_flight: Vec<InFlight>,
}

/// A fleet of `count` workers with loads that differ. The same for the same count.
#[must_use]
pub fn fleet(count: u32) -> SyntheticFleet {
    let (fleet, in_flight) = of_roles(count, |_| Role::Aggregated);
    let candidates = fleet.candidates(MODEL, Among::Everyone).expect("all workers are healthy");
    SyntheticFleet { candidates, links: None, stage: Stage::Whole, prefilled_by: None, _in_flight: in_flight }
}

/// A fleet of split and other pools, for who tells roles apart: `count` workers of all roles.
#[must_use]
pub fn split(count: u32) -> SyntheticFleet {
    use Role::{Aggregated, Both, Decode, Prefill};
    let (fleet, in_flight) =
        of_roles(count, |i| [Decode, Prefill, Decode, Prefill, Decode, Aggregated, Prefill, Both][i as usize % 8]);
    let candidates = fleet.candidates(MODEL, Among::Everyone).expect("all workers are healthy");
    let links = Some(links(&fleet));
    SyntheticFleet { candidates, links, stage: Stage::Whole, prefilled_by: None, _in_flight: in_flight }
}

/// Split pools as who does not tell roles apart sees them first: `count` workers that prefill.
#[must_use]
pub fn prefilling(count: u32) -> SyntheticFleet {
    let (fleet, in_flight) = of_roles(count + 1, |i| if i == count { Role::Decode } else { Role::Prefill });
    let candidates = fleet.candidates(MODEL, Among::Beginning).expect("all workers are healthy");
    SyntheticFleet { candidates, links: None, stage: Stage::Prefill, prefilled_by: None, _in_flight: in_flight }
}

/// Split pools when a prompt has been computed: `count` workers that decode.
#[must_use]
pub fn decoding(count: u32) -> SyntheticFleet {
    let (fleet, in_flight) = of_roles(count + 1, |i| if i == count { Role::Prefill } else { Role::Decode });
    let candidates = fleet.candidates(MODEL, Among::Decoders).expect("all workers are healthy");
    let prefilled_by = fleet.workers().iter().find(|worker| worker.spec.role == Role::Prefill).map(|worker| worker.id);
    let links = Some(links(&fleet));
    SyntheticFleet { candidates, links, stage: Stage::Decode, prefilled_by, _in_flight: in_flight }
}

fn of_roles(count: u32, role: impl Fn(u32) -> Role) -> (Fleet, Vec<InFlight>) {
    let board = LoadBoard::new(count);
    let mut in_flight = Vec::new();
    let workers = (0..count)
        .map(|i| {
            let load = board.claim().expect("the board has a slot per worker");
            let dispatch = |tokens| InFlight::dispatch(Arc::clone(&load), tokens, tokens, 0);
            // One request in prefill and up to seven that decode, no two workers quite alike.
            in_flight.push(dispatch(i.wrapping_mul(2_654_435_761) >> 16));
            for request in 0..i % 8 {
                let mut decoding = dispatch((i * 37 + request * 811) % 4000);
                decoding.tokens(i % 100 + 1, 0);
                in_flight.push(decoding);
            }
            let role = role(i);
            let spec = WorkerSpec {
                name: format!("synthetic-{i}"),
                model: MODEL.to_owned(),
                role,
                rank: 0,
                block_size: Some(16),
                labels: labels(i),
            };
            Worker {
                id: spec.id("synthetic"),
                spec: Arc::new(spec),
                state: WorkerState::Healthy,
                adapters: Arc::default(),
                handoff: Handoff { serves_whole: true, group: (role != Role::Aggregated).then_some(GROUP) },
                joined_ms: 0,
                load,
            }
        })
        .collect();
    (Fleet::new(1, workers).expect("names differ"), in_flight)
}

/// Some links that were used, and one that is avoided; of the first few workers, since all that there may be are too many.
fn links(fleet: &Fleet) -> Arc<LinkBoard> {
    let links = LinkBoard::default();
    let slots = |does: fn(Role) -> bool| fleet.workers().iter().filter(move |worker| does(worker.spec.role));
    for (i, from) in (0u32..).zip(slots(Role::prefills).take(16)) {
        for (j, to) in (0u32..).zip(slots(Role::decodes).take(64)) {
            let (from, to) = (from.load.index(), to.load.index());
            match (i + j) % 3 {
                0 => links.arrived(from, to, 1000 + 100 * j, 5.0 + i as f32),
                1 if (i, j) == (0, 1) => (0..FAILURES).for_each(|_| links.failed(from, to, 0)),
                _ => {}
            }
        }
    }
    Arc::new(links)
}

/// Every other worker is in zone `a` or `b`, and all have a price.
fn labels(worker: u32) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::from([("price".to_owned(), (worker % 4).to_string())]);
    if let Some(zone) = [Some("a"), None, Some("b"), None][worker as usize % 4] {
        labels.insert("zone".to_owned(), zone.to_owned());
    }
    labels
}

/// A made-up request of 1,000 prompt tokens.
fn request() -> RequestFacts {
    let mut request = RequestFacts::new("synthetic", MODEL, Endpoint::ChatCompletions);
    request.prompt = TokenCount { tokens: 1000, exact: false };
    request
}

/// Makes the `nth` of a series of requests one of a few sessions and prompts that come again.
pub(crate) fn vary(request: &mut RequestFacts, nth: u64) {
    request.decision_id = nth;
    request.session_key = Some(nth % 3);
    request.prefix_key = nth % 5;
    request.prompt.tokens = 100 + 700 * (nth as u32 % 4);
}

/// A decision about where a made-up request goes.
#[must_use]
pub fn route_call(fleet: &SyntheticFleet, seed: u64) -> RouteCall {
    RouteCall {
        request: Arc::new(RequestFacts { stage: fleet.stage, prefilled_by: fleet.prefilled_by, ..request() }),
        candidates: Arc::clone(&fleet.candidates),
        overlap: None,
        links: fleet.links.clone(),
        now_ms: 1,
        unix_ms: 1,
        seed,
        explain: false,
    }
}

/// Pools that get fuller from the first, which has room for more, to the last. The same for the same count.
#[must_use]
pub fn pools(count: u32) -> Arc<[PoolState]> {
    let pool = |i: u32| PoolState {
        key: u64::from(i) + 1,
        role: [Role::Aggregated, Role::Prefill, Role::Decode][i as usize % 3],
        ready_workers: 4,
        running_requests: 16 * (i + 1),
        free_requests: 64u32.saturating_sub(16 * (i + 1)),
        queued_requests: 10 * i,
        queued_tokens: 10_000 * i,
        oldest_age_ms: 100 * i,
        predicted_wait_ms: 150.0 * i as f32,
        shed_rate: (i as f32 / 10.0).min(1.0),
        ttft: Quantiles([20.0, 50.0, 80.0, 120.0, 400.0].into()),
        itl: Quantiles([5.0, 8.0, 10.0, 15.0, 60.0].into()),
    };
    (0..count).map(pool).collect()
}

/// A decision about whether a made-up request with targets is let in.
#[must_use]
pub fn admission_call(pools: &Arc<[PoolState]>, seed: u64) -> AdmissionCall {
    let mut request = request();
    request.slo = Slo { ttft_ms: Some(500.0), itl_ms: Some(50.0) };
    let native = Admitted::of(&request);
    AdmissionCall { request: Arc::new(request), pools: Arc::clone(pools), native, now_ms: 1, unix_ms: 1, seed }
}
