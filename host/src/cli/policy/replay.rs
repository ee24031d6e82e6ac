//! `dynamo-host policy replay`: a candidate policy decides again what receipts tell of, and is compared with what was done.
//!
//! Contract: it gets what was read then, bit by bit, with the clocks and the seed of then, on scratch state; in the order in
//! which it was decided, by one instance. So a policy that decides by nothing else agrees with itself to the last decision.
//! What it reads and the receipts do not hold is unknown to it, and said.

mod compare;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use dynamo_host_core::{SlotName, answer::Verdict, native};
use dynamo_host_policy::{Digest, PolicyFault, PolicyVersion, Reading, RouteCall, SlotState, Trial, native_route};
use serde::Serialize;

use self::compare::{Comparison, Shown, compare};
use super::{file_and_settings, load_for, named, read, read_given, uses};
use crate::{
    cli::{Output, OutputFlags, receipts::warn},
    receipts::{DecisionLine, Line, Source},
    text::plain,
};

/// What to replay, with which policy.
#[derive(clap::Args)]
pub(in crate::cli) struct ReplayFlags {
    /// The receipts: a host's state directory, their folder, or a file of `receipts export`
    #[arg(long, value_name = "PATH")]
    receipts: PathBuf,
    /// The candidate: a component with its settings as JSON or @FILE, or `native` for the built-in fallback
    #[arg(long, value_name = "FILE.wasm[,SETTINGS]")]
    policy: String,
    /// Workers of the recorded ranking that the candidate's first choice is looked for among
    #[arg(long, value_name = "K", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=16))]
    top: u32,
    /// Examples of differing decisions to print
    #[arg(long, value_name = "N", default_value_t = 5)]
    show: usize,
    #[command(flatten)]
    output: OutputFlags,
}

/// Request facts of the contract that no receipt holds.
const FACTS_NOT_HELD: [&str; 2] = ["tenant", "attribute"];
/// Who decides in the replay.
enum Candidate {
    Native,
    Policy { version: Arc<PolicyVersion>, uses: uses::Uses, trial: Option<Trial> },
}

/// Counted over the decisions of one policy version with one set of settings.
#[derive(Clone, Debug, Default, Serialize)]
struct Tally {
    decisions: u64,
    same_first: u64,
    /// The candidate's first choice was among the recorded first K.
    in_top: u64,
    /// Decisions that differ, by how.
    differences: BTreeMap<&'static str, u64>,
}

/// One difference.
#[derive(Clone, Debug, Serialize)]
struct Example {
    id: String,
    request: String,
    cause: &'static str,
    recorded: Vec<String>,
    candidate: Vec<String>,
    detail: Option<String>,
}

/// What was found.
#[derive(Debug, Default, Serialize)]
struct Report {
    candidate: String,
    digest: Option<String>,
    settings: Option<String>,
    /// Decisions in the receipts.
    read: u64,
    /// Decisions that were not replayed, by reason.
    left_out: BTreeMap<&'static str, u64>,
    total: Tally,
    /// By who decided then: policy, digest, settings.
    by: BTreeMap<String, Tally>,
    /// Decisions of the candidate's own digest and settings.
    own: Tally,
    /// What the candidate reads and receipts do not hold, with the number of decisions.
    not_held: BTreeMap<String, u64>,
    faults: BTreeMap<String, u64>,
    fuel_mean: f64,
    fuel_max: u64,
    notes: Vec<String>,
    examples: Vec<Example>,
    #[serde(skip)]
    fuel_sum: u64,
}

pub(in crate::cli) fn replay(flags: &ReplayFlags) -> Result<(), String> {
    let source = Source::of(&flags.receipts).map_err(|error| error.to_string())?;
    let mut candidate = Candidate::open(&flags.policy)?;
    let mut report = Report::of(&candidate);
    let skipped = source.each(|line, _| {
        if let Line::Decision(line) = line {
            report.take(&line, &mut candidate, flags);
        }
    });
    warn(&skipped.map_err(|error| error.to_string())?);
    if report.read == 0 {
        return Err(format!("{} holds no decisions", flags.receipts.display()));
    }
    report.conclude();
    if flags.output.output == Output::Json {
        print_json(&report);
    } else {
        report.print(flags.top);
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "a command's answer")]
fn print_json(report: &Report) {
    println!("{:#}", serde_json::to_value(report).unwrap_or_default());
}

impl Candidate {
    fn open(text: &str) -> Result<Self, String> {
        if text == native::NAME {
            return Ok(Self::Native);
        }
        let (file, settings) = file_and_settings(text);
        let file = PathBuf::from(file);
        let bytes = read(&file)?;
        let version = load_for(&bytes, &read_given(settings)?, SlotState::of(&SlotName::ROUTING));
        let version = version.map_err(|error| named(&file, &error))?;
        let uses = uses::of(&bytes).map_err(|error| format!("{}: {error}", file.display()))?;
        Ok(Self::Policy { version, uses, trial: None })
    }

    /// How the decision of a receipt is put to it.
    fn shown(&self, line: &DecisionLine) -> Shown {
        match self {
            // It knows what to do with either.
            Self::Native => Shown::AsThen,
            Self::Policy { version, .. } => Shown::of(line, version.tells_roles_apart()),
        }
    }

    /// What it decides, with what it read and the fuel that it took.
    fn decide(&mut self, call: &RouteCall) -> Result<(Verdict, Vec<Reading>, u64), PolicyFault> {
        match self {
            Self::Native => {
                let (ranking, readings) = native_route(call);
                Ok((Verdict::Place(ranking), readings, 0))
            }
            Self::Policy { version, trial, .. } => {
                let mut asked = match trial.take() {
                    Some(trial) => trial,
                    None => version.trial()?,
                };
                // One that failed is over, and the next decision has a new one, as in a host.
                let routed = asked.decide(call)?;
                *trial = Some(asked);
                Ok((routed.verdict, routed.readings, routed.fuel))
            }
        }
    }
}

impl Report {
    fn of(candidate: &Candidate) -> Self {
        let Candidate::Policy { version, uses, .. } = candidate else {
            return Self { candidate: native::NAME.to_owned(), ..Self::default() };
        };
        let mut notes = Vec::new();
        for fact in FACTS_NOT_HELD {
            if uses.get("request").is_some_and(|functions| functions.iter().any(|function| function == fact)) {
                notes.push(format!("reads request.{fact}, which receipts do not hold: it is unknown to it here"));
            }
        }
        if version.inspection().imports_interface("state") {
            notes.push(
                "keeps state, which receipts do not hold: here it begins with none, and sees these decisions alone".to_owned(),
            );
        }
        if version.observes() {
            notes.push("learns from outcomes, and is told of none here".to_owned());
        }
        Self {
            candidate: version.label().to_string(),
            digest: Some(version.digest().to_string()),
            settings: Some(Digest::of(version.settings().as_bytes()).to_string()),
            notes,
            ..Self::default()
        }
    }

    /// Replays one decision.
    fn take(&mut self, line: &DecisionLine, candidate: &mut Candidate, flags: &ReplayFlags) {
        self.read += 1;
        let mut leave = |why| *self.left_out.entry(why).or_default() += 1;
        if line.rows_cut > 0 {
            return leave("rows were cut: the fleet was too large for a receipt");
        }
        if line.choices().is_empty() {
            return leave("it was held or rejected: nothing was placed");
        }
        let call = match candidate.shown(line) {
            Shown::AsThen => line.call(),
            Shown::Beginning => line.of_beginning().call(),
            Shown::Less => return leave("it was put to who tells no roles apart: who might decode was not shown"),
        };
        let Ok(call) = call else { return leave("its receipt does not fit together") };
        let decided = candidate.decide(&call);
        if let Ok((_, readings, fuel)) = &decided {
            self.fuel_sum += fuel;
            self.fuel_max = self.fuel_max.max(*fuel);
            for what in readings.iter().filter_map(|reading| not_held(line, reading)) {
                *self.not_held.entry(what).or_default() += 1;
            }
        }
        let comparison = compare(line, &call, decided.as_ref().map(|(verdict, ..)| verdict), flags.top);
        let key = [line.digest.as_deref(), line.settings.as_deref()];
        let is_own = key == [self.digest.as_deref(), self.settings.as_deref()];
        let short = |digest: Option<&str>| digest.map_or("-", |digest| digest.get(..8).unwrap_or(digest)).to_owned();
        let of = format!("{}  {}  {}", plain(&line.policy), short(key[0]), short(key[1]));
        let own = is_own.then_some(&mut self.own);
        for tally in [&mut self.total, self.by.entry(of).or_default()].into_iter().chain(own) {
            tally.count(&comparison);
        }
        if let Err(fault) = &decided {
            *self.faults.entry(fault.cause.to_string()).or_default() += 1;
        }
        if let Some(cause) = comparison.cause
            && self.examples.len() < flags.show
        {
            self.examples.push(Example {
                id: line.id.to_string(),
                request: plain(&line.request),
                cause,
                recorded: line.choices().into_iter().take(flags.top as usize).map(|choice| line.text_of(choice)).collect(),
                candidate: comparison.choices.into_iter().take(flags.top as usize).map(|choice| line.text_of(choice)).collect(),
                detail: decided.err().map(|fault| plain(&fault.to_string())),
            });
        }
    }

    fn conclude(&mut self) {
        let decided = self.total.decisions - self.faults.values().sum::<u64>();
        self.fuel_mean = if decided > 0 { self.fuel_sum as f64 / decided as f64 } else { 0.0 };
        let own = &self.own;
        if own.same_first < own.decisions && self.not_held.is_empty() {
            self.notes.push(format!(
                "it differs from itself in {} of its own {} decisions: it depends on what its instance or its state remembers, \
                 see policy check",
                own.decisions - own.same_first,
                own.decisions
            ));
        }
    }

    #[expect(clippy::print_stdout, reason = "a command's answer")]
    fn print(&self, top: u32) {
        let of = self.total.decisions;
        println!("{} over {of} of {} recorded decisions", self.candidate, self.read);
        for (why, count) in &self.left_out {
            println!("  left out {count:>10}: {why}");
        }
        for (what, count) in &self.not_held {
            println!("  reads {what}, which these receipts do not hold ({count} of {of} decisions): unknown to it here");
        }
        for note in &self.notes {
            println!("  {note}");
        }
        println!("  same first choice     {}", share(self.total.same_first, of));
        println!("  within the first {top:<4} {}", share(self.total.in_top, of));
        println!("  fuel                  {:.0} mean, {} at most", self.fuel_mean, self.fuel_max);
        for (cause, count) in &self.faults {
            println!("  failed, {cause:<13} {count}");
        }
        println!("by who decided (policy, digest, settings):");
        for (who, tally) in &self.by {
            println!(
                "  {who}: {} decisions, same first choice {}, within the first {top} {}",
                tally.decisions,
                share(tally.same_first, tally.decisions),
                share(tally.in_top, tally.decisions)
            );
            for (cause, count) in &tally.differences {
                println!("    {cause:<44} {count}");
            }
        }
        for example in &self.examples {
            let Example { id, request, cause, recorded, candidate, detail } = example;
            let candidate = detail.clone().unwrap_or_else(|| candidate.join(", "));
            println!("{id}  {request}  {cause}: {} then, {candidate} now", recorded.join(", "));
        }
    }
}

impl Tally {
    fn count(&mut self, comparison: &Comparison) {
        self.decisions += 1;
        self.in_top += u64::from(comparison.in_top);
        match comparison.cause {
            None => self.same_first += 1,
            Some(cause) => *self.differences.entry(cause).or_default() += 1,
        }
    }
}

/// What was read and a receipt does not hold.
fn not_held(line: &DecisionLine, reading: &Reading) -> Option<String> {
    match reading {
        Reading::Column("worker-id", _) => None,
        Reading::Column(name, _) => (!line.columns.contains_key(*name)).then(|| (*name).to_owned()),
        Reading::Link(name, from, _) => {
            let from = from.and_then(|from| line.workers.get(from as usize).copied());
            let is_held = line.links.iter().any(|link| link.column == *name && link.from == from);
            (!is_held).then(|| format!("links.{name}"))
        }
        Reading::Label(key) => (!line.labels.contains_key(key)).then(|| format!("label {key:?}")),
    }
}

fn share(part: u64, of: u64) -> String {
    let percent = if of == 0 { 0.0 } else { 100.0 * part as f64 / of as f64 };
    format!("{percent:.1} % ({part})")
}
