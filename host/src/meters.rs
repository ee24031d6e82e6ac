//! Metrics: every name with its help text and buckets, in one table, and the handles that requests use.

use std::time::Duration;

use metrics::{Counter, Histogram, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

/// Buckets for the host's own work: a decision takes microseconds.
const MICROSECONDS: &[f64] = &[1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1];
/// Buckets for what engines take.
const ENGINE_SECONDS: &[f64] = &[
    1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2, 7.5e-2, 1e-1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0,
    120.0,
];
/// Buckets for what may be nothing or minutes.
const QUEUE_SECONDS: &[f64] =
    &[1e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0];
/// Buckets for fuel.
const FUEL: &[f64] = &[1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 2e6, 5e6];

/// What a metric is.
pub(crate) enum Kind {
    Counter,
    Gauge,
    Histogram(&'static [f64]),
}

/// All metrics: name, kind, help.
pub(crate) const METRICS: &[(&str, Kind, &str)] = &[
    ("dynamo_host_requests_total", Kind::Counter, "Requests by endpoint, model and HTTP status; 499: the client left first"),
    ("dynamo_host_errors_total", Kind::Counter, "Errors by kind, those inside started streams included"),
    ("dynamo_host_requests_in_flight", Kind::Gauge, "Requests being served"),
    ("dynamo_host_time_to_first_token_seconds", Kind::Histogram(ENGINE_SECONDS), "From accepting a request to its first token"),
    ("dynamo_host_inter_token_latency_seconds", Kind::Histogram(ENGINE_SECONDS), "Time between tokens of a stream"),
    ("dynamo_host_request_seconds", Kind::Histogram(ENGINE_SECONDS), "From accepting a request to the end of its answer"),
    ("dynamo_host_prompt_tokens_total", Kind::Counter, "Prompt tokens, as engines count them where they say, else estimated"),
    ("dynamo_host_output_tokens_total", Kind::Counter, "Output tokens, as engines count them where they say, else by deltas"),
    (
        "dynamo_host_stage_seconds",
        Kind::Histogram(MICROSECONDS),
        "The host's own overhead by stage: decode, tokenize, admission, queue (the waiting apart), route, dispatch (all until the engine is asked, waiting and holds apart), relay (all chunks of a stream)",
    ),
    (
        "dynamo_host_prompts_tokenized_total",
        Kind::Counter,
        "Prompts by how their tokens became known: tokenizer, engine, given (as ids) or approximate",
    ),
    ("dynamo_host_prompts_tokenized_tokens_total", Kind::Counter, "Their tokens, by the same; stand-ins if approximate"),
    (
        "dynamo_host_tokenize_failures_total",
        Kind::Counter,
        "Prompts whose tokens could not be had as configured, by cause: prompt, busy, panic or engine",
    ),
    ("dynamo_host_tokenize_text_bytes_total", Kind::Counter, "Text of prompts by where its tokens came from: tokenizer or cache"),
    ("dynamo_host_token_cache_bytes", Kind::Gauge, "Memory of the cache of token runs"),
    ("dynamo_host_admission_total", Kind::Counter, "Requests that were let in or shed, by verdict and class"),
    (
        "dynamo_host_shed_total",
        Kind::Counter,
        "Requests that were not let in, or waited for nothing, by reason: policy, requests and tokens (the queue is full), displaced (by others with a better claim), late (its deadline was over), timeout, no_worker, left (the client)",
    ),
    ("dynamo_host_queue_requests", Kind::Gauge, "Requests that wait for room, by model and class"),
    ("dynamo_host_queue_tokens", Kind::Gauge, "Tokens of their prompts"),
    (
        "dynamo_host_queue_wait_seconds",
        Kind::Histogram(QUEUE_SECONDS),
        "How long requests waited for room, by class; most not at all",
    ),
    ("dynamo_host_retries_total", Kind::Counter, "Requests that went on to another worker before their first token, by cause"),
    (
        "dynamo_host_migrations_total",
        Kind::Counter,
        "Choices of streams whose worker was lost, by cause and by result: continued, failed, or unsound to go on with",
    ),
    (
        "dynamo_host_migration_pause_seconds",
        Kind::Histogram(ENGINE_SECONDS),
        "From the last frame of a lost worker to the first of the one that goes on",
    ),
    (
        "dynamo_host_migration_untracked_total",
        Kind::Counter,
        "Streams that grew past migration.max_kept_bytes, so that no other worker could go on with them",
    ),
    (
        "dynamo_host_prefill_where_total",
        Kind::Counter,
        "Prompts by where they were computed: remote (by another worker than the one that decodes), local (by a worker of a decode pool), aggregated",
    ),
    (
        "dynamo_host_handoffs_total",
        Kind::Counter,
        "Requests that were given to two workers, by protocol and by result: answered, fell_back (another way was taken), failed",
    ),
    (
        "dynamo_host_handoff_seconds",
        Kind::Histogram(ENGINE_SECONDS),
        "From the end of prefill to the first token of decode, by protocol; where both are asked together, from asking",
    ),
    (
        "dynamo_host_handoff_fallbacks_total",
        Kind::Counter,
        "Requests that were to be handed from one worker to another and went another way, by cause: prefill_failed, not_handed_over (no parameters came), refused (in parts; it was asked for as a whole), decode_failed, lease_lost, no_prefill_pool, no_decode_pool",
    ),
    ("dynamo_host_handoff_leases_lost_total", Kind::Counter, "Prompts that were computed, and whose KV nobody fetched in time"),
    ("dynamo_host_handoff_bytes_total", Kind::Counter, "KV that was handed over, of engines that say how much, by protocol"),
    ("dynamo_host_connections", Kind::Gauge, "Connections by listener"),
    ("dynamo_host_connections_refused_total", Kind::Counter, "Connections that were one client's too many"),
    (
        "dynamo_host_slow_clients_total",
        Kind::Counter,
        "Clients that were hung up on since they did not take their answer, by cause: stalled, deadline",
    ),
    ("dynamo_host_audit_failures_total", Kind::Counter, "Changes that could not be written to the audit file"),
    ("dynamo_host_reload_failures_total", Kind::Counter, "Changed files that could not be read again, by what they hold"),
    (
        "dynamo_host_trace_spans_dropped_total",
        Kind::Counter,
        "Spans of traces that were not exported: queue full, or export failed",
    ),
    ("dynamo_host_workers", Kind::Gauge, "Workers by state"),
    (
        "dynamo_host_disaggregation",
        Kind::Gauge,
        "Whether prefill and decode are apart, by model and state: split, or served whole since there is no_prefill, no_decode or no_pair",
    ),
    (
        "dynamo_host_handoff_checks_total",
        Kind::Counter,
        "Hand-offs that were tried to see whether workers can, by result: ok, or where it failed: prefill, decode, untold",
    ),
    ("dynamo_host_links_avoided", Kind::Gauge, "Pairs of workers that are left alone since hand-offs between them keep failing"),
    ("dynamo_host_links_avoided_total", Kind::Counter, "Times that a pair of workers came to be left alone"),
    ("dynamo_host_worker_breaker", Kind::Gauge, "Breakers of workers that ever opened: 0 closed, 1 half-open, 2 open"),
    ("dynamo_host_breaker_opens_total", Kind::Counter, "Times that a worker's breaker opened, by the last failure's kind"),
    (
        "dynamo_host_worker_ejections_total",
        Kind::Counter,
        "Times that a worker was left out as much slower than its pool, by what: ttft or itl",
    ),
    ("dynamo_host_canaries_total", Kind::Counter, "Tokens asked of idle workers, by result: token or none"),
    (
        "dynamo_host_given_up_total",
        Kind::Counter,
        "Workers whose requests were given to others, by cause: unresponsive, or drained past the grace",
    ),
    (
        "dynamo_host_retries_denied_total",
        Kind::Counter,
        "Retries before the first byte that the budget of all requests did not allow",
    ),
    ("dynamo_host_discovery_problems", Kind::Gauge, "What a source of workers says that cannot be understood or taken in"),
    ("dynamo_host_load_failures_total", Kind::Counter, "Readings of an engine's load that failed, by cause"),
    ("dynamo_host_kv_events_total", Kind::Counter, "KV events of engines, by kind and by what became of them"),
    (
        "dynamo_host_kv_event_lag_seconds",
        Kind::Histogram(ENGINE_SECONDS),
        "Age of KV events when they come, by the engine's clock and ours",
    ),
    ("dynamo_host_kv_resets_total", Kind::Counter, "Times that all an engine's rank had told of its KV was void, by cause"),
    ("dynamo_host_kv_replays_total", Kind::Counter, "Replays of KV events, by result"),
    (
        "dynamo_host_kv_index_blocks",
        Kind::Gauge,
        "KV blocks in the prefix index, each counted once for every worker that holds it",
    ),
    ("dynamo_host_kv_index_bytes", Kind::Gauge, "Memory of the prefix index"),
    (
        "dynamo_host_kv_index_left_out_total",
        Kind::Counter,
        "Blocks and events that the prefix index could not take up, by cause: full (raise kv.max_blocks), unknown_parent, hash_collision",
    ),
    ("dynamo_host_kv_index_stale_workers", Kind::Gauge, "Workers that tell of their KV and are not heard now"),
    (
        "dynamo_host_model_fallbacks_total",
        Kind::Counter,
        "Requests served by another model, since the one asked for had no worker",
    ),
    ("dynamo_host_config_reloads_total", Kind::Counter, "Changes of the configuration file that were taken over"),
    (
        "dynamo_host_config_reload_failures_total",
        Kind::Counter,
        "Changes of the configuration file that were not, since it cannot be run",
    ),
    ("dynamo_host_worker_requests_total", Kind::Counter, "Requests that a worker was given"),
    ("dynamo_host_policy_calls_total", Kind::Counter, "Decisions asked of a policy"),
    ("dynamo_host_policy_call_seconds", Kind::Histogram(MICROSECONDS), "Time of one policy call"),
    ("dynamo_host_policy_call_fuel", Kind::Histogram(FUEL), "Fuel of one policy call"),
    (
        "dynamo_host_policy_fallbacks_total",
        Kind::Counter,
        "Decisions that a policy failed to make, by cause and by who decided instead",
    ),
    ("dynamo_host_policy_quarantined", Kind::Gauge, "Policies in service that are quarantined"),
    ("dynamo_host_policy_quarantines_total", Kind::Counter, "Quarantines that began, by the cause of the last fault"),
    ("dynamo_host_policy_bypass", Kind::Gauge, "Whether a slot's kill switch is on: the native fallback decides"),
    ("dynamo_host_policy_bypassed_total", Kind::Counter, "Decisions that the native fallback made since the kill switch was on"),
    (
        "dynamo_host_policy_observe_failures_total",
        Kind::Counter,
        "Batches of outcomes that a policy failed to learn from, by cause",
    ),
    ("dynamo_host_policy_load_failures_total", Kind::Counter, "Components that were refused, by cause"),
    (
        "dynamo_host_policy_restore_failures_total",
        Kind::Counter,
        "Policies that a start found in the state or the configuration and could not bring back, by what they were",
    ),
    ("dynamo_host_policy_swaps_total", Kind::Counter, "Changes of a slot's policy"),
    ("dynamo_host_policy_swap_seconds", Kind::Histogram(MICROSECONDS), "Time of the swap itself, after loading"),
    ("dynamo_host_policy_retry_after_cut_total", Kind::Counter, "Answers of policies whose Retry-After was cut to a day"),
    ("dynamo_host_policy_outcomes_dropped_total", Kind::Counter, "Outcomes that did not reach observe, since its queue was full"),
    ("dynamo_host_policy_telemetry_dropped_total", Kind::Counter, "Log lines and metric updates of policies over their quota"),
    ("dynamo_host_policy_counter_total", Kind::Counter, "Counters that policies keep, by policy and name"),
    ("dynamo_host_policy_gauge", Kind::Gauge, "Gauges that policies keep, by policy and name"),
    (
        "dynamo_host_prefix_hit_tokens_total",
        Kind::Counter,
        "Cached prompt tokens of requests whose engine reports them, by kind: as predicted when they were placed, and as reported",
    ),
    (
        "dynamo_host_receipts_dropped_total",
        Kind::Counter,
        "Lines of receipts that were lost, by cause: queue (full), disk, unwritable",
    ),
    (
        "dynamo_host_receipts_skipped_total",
        Kind::Counter,
        "Requests without a receipt, since receipts.max_per_second or max_bytes_per_second was reached",
    ),
    ("dynamo_host_task_panics_total", Kind::Counter, "Background tasks that panicked"),
];

/// How often histograms fold their samples: between scrapes they would only grow.
pub(crate) const UPKEEP: Duration = Duration::from_secs(5);

/// Installs the exporter of this process.
pub(crate) fn install() -> PrometheusHandle {
    let mut builder = PrometheusBuilder::new();
    for (name, kind, _) in METRICS {
        if let Kind::Histogram(buckets) = kind {
            builder = builder.set_buckets_for_metric(Matcher::Full((*name).to_owned()), buckets).expect("buckets are not empty");
        }
    }
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    // A second server in one process, as tests may have, goes on with the first's exporter.
    if metrics::set_global_recorder(recorder).is_ok() {
        for (name, kind, help) in METRICS {
            match kind {
                Kind::Counter => describe_counter!(*name, *help),
                Kind::Gauge => describe_gauge!(*name, *help),
                Kind::Histogram(_) if name.ends_with("_seconds") => describe_histogram!(*name, Unit::Seconds, *help),
                Kind::Histogram(_) => describe_histogram!(*name, *help),
            }
        }
    }
    handle
}

/// Handles that every request uses: looked up once.
#[derive(Clone)]
pub(crate) struct RequestMeters {
    pub(crate) in_flight: metrics::Gauge,
    pub(crate) ttft: Histogram,
    pub(crate) itl: Histogram,
    pub(crate) seconds: Histogram,
    pub(crate) prompt_tokens: Counter,
    pub(crate) output_tokens: Counter,
    pub(crate) prefix_predicted: Counter,
    pub(crate) prefix_reported: Counter,
    pub(crate) decode: Histogram,
    pub(crate) tokenize: Histogram,
    pub(crate) admission: Histogram,
    pub(crate) queue: Histogram,
    pub(crate) route: Histogram,
    pub(crate) dispatch: Histogram,
    pub(crate) relay: Histogram,
}

impl RequestMeters {
    pub(crate) fn new() -> Self {
        let stage = |stage: &'static str| histogram!("dynamo_host_stage_seconds", "stage" => stage);
        let hit = |kind: &'static str| counter!("dynamo_host_prefix_hit_tokens_total", "kind" => kind);
        Self {
            in_flight: gauge!("dynamo_host_requests_in_flight"),
            ttft: histogram!("dynamo_host_time_to_first_token_seconds"),
            itl: histogram!("dynamo_host_inter_token_latency_seconds"),
            seconds: histogram!("dynamo_host_request_seconds"),
            prompt_tokens: counter!("dynamo_host_prompt_tokens_total"),
            output_tokens: counter!("dynamo_host_output_tokens_total"),
            prefix_predicted: hit("predicted"),
            prefix_reported: hit("reported"),
            decode: stage("decode"),
            tokenize: stage("tokenize"),
            admission: stage("admission"),
            queue: stage("queue"),
            route: stage("route"),
            dispatch: stage("dispatch"),
            relay: stage("relay"),
        }
    }
}
