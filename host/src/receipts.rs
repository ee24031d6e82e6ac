//! Receipts: what each decision read, what came out, and what became of it, on disk; so that people see why, and another
//! policy can decide again.
//!
//! Contract: a receipt holds no prompt text, no token ids and no tenant's name. Nothing here is on the request path but a
//! few clones and a bounded queue: a thread of its own writes, and what it cannot keep up with or cannot write is counted
//! (`dynamo_host_receipts_dropped_total`) and said once. Requests are recorded whole or not at all, with every attempt.

mod budget;
mod line;
mod log;
mod read;
mod writer;

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use dynamo_host_core::{Candidates, RequestFacts, SlotName, answer::Verdict};
use dynamo_host_policy::{DecidedBy, Decision, Explanation, Reading, RouteCall};
use serde::Deserialize;

use self::{
    budget::Budget,
    log::Log,
    writer::{Entry, Queue},
};
pub(crate) use self::{
    line::{By, Choice, DecisionLine, Done, Hex, Line, OutcomeLine, VERSION},
    read::{Skipped, Source, Tail},
};

/// Folder of the receipts within the state directory.
pub(crate) const FOLDER: &str = "receipts";

/// `[receipts]` of the configuration.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ReceiptsConfig {
    /// Whether there are any; by default where there is a state directory.
    pub(crate) enabled: Option<bool>,
    /// Share of requests that are recorded.
    pub(crate) sample: f64,
    /// Requests that are recorded in one second at most.
    pub(crate) max_per_second: u32,
    /// Bytes that are written in one second at most, on average: of large fleets receipts are large.
    pub(crate) max_bytes_per_second: u64,
    /// Which columns are kept.
    pub(crate) columns: Columns,
    /// Size at which a file is full.
    pub(crate) max_bytes: u64,
    /// Files that are kept.
    pub(crate) files: u32,
}

/// Which columns a receipt holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Columns {
    /// Those that were read for the decision, as they were read.
    #[default]
    Read,
    /// Those, and all others as they are just after it: a candidate policy may read what the present one does not.
    All,
}

impl Default for ReceiptsConfig {
    fn default() -> Self {
        Self {
            enabled: None,
            sample: 1.0,
            max_per_second: 200,
            max_bytes_per_second: 1 << 20,
            columns: Columns::Read,
            max_bytes: 64 << 20,
            files: 4,
        }
    }
}

impl ReceiptsConfig {
    /// Checks the values.
    ///
    /// # Errors
    /// Names the key, its value and what it may be.
    pub(crate) fn check(&self) -> Result<(), String> {
        if !(0.0..=1.0).contains(&self.sample) {
            return Err(format!("receipts.sample is {}; use 0 to 1, the share of requests", self.sample));
        }
        for (key, value, allowed) in [
            ("max_per_second", u64::from(self.max_per_second), 1..=1_000_000),
            ("max_bytes_per_second", self.max_bytes_per_second, 1 << 10..=1 << 30),
            ("max_bytes", self.max_bytes, 64 << 10..=1 << 40),
            ("files", u64::from(self.files), 2..=10_000),
        ] {
            if !allowed.contains(&value) {
                return Err(format!("receipts.{key} is {value}; use {} to {}", allowed.start(), allowed.end()));
            }
        }
        Ok(())
    }
}

/// Where decisions leave their receipts; a clone is the same place.
#[derive(Clone)]
pub(crate) struct Receipts(Option<Arc<Office>>);

struct Office {
    queue: Queue,
    slot: String,
    columns: Columns,
    /// Share of requests, of 2⁶⁴.
    sample: u64,
    /// Requests that come, recorded or not.
    requests: AtomicU64,
    /// Those that may be recorded.
    recorded: Budget,
    bytes: Arc<Budget>,
}

impl Receipts {
    /// Nowhere.
    pub(crate) fn off() -> Self {
        Self(None)
    }

    /// In files in `state_dir`, by a thread that writes them.
    pub(crate) fn start(config: &ReceiptsConfig, state_dir: &Path, slot: &SlotName) -> Self {
        let log = Log::new(state_dir.join(FOLDER), config.max_bytes, config.files);
        let bytes = Arc::new(Budget::new(config.max_bytes_per_second));
        let Some(queue) = Queue::start(log, Arc::clone(&bytes)) else {
            tracing::warn!("no receipts: their thread cannot start");
            return Self::off();
        };
        Self(Some(Arc::new(Office {
            queue,
            slot: slot.to_string(),
            columns: config.columns,
            sample: if config.sample >= 1.0 { u64::MAX } else { (config.sample * 2f64.powi(64)) as u64 },
            requests: AtomicU64::new(0),
            recorded: Budget::new(u64::from(config.max_per_second)),
            bytes,
        })))
    }

    /// Says of the next request whether it is recorded.
    pub(crate) fn sample(&self) -> Option<Recorder> {
        let office = self.0.as_ref()?;
        // Evenly spread over requests: the multiples of the golden ratio.
        let nth = office.requests.fetch_add(1, Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        if nth > office.sample || office.sample == 0 {
            return None;
        }
        if !(office.bytes.has_room() && office.recorded.take_one()) {
            metrics::counter!("dynamo_host_receipts_skipped_total").increment(1);
            return None;
        }
        Some(Recorder(Arc::clone(office)))
    }

    /// Waits until what was left here is written, at most so long.
    pub(crate) async fn flush(&self, at_most: Duration) {
        if let Some(office) = &self.0 {
            let _ = tokio::time::timeout(at_most, office.queue.flushed()).await;
        }
    }
}

/// Records one request.
#[derive(Clone)]
pub(crate) struct Recorder(Arc<Office>);

/// A decision under way.
pub(crate) struct Draft {
    recorder: Recorder,
    call: RouteCall,
}

/// A decision as it is left for the writer: shared with the request, until it is made a line.
pub(crate) struct Decided {
    slot: String,
    request: Arc<RequestFacts>,
    candidates: Arc<Candidates>,
    now_ms: u64,
    unix_ms: u64,
    seed: u64,
    verdict: Verdict,
    by: DecidedBy,
    explanations: Vec<Explanation>,
    readings: Vec<Reading>,
    elapsed: Duration,
    fuel: u64,
}

impl Recorder {
    /// Begins the receipt of a decision.
    pub(crate) fn draft(&self, call: &RouteCall) -> Draft {
        Draft { recorder: self.clone(), call: call.clone() }
    }

    /// Leaves what became of a request on one worker.
    pub(crate) fn outcome(&self, outcome: OutcomeLine) {
        self.0.queue.leave(Entry::Outcome(Box::new(outcome)));
    }
}

impl Draft {
    /// Leaves what was decided, and takes what only a receipt needs of it.
    pub(crate) fn close(self, decision: &mut Decision) {
        let Self { recorder: Recorder(office), call } = self;
        let mut readings = std::mem::take(&mut decision.readings);
        if office.columns == Columns::All {
            read_the_rest(&call, &mut readings);
        }
        let decided = Decided {
            slot: office.slot.clone(),
            request: call.request,
            candidates: call.candidates,
            now_ms: call.now_ms,
            unix_ms: call.unix_ms,
            seed: call.seed,
            verdict: decision.verdict.clone(),
            by: decision.by.clone(),
            explanations: std::mem::take(&mut decision.explanations),
            readings,
            elapsed: decision.elapsed,
            fuel: decision.fuel,
        };
        office.queue.leave(Entry::Decision(Box::new(decided)));
    }
}

/// Adds what nobody read.
fn read_the_rest(call: &RouteCall, readings: &mut Vec<Reading>) {
    for name in Candidates::column_names() {
        let is_read = readings.iter().any(|reading| matches!(reading, Reading::Column(read, _) if *read == name));
        // Ids are in every receipt.
        if is_read || name == "worker-id" {
            continue;
        }
        let column = call.candidates.column(name, call.now_ms, call.overlap.as_deref());
        readings.extend(column.map(|column| Reading::Column(name, column)));
    }
    let keys: std::collections::BTreeSet<&String> = call.candidates.iter().flat_map(|worker| worker.spec.labels.keys()).collect();
    let is_read = |key: &String| readings.iter().any(|reading| matches!(reading, Reading::Label(read) if read == key));
    let unread: Vec<_> = keys.into_iter().filter(|key| !is_read(key)).cloned().map(Reading::Label).collect();
    readings.extend(unread);
}

#[cfg(test)]
mod tests;
