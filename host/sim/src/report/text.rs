//! The table: for a terminal, and its cells for the page.

use std::fmt::Write as _;

use super::{Report, Row, pools, service};

/// A column: what stands above it, what it says of a policy, and whether that is a time of this machine.
type Column = (&'static str, fn(&Row) -> String, bool);

const COLUMNS: &[Column] = &[
    ("TTFT mean", |row| format!("{:.1}", row.ttft.mean), false),
    ("p50", |row| format!("{:.1}", row.ttft.p50), false),
    ("p90", |row| format!("{:.1}", row.ttft.p90), false),
    ("p99", |row| format!("{:.1}", row.ttft.p99), false),
    ("ITL mean", |row| format!("{:.2}", row.itl.mean), false),
    ("p50", |row| format!("{:.2}", row.itl.p50), false),
    ("p90", |row| format!("{:.2}", row.itl.p90), false),
    ("p99", |row| format!("{:.2}", row.itl.p99), false),
    ("e2e mean", |row| format!("{:.0}", row.e2e.mean), false),
    ("p50", |row| format!("{:.0}", row.e2e.p50), false),
    ("p90", |row| format!("{:.0}", row.e2e.p90), false),
    ("p99", |row| format!("{:.0}", row.e2e.p99), false),
    (REUSE, |row| format!("{:.3}", row.reuse), false),
    ("tok/s", |row| format!("{:.0}", row.output_tokens_per_second), false),
    ("req/s", |row| format!("{:.2}", row.requests_per_second), false),
    ("max/mean", |row| format!("{:.3}", row.imbalance), false),
    ("busy", |row| format!("{:.3}", row.utilization), false),
    ("preempt", |row| row.preemptions.to_string(), false),
    ("fuel", |row| format!("{:.0}", row.fuel_per_decision), false),
    ("decisions/s", |row| format!("{:.0}", row.decisions as f64 / row.tally.deciding.as_secs_f64().max(1e-9)), true),
    ("wall s", |row| format!("{:.2}", row.tally.wall.as_secs_f64()), true),
];

const REUSE: &str = "reuse";

pub(super) fn table(report: &Report) -> String {
    let mut out = heading(report);
    out.push('\n');
    align(&mut out, &[cells(report, true), bound_lines(report, true)].concat());
    for table in pools::tables(report).into_iter().chain(service::table(report)) {
        out.push('\n');
        align(&mut out, &table);
    }
    for note in report.policies.iter().flat_map(notes) {
        let _ = writeln!(out, "{note}");
    }
    out
}

/// What was simulated.
pub(super) fn heading(report: &Report) -> String {
    let Report { trace, requests, speed, workers, seed, engine, .. } = report;
    let (blocks, size, roles, admission) =
        (engine.kv_blocks, engine.block_size, pools::roles(report), service::admission(report));
    format!(
        "{trace}: {requests} requests at {speed}× on {workers} workers{roles} of {blocks} blocks of {size} tokens{admission}, seed {seed}; times in ms"
    )
}

fn columns(with_times: bool) -> impl Iterator<Item = &'static Column> {
    COLUMNS.iter().filter(move |(.., is_time)| with_times || !is_time)
}

/// What stands above the columns, then a line for each policy; with the times of this machine if they are wanted.
pub(super) fn cells(report: &Report, with_times: bool) -> Vec<Vec<String>> {
    let line = |first: &str, cell: &dyn Fn(&Column) -> String| {
        std::iter::once(first.to_owned()).chain(columns(with_times).map(cell)).collect()
    };
    let heads = line("policy", &|(name, ..)| (*name).to_owned());
    let rows = report.policies.iter().map(|row| line(&row.name, &|(_, cell, _)| cell(row)));
    std::iter::once(heads).chain(rows).collect()
}

/// Lines of the same table for the bounds, with most of their cells empty.
pub(super) fn bound_lines(report: &Report, with_times: bool) -> Vec<Vec<String>> {
    let bounds = [("bound: pooled LRU", &report.bounds.pooled), ("bound: infinite cache", &report.bounds.infinite)];
    let line = |(name, bound): (&str, &crate::bounds::Bound)| {
        let ttft = [bound.ttft.mean, bound.ttft.p50, bound.ttft.p90, bound.ttft.p99].map(|ms| format!("{ms:.1}"));
        let cell = |(at, (name, ..)): (usize, &Column)| match ttft.get(at) {
            Some(ttft) => ttft.clone(),
            None if *name == REUSE => format!("{:.3}", bound.reuse),
            None => String::new(),
        };
        std::iter::once(name.to_owned()).chain(columns(with_times).enumerate().map(cell)).collect()
    };
    bounds.into_iter().map(line).collect()
}

/// The first column to the left, numbers to the right.
fn align(out: &mut String, lines: &[Vec<String>]) {
    let width = |at: usize| lines.iter().map(|line| line[at].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
    for line in lines {
        let _ = write!(out, "{:<width$}", line[0], width = widths[0]);
        for (cell, width) in line.iter().zip(&widths).skip(1) {
            let _ = write!(out, "  {cell:>width$}");
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
    }
}

/// What a reader must know who sees only the figures.
pub(super) fn notes(row: &Row) -> Vec<String> {
    let rejected =
        (row.rejected > 0).then(|| format!("{}: it refused {} requests; their latencies do not count", row.name, row.rejected));
    let fallbacks = row.fallbacks.iter();
    let fallbacks =
        fallbacks.map(|(cause, count)| format!("{}: {count} decisions were the native fallback's, cause {cause}", row.name));
    let refused = (row.refused_blocks > 0).then(|| {
        format!("{}: the prefix index had no room for {} blocks, so that it saw too little reuse", row.name, row.refused_blocks)
    });
    rejected.into_iter().chain(fallbacks).chain(refused).chain(service::notes(row)).collect()
}
