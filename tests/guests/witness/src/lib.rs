//! Reads every fact and column, uses every service, and says what it saw through `explain`.
//!
//! Compiled against a released contract it is that release's fossil: whatever later hosts add, it must see the same.

use std::time::Duration;

use dynamo_policy_sdk::{
    Candidates, Decision, NoSettings, Outcomes, Request, Router, clock, entropy, explain, explain_wanted, state, telemetry,
};

/// The policy.
pub struct Witness;

impl Router for Witness {
    type Settings = NoSettings;

    fn new(_: NoSettings) -> Result<Self, String> {
        Ok(Self)
    }

    fn route(&self, request: &Request, candidates: &Candidates) -> Decision {
        if explain_wanted() {
            explain("request", || facts(request));
            explain("keys", || keys(candidates));
            explain("u32", || u32_columns(candidates));
            explain("added", || added_columns(candidates));
            explain("f32", || f32_columns(candidates));
            explain("named", || named(candidates));
            explain("links", || links(candidates));
            explain("services", services);
        }
        telemetry::gauge_set("prompt_tokens", f64::from(request.prompt_tokens()));
        telemetry::gauge_set("prompt_tokens_exact", f64::from(u8::from(request.prompt_tokens_exact())));
        Decision::Place(candidates.rows().take(16).collect())
    }

    fn observe(&self, outcomes: &Outcomes) {
        let tokens: u32 = outcomes.output_tokens().iter().sum();
        let rows = [outcomes.decision_id().len(), outcomes.worker_id().len(), outcomes.ttft_ms().len(), outcomes.itl_ms().len()];
        assert!(rows.iter().all(|&rows| rows == outcomes.end().len()), "columns of one length");
        let _ = state::add("observed tokens", i64::from(tokens), Duration::ZERO);
    }
}

fn optional<T>(value: Option<T>, number: impl FnOnce(T) -> f32) -> f32 {
    value.map_or(-1.0, number)
}

/// Texts by their lengths, keys by whether they are there.
fn facts(request: &Request) -> Vec<f32> {
    vec![
        request.decision_id() as f32,
        request.model().len() as f32,
        optional(request.adapter(), |text| text.len() as f32),
        request.endpoint() as f32,
        request.stage() as f32,
        optional(request.tenant(), |text| text.len() as f32),
        optional(request.tenant_key(), |_| 1.0),
        optional(request.session_key(), |_| 1.0),
        optional(request.parent_session_key(), |_| 1.0),
        request.prefix_key() as f32,
        request.prompt_tokens() as f32,
        f32::from(u8::from(request.prompt_tokens_exact())),
        request.generated_tokens() as f32,
        request.max_output_tokens() as f32,
        request.expected_output_tokens() as f32,
        request.choices() as f32,
        request.flags() as f32,
        request.multimodal_items() as f32,
        request.multimodal_bytes() as f32,
        request.priority_tier() as f32,
        request.priority(),
        optional(request.class(), |text| text.len() as f32),
        request.age_ms() as f32,
        optional(request.deadline_ms(), |ms| ms as f32),
        request.slo_ttft_ms(),
        request.slo_itl_ms(),
        request.attempt() as f32,
        request.holds() as f32,
        request.failed_workers().len() as f32,
        optional(request.pinned_worker(), |_| 1.0),
        optional(request.affinity_worker(), |_| 1.0),
        request.tags().len() as f32,
        optional(request.attribute("x-test"), |text| text.len() as f32),
    ]
}

/// Whether ids ascend, and how many different engines and pools there are.
fn keys(candidates: &Candidates) -> Vec<f32> {
    let different = |keys: &[u64]| {
        let mut keys = keys.to_vec();
        keys.sort_unstable();
        keys.dedup();
        keys.len() as f32
    };
    let ids = candidates.worker_id();
    vec![
        f32::from(u8::from(ids.is_sorted())),
        different(ids),
        different(candidates.engine_key()),
        different(candidates.pool_key()),
    ]
}

/// Sums, with unknown as it is.
fn u32_columns(candidates: &Candidates) -> Vec<f32> {
    let columns = [
        candidates.dp_rank(),
        candidates.role(),
        candidates.state(),
        candidates.block_size(),
        candidates.cached_device_tokens(),
        candidates.cached_host_tokens(),
        candidates.cached_disk_tokens(),
        candidates.cached_remote_tokens(),
        candidates.active_prefill_tokens(),
        candidates.active_decode_tokens(),
        candidates.active_requests(),
        candidates.queued_requests(),
        candidates.max_running_requests(),
        candidates.max_batched_tokens(),
        candidates.kv_tokens_total(),
        candidates.kv_tokens_free(),
        candidates.load_age_ms(),
        candidates.recent_age_ms(),
        candidates.up_seconds(),
        candidates.adapter_loaded(),
    ];
    sums(&columns)
}

/// Columns that were added since the first release.
fn added_columns(candidates: &Candidates) -> Vec<f32> {
    sums(&[candidates.active_uncached_tokens(), candidates.prefill_busy_ms()])
}

fn sums(columns: &[&[u32]]) -> Vec<f32> {
    columns.iter().map(|column| column.iter().map(|&value| value as f32).sum()).collect()
}

fn f32_columns(candidates: &Candidates) -> Vec<f32> {
    let columns = [
        candidates.recent_ttft_ms(),
        candidates.recent_itl_ms(),
        candidates.recent_tokens_per_second(),
        candidates.error_rate(),
        candidates.preference(),
    ];
    columns.iter().map(|column| column.iter().sum()).collect()
}

/// What is asked for by a name.
fn named(candidates: &Candidates) -> Vec<f32> {
    let known = |column: &[u32]| column.iter().filter(|&&code| code != dynamo_policy_sdk::UNKNOWN).count() as f32;
    vec![
        known(&candidates.topology(2)),
        known(&candidates.label("zone")),
        optional(candidates.label_code("zone", "a"), |code| code as f32),
        optional(candidates.signal("price"), |prices| prices.iter().sum()),
        optional(candidates.signal("absent"), |_| 1.0),
    ]
}

/// Who has prefilled, and sums over all that it and the first two rows can reach.
fn links(candidates: &Candidates) -> Vec<f32> {
    let links = candidates.links();
    let mut seen = vec![optional(links.prefilled_by(), |_| 1.0)];
    for from in [None, Some(0), Some(1), Some(99)] {
        seen.push(links.reachable(from).iter().sum::<u32>() as f32);
        for column in [links.tokens_per_second(from), links.handoff_ms(from), links.error_rate(from)] {
            seen.push(column.iter().filter(|value| !value.is_nan()).sum());
        }
    }
    seen
}

fn services() -> Vec<f32> {
    telemetry::log(telemetry::Level::Debug, "witness");
    telemetry::counter_add("witnessed", 1);
    telemetry::gauge_set("witness", 0.5);
    let kept = state::set("k", b"value", Duration::from_secs(60)).is_ok();
    vec![
        f32::from(u8::from(kept)),
        optional(state::get("k"), |bytes| bytes.len() as f32),
        optional(state::add("n", 2, Duration::ZERO).ok(), |sum| sum as f32),
        f32::from(u8::from(state::take("b", 1.0, 1.0, 2.0).is_ok())),
        clock::monotonic_ms() as f32,
        clock::unix_ms() as f32,
        f32::from(u8::from(entropy::next() != entropy::next())),
    ]
}

dynamo_policy_sdk::register!(Witness);

/// What the README and the guide show compiles.
#[cfg(doctest)]
#[doc = include_str!("../../../../README.md")]
#[doc = include_str!("../../../../docs/writing-policies.md")]
struct Documents;
