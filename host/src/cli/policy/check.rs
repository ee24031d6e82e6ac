//! `dynamo-host policy check`: everything that can be said of a component without a host, with what is wrong and what may
//! become so.
//!
//! Errors are what would make an activation fail or a decision fall back; warnings are what a policy may do and its author
//! should know.

use std::sync::Arc;

use dynamo_host_core::answer::Verdict;
use dynamo_host_policy::{Inspection, OutcomeRow, PolicyFault, PolicyVersion, Trial};
use serde::Serialize;
use serde_json::Value;

use super::{
    probes::{self, MANY, Probe},
    uses::{self, Uses},
};
use crate::text::plain;

/// Share of the fuel, with up to 1,024 candidates, above which there is little room for more.
const MUCH_FUEL: f64 = 0.25;
/// Candidates from which on a single row is a poor answer.
const CHOICE: u32 = 4;

/// What was found. Its JSON is documented in docs/writing-policies.md.
#[derive(Serialize)]
pub(super) struct Report {
    pub(super) file: String,
    pub(super) ok: bool,
    pub(super) policy: Inspection,
    pub(super) contract: Option<String>,
    pub(super) uses: Uses,
    pub(super) settings: Value,
    pub(super) settings_schema: Value,
    pub(super) fuel_limit: u64,
    pub(super) deterministic: bool,
    pub(super) memory: Memory,
    pub(super) decisions: Vec<Decided>,
    pub(super) findings: Vec<Finding>,
}

/// What its answers depend on besides the request and the candidates.
#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Memory {
    /// Nothing: the same question, the same answer.
    None,
    /// What it keeps in the host's state.
    State,
    /// What it keeps in its own memory, which may vanish between any two calls.
    Own,
}

/// A probe and what came of it.
#[derive(Serialize)]
pub(super) struct Decided {
    pub(super) probe: &'static str,
    pub(super) candidates: u32,
    pub(super) answer: String,
    pub(super) fuel: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Level {
    Error,
    Warning,
}

/// What is or may become wrong.
#[derive(Serialize)]
pub(super) struct Finding {
    pub(super) level: Level,
    /// For tools: stable.
    pub(super) code: &'static str,
    /// For people.
    pub(super) message: String,
}

/// Looks at a policy that could be loaded.
pub(super) fn report(file: String, bytes: &[u8], version: &Arc<PolicyVersion>, fuel_limit: u64) -> Report {
    let mut report = Report {
        file,
        ok: true,
        policy: version.inspection().clone(),
        contract: super::contract(version.inspection()),
        uses: uses::of(bytes).unwrap_or_default(),
        settings: serde_json::from_str(version.settings()).unwrap_or_default(),
        settings_schema: Value::Null,
        fuel_limit,
        deterministic: true,
        memory: Memory::None,
        decisions: Vec::new(),
        findings: Vec::new(),
    };
    match version.settings_schema().map(|schema| serde_json::from_str(&schema)) {
        Ok(Ok(schema)) => report.settings_schema = schema,
        Ok(Err(error)) => report.find(Level::Error, "settings-schema", format!("settings-schema is not JSON: {error}")),
        Err(fault) => {
            report.find(Level::Error, "settings-schema", format!("settings-schema failed: {}", plain(&fault.to_string())));
        }
    }
    let probes = probes::all();
    let verdicts: Vec<_> = probes.iter().map(|probe| report.decide(version, probe)).collect();
    report.look_for_memory(version, &probes, &verdicts);
    report.look_at_fuel();
    report.let_observe(version);
    report.ok = report.findings.iter().all(|finding| finding.level != Level::Error);
    report
}

impl Report {
    fn find(&mut self, level: Level, code: &'static str, message: String) {
        self.findings.push(Finding { level, code, message });
    }

    /// Decides a probe twice, each on an instance that knows nothing of any other.
    fn decide(&mut self, version: &Arc<PolicyVersion>, probe: &Probe) -> Option<Verdict> {
        let fresh = || version.trial().and_then(|mut trial| trial.route(&probe.call));
        let routed = match fresh() {
            Ok(routed) => routed,
            Err(fault) => {
                self.failed(probe, &fault);
                return None;
            }
        };
        match fresh() {
            Ok(again) if again.verdict != routed.verdict && self.deterministic => {
                self.deterministic = false;
                let message = format!("it decides differently when asked the same twice ({})", probe.name);
                self.find(Level::Error, "not-deterministic", message);
            }
            Ok(_) => {}
            Err(fault) => self.failed(probe, &fault),
        }
        let answer = match &routed.verdict {
            Verdict::Place(ranking) => {
                let ranked = ranking.rows().len();
                let is_first = !self.findings.iter().any(|finding| finding.code == "no-alternative");
                if ranked == 1 && probe.candidates >= CHOICE && is_first {
                    let message = format!(
                        "it ranks 1 of {} candidates; rank some more, for when the first does not take it",
                        probe.candidates
                    );
                    self.find(Level::Warning, "no-alternative", message);
                }
                format!("place on {ranked} of {}", probe.candidates)
            }
            Verdict::Hold { at_most_ms } => {
                self.find(Level::Warning, "holds", format!("it holds a request although workers are there ({})", probe.name));
                format!("hold for {at_most_ms} ms")
            }
            Verdict::Reject(rejection) => {
                let message = format!("it rejects a plain request with {} ({})", rejection.status, probe.name);
                self.find(Level::Warning, "rejects", message);
                format!("reject with {}", rejection.status)
            }
        };
        self.decisions.push(Decided { probe: probe.name, candidates: probe.candidates, answer, fuel: routed.fuel });
        Some(routed.verdict)
    }

    fn failed(&mut self, probe: &Probe, fault: &PolicyFault) {
        let text = format!("it failed with {} candidates ({}): {}", probe.candidates, probe.name, plain(&fault.to_string()));
        if probe.candidates == MANY {
            self.find(Level::Warning, "large-fleet", format!("{text}; such a fleet is routed by the native fallback"));
        } else {
            self.find(Level::Error, "fault", text);
        }
    }

    /// What its answers depend on: an instance's memory, or at least what it keeps in `state`.
    fn look_for_memory(&mut self, version: &Arc<PolicyVersion>, probes: &[Probe], verdicts: &[Option<Verdict>]) {
        match Trial::memory_dependence(version) {
            Ok(Some(_)) => {
                self.memory = Memory::Own;
                let message = "its answers depend on its own memory, which may vanish between any two calls and is not \
                    shared by its instances; keep in `state` what must last";
                self.find(Level::Warning, "memory", message.to_owned());
            }
            Ok(None) if self.uses.contains_key("state") && remembers(version, probes, verdicts) => self.memory = Memory::State,
            Ok(None) => {}
            Err(fault) => {
                let text = plain(&fault.to_string());
                self.find(Level::Error, "fault", format!("it failed on an instance that had decided before: {text}"));
            }
        }
    }

    fn look_at_fuel(&mut self) {
        let usual = self.decisions.iter().filter(|decided| decided.candidates < MANY).map(|decided| decided.fuel).max();
        let share = usual.unwrap_or(0) as f64 / self.fuel_limit as f64;
        if share > MUCH_FUEL {
            let message =
                format!("it uses up to {:.0} % of the fuel of one decision with at most 1,024 candidates", share * 100.0);
            self.find(Level::Warning, "fuel", message);
        }
    }

    fn let_observe(&mut self, version: &Arc<PolicyVersion>) {
        if !version.observes() {
            return;
        }
        let row = |decision_id, ttft_ms, end| OutcomeRow {
            decision_id,
            worker_id: 1,
            ttft_ms,
            itl_ms: f32::NAN,
            output_tokens: 1,
            end,
        };
        // An end that this contract does not know: codes may grow.
        for batch in [vec![row(1, 10.0, 0), row(2, f32::NAN, 2), row(3, f32::NAN, 99)], vec![]] {
            if let Err(fault) = version.observe(batch.into()) {
                self.find(Level::Error, "observe", format!("observe failed: {}", plain(&fault.to_string())));
            }
        }
    }
}

/// Whether an instance that has decided before ever decides unlike a fresh one.
fn remembers(version: &Arc<PolicyVersion>, probes: &[Probe], verdicts: &[Option<Verdict>]) -> bool {
    let Ok(mut trial) = version.trial() else { return false };
    let twice = probes.iter().zip(verdicts).chain(probes.iter().zip(verdicts));
    twice
        .filter_map(|(probe, fresh)| Some((probe, fresh.as_ref()?)))
        .any(|(probe, fresh)| trial.route(&probe.call).is_ok_and(|warm| warm.verdict != *fresh))
}
