use proptest::prelude::*;

use super::*;

const RULES: BreakerRules = BreakerRules {
    in_a_row: 5,
    share: 0.5,
    window_ms: 30_000,
    min_requests: 20,
    first_pause_ms: 1000,
    max_pause_ms: 30_000,
    trials: 3,
};

fn ends(breaker: &mut Breaker, ended: Ended, now_ms: u64) {
    let attempt = breaker.begin(now_ms);
    breaker.end(attempt, ended, &RULES, now_ms);
}

fn fails(breaker: &mut Breaker, times: u32, now_ms: u64) {
    (0..times).for_each(|_| ends(breaker, Ended::Failed(Failure::Broken), now_ms));
}

#[test]
fn failures_in_a_row_open_it_and_a_good_end_between_them_does_not() {
    let mut breaker = Breaker::default();
    fails(&mut breaker, 4, 0);
    ends(&mut breaker, Ended::Well, 0);
    fails(&mut breaker, 4, 0);
    ends(&mut breaker, Ended::Untold, 0);
    assert_eq!(breaker.stand(0), Stand::Closed);
    fails(&mut breaker, 1, 0);
    assert_eq!((breaker.stand(0), breaker.cause()), (Stand::Open { until_ms: 1000 }, Some(Failure::Broken)));
    assert!(!breaker.has_room(&RULES, 999) && breaker.has_room(&RULES, 1000));
}

#[test]
fn a_share_of_failures_opens_it_once_there_were_enough_and_what_is_old_is_forgotten() {
    let mut breaker = Breaker::default();
    let mut mixed = |times: u32, now_ms: u64| {
        for _ in 0..times {
            ends(&mut breaker, Ended::Well, now_ms);
            fails(&mut breaker, 1, now_ms);
        }
        breaker.stand(now_ms)
    };
    assert_eq!(mixed(9, 0), Stand::Closed);
    assert_eq!(mixed(9, 40_000), Stand::Closed, "what was before is out of the window");
    assert!(matches!(mixed(1, 41_000), Stand::Open { .. }));
}

#[test]
fn what_is_nobodys_request_is_a_trial_and_takes_no_place_of_one() {
    let mut breaker = Breaker::default();
    fails(&mut breaker, 5, 0);
    let rules = BreakerRules { trials: 1, ..RULES };
    let canary = breaker.begin_beside(1000);
    assert!(breaker.has_room(&rules, 1000), "a canary that hangs keeps no request from being tried");
    let request = breaker.begin(1000);
    assert!(!breaker.has_room(&rules, 1000));
    breaker.end(request, Ended::Untold, &rules, 1000);
    assert!(breaker.has_room(&rules, 1000));
    breaker.end(canary, Ended::Well, &rules, 1100);
    assert_eq!(breaker.stand(1100), Stand::Closed, "its token is as good as a request's");
    fails(&mut breaker, 5, 1200);
    let Stand::Open { until_ms } = breaker.stand(1200) else { panic!("it is open") };
    let canary = breaker.begin_beside(until_ms);
    breaker.end(canary, Ended::Failed(Failure::Timeout), &rules, until_ms);
    assert!(matches!(breaker.stand(until_ms), Stand::Open { .. }), "and so is its failure");
}

#[test]
fn nobody_there_opens_it_at_once_and_a_sign_of_life_closes_it() {
    let mut breaker = Breaker::default();
    ends(&mut breaker, Ended::Failed(Failure::Connect), 0);
    assert!(matches!(breaker.stand(0), Stand::Open { .. }));
    breaker.recover(10);
    assert_eq!(breaker.stand(10), Stand::Closed);
    // How often it failed is kept: the pause has doubled.
    ends(&mut breaker, Ended::Failed(Failure::Connect), 20);
    assert_eq!(breaker.stand(20), Stand::Open { until_ms: 2020 });
}

#[test]
fn half_open_it_tries_a_few_closes_when_they_do_well_and_opens_for_longer_when_one_does_not() {
    let mut breaker = Breaker::default();
    fails(&mut breaker, 5, 0);
    assert_eq!(breaker.stand(1000), Stand::HalfOpen);
    let mut trials: Vec<Attempt> = (0..3).map(|_| breaker.begin(1000)).collect();
    assert!(!breaker.has_room(&RULES, 1000));
    breaker.progress(&mut trials[0], &RULES, 1100);
    assert!(breaker.has_room(&RULES, 1100), "one that came to a token makes room");
    breaker.end(trials.remove(1), Ended::Failed(Failure::Stall), &RULES, 1200);
    assert_eq!(breaker.stand(1200), Stand::Open { until_ms: 3200 });
    // Those of before say nothing of what it is after.
    assert_eq!(breaker.stand(3200), Stand::HalfOpen);
    for attempt in trials {
        breaker.end(attempt, Ended::Well, &RULES, 3200);
    }
    assert_eq!(breaker.stand(3200), Stand::HalfOpen);
    (0..3).for_each(|_| ends(&mut breaker, Ended::Well, 3300));
    assert_eq!(breaker.stand(3300), Stand::Closed);
    // Well for long: it begins with the first pause again.
    fails(&mut breaker, 5, 40_000);
    assert_eq!(breaker.stand(40_000), Stand::Open { until_ms: 41_000 });
}

#[test]
fn one_that_serves_though_it_is_open_is_tried_at_once() {
    let mut breaker = Breaker::default();
    fails(&mut breaker, 5, 0);
    ends(&mut breaker, Ended::Failed(Failure::Broken), 10);
    assert_eq!(breaker.stand(10), Stand::Open { until_ms: 1000 }, "what fails then does not put it off");
    ends(&mut breaker, Ended::Well, 20);
    assert_eq!(breaker.stand(20), Stand::HalfOpen);
}

#[derive(Clone, Debug)]
enum Step {
    Wait(u64),
    Begin,
    Progress(prop::sample::Index),
    End(prop::sample::Index, Ended),
    Recover,
}

fn step() -> impl Strategy<Value = Step> {
    let ended =
        prop_oneof![Just(Ended::Well), Just(Ended::Untold), prop::sample::select(Failure::ALL.to_vec()).prop_map(Ended::Failed),];
    prop_oneof![
        2 => (0u64..5000).prop_map(Step::Wait),
        4 => Just(Step::Begin),
        1 => any::<prop::sample::Index>().prop_map(Step::Progress),
        4 => (any::<prop::sample::Index>(), ended).prop_map(|(which, ended)| Step::End(which, ended)),
        1 => Just(Step::Recover),
    ]
}

proptest! {
    /// Whatever happens: trials are bounded, a pause has its bounds, and it always comes to trials again.
    #[test]
    fn it_never_tries_more_than_it_may_and_never_stays_open(steps in prop::collection::vec(step(), 0..300)) {
        let (mut breaker, mut now_ms, mut running) = (Breaker::default(), 0u64, Vec::new());
        for step in steps {
            let before = breaker.stand(now_ms);
            match step {
                Step::Wait(ms) => now_ms += ms,
                Step::Begin if breaker.has_room(&RULES, now_ms) => running.push(breaker.begin(now_ms)),
                Step::Begin => {}
                Step::Progress(which) if !running.is_empty() => {
                    let at = which.index(running.len());
                    breaker.progress(&mut running[at], &RULES, now_ms);
                }
                Step::End(which, ended) if !running.is_empty() => {
                    let attempt = running.swap_remove(which.index(running.len()));
                    breaker.end(attempt, ended, &RULES, now_ms);
                }
                Step::Progress(_) | Step::End(..) => {}
                Step::Recover => breaker.recover(now_ms),
            }
            prop_assert!(breaker.running_trials <= RULES.trials);
            let counted = running.iter().filter(|attempt| attempt.is_trial && attempt.epoch == breaker.epoch).count();
            prop_assert_eq!(breaker.running_trials as usize, counted);
            if let Stand::Open { until_ms } = breaker.stand(now_ms) {
                prop_assert!(until_ms <= now_ms + RULES.max_pause_ms);
                if !matches!(before, Stand::Open { .. }) {
                    prop_assert!(until_ms >= now_ms + RULES.first_pause_ms);
                }
                prop_assert_eq!(breaker.clone().stand(until_ms), Stand::HalfOpen);
            }
        }
        // Left alone and doing well, it closes.
        now_ms += RULES.max_pause_ms;
        drop(running);
        breaker.running_trials = 0;
        (0..RULES.trials).for_each(|_| ends(&mut breaker, Ended::Well, now_ms));
        prop_assert_eq!(breaker.stand(now_ms), Stand::Closed);
    }

    /// Failures that are few among the good ones open nothing.
    #[test]
    fn a_few_failures_among_many_good_ends_open_nothing(gaps in prop::collection::vec(2u32..20, 1..60)) {
        let (mut breaker, mut now_ms) = (Breaker::default(), 0);
        for good in gaps {
            for _ in 0..good {
                ends(&mut breaker, Ended::Well, now_ms);
                now_ms += 10;
            }
            fails(&mut breaker, 1, now_ms);
            prop_assert_eq!(breaker.stand(now_ms), Stand::Closed);
        }
    }
}
