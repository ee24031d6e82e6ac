//! A Grafana dashboard with a panel for every metric, made from the table of metrics: none can be missing, none can be of a
//! metric that is no more.

use serde_json::{Value, json};

use crate::meters::{Kind, METRICS};

/// Labels that Prometheus adds: panels sum over them, and keep the metric's own.
const SUMMED_OVER: &str = "instance, job, namespace, pod";
/// Columns of a dashboard, and of each of its panels.
const WIDTH: usize = 24;
const PANEL: (usize, usize) = (8, 7);

/// Sections, by what the names of their metrics contain; the last takes the rest.
const SECTIONS: &[(&str, &[&str])] = &[
    ("Policies", &["_policy_"]),
    ("Prefill and decode", &["_handoff", "_prefill_where", "_disaggregation", "_links_"]),
    ("Workers and the host itself", &["_worker", "_stage_", "_connections", "_task_"]),
    ("Requests", &[""]),
];

/// The dashboard, as a file that Grafana imports.
pub(super) fn json() -> String {
    let mut panels = Vec::new();
    let mut y = 0;
    for (title, section) in sections() {
        panels.push(json!({ "type": "row", "title": title, "collapsed": false, "panels": [], "id": panels.len() + 1,
            "gridPos": { "x": 0, "y": y, "w": WIDTH, "h": 1 } }));
        y += 1;
        let in_a_line = WIDTH / PANEL.0;
        for (at, (name, kind, help)) in section.iter().enumerate() {
            let place = json!({ "x": at % in_a_line * PANEL.0, "y": y + at / in_a_line * PANEL.1, "w": PANEL.0, "h": PANEL.1 });
            panels.push(panel(panels.len() + 1, name, kind, help, place));
        }
        y += section.len().div_ceil(in_a_line) * PANEL.1;
    }
    let datasource = json!({ "name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus" });
    let dashboard = json!({
        "title": "dynamo-host",
        "uid": "dynamo-host",
        "description": "Every metric of dynamo-host. Made by `cargo xtask dashboard`.",
        "tags": ["dynamo-host", "llm"],
        "schemaVersion": 39,
        "editable": true,
        "refresh": "30s",
        "time": { "from": "now-1h", "to": "now" },
        "templating": { "list": [datasource] },
        "panels": panels,
    });
    format!("{dashboard:#}\n")
}

type Metric = (&'static str, &'static Kind, &'static str);

/// Each section with its metrics, the requests first.
fn sections() -> Vec<(&'static str, Vec<Metric>)> {
    let mut sections: Vec<(&str, Vec<Metric>)> = SECTIONS.iter().map(|(title, _)| (*title, Vec::new())).collect();
    for (name, kind, help) in METRICS {
        let of = |(_, parts): &(&str, &[&str])| parts.iter().any(|part| name.contains(part));
        let section = SECTIONS.iter().position(of).unwrap_or(SECTIONS.len() - 1);
        sections[section].1.push((name, kind, help));
    }
    sections.rotate_right(1);
    sections
}

fn panel(id: usize, name: &str, kind: &Kind, help: &str, place: Value) -> Value {
    let rate = |series: &str| format!("sum without ({SUMMED_OVER}) (rate({series}[$__rate_interval]))");
    let quantile = |quantile: f64| format!("histogram_quantile({quantile}, {})", rate(&format!("{name}_bucket")));
    let queries = match kind {
        Kind::Counter => vec![("__auto", rate(name))],
        Kind::Gauge => vec![("__auto", format!("sum without ({SUMMED_OVER}) ({name})"))],
        Kind::Histogram(_) => vec![("p50 {{stage}}{{policy}}", quantile(0.5)), ("p99 {{stage}}{{policy}}", quantile(0.99))],
    };
    let unit = match kind {
        Kind::Histogram(_) if name.ends_with("_seconds") => "s",
        Kind::Counter => "cps",
        _ => "short",
    };
    let datasource = json!({ "type": "prometheus", "uid": "${datasource}" });
    let target = |(at, (legend, query)): (u8, (&str, String))| json!({ "refId": char::from(b'A' + at).to_string(), "expr": query, "legendFormat": legend, "datasource": datasource });
    let targets: Vec<_> = (0..).zip(queries).map(target).collect();
    let title = name.trim_start_matches("dynamo_host_").trim_end_matches("_total").replace('_', " ");
    json!({
        "id": id,
        "type": "timeseries",
        "title": title,
        "description": help,
        "datasource": datasource,
        "gridPos": place,
        "targets": targets,
        "fieldConfig": { "defaults": { "unit": unit, "min": 0 }, "overrides": [] },
        "options": { "legend": { "displayMode": "list", "placement": "bottom" }, "tooltip": { "mode": "multi" } },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dashboard_of_the_repository_is_that_of_these_metrics() {
        let committed = include_str!("../../../dist/grafana.json");
        assert!(json() == committed, "dist/grafana.json is not up to date; run: cargo xtask dashboard");
    }

    #[test]
    fn every_metric_has_one_panel_and_every_panel_a_metric() {
        let dashboard: Value = serde_json::from_str(&json()).unwrap();
        let panels = dashboard["panels"].as_array().unwrap();
        let mut shown: Vec<&str> = Vec::new();
        for panel in panels.iter().filter(|panel| panel["type"] != "row") {
            let expression = panel["targets"][0]["expr"].as_str().unwrap();
            let names = METRICS.iter().map(|(name, ..)| *name);
            // The longest, since names begin alike.
            shown.extend(names.filter(|name| expression.contains(name)).max_by_key(|name| name.len()));
        }
        let mut all: Vec<&str> = METRICS.iter().map(|(name, ..)| *name).collect();
        all.sort_unstable();
        shown.sort_unstable();
        assert_eq!(shown, all);
    }

    #[test]
    fn panels_do_not_overlap() {
        let dashboard: Value = serde_json::from_str(&json()).unwrap();
        let mut places: Vec<_> =
            dashboard["panels"].as_array().unwrap().iter().map(|panel| panel["gridPos"].to_string()).collect();
        let count = places.len();
        places.sort();
        places.dedup();
        assert_eq!(places.len(), count);
    }
}
