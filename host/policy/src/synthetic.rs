//! Made-up fleets and requests: what policies are probed and measured with.

use std::{collections::BTreeMap, sync::Arc};

use dynamo_host_core::{
    Candidates, Endpoint, Fleet, LoadBoard, RequestFacts, Role, TokenCount, Worker, WorkerSpec, WorkerState, load::InFlight,
};

use crate::call::RouteCall;

/// Model that the made-up workers serve.
const MODEL: &str = "synthetic";

/// Candidates with their load kept up for as long as this lives.
#[derive(Debug)]
pub struct SyntheticFleet {
    /// The candidates.
    pub candidates: Arc<Candidates>,
    _in_flight: Vec<InFlight>,
}

/// A fleet of `count` workers with loads that differ. The same for the same count.
#[must_use]
pub fn fleet(count: u32) -> SyntheticFleet {
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
            let spec = WorkerSpec {
                name: format!("synthetic-{i}"),
                model: MODEL.to_owned(),
                role: Role::Aggregated,
                rank: 0,
                block_size: Some(16),
                labels: labels(i),
            };
            Worker {
                id: spec.id("synthetic"),
                spec: Arc::new(spec),
                state: WorkerState::Healthy,
                adapters: Arc::default(),
                joined_ms: 0,
                load,
            }
        })
        .collect();
    let fleet = Fleet::new(1, workers).expect("names differ");
    let candidates = fleet.candidates(MODEL, Role::Aggregated).expect("all workers are healthy");
    SyntheticFleet { candidates, _in_flight: in_flight }
}

/// Every other worker is in zone `a` or `b`, and all have a price.
fn labels(worker: u32) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::from([("price".to_owned(), (worker % 4).to_string())]);
    if let Some(zone) = [Some("a"), None, Some("b"), None][worker as usize % 4] {
        labels.insert("zone".to_owned(), zone.to_owned());
    }
    labels
}

/// A decision about a made-up request of 1,000 prompt tokens.
#[must_use]
pub fn route_call(fleet: &SyntheticFleet, seed: u64) -> RouteCall {
    let mut request = RequestFacts::new("synthetic", MODEL, Endpoint::ChatCompletions);
    request.prompt = TokenCount { tokens: 1000, exact: false };
    RouteCall {
        request: Arc::new(request),
        candidates: Arc::clone(&fleet.candidates),
        overlap: None,
        now_ms: 1,
        unix_ms: 1,
        seed,
        explain: false,
    }
}
