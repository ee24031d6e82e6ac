//! Policies decide as in a host: over the same columns, told of the same outcomes, within the same bounds.

use dynamo_host_sim::report::Row;

use crate::*;

/// A prompt that both workers could take, again and again when it is done.
fn repeated() -> Trace {
    trace(&[(0, &[(1, 640)], 1), (0, &[(2, 640)], 1), (2000, &[(1, 640), (3, 64)], 1), (4000, &[(1, 640), (4, 64)], 1)])
}

#[test]
fn a_policy_reads_what_engines_have_cached_after_their_events_have_come() {
    let kv_cost = component("guests", "kv-cost", "{}");
    let row = Row::new(run(&repeated(), &options(2), &kv_cost));
    assert_eq!((row.reuse, row.served), (2.0 * 640.0 / 2688.0, 4));
    // With events that come after all is over, it knows of nothing: the third and the fourth request take turns.
    let late = Options { kv_event_lag: Duration::from_secs(60), ..options(2) };
    let unaware = Row::new(run(&repeated(), &late, &component("policies", "round-robin", "{}")));
    assert!(unaware.reuse < row.reuse, "{}", unaware.reuse);
    assert!(row.fuel_per_decision > 0.0);
}

#[test]
fn round_robin_takes_turns() {
    let requests: Vec<Line<'_>> = vec![(0, &[(1, 100)], 1); 12];
    let tally = run(&trace(&requests), &options(4), &component("policies", "round-robin", "{}"));
    assert_eq!(tally.imbalance(), 1.0);
    assert_eq!((tally.decisions, tally.policy.split_once('@').unwrap().0), (12, "round-robin"));
}

/// At every request, since none of a trace says what its output may be at most.
fn hostile(mode: &str) -> Contender {
    // Not at the probe, which comes when virtual time begins.
    let settings = r#"{"mode": "MODE", "at_max_output_tokens": 4294967295, "from_unix_ms": 1700000000001}"#;
    component("guests", "hostile", &settings.replace("MODE", mode))
}

#[test]
fn a_request_that_is_held_is_asked_for_again_and_decided_natively_in_the_end() {
    let tally = run(&trace(&[(1, &[(1, 100)], 1)]), &options(1), &hostile("hold"));
    let fallbacks: Vec<_> = tally.fallbacks.iter().map(|(cause, count)| (cause.as_str(), *count)).collect();
    assert_eq!((fallbacks, tally.decisions), (vec![("hold-exhausted", 1)], 9));
    // Eight times held for a millisecond.
    assert_eq!(Row::new(tally).ttft.mean, 208.0);
}

#[test]
fn a_request_that_is_refused_is_counted_and_the_run_goes_on() {
    let row = Row::new(run(&trace(&[(1, &[(1, 100)], 1), (5, &[(1, 100)], 1)]), &options(1), &hostile("reject")));
    assert_eq!((row.rejected, row.served, row.decisions), (2, 0, 2));
}

#[test]
fn a_policy_that_fails_is_named_by_cause_and_the_native_fallback_serves() {
    let requests: Vec<Line<'_>> = (0..40).map(|nth| (nth * 300 + 1, &[(1, 100)][..], 1)).collect();
    let row = Row::new(run(&trace(&requests), &options(2), &hostile("out-of-range")));
    assert_eq!((row.served, row.fallbacks.values().sum::<u64>()), (40, 40));
    assert!(row.fallbacks["answer-out-of-range"] >= 8 && row.fallbacks["quarantined"] > 0, "{:?}", row.fallbacks);
}

#[test]
fn a_component_that_no_host_would_take_ends_the_run_before_it_begins() {
    let broken = Contender { name: "broken".to_owned(), policy: Some((b"hello".to_vec(), "{}".to_owned())) };
    let error = dynamo_host_sim::simulate(&repeated(), &options(1), &broken, &|_| ()).unwrap_err().to_string();
    assert!(error.contains("policy broken: this is not WebAssembly"), "{error}");
}
