//! `dynamo-host receipts`: what was decided, why, and what became of it; read from disk, whether a host runs or not.

use std::{
    collections::{HashMap, VecDeque},
    io::{self, Write},
    path::PathBuf,
    time::Duration,
};

use clap::{Args, Subcommand, ValueEnum};

use super::Output;
use crate::{
    clock::{unix_ms, utc},
    receipts::{By, Choice, DecisionLine, Done, Hex, Line, OutcomeLine, Source, Tail},
    text::plain,
};

/// How often is looked for new ones.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Alternatives that a line shows.
const SHOWN: usize = 3;

#[derive(Subcommand)]
pub(super) enum ReceiptsCommand {
    /// The last decisions, a line for each: who decided, where it went and instead of where, and what became of it
    Tail {
        #[command(flatten)]
        place: Place,
        /// How many
        #[arg(short = 'n', long, value_name = "N", default_value_t = 20)]
        lines: usize,
        /// Go on with what is decided from now on
        #[arg(long)]
        follow: bool,
        #[command(flatten)]
        output: super::OutputFlags,
    },
    /// Write receipts to stdout: as they are, for `policy replay` and tools, or as a table
    Export {
        #[command(flatten)]
        place: Place,
        /// From then on: a time such as 2027-01-31T18:00:00Z, or how long ago, such as 90s, 15m, 2h, 3d
        #[arg(long, value_name = "TIME")]
        since: Option<String>,
        /// Until then
        #[arg(long, value_name = "TIME")]
        until: Option<String>,
        /// jsonl: a line for each decision and each outcome; csv: a row for each decision with its last outcome
        #[arg(long, value_name = "FORMAT", default_value = "jsonl")]
        format: Format,
    },
}

/// Where receipts are.
#[derive(Args)]
#[group(required = true, multiple = false)]
pub(super) struct Place {
    /// The host's state directory
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Their folder, or one file of them
    #[arg(long, value_name = "PATH")]
    receipts: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    Jsonl,
    Csv,
}

impl Place {
    fn open(&self) -> Result<Source, String> {
        let path = self.state_dir.as_ref().or(self.receipts.as_ref()).expect("clap demands one of them");
        Source::of(path).map_err(|error| error.to_string())
    }
}

pub(super) fn run(command: &ReceiptsCommand) -> Result<(), String> {
    let done = match command {
        ReceiptsCommand::Tail { place, lines, follow, output } => tail(place, *lines, *follow, output.output),
        ReceiptsCommand::Export { place, since, until, format } => export(place, since.as_deref(), until.as_deref(), *format),
    };
    match done {
        // Whoever reads has read enough.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(Failure::Output(error)) => Err(format!("the output cannot be written: {error}")),
        Err(Failure::Reason(reason)) => Err(reason),
        Ok(()) => Ok(()),
    }
}

enum Failure {
    Reason(String),
    Output(io::Error),
}

impl From<String> for Failure {
    fn from(reason: String) -> Self {
        Self::Reason(reason)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

fn tail(place: &Place, lines: usize, follow: bool, output: Output) -> Result<(), Failure> {
    let mut source = place.open()?;
    let mut tail = source.follow().map_err(|error| error.to_string())?;
    source.keep_newest(lines).map_err(|error| error.to_string())?;
    let mut kept: VecDeque<(Box<DecisionLine>, String)> = VecDeque::new();
    let mut outcomes: HashMap<Hex, Vec<(Box<OutcomeLine>, String)>> = HashMap::new();
    let skipped = source.each(|line, text| match line {
        Line::Decision(decision) => {
            kept.push_back((decision, text.to_owned()));
            if kept.len() > lines {
                let (oldest, _) = kept.pop_front().expect("one was pushed");
                if is_placed(&oldest) {
                    outcomes.remove(&oldest.id);
                }
            }
        }
        Line::Outcome(outcome) => outcomes.entry(outcome.id).or_default().push((outcome, text.to_owned())),
    });
    warn(&skipped.map_err(|error| error.to_string())?);
    let mut out = io::stdout().lock();
    for (decision, text) in &kept {
        let ended = outcomes.get(&decision.id).filter(|_| is_placed(decision)).map(Vec::as_slice).unwrap_or_default();
        if output == Output::Json {
            writeln!(out, "{text}")?;
            ended.iter().try_for_each(|(_, text)| writeln!(out, "{text}"))?;
        } else if !is_placed(decision) {
            writeln!(out, "{}", decision_text(decision))?;
        } else {
            let ended: Vec<String> = ended.iter().map(|(outcome, _)| outcome_text(outcome)).collect();
            writeln!(
                out,
                "{}  {}",
                decision_text(decision),
                if ended.is_empty() { "…".to_owned() } else { ended.join(", then ") }
            )?;
        }
    }
    out.flush()?;
    if follow {
        return go_on(&mut tail, output, &mut out);
    }
    Ok(())
}

/// Prints what is written from now on, until nobody reads it any more.
fn go_on(tail: &mut Tail, output: Output, out: &mut impl Write) -> Result<(), Failure> {
    loop {
        let mut written = Ok(());
        tail.look(|line, text| {
            let text = match (&line, output) {
                (_, Output::Json) => text.to_owned(),
                (Line::Decision(decision), _) => decision_text(decision),
                (Line::Outcome(outcome), _) => {
                    format!("{}  {}  └ {}", utc(outcome.unix_ms), outcome.id, outcome_text(outcome))
                }
            };
            if written.is_ok() {
                written = writeln!(out, "{text}");
            }
        });
        written.and_then(|()| out.flush())?;
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Whether the request went to a worker by it. Those that held it before have the same id, and no outcome.
fn is_placed(line: &DecisionLine) -> bool {
    matches!(line.done, Done::Place(_) | Done::PlacePairs(_))
}

/// A decision on one line.
fn decision_text(line: &DecisionLine) -> String {
    let who = match (&line.failed, line.by) {
        (Some(failed), _) => format!("{} (instead of {}: {})", line.policy, failed.policy, failed.cause),
        (None, By::Bypass) => format!("{} (bypass)", line.policy),
        (None, _) => line.policy.clone(),
    };
    let named = |choice: Choice| match choice {
        Choice::One(worker) => match line.score_of(worker) {
            Some((_, score)) => format!("{} ({score:.4})", line.name_of(worker)),
            None => line.name_of(worker),
        },
        Choice::Pair(..) => line.text_of(choice),
    };
    let ranked: Vec<String> = line.choices().into_iter().take(1 + SHOWN).map(named).collect();
    let what = match (&line.done, ranked.split_first()) {
        (Done::HoldMs(ms), _) => format!("holds it for {ms} ms"),
        (Done::Reject(status), _) => format!("rejects it with {status}"),
        (_, Some((first, rest))) if !rest.is_empty() => format!("→ {first}, else {}", rest.join(", ")),
        (_, first) => format!("→ {}", first.map(|(first, _)| first.as_str()).unwrap_or_default()),
    };
    let stage = line.facts.stage.as_ref().map(|stage| format!(" {stage}")).unwrap_or_default();
    let attempt = if line.facts.attempt > 0 { format!(" attempt {}", line.facts.attempt + 1) } else { String::new() };
    format!(
        "{}  {}  {}{stage}{attempt}  {who} {what}  of {}, {:.0} µs",
        utc(line.unix_ms),
        line.id,
        plain(&line.request),
        line.candidates,
        line.us
    )
}

/// What became of a request, in a few words.
fn outcome_text(line: &OutcomeLine) -> String {
    let mut text = format!("{} on {}", line.end, plain(&line.name));
    if let Some(status) = line.status.filter(|status| *status != 200) {
        text += &format!(" with {status}");
    }
    for (what, ms) in [("ttft", line.ttft_ms), ("itl", line.itl_ms)] {
        if let Some(ms) = ms {
            text += &format!(", {what} {ms:.1} ms");
        }
    }
    text += &format!(", {} tokens", line.output_tokens);
    match line.cached_reported {
        Some(cached) => text += &format!(", {cached} of {} cached, {} expected", line.prompt_tokens, line.cached_predicted),
        None if line.cached_predicted > 0 => {
            text += &format!(", {} of {} expected in cache", line.cached_predicted, line.prompt_tokens);
        }
        None => {}
    }
    text
}

fn export(place: &Place, since: Option<&str>, until: Option<&str>, format: Format) -> Result<(), Failure> {
    let source = place.open()?;
    let now = unix_ms();
    let since = since.map(|text| moment("--since", text, now)).transpose()?.unwrap_or(0);
    let until = until.map(|text| moment("--until", text, now)).transpose()?.unwrap_or(u64::MAX);
    let mut out = io::BufWriter::new(io::stdout().lock());
    let mut written = Ok(());
    let mut rows: Vec<Box<DecisionLine>> = Vec::new();
    let mut outcomes: HashMap<Hex, Option<Box<OutcomeLine>>> = HashMap::new();
    let skipped = source.each(|line, text| match line {
        Line::Decision(decision) if (since..until).contains(&decision.unix_ms) => {
            outcomes.insert(decision.id, None);
            match format {
                Format::Jsonl if written.is_ok() => written = writeln!(out, "{text}"),
                Format::Jsonl => {}
                // Its columns have no place in a table.
                Format::Csv => {
                    rows.push(Box::new(DecisionLine { columns: Default::default(), labels: Default::default(), ..*decision }));
                }
            }
        }
        Line::Decision(_) => {}
        // Those of decisions that are exported, whenever they ended.
        Line::Outcome(outcome) => {
            if let Some(last) = outcomes.get_mut(&outcome.id) {
                match format {
                    Format::Jsonl if written.is_ok() => written = writeln!(out, "{text}"),
                    Format::Jsonl => {}
                    Format::Csv => *last = Some(outcome),
                }
            }
        }
    });
    warn(&skipped.map_err(|error| error.to_string())?);
    written?;
    if format == Format::Csv {
        writeln!(out, "{CSV_HEAD}")?;
        for row in rows {
            let outcome = outcomes.get(&row.id).filter(|_| is_placed(&row)).and_then(Option::as_deref);
            writeln!(out, "{}", csv_row(&row, outcome))?;
        }
    }
    out.flush()?;
    Ok(())
}

const CSV_HEAD: &str = "id,time,request,model,adapter,by,policy,digest,settings,failed_policy,failed_cause,prompt_tokens,exact,attempt,holds,\
                        candidates,worker,worker_id,score,hold_ms,reject_status,fuel,us,end,status,ttft_ms,itl_ms,output_tokens,\
                        cached_predicted,cached_reported,stage,prefill,prefill_id";

fn csv_row(line: &DecisionLine, outcome: Option<&OutcomeLine>) -> String {
    fn or<T: ToString>(value: Option<T>) -> String {
        value.map(|value| value.to_string()).unwrap_or_default()
    }
    // Of a pair, the worker is the one that decodes.
    let (prefill, first) = match line.choices().first() {
        Some(Choice::One(worker)) => (line.facts.prefilled_by, Some(*worker)),
        Some(Choice::Pair(prefill, decode)) => (Some(*prefill), Some(*decode)),
        None => (None, None),
    };
    let (hold_ms, reject) = match line.done {
        Done::HoldMs(ms) => (Some(ms), None),
        Done::Reject(status) => (None, Some(status)),
        Done::Place(_) | Done::PlacePairs(_) => (None, None),
    };
    let by = serde_json::to_value(line.by).ok().and_then(|by| by.as_str().map(str::to_owned));
    let fields = [
        line.id.to_string(),
        utc(line.unix_ms),
        line.request.clone(),
        line.model.clone(),
        or(line.facts.adapter.as_ref()),
        or(by),
        line.policy.clone(),
        or(line.digest.as_ref()),
        or(line.settings.as_ref()),
        or(line.failed.as_ref().map(|failed| &failed.policy)),
        or(line.failed.as_ref().map(|failed| &failed.cause)),
        line.facts.prompt_tokens.to_string(),
        line.facts.exact.to_string(),
        line.facts.attempt.to_string(),
        line.facts.holds.to_string(),
        line.candidates.to_string(),
        or(first.map(|first| line.name_of(first))),
        or(first),
        or(first.and_then(|first| line.score_of(first)).map(|(_, score)| score)),
        or(hold_ms),
        or(reject),
        line.fuel.to_string(),
        line.us.to_string(),
        or(outcome.map(|outcome| &outcome.end)),
        or(outcome.and_then(|outcome| outcome.status)),
        or(outcome.and_then(|outcome| outcome.ttft_ms)),
        or(outcome.and_then(|outcome| outcome.itl_ms)),
        or(outcome.map(|outcome| outcome.output_tokens)),
        or(outcome.map(|outcome| outcome.cached_predicted)),
        or(outcome.and_then(|outcome| outcome.cached_reported)),
        or(line.facts.stage.as_ref()),
        or(prefill.map(|prefill| line.name_of(prefill))),
        or(prefill),
    ];
    fields.map(quoted).join(",")
}

/// A field of RFC 4180. What a spreadsheet would take for a formula is made text: ids are the clients' words.
fn quoted(field: String) -> String {
    let field = if field.starts_with(['=', '+', '@']) { format!("'{field}") } else { field };
    if field.contains([',', '"', '\n', '\r']) { format!("\"{}\"", field.replace('"', "\"\"")) } else { field }
}

/// A moment in milliseconds since 1970: a time, or how long ago.
fn moment(flag: &str, text: &str, now: u64) -> Result<u64, String> {
    let wrong =
        || format!("{flag} is {text:?}; write a time such as 2027-01-31T18:00:00Z, or how long ago, such as 90s, 15m, 2h or 3d");
    if let Some((number, seconds)) = [('s', 1), ('m', 60), ('h', 3600), ('d', 86_400)]
        .into_iter()
        .find_map(|(unit, seconds)| Some((text.strip_suffix(unit)?, seconds)))
    {
        let amount: u64 = number.parse().map_err(|_| wrong())?;
        return Ok(now.saturating_sub(amount.saturating_mul(seconds * 1000)));
    }
    let moment = text.parse().map_err(|_| wrong())?;
    crate::clock::unix_ms_of(moment).ok_or_else(wrong)
}

/// Says what could not be read.
#[expect(clippy::print_stderr, reason = "the answer goes on without those lines, and people should know")]
pub(super) fn warn(skipped: &crate::receipts::Skipped) {
    if let Some(first) = &skipped.first {
        eprintln!("warning: {} lines were skipped, the first: {}", skipped.lines, plain(first));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_a_time_or_how_long_ago() {
        let now = 1_800_000_000_000;
        assert_eq!(moment("--since", "90s", now), Ok(now - 90_000));
        assert_eq!(moment("--since", "2h", now), Ok(now - 7_200_000));
        assert_eq!(moment("--since", "2027-01-15T08:00:00Z", now), Ok(now));
        assert_eq!(utc(now), "2027-01-15T08:00:00.000Z");
        for text in ["yesterday", "h", "-3m", "2027-01-15T08:00:00", "08:00:00"] {
            assert!(moment("--since", text, now).unwrap_err().contains("--since"), "{text}");
        }
    }

    #[test]
    fn a_field_of_a_table_cannot_break_out_of_it() {
        assert_eq!(quoted("a,\"b\"".to_owned()), "\"a,\"\"b\"\"\"");
        assert_eq!(quoted("=1+1".to_owned()), "'=1+1");
        assert_eq!(quoted("plain".to_owned()), "plain");
    }
}
