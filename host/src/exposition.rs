//! The page of metrics: what the exporter has, and what has the name of a worker.
//!
//! The exporter keeps each label for ever, and pods come under new names for ever. So what is labelled by worker is read from
//! the roster when it is asked for: it is there for as long as its worker. Rejected: the exporter's idle time-out, which holds for all
//! metrics of a kind, begins those of quiet workers anew, and looks at scrapes only.

use std::{fmt::Write as _, sync::Arc};

use metrics_exporter_prometheus::PrometheusHandle;

use crate::{
    meters::{Kind, METRICS},
    roster::{Roster, WorkerTally},
};

/// Renders the page of metrics.
#[derive(Clone)]
pub(crate) struct Exposition {
    prometheus: PrometheusHandle,
    roster: Arc<Roster>,
}

impl Exposition {
    pub(crate) fn new(prometheus: PrometheusHandle, roster: Arc<Roster>) -> Self {
        Self { prometheus, roster }
    }

    /// In Prometheus' text format.
    pub(crate) fn render(&self) -> String {
        let mut page = self.prometheus.render();
        write_workers(&mut page, &self.roster.tallies());
        page
    }
}

fn write_workers(page: &mut String, tallies: &[WorkerTally]) {
    let requests = tallies.iter().map(|tally| (tally.worker.as_str(), tally.requests));
    write_family(page, "dynamo_host_worker_requests_total", requests);
    let breakers = tallies.iter().filter_map(|tally| Some((tally.worker.as_str(), tally.breaker?.into())));
    write_family(page, "dynamo_host_worker_breaker", breakers);
}

/// Writes one metric of many workers; nothing where there are none.
fn write_family<'a>(page: &mut String, name: &str, workers: impl Iterator<Item = (&'a str, u64)>) {
    let mut workers = workers.peekable();
    if workers.peek().is_none() {
        return;
    }
    let (_, kind, help) = METRICS.iter().find(|(known, ..)| *known == name).expect("it is in the table of metrics");
    let kind = if matches!(kind, Kind::Counter) { "counter" } else { "gauge" };
    let _ = write!(page, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    for (worker, value) in workers {
        let _ = writeln!(page, "{name}{{worker=\"{}\"}} {value}", escaped(worker));
    }
    page.push('\n');
}

/// A label's value as the text format wants it.
fn escaped(value: &str) -> String {
    value.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_worker_is_a_sample_and_breakers_only_of_those_that_ever_opened() {
        let tally = |worker: &str, requests, breaker| WorkerTally { worker: worker.to_owned(), requests, breaker };
        let mut page = String::new();
        write_workers(&mut page, &[tally("a", 3, None), tally("b \"\\\n", 0, Some(2))]);
        let samples: Vec<&str> = page.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).collect();
        let expected = [
            r#"dynamo_host_worker_requests_total{worker="a"} 3"#,
            r#"dynamo_host_worker_requests_total{worker="b \"\\\n"} 0"#,
            r#"dynamo_host_worker_breaker{worker="b \"\\\n"} 2"#,
        ];
        assert_eq!(samples, expected);
        assert!(page.contains("# TYPE dynamo_host_worker_requests_total counter\n"));
        assert!(page.contains("# TYPE dynamo_host_worker_breaker gauge\n"));
        page.clear();
        write_workers(&mut page, &[]);
        assert_eq!(page, "");
    }
}
