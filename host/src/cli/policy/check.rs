//! `dynamo-host policy check`: everything that can be said of a component without a host, with what is wrong and what may
//! become so.
//!
//! Errors are what would make an activation fail or a decision fall back; warnings are what a policy may do and its author
//! should know.

use std::sync::Arc;

use dynamo_host_core::{
    Role, SlotKind, admission,
    answer::{MAX_HOLDS, Verdict},
};
use dynamo_host_policy::{AdmissionCall, Inspection, OutcomeRow, PolicyFault, PolicyVersion, Question, RouteCall};
use serde::{Serialize, Serializer, ser::SerializeMap as _};
use serde_json::Value;

use super::{
    probes::{MANY, Probe, Probed},
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
    /// Of routing policies: whether it decides between workers of different roles.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) tells_roles_apart: Option<bool>,
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
    #[serde(flatten)]
    pub(super) rows: Rows,
    pub(super) answer: String,
    pub(super) fuel: u64,
}

/// How many candidates, or pools: in JSON, a number by that name.
pub(super) struct Rows {
    pub(super) of: &'static str,
    pub(super) count: u32,
}

impl Serialize for Rows {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry(self.of, &self.count)?;
        map.end()
    }
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
        tells_roles_apart: (version.world().slot == SlotKind::Routing).then(|| version.tells_roles_apart()),
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
    match version.world().slot {
        SlotKind::Admission => report.probe::<AdmissionCall>(version),
        _ => report.probe::<RouteCall>(version),
    }
    report.look_at_fuel();
    report.let_observe(version);
    report.ok = report.findings.iter().all(|finding| finding.level != Level::Error);
    report
}

/// What is checked of policies of one world.
trait Checked: Probed {
    /// What it answered to a probe, in words; what its author should know of that is found.
    fn describe(verdict: &Self::Verdict, probe: &Probe<Self>, report: &mut Report) -> String;

    /// For how long the request is held, if it is, and what is asked after that.
    fn held(&self, _: &Self::Verdict) -> Option<(u32, Self)> {
        None
    }
}

impl Checked for RouteCall {
    fn describe(verdict: &Verdict, probe: &Probe<Self>, report: &mut Report) -> String {
        match verdict {
            Verdict::Place(ranking) => {
                let ranked = ranking.rows().len();
                report.look_for_choice(ranked, probe.rows);
                let first = probe.call.candidates.worker(ranking.rows()[0]).spec.role;
                // As it is where one has to choose between them.
                let role = if probe.call.candidates.have_different_roles() {
                    format!(", first {}", whole(first))
                } else {
                    String::new()
                };
                format!("place on {ranked} of {}{role}", probe.rows)
            }
            Verdict::PlacePairs(pairs) => {
                report.look_for_choice(pairs.len(), probe.rows);
                format!("place {} pairs of {}", pairs.len(), probe.rows)
            }
            Verdict::Hold { at_most_ms } => {
                let message = format!("it holds a request whenever it is asked, although workers are there ({})", probe.name);
                report.find(Level::Warning, "holds", message);
                format!("hold for {at_most_ms} ms")
            }
            Verdict::Reject(rejection) => {
                let message = format!("it rejects a plain request with {} ({})", rejection.status, probe.name);
                report.find(Level::Warning, "rejects", message);
                format!("reject with {}", rejection.status)
            }
        }
    }

    fn held(&self, verdict: &Verdict) -> Option<(u32, Self)> {
        let Verdict::Hold { at_most_ms } = verdict else { return None };
        let mut next = self.clone();
        let request = Arc::make_mut(&mut next.request);
        request.holds += 1;
        (request.holds <= MAX_HOLDS).then_some((*at_most_ms, next))
    }
}

impl Checked for AdmissionCall {
    fn describe(verdict: &admission::Verdict, probe: &Probe<Self>, report: &mut Report) -> String {
        match verdict {
            admission::Verdict::Admit(admitted) => {
                let class = admitted.class.as_deref().map(|class| format!(" as {class}")).unwrap_or_default();
                format!("admit{class} in tier {}", admitted.tier)
            }
            admission::Verdict::Shed(rejection) => {
                if probe.call.pools[0].queued_requests == 0 {
                    let message = format!("it sheds with {} though nothing waits ({})", rejection.status, probe.name);
                    report.find(Level::Warning, "sheds", message);
                }
                if rejection.retry_after_ms.is_none() && !report.findings.iter().any(|finding| finding.code == "no-retry-after") {
                    let message = format!("it sheds without saying when to try again ({})", probe.name);
                    report.find(Level::Warning, "no-retry-after", message);
                }
                format!("shed with {}", rejection.status)
            }
        }
    }
}

/// What comes of a whole request on a worker of a role.
fn whole(role: Role) -> &'static str {
    match role {
        Role::Aggregated | Role::Both => "all in one",
        Role::Prefill => "prefill",
        Role::Decode => "decode with prefill",
    }
}

impl Report {
    /// Whether there is somebody else for when the first does not take it.
    fn look_for_choice(&mut self, ranked: usize, rows: u32) {
        let is_first = !self.findings.iter().any(|finding| finding.code == "no-alternative");
        if ranked == 1 && rows >= CHOICE && is_first {
            let message = format!("it ranks 1 of {rows} candidates; rank some more, for when the first does not take it");
            self.find(Level::Warning, "no-alternative", message);
        }
    }

    fn find(&mut self, level: Level, code: &'static str, message: String) {
        self.findings.push(Finding { level, code, message });
    }

    fn probe<Q: Checked>(&mut self, version: &Arc<PolicyVersion>) {
        let probes = Q::probes(version);
        let verdicts: Vec<_> = probes.iter().map(|probe| self.decide(version, probe)).collect();
        self.look_for_memory(version, &probes, &verdicts);
    }

    /// Decides a probe, and goes on asking while the request is held, as a host does. Returns the first answer.
    fn decide<Q: Checked>(&mut self, version: &Arc<PolicyVersion>, probe: &Probe<Q>) -> Option<Q::Verdict> {
        let first = self.ask(version, probe, &probe.call)?;
        let (mut last, mut fuel, mut holds) = (first.verdict.clone(), first.fuel, String::new());
        let mut held = probe.call.held(&last);
        while let Some((at_most_ms, call)) = held {
            let again = self.ask(version, probe, &call)?;
            if holds.is_empty() {
                holds = format!("hold for {at_most_ms} ms, then ");
            }
            held = call.held(&again.verdict);
            (last, fuel) = (again.verdict, fuel.max(again.fuel));
        }
        let answer = holds + &Q::describe(&last, probe, self);
        let rows = Rows { of: Q::WORLD.rows, count: probe.rows };
        self.decisions.push(Decided { probe: probe.name, rows, answer, fuel });
        Some(first.verdict)
    }

    /// Asks twice, each time an instance that knows nothing of any other.
    fn ask<Q: Checked>(
        &mut self,
        version: &Arc<PolicyVersion>,
        probe: &Probe<Q>,
        call: &Q,
    ) -> Option<dynamo_host_policy::Decided<Q::Verdict>> {
        let fresh = || version.trial().and_then(|mut trial| trial.decide(call));
        let decided = match fresh() {
            Ok(decided) => decided,
            Err(fault) => {
                self.failed(probe, &fault);
                return None;
            }
        };
        match fresh() {
            Ok(again) if again.verdict != decided.verdict && self.deterministic => {
                self.deterministic = false;
                let message = format!("it decides differently when asked the same twice ({})", probe.name);
                self.find(Level::Error, "not-deterministic", message);
            }
            Ok(_) => {}
            Err(fault) => self.failed(probe, &fault),
        }
        Some(decided)
    }

    fn failed<Q: Question>(&mut self, probe: &Probe<Q>, fault: &PolicyFault) {
        let fault = plain(&fault.to_string());
        let text = format!("it failed with {} {} ({}): {fault}", probe.rows, Q::WORLD.rows, probe.name);
        if probe.rows == MANY {
            self.find(Level::Warning, "large-fleet", format!("{text}; such a fleet is decided by the native fallback"));
        } else {
            self.find(Level::Error, "fault", text);
        }
    }

    /// What its answers depend on: an instance's memory, or at least what it keeps in `state`.
    fn look_for_memory<Q: Question>(
        &mut self,
        version: &Arc<PolicyVersion>,
        probes: &[Probe<Q>],
        verdicts: &[Option<Q::Verdict>],
    ) {
        match version.memory_dependence() {
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
        let usual = self.decisions.iter().filter(|decided| decided.rows.count < MANY).map(|decided| decided.fuel).max();
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
            queue_ms: f32::NAN,
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
fn remembers<Q: Question>(version: &Arc<PolicyVersion>, probes: &[Probe<Q>], verdicts: &[Option<Q::Verdict>]) -> bool {
    let Ok(mut trial) = version.trial() else { return false };
    let twice = probes.iter().zip(verdicts).chain(probes.iter().zip(verdicts));
    twice
        .filter_map(|(probe, fresh)| Some((probe, fresh.as_ref()?)))
        .any(|(probe, fresh)| trial.decide(&probe.call).is_ok_and(|warm| warm.verdict != *fresh))
}
