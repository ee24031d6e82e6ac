//! What an engine says it serves, what sources say there is, and what becomes of that.

use std::sync::atomic::{AtomicU32, Ordering};

use dynamo_engine_api::{Engine, GenerateRequest, ModelCard, RankLoad, Reply};
use dynamo_host_core::{
    Endpoint, RequestFacts,
    column::{F32Column, U32Column},
    load::{InFlight, Reported},
};
use futures_core::future::BoxFuture;

use super::{
    connect::{Connection, Credentials},
    tend::*,
    *,
};
use crate::{config::WorkerConfig, discovery::Found, error::RequestError};

fn config(text: &str) -> WorkerConfig {
    text.parse().unwrap()
}

fn roster(max_workers: u32) -> Arc<Roster> {
    Roster::new(Clock::start(), max_workers, PrefixIndexes::new(), None)
}

fn found(workers: &[&str]) -> Found {
    Found { workers: workers.iter().map(|text| config(text)).collect(), problems: Vec::new() }
}

/// A roster of one engine that is to say itself what it serves.
fn of_one(max_workers: u32) -> Arc<Roster> {
    let roster = roster(max_workers);
    roster.configure(&[config("http://127.0.0.1:1,name=e")], ModelNames::default()).unwrap();
    roster
}

fn member(roster: &Roster, name: &str) -> Arc<Member> {
    Arc::clone(&roster.members()[name])
}

fn card(id: &str, parent: Option<&str>) -> ModelCard {
    ModelCard { id: id.to_owned(), max_model_len: parent.is_none().then_some(4096), parent: parent.map(str::to_owned) }
}

/// Has engine `e` list models, `ADAPTER@BASE` for an adapter; returns whether its workers are others now.
fn lists(roster: &Roster, models: &[&str]) -> bool {
    let cards = models.iter().map(|model| match model.split_once('@') {
        Some((adapter, base)) => card(adapter, Some(base)),
        None => card(model, None),
    });
    let member = member(roster, "e");
    let is_other = member.learn_models(Some(cards.collect()), &roster.home());
    roster.settle(&member, Ok(()), is_other);
    roster.publish();
    is_other
}

/// The workers that would be candidates for a name, as (model, rank).
fn candidates(roster: &Roster, model: &str) -> Result<Vec<(String, u32)>, RequestError> {
    let snapshot = roster.snapshot();
    let resolved = snapshot.resolve(model)?;
    let mut facts = RequestFacts::new("id", resolved.model, Endpoint::Completions);
    facts.adapter = resolved.adapter;
    let candidates = snapshot.candidates(&facts)?;
    let mut workers: Vec<_> = candidates.iter().map(|worker| (worker.spec.model.clone(), worker.spec.rank)).collect();
    workers.sort();
    Ok(workers)
}

#[test]
fn models_are_unknown_until_the_engine_has_listed_them() {
    let roster = of_one(4);
    assert!(matches!(candidates(&roster, "m"), Err(RequestError::ModelsUnknown { .. })));
    lists(&roster, &["m"]);
    candidates(&roster, "m").unwrap();
    assert!(matches!(candidates(&roster, "other"), Err(RequestError::ModelNotFound { .. })));
}

#[test]
fn models_beyond_the_limit_leave_the_others_in_service_and_come_in_when_there_is_room() {
    let roster = of_one(1);
    lists(&roster, &["m"]);
    assert_eq!(member(&roster, "e").standing().left_out, 0);
    lists(&roster, &["m", "n", "o"]);
    assert_eq!(member(&roster, "e").standing().left_out, 2);
    assert!(roster.report()[0].trouble.as_ref().unwrap().contains("raise limits.max_workers"));
    candidates(&roster, "m").unwrap();
    assert!(candidates(&roster, "n").is_err());
    lists(&roster, &["n"]);
    // The snapshot before held the place.
    lists(&roster, &["n"]);
    candidates(&roster, "n").unwrap();
}

#[test]
fn a_snapshot_is_built_only_after_a_change() {
    let roster = of_one(4);
    lists(&roster, &["m"]);
    let generation = roster.snapshot().fleet().generation();
    assert!(!lists(&roster, &["m"]));
    assert_eq!(roster.snapshot().fleet().generation(), generation);
    lists(&roster, &["n"]);
    assert!(roster.snapshot().fleet().generation() > generation);
    assert!(candidates(&roster, "m").is_err());
}

#[test]
fn an_adapter_is_on_its_bases_workers_and_no_worker_of_its_own() {
    let roster = of_one(8);
    lists(&roster, &["m", "n", "sql@m", "lost@elsewhere"]);
    assert_eq!(roster.report().len(), 2);
    assert_eq!(candidates(&roster, "sql").unwrap(), [("m".to_owned(), 0)]);
    assert!(candidates(&roster, "lost").is_err());
    let listed = roster.snapshot().listed_models();
    let sql = listed.iter().find(|model| model.id == "sql").unwrap();
    assert_eq!((sql.parent.as_deref(), listed.len()), (Some("m"), 3));
    // It is unloaded.
    lists(&roster, &["m", "n"]);
    assert!(matches!(candidates(&roster, "sql"), Err(RequestError::ModelNotFound { .. })));
}

#[test]
fn an_adapter_of_a_base_by_another_name_is_on_the_one_base_that_there_is() {
    let roster = of_one(8);
    lists(&roster, &["m", "sql@/models/m"]);
    assert_eq!(candidates(&roster, "sql").unwrap(), [("m".to_owned(), 0)]);
}

fn load(rank: u32, queued: u32) -> RankLoad {
    RankLoad { rank, queued: Some(queued), block_size: Some(16), tokens_per_second: Some(50.0), ..RankLoad::default() }
}

#[test]
fn ranks_are_learnt_from_the_load_and_each_has_its_own() {
    let roster = of_one(8);
    lists(&roster, &["m"]);
    let e = member(&roster, "e");
    roster.take_load(&e, Ok(vec![load(1, 7), load(0, 3)]));
    roster.publish();
    assert_eq!(candidates(&roster, "m").unwrap(), [("m".to_owned(), 0), ("m".to_owned(), 1)]);
    let snapshot = roster.snapshot();
    for worker in snapshot.fleet().workers() {
        assert_eq!(snapshot.rank(worker), Some(worker.spec.rank));
        assert_eq!(worker.load.get_reported(Reported::QueuedRequests), Some([3, 7][worker.spec.rank as usize]));
    }
    // Back to one: the rank that stays keeps its load, and need not be named.
    roster.take_load(&e, Ok(vec![load(5, 1)]));
    roster.publish();
    let snapshot = roster.snapshot();
    let [only] = snapshot.fleet().workers() else { panic!("one worker expected") };
    assert_eq!((snapshot.rank(only), only.load.get_reported(Reported::QueuedRequests)), (None, Some(1)));
}

#[test]
fn configured_ranks_are_not_learnt_anew() {
    let roster = roster(8);
    roster.configure(&[config("http://127.0.0.1:1,name=e,model=m,ranks=2")], ModelNames::default()).unwrap();
    let e = member(&roster, "e");
    roster.take_load(&e, Ok((0..4).map(|rank| load(rank, 1)).collect()));
    roster.take_load(&e, Ok(vec![load(0, 9)]));
    assert_eq!(roster.report().len(), 2);
    roster.settle(&e, Ok(()), false);
    roster.publish();
    let snapshot = roster.snapshot();
    assert!(snapshot.fleet().workers().iter().all(|worker| snapshot.rank(worker).is_some()));
}

fn cut() -> EngineError {
    EngineError::Broken { engine: "e".to_owned(), reason: "cut".to_owned() }
}

#[test]
fn only_an_engine_that_says_nothing_of_its_load_is_asked_less_often() {
    assert_eq!((skips_after(&Ok(vec![load(0, 1)])), skips_after(&Err(cut()))), (0, 0));
    assert!(skips_after(&Ok(Vec::new())) > 0);
}

#[test]
fn a_reading_that_fails_ages_what_was_known() {
    let roster = of_one(8);
    lists(&roster, &["m"]);
    let e = member(&roster, "e");
    roster.take_load(&e, Ok(vec![load(0, 3)]));
    roster.take_load(&e, Err(cut()));
    let report = &roster.report()[0];
    assert_eq!(report.queued_requests, Some(3));
    assert!(report.load_trouble.as_ref().unwrap().contains("cut") && report.load_age_ms.is_some());
    roster.take_load(&e, Ok(Vec::new()));
    let snapshot = roster.snapshot();
    let candidates = snapshot.candidates(&RequestFacts::new("id", "m", Endpoint::Completions)).unwrap();
    assert_eq!(*candidates.u32_column(U32Column::QueuedRequests, 0), [3]);
    assert_eq!(*candidates.f32_column(F32Column::RecentTokensPerSecond), [50.0]);
}

#[test]
fn sources_add_change_and_take_away_their_own() {
    let roster = roster(8);
    let (one, other) = (Origin::configuration(), Origin::of_text("file:/x"));
    roster.apply(&one, found(&["http://h:1,name=a,model=m", "http://h:2,name=b,model=m"]));
    roster.apply(&other, found(&["http://h:3,name=c,model=m", "http://h:4,name=a,model=m", "ftp://x,name=d"]));
    let names: Vec<_> = roster.report().into_iter().map(|worker| (worker.name, worker.source.to_string())).collect();
    let expected = [("a", "static"), ("b", "static"), ("c", "file:/x")].map(|(name, of)| (name.to_owned(), of.to_owned()));
    assert_eq!(names, expected);
    let problems: Vec<String> = roster.problems().into_iter().map(|it| it.problem.place + ": " + &it.problem.reason).collect();
    assert!(problems[0].contains("\"a\"") && problems[0].contains("from static"), "{problems:?}");
    assert!(problems[1].contains("\"d\"") && problems[1].contains("ftp"), "{problems:?}");
    assert_eq!(problems.len(), 2);
}

/// Names of workers, whence they are, and whether they are on their way out.
fn members(roster: &Roster) -> Vec<(String, String, bool)> {
    let rows = roster.report().into_iter();
    rows.map(|row| (row.name, row.source.to_string(), row.state == WorkerState::Draining)).collect()
}

#[tokio::test]
async fn a_worker_that_was_refused_comes_when_whoever_has_its_name_goes() {
    let roster = roster(8);
    let (one, other) = (Origin::configuration(), Origin::of_text("file:/x"));
    roster.apply(&one, found(&["http://h:1,name=a,model=m"]));
    roster.settle(&member(&roster, "a"), Ok(()), true);
    roster.apply(&other, found(&["http://h:1,name=a,model=m"]));
    assert_eq!(roster.problems().len(), 1);
    roster.apply(&one, found(&[]));
    assert_eq!(members(&roster), [("a".to_owned(), "file:/x".to_owned(), false)]);
    assert!(roster.problems().is_empty());
    candidates(&roster, "m").unwrap();
}

#[tokio::test]
async fn a_worker_that_there_was_no_room_for_comes_when_another_has_gone() {
    let roster = roster(1);
    let (one, other) = (Origin::configuration(), Origin::of_text("file:/x"));
    roster.apply(&one, found(&["http://h:1,name=a,model=m"]));
    roster.apply(&other, found(&["http://h:2,name=b,model=m"]));
    assert!(roster.problems()[0].problem.reason.contains("raise limits.max_workers"));
    let request = InFlight::dispatch(Arc::clone(&member(&roster, "a").standing().workers[0].load), 1, 1, 0);
    roster.apply(&one, found(&[]));
    roster.apply_again();
    assert_eq!(members(&roster), [("a".to_owned(), "static".to_owned(), true)]);
    drop(request);
    eventually("a is gone", || roster.members().is_empty()).await;
    roster.apply_again();
    assert_eq!(members(&roster), [("b".to_owned(), "file:/x".to_owned(), false)]);
    assert!(roster.problems().is_empty());
}

#[tokio::test]
async fn a_worker_is_connected_anew_when_its_token_changes_and_what_runs_goes_on() {
    let roster = roster(8);
    let directory = tempfile::tempdir().unwrap();
    let token = directory.path().join("token");
    let configured = [format!("http://h:1,name=e,model=m,bearer_file={}", token.display())];
    let workers = configured.each_ref().map(String::as_str);
    let origin = Origin::of_text("file:/x");
    roster.apply(&origin, found(&workers));
    assert!(roster.report().is_empty() && roster.problems()[0].problem.reason.contains("bearer_file"));
    std::fs::write(&token, "first").unwrap();
    roster.apply_again();
    assert!(roster.problems().is_empty());
    roster.settle(&member(&roster, "e"), Ok(()), true);
    let before = member(&roster, "e");
    let _request = InFlight::dispatch(Arc::clone(&before.standing().workers[0].load), 1, 1, 0);
    roster.apply_again();
    assert!(Arc::ptr_eq(&before, &member(&roster, "e")), "nothing has changed");
    // One that is no token changes nothing, and is told.
    std::fs::write(&token, "").unwrap();
    roster.apply_again();
    assert!(Arc::ptr_eq(&before, &member(&roster, "e")));
    assert!(roster.problems()[0].problem.reason.contains("holds no token"));
    std::fs::write(&token, "other").unwrap();
    roster.apply_again();
    let after = member(&roster, "e");
    assert!(!Arc::ptr_eq(&before.engine, &after.engine) && roster.problems().is_empty());
    assert_eq!((roster.report()[0].active_requests, roster.report()[0].state), (1, WorkerState::Healthy));
    candidates(&roster, "m").unwrap();
}

#[test]
fn a_request_that_found_nobody_takes_only_that_engine_out_of_service() {
    let roster = roster(8);
    let origin = Origin::configuration();
    let unreachable = |roster: &Roster, engine: &Arc<dyn Engine>| {
        let id = roster.snapshot().fleet().workers()[0].id;
        roster.report_unreachable(id, engine, &cut());
    };
    roster.apply(&origin, found(&["http://h:1,name=e,model=m"]));
    let engine = Arc::clone(&member(&roster, "e").engine);
    // Another configuration of the engine that it was.
    roster.apply(&origin, found(&["http://h:1,name=e,model=m,label.zone=b"]));
    let present = member(&roster, "e");
    roster.settle(&present, Ok(()), true);
    roster.publish();
    // Whoever changes the roster holds neither up.
    let held = roster.members();
    let another: Arc<dyn Engine> = Arc::new(Ranked::default());
    unreachable(&roster, &another);
    assert_eq!(present.standing().found(), WorkerState::Healthy);
    unreachable(&roster, &engine);
    assert_eq!(present.standing().found(), WorkerState::Unreachable);
    drop(held);
}

/// Runs what tasks there are until a condition holds.
async fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..6000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 60 s: {what}");
}

#[tokio::test]
async fn a_worker_that_goes_finishes_what_it_has_and_its_place_is_free_then() {
    let roster = roster(1);
    let origin = Origin::configuration();
    roster.apply(&origin, found(&["http://h:1,name=e,model=m"]));
    roster.settle(&member(&roster, "e"), Ok(()), true);
    roster.publish();
    candidates(&roster, "m").unwrap();
    let request = InFlight::dispatch(Arc::clone(&member(&roster, "e").standing().workers[0].load), 1, 1, 0);
    roster.apply(&origin, found(&[]));
    assert!(matches!(candidates(&roster, "m"), Err(RequestError::NoWorker { .. })), "it is a candidate no more");
    assert_eq!(roster.report()[0].state, WorkerState::Draining);
    // It comes back meanwhile: nothing was lost, and nobody waits for its end any more.
    roster.apply(&origin, found(&["http://h:1,name=e,model=m"]));
    let waits = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    eventually("its end is not awaited", || waits() == 0).await;
    candidates(&roster, "m").unwrap();
    assert_eq!(roster.report()[0].active_requests, 1);
    roster.apply(&origin, found(&[]));
    drop(request);
    eventually("it is gone", || roster.members().is_empty()).await;
    roster.publish();
    eventually("its place is free", || roster.board.claim().is_some()).await;
}

#[tokio::test]
async fn another_configuration_of_the_same_engine_keeps_what_runs_and_another_engine_does_not() {
    let roster = roster(8);
    let origin = Origin::configuration();
    roster.apply(&origin, found(&["http://h:1,name=e,model=m"]));
    roster.settle(&member(&roster, "e"), Ok(()), true);
    let before = member(&roster, "e");
    let _request = InFlight::dispatch(Arc::clone(&before.standing().workers[0].load), 1, 1, 0);
    roster.apply(&origin, found(&["http://h:1,name=e,model=m,label.zone=b"]));
    let after = member(&roster, "e");
    assert!(Arc::ptr_eq(&before.engine, &after.engine));
    assert_eq!(after.standing().workers[0].spec.labels["zone"], "b");
    assert_eq!((roster.report()[0].active_requests, roster.report()[0].state), (1, WorkerState::Healthy));
    roster.apply(&origin, found(&["http://h:2,name=e,model=m"]));
    let other = member(&roster, "e");
    assert!(!Arc::ptr_eq(&before.engine, &other.engine));
    assert_eq!((roster.report()[0].active_requests, roster.report()[0].state), (0, WorkerState::Starting));
}

#[tokio::test]
async fn a_drained_worker_is_no_candidate_whatever_its_source_or_its_probe_says() {
    let roster = roster(8);
    let origin = Origin::configuration();
    roster.apply(&origin, found(&["http://h:1,name=e,model=m"]));
    roster.settle(&member(&roster, "e"), Ok(()), true);
    roster.publish();
    assert!(matches!(roster.set_drained("x", true, None), Err(DrainError::NoWorker { .. })));
    assert_eq!(roster.set_drained("e", true, None).unwrap()[0].state, WorkerState::Draining);
    assert!(candidates(&roster, "m").is_err());
    roster.settle(&member(&roster, "e"), Err("down".to_owned()), false);
    roster.settle(&member(&roster, "e"), Ok(()), false);
    roster.apply(&origin, found(&["http://h:9,name=e,model=m"]));
    assert_eq!(roster.report()[0].state, WorkerState::Draining);
    roster.apply(&origin, found(&[]));
    eventually("it is gone", || roster.members().is_empty()).await;
    roster.apply(&origin, found(&["http://h:9,name=e,model=m"]));
    roster.settle(&member(&roster, "e"), Ok(()), true);
    assert_eq!(roster.report()[0].state, WorkerState::Draining, "it was away, and is drained still");
    roster.set_drained("e", false, None).unwrap();
    candidates(&roster, "m").unwrap();
}

#[test]
fn a_source_that_has_not_spoken_may_have_any_model() {
    let roster = roster(8);
    let origin = Origin::of_text("kubernetes:a/b");
    roster.await_source(&origin);
    roster.publish();
    assert!(matches!(candidates(&roster, "m"), Err(RequestError::ModelsUnknown { .. })));
    roster.apply(&origin, found(&[]));
    assert!(matches!(candidates(&roster, "m"), Err(RequestError::ModelNotFound { .. })));
}

#[test]
fn pauses_are_spread_around_what_they_should_be() {
    let pauses: Vec<f64> = (0..200).map(|_| jittered(Duration::from_secs(2)).as_secs_f64()).collect();
    assert!(pauses.iter().all(|pause| (1.5..=2.5).contains(pause)), "{pauses:?}");
    assert!(pauses.windows(2).any(|pair| pair[0] != pair[1]));
}

/// An engine that serves `m`, has two ranks, and counts who reads its load.
#[derive(Default)]
struct Ranked {
    readings: AtomicU32,
    at_once: AtomicU32,
    most_at_once: AtomicU32,
}

impl Engine for Ranked {
    fn kind(&self) -> &'static str {
        "ranked"
    }

    fn models(&self) -> BoxFuture<'_, Result<Vec<ModelCard>, EngineError>> {
        Box::pin(async { Ok(vec![card("m", None)]) })
    }

    fn probe(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        Box::pin(async { Ok(()) })
    }

    fn load(&self) -> BoxFuture<'_, Result<Vec<RankLoad>, EngineError>> {
        Box::pin(async {
            let at_once = self.at_once.fetch_add(1, Ordering::Relaxed) + 1;
            self.most_at_once.fetch_max(at_once, Ordering::Relaxed);
            let readings = self.readings.fetch_add(1, Ordering::Relaxed) + 1;
            tokio::task::yield_now().await;
            self.at_once.fetch_sub(1, Ordering::Relaxed);
            Ok(vec![load(0, readings), load(1, readings)])
        })
    }

    fn generate(&self, _: GenerateRequest) -> BoxFuture<'_, Result<Reply, EngineError>> {
        Box::pin(std::future::pending())
    }
}

#[tokio::test]
async fn the_first_workers_have_their_ranks_and_their_load_is_read_again_and_again() {
    let roster = roster(8);
    let engine = Arc::new(Ranked::default());
    let connection = Connection { engine: Arc::clone(&engine) as _, credentials: Credentials::default() };
    let member = Member::new(config("http://h:1,name=e"), Origin::configuration(), connection, &roster.home());
    roster.members().insert("e".to_owned(), Arc::new(member));
    roster.start(Duration::from_secs(60)).await;
    assert_eq!(candidates(&roster, "m").unwrap().len(), 2);
    eventually("the third reading is on the board", || roster.report().iter().all(|it| it.queued_requests >= Some(3))).await;
    assert_eq!(engine.most_at_once.load(Ordering::Relaxed), 1);
}
