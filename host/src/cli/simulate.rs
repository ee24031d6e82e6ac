//! `dynamo-host simulate`: policies side by side over a trace, in virtual time.
#![allow(clippy::print_stdout)]

mod arguments;

use std::{
    fs,
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use dynamo_host_sim::{
    Contender, Options, Report, SimulationError, Tally, Trace,
    bounds::{Bounds, bounds},
    report::Row,
    simulate,
};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

pub(super) use self::arguments::SimulateFlags;
use super::Output;

/// Simulates, and says what came of it.
pub(super) fn run(flags: &SimulateFlags) -> Result<(), String> {
    let workers = flags.workers()?;
    let contenders = flags.contenders()?;
    let mut trace = Trace::open(&flags.trace, flags.seed).map_err(|error| error.to_string())?;
    trace.truncate(flags.limit.unwrap_or(usize::MAX));
    let options = Options {
        workers,
        links: flags.links()?,
        speed: flags.speed,
        seed: flags.seed,
        load_interval: Duration::from_millis(flags.load_interval_ms),
        kv_event_lag: Duration::from_millis(flags.kv_event_lag_ms),
        queueing: flags.queueing()?,
        faults: flags.faults()?,
        audit_every: flags.audit_every,
    };
    let threads = flags.threads.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from));
    let (bounds, tallies) = compare(&trace, &options, &contenders, threads).map_err(|error| error.to_string())?;
    let report = Report {
        trace: trace.name.clone(),
        requests: trace.requests.len() as u64,
        workers: options.workers.len() as u64,
        speed: options.speed,
        seed: options.seed,
        engine: options.workers[0].profile.clone(),
        bounds,
        policies: tallies.into_iter().map(Row::new).collect(),
    };
    if let Some(path) = &flags.json {
        write(path, &report.json())?;
    }
    if let Some(path) = &flags.html {
        write(path, &report.html())?;
    }
    match flags.output {
        Output::Json => print!("{}", report.json()),
        Output::Text => print!("{}", report.table()),
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("{} cannot be written: {error}", path.display()))
}

/// Runs all contenders, some at once, and the bounds beside them.
fn compare(
    trace: &Trace,
    options: &Options,
    contenders: &[Contender],
    threads: usize,
) -> Result<(Bounds, Vec<Tally>), SimulationError> {
    let progress = MultiProgress::new();
    let bars: Vec<ProgressBar> = contenders.iter().map(|contender| bar(&progress, trace, &contender.name)).collect();
    let (next, results) = (AtomicUsize::new(0), Mutex::new((None, contenders.iter().map(|_| None).collect::<Vec<_>>())));
    let keep = |at: usize, result| {
        let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
        results.1[at] = Some(result);
    };
    thread::scope(|scope| {
        for _ in 0..threads.clamp(1, contenders.len() + 1) {
            scope.spawn(|| {
                loop {
                    let turn = next.fetch_add(1, Relaxed);
                    if let Some(contender) = contenders.get(turn) {
                        keep(turn, simulate(trace, options, contender, &|done| bars[turn].set_position(done)));
                        bars[turn].finish_and_clear();
                    } else {
                        if turn == contenders.len() {
                            let bounds = bounds(trace, &options.workers);
                            results.lock().unwrap_or_else(PoisonError::into_inner).0 = Some(bounds);
                        }
                        return;
                    }
                }
            });
        }
    });
    let (bounds, tallies) = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    let tallies = tallies.into_iter().flatten().collect::<Result<_, _>>()?;
    Ok((bounds.expect("a thread took the turn after the last contender's")?, tallies))
}

/// On a terminal only: indicatif draws nothing elsewhere.
fn bar(progress: &MultiProgress, trace: &Trace, name: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:<24} {wide_bar} {pos}/{len} requests, {eta} left");
    let bar = ProgressBar::new(trace.requests.len() as u64).with_message(name.to_owned());
    progress.add(if let Ok(style) = style { bar.with_style(style) } else { bar })
}
