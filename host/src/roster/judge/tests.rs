//! Who is a candidate after what requests did, and who waits for whom.

use dynamo_host_core::{Endpoint, RequestFacts, column::U32Column, load::InFlight};
use dynamo_host_flow::{Ended, Failure};
use dynamo_host_index::PrefixIndexes;

use super::*;
use crate::{
    clock::Clock,
    config::HealthConfig,
    discovery::{Found, Origin},
    roster::{Attempt, Outcome},
};

/// A roster of engines of model `m` that all answer.
fn roster(names: &[&str]) -> Arc<Roster> {
    let roster = Roster::new(Clock::start(), 16, PrefixIndexes::new(), None);
    let workers = names.iter().map(|name| format!("http://h:1,name={name},model=m").parse().unwrap()).collect();
    roster.apply(&Origin::configuration(), Found { workers, problems: Vec::new() });
    for name in names {
        let member = Arc::clone(&roster.members()[*name]);
        roster.settle(&member, Ok(()), true);
    }
    roster.publish();
    roster
}

fn candidates(roster: &Roster) -> Vec<String> {
    let found = roster.snapshot().candidates(&RequestFacts::new("id", "m", Endpoint::Completions)).unwrap();
    let mut names: Vec<_> = found.iter().map(|worker| worker.spec.name.clone()).collect();
    names.sort();
    names
}

fn attempt(roster: &Arc<Roster>, name: &str) -> Attempt {
    let snapshot = roster.snapshot();
    let worker = snapshot.fleet.workers().iter().find(|worker| worker.spec.name == name).unwrap();
    roster.attempt(&snapshot, worker.id)
}

fn ends(roster: &Arc<Roster>, name: &str, ended: Ended, itl_ms: f32) {
    attempt(roster, name).end(Outcome { ended, ttft_ms: f32::NAN, itl_ms, uncached_tokens: 0 });
}

fn trip(roster: &Arc<Roster>, name: &str) {
    (0..5).for_each(|_| ends(roster, name, Ended::Failed(Failure::Broken), f32::NAN));
    roster.publish();
}

fn state(roster: &Roster, name: &str) -> WorkerState {
    roster.report_of(name).unwrap()[0].state
}

fn with(change: impl FnOnce(&mut HealthConfig)) -> HealthConfig {
    let mut health = HealthConfig::default();
    change(&mut health);
    health
}

#[test]
fn one_whose_breaker_is_open_is_no_candidate_and_where_all_are_all_are_tried() {
    let roster = roster(&["a", "b"]);
    trip(&roster, "a");
    assert_eq!((candidates(&roster), state(&roster, "a")), (vec!["b".to_owned()], WorkerState::Tripped));
    assert!(roster.report_of("a").unwrap()[0].trouble.as_ref().unwrap().contains("broken answers"));
    trip(&roster, "b");
    assert_eq!(candidates(&roster), ["a", "b"]);
    let all = roster.snapshot().candidates(&RequestFacts::new("id", "m", Endpoint::Completions)).unwrap();
    assert_eq!(*all.u32_column(U32Column::State, 0), [1, 1], "policies see that they are suspect");
}

#[test]
fn a_half_open_one_is_a_candidate_until_it_has_its_trials_and_healthy_after_them() {
    let roster = roster(&["a", "b"]);
    roster.set_health(with(|health| health.breaker.pause_ms = 1));
    trip(&roster, "a");
    while state(&roster, "a") != WorkerState::Suspect {
        std::thread::yield_now();
    }
    roster.look(&roster.snapshot());
    roster.publish();
    assert_eq!((candidates(&roster), state(&roster, "a")), (vec!["a".to_owned(), "b".to_owned()], WorkerState::Suspect));
    let mut trials: Vec<Attempt> = (0..3).map(|_| attempt(&roster, "a")).collect();
    assert_eq!(candidates(&roster), ["b"], "it has its trials");
    trials[0].progress();
    assert_eq!(candidates(&roster), ["a", "b"]);
    drop(trials);
    (0..2).for_each(|_| ends(&roster, "a", Ended::Well, f32::NAN));
    roster.publish();
    assert_eq!(state(&roster, "a"), WorkerState::Healthy);
}

#[test]
fn an_engine_that_was_away_begins_with_a_clean_slate() {
    let roster = roster(&["a", "b"]);
    trip(&roster, "a");
    let member = Arc::clone(&roster.members()["a"]);
    roster.settle(&member, Err("away".to_owned()), false);
    roster.settle(&member, Ok(()), false);
    assert_eq!(state(&roster, "a"), WorkerState::Healthy);
}

#[test]
fn the_slowest_is_left_out_and_the_cap_holds() {
    let roster = roster(&["a", "b", "c", "d", "e"]);
    for (name, itl_ms) in [("a", 20.0), ("b", 20.0), ("c", 20.0), ("d", 200.0), ("e", 300.0)] {
        (0..5).for_each(|_| ends(&roster, name, Ended::Well, itl_ms));
    }
    for _ in 0..3 {
        roster.compare(&roster.snapshot());
        roster.publish();
        assert_eq!(candidates(&roster), ["a", "b", "c", "d"], "one of five");
    }
    assert_eq!(state(&roster, "e"), WorkerState::Ejected);
}

#[test]
fn one_that_drains_past_its_grace_is_given_up_where_others_serve_its_model_and_not_after_it_is_resumed() {
    let roster = roster(&["a", "b"]);
    let member = Arc::clone(&roster.members()["a"]);
    let _request = InFlight::dispatch(Arc::clone(&member.standing().workers[0].load), 1, 1, 0);
    let given_up = member.given_up.subscribe();
    let look = || {
        roster.look(&roster.snapshot());
        *given_up.borrow()
    };
    roster.set_drained("a", true, None).unwrap();
    assert_eq!(look(), GivenUp::Not);
    let other = Arc::clone(&roster.members()["b"]);
    roster.settle(&other, Err("away".to_owned()), false);
    roster.set_drained("a", true, Some(Duration::ZERO)).unwrap();
    assert_eq!(look(), GivenUp::Not, "nobody could continue");
    roster.settle(&other, Ok(()), false);
    roster.publish();
    assert_eq!(look(), GivenUp::Drained);
    roster.set_drained("a", false, None).unwrap();
    assert_eq!(*given_up.borrow(), GivenUp::Not);
}

#[tokio::test]
async fn requests_wait_for_who_is_starting_and_for_nobody_else() {
    let roster = roster(&["a"]);
    roster.set_health(with(|health| health.hold_s = 3600));
    let member = Arc::clone(&roster.members()["a"]);
    let later = tokio::time::Instant::now() + Duration::from_secs(3600);
    // None of these waits: it is there, or it is dead, or nobody knows it.
    roster.hold("m", later).await;
    roster.settle(&member, Err("away".to_owned()), false);
    roster.publish();
    roster.hold("m", later).await;
    roster.hold("unknown", later).await;
    roster.settle_as(&member, WorkerState::Starting, Some("loading".to_owned()), false);
    roster.publish();
    assert!(tokio::time::timeout(Duration::from_millis(50), roster.hold("m", later)).await.is_err(), "it waits");
    roster.set_health(with(|health| health.hold_s = 0));
    roster.hold("m", later).await;
    roster.set_health(with(|health| health.hold_s = 3600));
    roster.hold("m", tokio::time::Instant::now() + Duration::from_millis(20)).await;
}
