//! Reads every fact and column of the world `admission`, uses every service and all of an answer, and says what it saw in
//! the reason that it sheds for.
//!
//! Compiled against a released contract it is that release's fossil: whatever later hosts add, it must see the same.

use std::time::Duration;

use dynamo_policy_sdk::{Admission, NoSettings, Outcomes, Pools, Request, Verdict, clock, entropy, state, telemetry};

/// The policy.
pub struct Witness;

impl Admission for Witness {
    type Settings = NoSettings;

    fn new(_: NoSettings) -> Result<Self, String> {
        Ok(Self)
    }

    fn admit(&self, request: &Request, pools: &Pools) -> Verdict {
        let saw = [("request", facts(request)), ("pools", columns(pools)), ("services", services())];
        let saw: Vec<String> = saw.into_iter().map(|(of, values)| format!("{of}: {}", joined(&values))).collect();
        if request.attribute("x-shed").is_some() {
            return Verdict::shed(429, saw.join("; ")).retry_after(Duration::from_millis(1500)).into();
        }
        let admit = Verdict::admit().class("seen").tier(2).class_weight(3.0).tenant_weight(0.5);
        admit.priority(-1.5).deadline(Duration::from_millis(700)).into()
    }

    fn observe(&self, outcomes: &Outcomes) {
        let tokens: u32 = outcomes.output_tokens().iter().sum();
        let waited: f32 = outcomes.queue_ms().iter().sum();
        let rows = [outcomes.decision_id().len(), outcomes.worker_id().len(), outcomes.ttft_ms().len(), outcomes.itl_ms().len()];
        assert!(rows.iter().all(|&rows| rows == outcomes.end().len()), "columns of one length");
        let _ = state::add("observed tokens", i64::from(tokens), Duration::ZERO);
        let _ = state::add("observed waiting", waited as i64, Duration::ZERO);
    }
}

fn joined(values: &[f64]) -> String {
    values.iter().map(f64::to_string).collect::<Vec<_>>().join(" ")
}

fn optional<T>(value: Option<T>, number: impl FnOnce(T) -> f64) -> f64 {
    value.map_or(-1.0, number)
}

/// Texts by their lengths, keys by whether they are there.
fn facts(request: &Request) -> Vec<f64> {
    vec![
        request.decision_id() as f64,
        request.model().len() as f64,
        optional(request.adapter(), |text| text.len() as f64),
        request.endpoint().into(),
        request.stage().into(),
        optional(request.tenant(), |text| text.len() as f64),
        optional(request.tenant_key(), |_| 1.0),
        optional(request.session_key(), |_| 1.0),
        optional(request.parent_session_key(), |_| 1.0),
        request.prefix_key() as f64,
        request.prompt_tokens().into(),
        f64::from(u8::from(request.prompt_tokens_exact())),
        request.generated_tokens().into(),
        request.max_output_tokens().into(),
        request.expected_output_tokens().into(),
        request.choices().into(),
        request.flags().into(),
        request.multimodal_items().into(),
        request.multimodal_bytes() as f64,
        request.priority_tier().into(),
        request.priority().into(),
        optional(request.class(), |text| text.len() as f64),
        request.age_ms().into(),
        optional(request.deadline_ms(), f64::from),
        request.slo_ttft_ms().into(),
        request.slo_itl_ms().into(),
        request.attempt().into(),
        request.holds().into(),
        request.failed_workers().len() as f64,
        optional(request.pinned_worker(), |_| 1.0),
        optional(request.affinity_worker(), |_| 1.0),
        request.tags().len() as f64,
        optional(request.attribute("x-test"), |text| text.len() as f64),
    ]
}

/// Sums.
fn columns(pools: &Pools) -> Vec<f64> {
    let amounts = [
        pools.role(),
        pools.ready_workers(),
        pools.running_requests(),
        pools.free_requests(),
        pools.queued_requests(),
        pools.queued_tokens(),
        pools.oldest_age_ms(),
    ];
    let amounts = amounts.into_iter().map(|column| column.iter().copied().map(f64::from).sum());
    let measured =
        [pools.predicted_wait_ms().to_vec(), pools.shed_rate().to_vec(), pools.recent_ttft_ms(50.0), pools.recent_itl_ms(100.0)];
    let measured = measured.into_iter().map(|column| column.iter().copied().map(f64::from).sum());
    let keys = pools.pool_key().iter().fold(0, |all, key| all ^ key) as f64;
    [f64::from(pools.count()), keys].into_iter().chain(amounts).chain(measured).collect()
}

fn services() -> Vec<f64> {
    telemetry::log(telemetry::Level::Debug, "witness");
    telemetry::counter_add("witnessed", 1);
    telemetry::gauge_set("witness", 0.5);
    let kept = state::set("k", b"value", Duration::from_secs(60)).is_ok();
    let taken = state::take("b", 1.0, 1.0, 2.0).is_ok() && state::give_back("b", 1.0, 1.0, 2.0).is_ok();
    vec![
        f64::from(u8::from(kept)),
        optional(state::get("k"), |bytes| bytes.len() as f64),
        optional(state::add("n", 2, Duration::ZERO).ok(), |sum| sum as f64),
        f64::from(u8::from(taken)),
        clock::monotonic_ms() as f64,
        clock::unix_ms() as f64,
        f64::from(u8::from(entropy::next() != entropy::next())),
    ]
}

dynamo_policy_sdk::register!(Witness as Admission);
