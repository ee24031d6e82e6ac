//! All time is made up here.

use super::*;

const TRAP: FaultCause = FaultCause::Trap;

fn standing() -> Standing {
    Standing::new(QuarantineLimits::default())
}

/// A call; `true` if it was let in.
fn call(standing: &Standing, now_ms: u64) -> bool {
    matches!(standing.ask(now_ms), Leave::Open)
}

fn fault(standing: &Standing, now_ms: u64) -> Option<Quarantine> {
    assert!(call(standing, now_ms), "it is asked at {now_ms}");
    standing.fault(TRAP, now_ms)
}

/// Faults alone, until it is quarantined.
#[track_caller]
fn quarantined(standing: &Standing, now_ms: u64) -> Quarantine {
    let quarantine = (0..8).find_map(|_| fault(standing, now_ms)).expect("eight faults are enough");
    assert!(!call(standing, now_ms));
    quarantine
}

#[track_caller]
fn trial(standing: &Standing, now_ms: u64) -> Trial<'_> {
    match standing.ask(now_ms) {
        Leave::Trial(trial) => trial,
        Leave::Open => panic!("it is open at {now_ms}"),
        Leave::Shut(cause) => panic!("it is {cause} at {now_ms}"),
    }
}

#[test]
fn eight_faults_in_ten_seconds_quarantine_and_seven_do_not() {
    let it = standing();
    for n in 0..7 {
        assert_eq!(fault(&it, 1000 + n * 1000), None, "fault {n}");
    }
    let quarantine = fault(&it, 8500).unwrap();
    assert_eq!((quarantine.faults, quarantine.calls, quarantine.cause), (8, 8, TRAP));
    assert_eq!((quarantine.backoff, quarantine.trial_ms), (Duration::from_secs(1), 9500));

    let slow = standing();
    assert!((0..100).all(|n| fault(&slow, n * 1500).is_none()), "seven in ten seconds are not enough, however long");
}

#[test]
fn a_small_share_of_calls_does_not_quarantine_however_many_faults_it_is() {
    let it = standing();
    for n in 0..100_000u64 {
        let now_ms = 1 + n / 10;
        if n % 11 == 10 {
            assert_eq!(fault(&it, now_ms), None, "call {n}");
        } else {
            assert!(call(&it, now_ms));
        }
    }
    // And a tenth does.
    let it = standing();
    let begins = (0..1000u64).find(|n| if n % 10 == 9 { fault(&it, n * 5).is_some() } else { !call(&it, n * 5) });
    assert_eq!(begins, Some(79), "with the eighth");
}

#[test]
fn calls_of_long_ago_do_not_hide_faults_of_now() {
    let it = standing();
    for n in 0..100_000 {
        assert!(call(&it, n / 100));
    }
    assert_eq!(quarantined(&it, 20_000).calls, 8);
}

#[test]
fn a_burst_among_many_good_calls_is_no_reason() {
    let it = standing();
    for n in 0..5000 {
        assert!(call(&it, 1000 + n));
    }
    assert!((0..100).all(|_| fault(&it, 6000).is_none()), "100 of 5,100 calls");
}

#[test]
fn what_is_not_the_policys_fault_is_not_held_against_it_and_does_not_dilute() {
    for cause in [FaultCause::Busy, FaultCause::HostStall, FaultCause::Instantiate] {
        let it = standing();
        for _ in 0..10_000 {
            assert!(call(&it, 5));
            assert_eq!(it.fault(cause, 5), None, "{cause}");
        }
        assert_eq!(quarantined(&it, 6).calls, 8, "{cause}");
        assert_eq!(it.calls(), 10_008);
    }
}

#[test]
fn one_request_at_a_time_tries_it_when_its_time_has_come() {
    let it = standing();
    let until = quarantined(&it, 100).trial_ms;
    assert!(matches!(it.ask(until - 1), Leave::Shut(FaultCause::Quarantined)));
    let running = trial(&it, until);
    assert!(matches!(it.ask(until + 5000), Leave::Shut(FaultCause::Quarantined)), "one at a time");
    let ended = running.passed().unwrap();
    assert_eq!((ended.since_ms, ended.failed_trials), (100, 0));
    assert!(call(&it, until) && it.quarantine().is_none());
    assert_eq!((it.quarantines(), it.skipped()), (1, 3));
}

#[test]
fn a_failed_trial_doubles_the_back_off_up_to_its_cap() {
    let it = standing();
    let mut due = quarantined(&it, 0).trial_ms;
    let mut backoffs = Vec::new();
    for _ in 0..8 {
        trial(&it, due).failed(FaultCause::Fuel);
        let quarantine = it.quarantine().unwrap();
        assert_eq!(quarantine.trial_ms, due + quarantine.backoff.as_millis() as u64);
        assert_eq!(quarantine.cause, FaultCause::Fuel);
        due = quarantine.trial_ms;
        backoffs.push(quarantine.backoff.as_secs());
    }
    assert_eq!(backoffs, [2, 4, 8, 16, 32, 60, 60, 60]);
    assert_eq!((it.quarantine().unwrap().failed_trials, it.quarantines()), (8, 1));
}

#[test]
fn a_trial_that_says_nothing_is_repeated_soon() {
    let it = standing();
    let mut due = quarantined(&it, 0).trial_ms;
    for _ in 0..3 {
        trial(&it, due).failed(TRAP);
        due = it.quarantine().unwrap().trial_ms;
    }
    drop(trial(&it, due));
    let quarantine = it.quarantine().unwrap();
    assert_eq!((quarantine.backoff.as_secs(), quarantine.failed_trials), (8, 3), "it is not held against the policy");
    assert_eq!(quarantine.trial_ms, due + 1000);
}

#[test]
fn the_back_off_grows_with_relapses_and_shrinks_with_healthy_stretches() {
    let it = standing();
    let mut now = 0;
    let mut relapse = |healthy_ms: u64| {
        now += healthy_ms;
        let quarantine = quarantined(&it, now);
        now = quarantine.trial_ms;
        trial(&it, now).passed().unwrap();
        quarantine.backoff.as_secs()
    };
    assert_eq!([relapse(0), relapse(5000), relapse(59_999), relapse(1)], [1, 2, 4, 8]);
    assert_eq!(relapse(60_000), 4, "one healthy minute");
    assert_eq!(relapse(125_000), 1, "two");
    assert_eq!(relapse(u64::from(u32::MAX) * 120_000), 1, "many");
}

#[test]
fn after_a_quarantine_the_count_begins_anew() {
    let it = standing();
    for n in 0..80u64 {
        assert!(call(&it, n));
    }
    let until = (0..20).find_map(|_| fault(&it, 100)).unwrap().trial_ms;
    trial(&it, until).passed().unwrap();
    assert!((0..7).all(|_| fault(&it, until + 1).is_none()));
    assert_eq!(fault(&it, until + 2).unwrap().calls, 8, "what it was asked before does not count");
}

#[test]
fn revoked_is_for_good_whatever_else_is_under_way() {
    let it = standing();
    let until = quarantined(&it, 0).trial_ms;
    let running = trial(&it, until);
    it.revoke();
    assert_eq!(running.passed(), None);
    assert!(matches!(it.ask(until + 1), Leave::Shut(FaultCause::Revoked)));
    assert!(it.is_revoked() && !it.is_open() && it.quarantine().is_none());

    let it = standing();
    let until = quarantined(&it, 0).trial_ms;
    let running = trial(&it, until);
    it.revoke();
    running.failed(TRAP);
    assert!(it.is_revoked());
    it.fault(TRAP, 1);
    assert!(it.is_revoked());
}

#[test]
fn threads_that_meet_at_a_due_trial_send_one() {
    let it = standing();
    let until = quarantined(&it, 0).trial_ms;
    // A trial lasts until all have asked.
    let admissions: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| it.ask(until))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(admissions.iter().filter(|admission| matches!(admission, Leave::Trial(_))).count(), 1);
}
