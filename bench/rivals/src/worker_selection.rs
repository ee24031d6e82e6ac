//! Time per decision of NVIDIA Dynamo's own, native worker selection.
//!
//! Two selectors with the same default: the KV-aware cost (prefill load left after the cached prefix, plus decode
//! blocks; the lowest wins), no temperature, no decay of the overlap credit.
//!
//! - `dynamo-kv-router`'s `DefaultWorkerSelector`: one fused loop. The crate's own bench `worker_selection` calls it
//!   `default_worker_selection/direct/temperature_0`. It sits behind the crate's feature `bench`: a deployment does not
//!   run it.
//! - `dynamo-custom-policy-builtin`'s `default_policy`: the default as a native plug-in, a scorer and a picker on the
//!   public plug-in interface. This is what a 1.6.1 deployment runs unless it is configured otherwise.
//!
//! The workload and the boundaries are those of the first crate's own bench, so that the figures can be checked.
//!
//! **Inside the timing**, for every decision: `request.eligibility()`, the selector's input, `select_worker` (which
//! walks the workers' hash map, looks each worker's overlap and load up, filters, scores, picks, and builds the
//! result), and dropping that result.
//!
//! **Outside**, as in that bench: building the workers' map; finding each worker's overlap (the prefix index);
//! projecting each worker's load, which Dynamo redoes for each decision and that bench measures apart; queueing;
//! booking the choice; and log output (the "Selected worker" line at level info has no subscriber here).
//!
//! Prints one JSON object on stdout and a table on stderr. Takes no arguments.

use std::collections::{HashMap, HashSet};
use std::hint::black_box;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use dynamo_custom_policy_builtin::default_policy;
use dynamo_kv_router::protocols::{RoutingConstraints, WorkerConfigLike, WorkerId, WorkerSelectionResult, WorkerWithDpRank};
use dynamo_kv_router::scheduling::{OverlapSignals, ScheduleMode};
use dynamo_kv_router::{
    DefaultWorkerSelector, KvRouterConfig, SchedulingRequest, WorkerLoadProjection, WorkerSelectionInput, WorkerSelector,
};
use rustc_hash::FxHashMap;
use serde::Serialize;

const REFERENCE: &str = "dynamo-kv-router";
const SHIPPED: &str = "dynamo-custom-policy-builtin";
const VERSION: &str = "1.6.1";

const CANDIDATES: [usize; 5] = [4, 32, 64, 1_024, 10_000];
const BLOCK_SIZE: u32 = 16;
const PROMPT_TOKENS: usize = 2_048;

/// Each round builds its workload anew (its hash maps are seeded anew), and visits all sizes, so that neither one
/// lucky layout nor one noisy second makes a size's figure.
const ROUNDS: usize = 5;
const WARM_UP: Duration = Duration::from_millis(500);
/// Samples of a round; each is a batch of decisions timed as a whole, as criterion does.
const SAMPLES: usize = 40;
const SAMPLE_TIME: Duration = Duration::from_millis(10);
/// Decisions of a round that are timed one by one, for the tail that batches average away.
const SINGLES: usize = 2_000;

fn main() -> ExitCode {
    if let Some(argument) = std::env::args().nth(1) {
        eprintln!("worker-selection takes no arguments (got {argument:?})");
        return ExitCode::from(2);
    }
    let mut reference = Rival::new(REFERENCE);
    let mut shipped = Rival::new(SHIPPED);
    for round in 1..=ROUNDS {
        eprintln!("round {round} of {ROUNDS}");
        reference.measure(|| DefaultWorkerSelector::new(Some(KvRouterConfig::default()), "prefill"));
        shipped.measure(|| default_policy(KvRouterConfig::default(), "prefill"));
    }

    let report = Report { reference: reference.summarize(), shipped: shipped.summarize() };
    print_table(&report.reference);
    print_table(&report.shipped);
    println!("{}", serde_json::to_string(&report).expect("numbers and strings always serialize"));
    ExitCode::SUCCESS
}

fn print_table(summary: &Summary) {
    eprintln!(
        "\n{} {}, native default worker selection, per decision\n\
         {:>10} {:>14} {:>14} {:>8} {:>10}",
        summary.name, summary.version, "candidates", "median", "p99", "samples", "decisions"
    );
    for row in &summary.results {
        eprintln!(
            "{:>10} {:>11} ns {:>11} ns {:>8} {:>10}",
            row.candidates, row.median_ns, row.p99_ns, row.samples, row.decisions
        );
    }
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    reference: Summary,
    shipped: Summary,
}

#[derive(Serialize)]
struct Summary {
    #[serde(rename = "crate")]
    name: &'static str,
    version: &'static str,
    results: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    candidates: usize,
    /// Median over the samples of a sample's mean time per decision: what criterion would call the typical time.
    median_ns: u64,
    /// 99th percentile of the decisions timed one by one, less what reading the clock costs.
    p99_ns: u64,
    samples: usize,
    /// Decisions in all, warm-up left out.
    decisions: u64,
}

/// One selector and what was measured of it.
struct Rival {
    name: &'static str,
    sizes: [Measured; CANDIDATES.len()],
}

impl Rival {
    fn new(name: &'static str) -> Self {
        Self { name, sizes: CANDIDATES.map(Measured::new) }
    }

    /// One round over all sizes. Generic, not `dyn`: the selector is inlined as its own bench inlines it.
    fn measure<S: WorkerSelector<Worker>>(&mut self, selector: impl Fn() -> S) {
        for size in &mut self.sizes {
            let workload = Workload::new(selector(), size.candidates);
            // A selector that ignored the cache or the load would be a quicker, meaningless rival.
            assert_eq!(
                workload.decide().worker.worker_id,
                cheapest_worker(size.candidates),
                "{} {VERSION} did not choose the worker of the lowest KV-aware cost",
                self.name
            );
            size.measure(&workload);
        }
    }

    fn summarize(self) -> Summary {
        Summary { name: self.name, version: VERSION, results: self.sizes.map(Measured::summarize).into() }
    }
}

/// What was measured at one size, over all rounds so far.
struct Measured {
    candidates: usize,
    per_decision_ns: Vec<f64>,
    singles_ns: Vec<f64>,
    decisions: u64,
}

impl Measured {
    fn new(candidates: usize) -> Self {
        Self { candidates, per_decision_ns: Vec::new(), singles_ns: Vec::new(), decisions: 0 }
    }

    fn measure<S: WorkerSelector<Worker>>(&mut self, workload: &Workload<S>) {
        let warm_up = Instant::now();
        let mut warm_up_decisions = 0_u32;
        while warm_up.elapsed() < WARM_UP {
            black_box(workload.decide());
            warm_up_decisions += 1;
        }
        let decision = warm_up.elapsed() / warm_up_decisions;
        let batch = (SAMPLE_TIME.as_nanos() / decision.as_nanos().max(1)).max(1) as u32;

        for _ in 0..SAMPLES {
            let start = Instant::now();
            for _ in 0..batch {
                black_box(workload.decide());
            }
            let elapsed = start.elapsed();
            self.per_decision_ns.push(elapsed.as_nanos() as f64 / f64::from(batch));
        }

        let clock_ns = clock_cost_ns();
        for _ in 0..SINGLES {
            let start = Instant::now();
            black_box(workload.decide());
            let elapsed = start.elapsed();
            self.singles_ns.push((elapsed.as_nanos() as f64 - clock_ns).max(0.0));
        }
        self.decisions += SAMPLES as u64 * u64::from(batch) + SINGLES as u64;
    }

    fn summarize(self) -> Row {
        Row {
            candidates: self.candidates,
            samples: self.per_decision_ns.len(),
            median_ns: percentile(self.per_decision_ns, 50).round() as u64,
            p99_ns: percentile(self.singles_ns, 99).round() as u64,
            decisions: self.decisions,
        }
    }
}

/// One request and the workers it may go to, with everything that Dynamo's host hands to the selector ready.
struct Workload<S> {
    selector: S,
    workers: HashMap<WorkerId, Worker>,
    request: SchedulingRequest,
}

impl<S: WorkerSelector<Worker>> Workload<S> {
    fn new(selector: S, candidates: usize) -> Self {
        let mut workers = HashMap::with_capacity(candidates);
        let mut overlap_blocks = FxHashMap::with_capacity_and_hasher(candidates, Default::default());
        let mut cached_tokens = FxHashMap::with_capacity_and_hasher(candidates, Default::default());
        let mut loads = FxHashMap::with_capacity_and_hasher(candidates, Default::default());
        for id in 0..candidates {
            let state = WorkerState::of(id);
            let worker = WorkerWithDpRank::from_worker_id(id as WorkerId);
            workers.insert(id as WorkerId, Worker::default());
            overlap_blocks.insert(worker, state.cached_tokens as f64 / f64::from(BLOCK_SIZE));
            cached_tokens.insert(worker, state.cached_tokens);
            loads.insert(
                worker,
                WorkerLoadProjection {
                    active_prefill_tokens: state.prefill_tokens,
                    active_decode_blocks: state.decode_blocks,
                    active_requests: state.requests,
                    ..Default::default()
                },
            );
        }
        Self { selector, workers, request: request(overlap_blocks, cached_tokens, loads) }
    }

    /// All that is inside the timing.
    #[inline(always)]
    fn decide(&self) -> WorkerSelectionResult {
        self.selector
            .select_worker(WorkerSelectionInput::configured(
                black_box(&self.workers),
                black_box(&self.request),
                self.request.eligibility(),
                black_box(BLOCK_SIZE),
            ))
            .expect("every worker is eligible")
    }
}

/// What one worker holds and does: the pattern of the crate's own bench, so that the figures compare.
struct WorkerState {
    cached_tokens: usize,
    prefill_tokens: usize,
    decode_blocks: usize,
    requests: usize,
}

impl WorkerState {
    fn of(id: usize) -> Self {
        Self { cached_tokens: id % 32 * 64, prefill_tokens: id * 16, decode_blocks: id % 127, requests: id % 17 }
    }

    /// The documented cost, in blocks: the prompt and the prefill already waiting, less the cached prefix; plus decode.
    fn cost_blocks(&self) -> usize {
        let block = BLOCK_SIZE as usize;
        (self.prefill_tokens + PROMPT_TOKENS) / block - self.cached_tokens / block + self.decode_blocks
    }
}

/// The worker that the documented cost says must be chosen: the check that the real thing is being measured.
fn cheapest_worker(candidates: usize) -> WorkerId {
    (0..candidates).min_by_key(|&id| WorkerState::of(id).cost_blocks()).expect("every size has a candidate") as WorkerId
}

#[derive(Default)]
struct Worker {
    taints: HashSet<String>,
}

impl WorkerConfigLike for Worker {
    fn data_parallel_start_rank(&self) -> u32 {
        0
    }

    fn data_parallel_size(&self) -> u32 {
        1
    }

    fn max_num_batched_tokens(&self) -> Option<u64> {
        None
    }

    fn total_kv_blocks(&self) -> Option<u64> {
        Some(131_072)
    }

    fn taints(&self) -> &HashSet<String> {
        &self.taints
    }
}

fn request(
    effective_overlap_blocks: FxHashMap<WorkerWithDpRank, f64>,
    effective_cached_tokens: FxHashMap<WorkerWithDpRank, usize>,
    worker_loads: FxHashMap<WorkerWithDpRank, WorkerLoadProjection>,
) -> SchedulingRequest {
    SchedulingRequest {
        mode: ScheduleMode::QueryOnly { request_id: None },
        token_seq: None,
        isl_tokens: PROMPT_TOKENS,
        lora_name: None,
        expected_output_tokens: Some(256),
        affinity_target: None,
        pinned_worker: None,
        allowed_worker_ids: None,
        routing_constraints: RoutingConstraints::default(),
        router_config_override: None,
        track_prefill_tokens: true,
        priority_jump: 0.0,
        strict_priority: 0,
        policy_class: None,
        session_context: None,
        overlap: OverlapSignals { tier_overlap_blocks: Default::default(), effective_overlap_blocks, effective_cached_tokens },
        kv_transfer_candidates: None,
        retain_kv_transfer_chain: false,
        shared_cache_hits: None,
        worker_loads,
        resp_tx: None,
    }
}

/// What two reads of the clock with nothing between them show, in the median.
fn clock_cost_ns() -> f64 {
    let reads = (0..1_000)
        .map(|_| {
            let start = Instant::now();
            start.elapsed().as_nanos() as f64
        })
        .collect();
    percentile(reads, 50)
}

/// Nearest rank.
fn percentile(mut values: Vec<f64>, percent: usize) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let rank = (values.len() * percent).div_ceil(100);
    values[rank.saturating_sub(1)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_selectors_choose_the_worker_of_the_lowest_kv_aware_cost() {
        for candidates in CANDIDATES {
            let reference = DefaultWorkerSelector::new(None, "prefill");
            let shipped = default_policy(KvRouterConfig::default(), "prefill");
            let chosen = [
                Workload::new(reference, candidates).decide().worker.worker_id,
                Workload::new(shipped, candidates).decide().worker.worker_id,
            ];
            assert_eq!(chosen, [cheapest_worker(candidates); 2], "{candidates} candidates");
        }
    }

    #[test]
    fn the_reported_version_is_the_one_that_was_built() {
        for name in [REFERENCE, SHIPPED] {
            let locked = format!("name = \"{name}\"\nversion = \"{VERSION}\"\n");
            assert!(include_str!("../../Cargo.lock").contains(&locked), "{name} is not {VERSION}");
        }
    }

    #[test]
    fn a_percentile_is_the_nearest_rank() {
        let values = || (1..=200).rev().map(f64::from).collect::<Vec<_>>();
        assert_eq!(percentile(values(), 50), 100.0);
        assert_eq!(percentile(values(), 99), 198.0);
        assert_eq!(percentile(vec![7.0], 99), 7.0);
    }
}
