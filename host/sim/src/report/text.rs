//! The table for a terminal.

use std::fmt::Write as _;

use super::{Report, Row};

/// A column: what stands above it, and what it says of a policy.
type Column = (&'static str, fn(&Row) -> String);

const COLUMNS: &[Column] = &[
    ("TTFT mean", |row| format!("{:.1}", row.ttft.mean)),
    ("p50", |row| format!("{:.1}", row.ttft.p50)),
    ("p90", |row| format!("{:.1}", row.ttft.p90)),
    ("p99", |row| format!("{:.1}", row.ttft.p99)),
    ("ITL mean", |row| format!("{:.2}", row.itl.mean)),
    ("p50", |row| format!("{:.2}", row.itl.p50)),
    ("p90", |row| format!("{:.2}", row.itl.p90)),
    ("p99", |row| format!("{:.2}", row.itl.p99)),
    ("e2e mean", |row| format!("{:.0}", row.e2e.mean)),
    ("p99", |row| format!("{:.0}", row.e2e.p99)),
    ("reuse", |row| format!("{:.3}", row.reuse)),
    ("tok/s", |row| format!("{:.0}", row.output_tokens_per_second)),
    ("req/s", |row| format!("{:.2}", row.requests_per_second)),
    ("max/mean", |row| format!("{:.3}", row.imbalance)),
    ("busy", |row| format!("{:.3}", row.utilization)),
    ("preempt", |row| row.preemptions.to_string()),
    ("fuel", |row| format!("{:.0}", row.fuel_per_decision)),
    ("decisions/s", |row| format!("{:.0}", row.decisions as f64 / row.tally.deciding.as_secs_f64().max(1e-9))),
    ("wall s", |row| format!("{:.2}", row.tally.wall.as_secs_f64())),
];

pub(super) fn table(report: &Report) -> String {
    let mut out = String::new();
    let engine = &report.engine;
    let _ = writeln!(
        out,
        "{}: {} requests at {}× on {} workers of {} blocks × {} tokens, seed {}; times in ms",
        report.trace, report.requests, report.speed, report.workers, engine.kv_blocks, engine.block_size, report.seed
    );
    let mut lines = vec![std::iter::once("policy").chain(COLUMNS.iter().map(|(name, _)| *name)).map(str::to_owned).collect()];
    for row in &report.policies {
        lines.push(std::iter::once(row.name.clone()).chain(COLUMNS.iter().map(|(_, cell)| cell(row))).collect());
    }
    for (name, bound) in [("bound: pooled LRU", &report.bounds.pooled), ("bound: infinite", &report.bounds.infinite)] {
        let mut line: Vec<String> = vec![String::new(); COLUMNS.len() + 1];
        line[0] = name.to_owned();
        let ttft = [bound.ttft.mean, bound.ttft.p50, bound.ttft.p90, bound.ttft.p99];
        line[1..5].iter_mut().zip(ttft).for_each(|(cell, value)| *cell = format!("{value:.1}"));
        line[11] = format!("{:.3}", bound.reuse);
        lines.push(line);
    }
    align(&mut out, &lines);
    for row in &report.policies {
        notes(&mut out, row);
    }
    out
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
fn notes(out: &mut String, row: &Row) {
    if row.rejected > 0 {
        let _ = writeln!(out, "{}: it refused {} requests; their latencies do not count", row.name, row.rejected);
    }
    for (cause, count) in &row.fallbacks {
        let _ = writeln!(out, "{}: {count} decisions were the native fallback's, cause {cause}", row.name);
    }
}
