//! The page: the table, and plots of latencies and of the load over time. It needs nothing from elsewhere.

use std::fmt::Write as _;

use super::{
    Report, Row,
    plot::{Line, Plot, escape},
    pools, service,
    text::{bound_lines, cells, heading, notes},
};
use crate::samples::Share;

/// Up to so many workers each have a line of their own.
const OWN_LINES: usize = 32;

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #667; --rule: #dde; --paper: #fff }
@media (prefers-color-scheme: dark) { :root { --ink: #eee; --soft: #99a; --rule: #334; --paper: #16161a } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1100px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { color: var(--soft); font-weight: 600 } tr.bound td { color: var(--soft) }
svg { width: 100%; max-width: 860px; display: block } svg text { font-size: 11px; fill: var(--soft) }
svg .title { font-size: 13px; font-weight: 600; fill: var(--ink) } svg .grid { stroke: var(--rule); fill: none }
.legend { font-size: 13px; margin: .2rem 0 1.5rem } .legend span { margin-right: 1.2rem } .legend i { display: inline-block; width: 1.4rem; margin-right: .4rem; vertical-align: middle }
pre { font-size: 12px; overflow-x: auto }
";

pub(super) fn page(report: &Report) -> String {
    let title = format!("Simulation of {}", report.trace);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{}</title><style>{STYLE}</style>\n<h1>{}</h1>\n",
        escape(&title),
        escape(&title)
    );
    let _ = writeln!(out, "<p>{}</p>", escape(&heading(report)));
    table(&mut out, &[cells(report, false), bound_lines(report, false)].concat(), report.policies.len());
    for cells in pools::tables(report).into_iter().chain(service::table(report)) {
        table(&mut out, &cells, usize::MAX);
    }
    for row in &report.policies {
        notes(row).iter().for_each(|note| _ = writeln!(out, "<p>{}</p>", escape(note)));
    }
    let _ = writeln!(
        out,
        "<h2>Latencies</h2>\n{}\n{}",
        latency(report, "Time to first token", |row| &row.ttft_shares, true),
        latency(report, "Time between tokens", |row| &row.itl_shares, false)
    );
    let _ = writeln!(out, "<h2>Requests in flight on each worker, over time</h2>");
    for (colour, row) in report.policies.iter().enumerate() {
        let _ = writeln!(out, "{}", load(row, colour));
    }
    let engine = serde_json::to_string_pretty(&report.engine).unwrap_or_default();
    let _ = writeln!(out, "<h2>Engine of the first worker</h2>\n<pre>{}</pre>\n</html>", escape(&engine));
    out
}

/// A head, so many lines, and then bounds.
fn table(out: &mut String, lines: &[Vec<String>], count: usize) {
    out.push_str("<div class=\"wide\"><table>\n");
    for (at, line) in lines.iter().enumerate() {
        let cell = if at == 0 { "th" } else { "td" };
        out.push_str(if at > count { "<tr class=\"bound\">" } else { "<tr>" });
        line.iter().for_each(|text| _ = write!(out, "<{cell}>{}</{cell}>", escape(text)));
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n");
}

/// The share of requests or tokens that took at most so long, for each policy; with the bounds, if they are of that.
fn latency(report: &Report, title: &str, of: fn(&Row) -> &Vec<Share>, with_bounds: bool) -> String {
    let points = |shares: &[Share]| shares.iter().map(|share| (share.ms, share.percent)).collect();
    let mut lines: Vec<Line<'_>> = Vec::new();
    for (colour, row) in report.policies.iter().enumerate() {
        lines.push(Line { name: Some(&row.name), points: points(of(row)), colour, is_dashed: false });
    }
    if with_bounds {
        let bound = &report.bounds.pooled.ttft;
        let quantiles = [(bound.p50, 50.0), (bound.p90, 90.0), (bound.p99, 99.0), (bound.max, 100.0)];
        lines.push(Line { name: Some("bound: pooled LRU"), points: quantiles.into(), colour: 6, is_dashed: true });
    }
    Plot { title, x: "milliseconds", y: "% took at most that", is_log: true, lines }.svg()
}

/// Requests in flight: a thin line for each worker of a small fleet, the mean and the extremes of a large one.
fn load(row: &Row, colour: usize) -> String {
    let tally = row.tally();
    let workers = tally.busy.len();
    let at = |nth: usize| (tally.sample_every * nth as u32).as_secs_f64();
    let over = |of: &dyn Fn(&[u32]) -> f64| -> Vec<(f64, f64)> {
        tally.load.iter().enumerate().map(|(nth, loads)| (at(nth), of(loads))).collect()
    };
    let mut lines: Vec<Line<'_>> = Vec::new();
    if workers <= OWN_LINES {
        for worker in 0..workers {
            let points = over(&|loads| f64::from(loads[worker]));
            lines.push(Line { name: None, points, colour: worker, is_dashed: false });
        }
    } else {
        let extreme = |name, points| Line { name: Some(name), points, colour: 6, is_dashed: true };
        lines.push(extreme("most", over(&|loads| f64::from(loads.iter().copied().max().unwrap_or(0)))));
        lines.push(extreme("least", over(&|loads| f64::from(loads.iter().copied().min().unwrap_or(0)))));
    }
    let mean = over(&|loads| loads.iter().map(|&load| f64::from(load)).sum::<f64>() / workers.max(1) as f64);
    lines.push(Line { name: Some("mean"), points: mean, colour, is_dashed: false });
    Plot { title: &row.name, x: "seconds", y: "requests", is_log: false, lines }.svg()
}
