//! Faults as they are told and drawn.

use super::*;

#[track_caller]
fn check_refused(body: &str, expected: &str) {
    let error = Faults::from_json(body.as_bytes()).unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
}

#[test]
fn faults_are_read_as_they_are_written() {
    let faults = Faults::from_json(br#"{"cut": 3, "share": 0.5, "refuse": "draining", "content_type": "text/html"}"#).unwrap();
    let expected = Faults {
        cut: Some(3),
        share: 0.5,
        refuse: Some(Refusal::Draining),
        content_type: Some("text/html".to_owned()),
        ..Faults::default()
    };
    assert_eq!(faults, expected);
    assert_eq!(Faults::from_json(faults.to_json().to_string().as_bytes()), Ok(faults));
    assert_eq!(Faults::from_json(b"{}"), Ok(Faults::default()));
    let mut by_text = Faults::default();
    for (key, value) in [("cut", "3"), ("share", "0.5"), ("refuse", "draining"), ("content_type", "text/html")] {
        by_text.set(key, value).unwrap();
    }
    assert_eq!(by_text, expected);
    by_text.set("stall_on_stop", "true").unwrap();
    assert!(by_text.stall_on_stop);
}

#[test]
fn faults_that_cannot_be_say_what_can() {
    check_refused("[]", "not a JSON object of mock engine faults");
    check_refused("{oops", "{} heals it, the keys are content_type, cut, cut_character, die,");
    check_refused(r#"{"fire": 1}"#, "\"fire\" is not known; use content_type, cut,");
    check_refused(r#"{"die": -1}"#, "die=-1 is not possible");
    check_refused(r#"{"share": 1.5}"#, "share=1.5 is not possible; use a number from 0 to 1");
    check_refused(r#"{"slow": 0.5}"#, "slow=0.5 is not possible; use a factor from 1");
    check_refused(r#"{"refuse": "rudely"}"#, "dead_core");
}

fn struck(faults: Faults, requests: usize) -> Vec<bool> {
    let switches = Switches::new(faults);
    (0..requests).map(|_| switches.strike(Target::Request).faults().is_some()).collect()
}

#[test]
fn a_share_of_requests_is_struck_the_same_in_every_run() {
    let faults = |seed| Faults { share: 0.25, cut: Some(1), seed, ..Faults::default() };
    let first = struck(faults(1), 4000);
    assert_eq!(struck(faults(1), 4000), first);
    assert_ne!(struck(faults(2), 4000), first);
    let share = first.iter().filter(|&&is_struck| is_struck).count();
    assert!((900..1100).contains(&share), "{share} of 4000");
    assert_eq!(struck(Faults { share: 0.0, ..faults(1) }, 100), [false; 100]);
    assert_eq!(struck(Faults { share: 1.0, ..faults(1) }, 100), [true; 100]);
}

#[test]
fn only_the_next_requests_are_struck_and_setting_faults_counts_anew() {
    let switches = Switches::new(Faults { next: Some(2), end: Some(0), ..Faults::default() });
    let two = || [(); 4].map(|()| switches.strike(Target::Request).faults().is_some());
    assert_eq!((two(), switches.struck()), ([true, true, false, false], 2));
    switches.set(Faults { next: Some(1), end: Some(0), ..Faults::default() });
    assert_eq!((two(), switches.struck()), ([true, false, false, false], 1));
    switches.set(Faults::default());
    assert_eq!(two(), [false; 4]);
}

#[test]
fn faults_of_the_engine_strike_no_request() {
    for faults in [
        Faults { die: Some(0), ..Faults::default() },
        Faults { hang: Some(0), unhealthy: true, ..Faults::default() },
        Faults { slow: 3.0, stall_on_stop: true, ..Faults::default() },
    ] {
        assert_eq!(struck(faults, 3), [false; 3]);
    }
}

#[test]
fn who_was_told_to_die_before_it_knew_how_dies_then() {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    static DIED: AtomicBool = AtomicBool::new(false);
    let switches = Switches::new(Faults { die: Some(0), ..Faults::default() });
    switches.die_with(|| DIED.store(true, Relaxed));
    assert!(DIED.load(Relaxed));
}
