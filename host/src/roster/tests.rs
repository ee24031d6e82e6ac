//! What an engine says it serves, and what becomes of that.

use dynamo_host_core::{Endpoint, RequestFacts};

use super::*;
use crate::error::RequestError;

/// A roster of one engine that is to say itself what it serves, with room for so many workers.
fn roster(max_workers: u32) -> Arc<Roster> {
    let config: WorkerConfig = "http://127.0.0.1:1,name=e".parse().unwrap();
    Roster::new(&[config], Clock::start(), max_workers).unwrap()
}

fn lists(roster: &Roster, models: &[&str]) -> Learned {
    let models: Vec<String> = models.iter().map(|&model| model.to_owned()).collect();
    let learned = roster.learn(0, &models);
    roster.settle(0, Finding { state: WorkerState::Healthy, trouble: None, is_other: learned.is_other });
    roster.publish();
    learned
}

fn candidates(roster: &Roster, model: &str) -> Result<(), RequestError> {
    roster.snapshot().candidates(&RequestFacts::new("id", model, Endpoint::Completions)).map(drop)
}

#[test]
fn models_are_unknown_until_the_engine_has_listed_them() {
    let roster = roster(4);
    assert!(matches!(candidates(&roster, "m"), Err(RequestError::ModelsUnknown { .. })));
    lists(&roster, &["m"]);
    candidates(&roster, "m").unwrap();
    assert!(matches!(candidates(&roster, "other"), Err(RequestError::ModelNotFound { .. })));
}

#[test]
fn models_beyond_the_limit_leave_the_others_in_service() {
    let roster = roster(1);
    assert_eq!(lists(&roster, &["m"]).left_out, 0);
    assert_eq!(lists(&roster, &["m", "n", "o"]).left_out, 2);
    candidates(&roster, "m").unwrap();
    assert!(candidates(&roster, "n").is_err());
}

#[test]
fn a_snapshot_is_built_only_after_a_change() {
    let roster = roster(4);
    lists(&roster, &["m"]);
    let generation = roster.snapshot().fleet().generation();
    assert!(!lists(&roster, &["m"]).is_other);
    assert_eq!(roster.snapshot().fleet().generation(), generation);
    lists(&roster, &["n"]);
    assert!(roster.snapshot().fleet().generation() > generation);
    assert!(candidates(&roster, "m").is_err());
}

#[test]
fn pauses_are_spread_around_what_they_should_be() {
    let pauses: Vec<f64> = (0..200).map(|_| jittered(PROBE_EVERY).as_secs_f64()).collect();
    assert!(pauses.iter().all(|pause| (1.5..=2.5).contains(pause)), "{pauses:?}");
    assert!(pauses.windows(2).any(|pair| pair[0] != pair[1]));
}
