//! Metrics: a snapshot as Prometheus text, under vLLM's names and labels.

use std::fmt::Write;

use crate::{
    handoff::Handoff,
    model::{Histogram, Snapshot},
    options::MockOptions,
};

/// The text of a scrape.
pub(super) fn render(snapshot: &Snapshot, options: &MockOptions, handoff: &Handoff) -> String {
    let model = options.model.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let mut page = Page { text: String::with_capacity(8 << 10), labels: format!("engine=\"0\",model_name=\"{model}\"") };
    let stats = &snapshot.stats;
    page.gauge("num_requests_running", "Number of requests in model execution batches.", f64::from(snapshot.running));
    page.gauge("num_requests_waiting", "Number of requests waiting to be processed.", f64::from(snapshot.waiting));
    page.gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", snapshot.kv_usage());
    for (name, help, total) in [
        ("prefix_cache_queries", "Prefix cache queries, in terms of number of queried tokens.", stats.prefix_queries_tokens),
        ("prefix_cache_hits", "Prefix cache hits, in terms of number of cached tokens.", stats.prefix_hits_tokens),
        ("num_preemptions", "Cumulative number of preemption from the engine.", stats.preemptions),
        ("prompt_tokens", "Number of prefill tokens processed.", stats.prompt_tokens),
        ("generation_tokens", "Number of generation tokens processed.", stats.generation_tokens),
    ] {
        page.counter(name, help, &[("", total)]);
    }
    page.handoffs(snapshot, handoff);
    // As at a real vLLM, a client that leaves is not counted as an abort.
    let finished = [("stop", stats.finished_stop), ("length", stats.finished_length), ("abort", 0), ("error", 0)];
    let finished = finished.map(|(reason, count)| (format!("finished_reason=\"{reason}\","), count));
    let finished: Vec<_> = finished.iter().map(|(label, count)| (label.as_str(), *count)).collect();
    page.counter("request_success", "Count of successfully processed requests.", &finished);
    page.histogram("time_to_first_token_seconds", "Histogram of time to first token in seconds.", &stats.time_to_first_token);
    page.histogram("inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", &stats.inter_token_latency);
    page.histogram("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", &stats.e2e_latency);
    page.histogram("request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.", &stats.queue_time);
    let (block_size, blocks) = (options.profile.block_size, options.profile.kv_blocks);
    page.head("cache_config_info", "Information of the LLMEngine CacheConfig", "gauge");
    page.line(format_args!(
        "vllm:cache_config_info{{block_size=\"{block_size}\",cache_dtype=\"auto\",enable_prefix_caching=\"True\",\
         engine=\"0\",num_gpu_blocks=\"{blocks}\"}} 1.0"
    ));
    page.text
}

struct Page {
    text: String,
    labels: String,
}

impl Page {
    fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.head(name, help, "gauge");
        self.sample(name, "", value);
    }

    /// What concerns KV that comes from other engines, or is for them. Blocks that are held are in no metric of vLLM's.
    fn handoffs(&mut self, snapshot: &Snapshot, handoff: &Handoff) {
        let (stats, fetching) = (&snapshot.stats, snapshot.fetching);
        self.head("num_requests_waiting_by_reason", "Number of requests waiting, by reason.", "gauge");
        for (reason, waiting) in [("capacity", snapshot.waiting - fetching), ("deferred", fetching)] {
            self.sample("num_requests_waiting_by_reason", &format!("reason=\"{reason}\","), f64::from(waiting));
        }
        let (queried, fetched) = (stats.prompt_tokens - stats.prefix_hits_tokens, stats.prompt_tokens_fetched);
        self.counter(
            "prompt_tokens_by_source",
            "Number of prompt tokens by source.",
            &[
                ("source=\"local_compute\",", stats.prompt_tokens_computed()),
                ("source=\"local_cache_hit\",", stats.prefix_hits_tokens),
                ("source=\"external_kv_transfer\",", fetched),
            ],
        );
        let external = "External prefix cache";
        self.counter("external_prefix_cache_queries", &format!("{external} queries, in tokens."), &[("", queried)]);
        self.counter("external_prefix_cache_hits", &format!("{external} hits, in tokens."), &[("", fetched)]);
        self.counter("nixl_num_failed_transfers", "Number of failed KV transfers.", &[("", handoff.failed())]);
        self.counter("nixl_num_kv_expired_reqs", "Number of requests that had their KV expire.", &[("", handoff.expired())]);
        self.histogram("nixl_xfer_time_seconds", "Histogram of transfer duration for KV transfers.", &stats.fetch_time);
        self.gauge("mock_held_requests", "Requests whose KV is kept for other engines.", f64::from(snapshot.held));
        self.gauge("mock_held_blocks", "KV blocks of those.", f64::from(snapshot.kv_blocks_held));
    }

    /// `totals`: extra labels, each with its comma, and the total.
    fn counter(&mut self, name: &str, help: &str, totals: &[(&str, u64)]) {
        let name = format!("{name}_total");
        self.head(&name, help, "counter");
        for &(labels, total) in totals {
            self.sample(&name, labels, total as f64);
        }
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head(name, help, "histogram");
        for (bound, count) in histogram.cumulative() {
            let bound = if bound.is_finite() { format!("{bound:?}") } else { "+Inf".to_owned() };
            self.sample(&format!("{name}_bucket"), &format!("le=\"{bound}\","), count as f64);
        }
        self.sample(&format!("{name}_count"), "", histogram.count() as f64);
        self.sample(&format!("{name}_sum"), "", histogram.sum_seconds());
    }

    fn head(&mut self, name: &str, help: &str, kind: &str) {
        self.line(format_args!("# HELP vllm:{name} {help}\n# TYPE vllm:{name} {kind}"));
    }

    fn sample(&mut self, name: &str, extra_labels: &str, value: f64) {
        let labels = std::mem::take(&mut self.labels);
        self.line(format_args!("vllm:{name}{{{extra_labels}{labels}}} {value:?}"));
        self.labels = labels;
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.text, "{line}").expect("writing to a String does not fail");
    }
}
