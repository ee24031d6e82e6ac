//! Reports of whole comparisons.

use dynamo_host_sim::{Report, bounds::bounds, report::Row};

use crate::*;

fn report(seed: u64) -> Report {
    let trace = Trace::open("synthetic:requests=400,rate=8,prefixes=5,prefix_tokens=640,input=200,output=20", seed).unwrap();
    let options = Options { seed, ..options(4) };
    let contenders = [native(), component("policies", "power-of-two", "{}"), component("guests", "kv-cost", "{}")];
    Report {
        trace: trace.name.clone(),
        requests: trace.requests.len() as u64,
        workers: 4,
        speed: 1.0,
        seed,
        engine: profile(),
        bounds: bounds(&trace, &options.workers).unwrap(),
        policies: contenders.iter().map(|contender| Row::new(run(&trace, &options, contender))).collect(),
    }
}

#[test]
fn the_same_seed_writes_the_same_bytes_and_another_one_does_not() {
    let (one, same, other) = (report(1), report(1), report(2));
    assert_eq!((one.json(), one.html()), (same.json(), same.html()));
    assert_ne!(one.json(), other.json());
}

#[test]
fn nobody_beats_the_bounds() {
    let report = report(3);
    for row in &report.policies {
        assert!(row.reuse <= report.bounds.infinite.reuse + 0.05, "{} {}", row.name, row.reuse);
        assert!(row.ttft.mean >= report.bounds.infinite.ttft.mean, "{} {}", row.name, row.ttft.mean);
    }
}

#[test]
fn a_page_needs_nothing_from_elsewhere_and_names_every_policy() {
    let report = report(1);
    let page = report.html();
    for elsewhere in ["http://", "https://", "<script", "src=", "@import", "url("] {
        assert!(!page.contains(elsewhere), "{elsewhere}");
    }
    for row in &report.policies {
        assert!(page.contains(&format!("<td>{}</td>", row.name)));
    }
    assert!(!page.contains("NaN") && page.matches("<svg").count() == 2 + report.policies.len());
}

#[test]
fn the_table_has_the_bounds_and_the_times_of_this_machine() {
    let table = report(1).table();
    for part in ["TTFT mean", "decisions/s", "bound: pooled LRU", "bound: infinite cache", "power-of-two", "4 workers"] {
        assert!(table.contains(part), "{part}\n{table}");
    }
}
