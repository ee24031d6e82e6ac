//! Engines that can hand KV over, that only say so, and that differ: who is given hand-offs, and what is said of the others.

use std::sync::{
    Mutex,
    atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
};

use dynamo_engine_api::{ModelCard, Protocol, RankLoad};
use dynamo_host_core::{Among, RequestFacts};
use dynamo_host_index::PrefixIndexes;
use futures_core::future::BoxFuture;
use serde_json::value::RawValue;

use super::{
    super::{
        Origin,
        connect::{Connection, Credentials},
        handoff::Together,
        split::HandoffState,
    },
    *,
};
use crate::{clock::Clock, config::WorkerConfig};

/// An engine that hands KV over as it is told.
struct Splits {
    protocol: Protocol,
    block_size: AtomicU32,
    ids: Vec<u32>,
    is_up: AtomicBool,
    prefills: AtomicBool,
    decodes: AtomicBool,
    /// Whether it has a connector, if it tells what it fetches.
    fetches: Option<bool>,
    fetched: AtomicU32,
    /// The legs that it was asked for, and their prompts.
    asked: Mutex<Vec<(&'static str, String)>>,
}

impl Default for Splits {
    fn default() -> Self {
        Self {
            protocol: Protocol::Nixl,
            block_size: AtomicU32::new(16),
            ids: vec![1, 2, 3],
            is_up: AtomicBool::new(true),
            prefills: AtomicBool::new(true),
            decodes: AtomicBool::new(true),
            fetches: None,
            fetched: AtomicU32::new(0),
            asked: Mutex::default(),
        }
    }
}

fn ticket(protocol: Protocol) -> Ticket {
    let state = RawValue::from_string("{}".to_owned()).unwrap().into();
    Ticket { protocol, state, prompt_ids: None, cached_tokens: None, bytes: None }
}

impl Splits {
    fn refusal() -> EngineError {
        EngineError::Protocol { engine: "splits".to_owned(), reason: "its answer has no transfer parameters".to_owned() }
    }

    fn legs(&self) -> Vec<&'static str> {
        self.asked.lock().unwrap().iter().map(|(leg, _)| *leg).collect()
    }
}

impl Engine for Splits {
    fn kind(&self) -> &'static str {
        "vllm"
    }

    fn models(&self) -> BoxFuture<'_, Result<Vec<ModelCard>, EngineError>> {
        Box::pin(async { Ok(vec![ModelCard { id: "m".to_owned(), max_model_len: Some(4096), parent: None }]) })
    }

    fn probe(&self) -> BoxFuture<'_, Result<(), EngineError>> {
        let is_up = self.is_up.load(SeqCst);
        let away = || EngineError::Connect { engine: "splits".to_owned(), reason: "refused".to_owned() };
        Box::pin(async move { if is_up { Ok(()) } else { Err(away()) } })
    }

    fn load(&self) -> BoxFuture<'_, Result<Vec<RankLoad>, EngineError>> {
        let block_size = Some(self.block_size.load(SeqCst));
        let fetched_tokens = self.fetches.map(|_| self.fetched.load(SeqCst).into());
        Box::pin(async move { Ok(vec![RankLoad { block_size, fetched_tokens, ..RankLoad::default() }]) })
    }

    fn handoff(&self) -> Option<Protocol> {
        Some(self.protocol)
    }

    fn ticket(&self, _: Option<u32>) -> BoxFuture<'_, Result<Ticket, EngineError>> {
        Box::pin(async { Ok(ticket(self.protocol)) })
    }

    fn prefilled(&self, _: &WholeReply) -> Result<Prefilled, EngineError> {
        if self.prefills.load(SeqCst) { Ok(Prefilled::Ready(ticket(self.protocol))) } else { Err(Self::refusal()) }
    }

    fn tokenize(&self, _: Endpoint, _: Bytes) -> BoxFuture<'_, Result<Option<Vec<u32>>, EngineError>> {
        Box::pin(async { Ok(Some(self.ids.clone())) })
    }

    fn generate(&self, ask: GenerateRequest) -> BoxFuture<'_, Result<Reply, EngineError>> {
        let (leg, is_well) = match ask.leg {
            Leg::Whole => ("whole", true),
            Leg::Prefill(_) => ("prefill", true),
            Leg::Decode(_) => {
                self.fetched.fetch_add(if self.fetches == Some(true) { 17 } else { 0 }, SeqCst);
                ("decode", self.decodes.load(SeqCst))
            }
        };
        let body: serde_json::Value = serde_json::from_slice(&ask.body).unwrap();
        self.asked.lock().unwrap().push((leg, body["prompt"].as_str().unwrap_or_default().to_owned()));
        let status = if is_well { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR };
        let reply = WholeReply { status, headers: http::HeaderMap::new(), body: Bytes::from_static(b"{}") };
        Box::pin(async { Ok(Reply::Whole(reply)) })
    }
}

fn roster() -> Arc<Roster> {
    Roster::new(Clock::start(), 8, PrefixIndexes::new(), None)
}

/// A member of this roster, NAME,role=…
fn add(roster: &Arc<Roster>, text: &str, engine: &Arc<Splits>) {
    let config: WorkerConfig = format!("http://h:1,name={text}").parse().unwrap();
    let connection = Connection { engine: Arc::clone(engine) as _, credentials: Credentials::default() };
    let member = Arc::new(Member::new(config.clone(), Origin::configuration(), connection, &roster.home()));
    roster.members().insert(config.name, Arc::clone(&member));
    roster.look_after(&member);
}

/// A running roster of one engine that prefills and one that decodes.
async fn pair(prefill: Splits, decode: Splits) -> (Arc<Roster>, Arc<Splits>, Arc<Splits>) {
    let (roster, prefill, decode) = (roster(), Arc::new(prefill), Arc::new(decode));
    add(&roster, "p,role=prefill", &prefill);
    add(&roster, "d,role=decode", &decode);
    roster.start(Duration::from_secs(60)).await;
    (roster, prefill, decode)
}

fn state(roster: &Roster, name: &str) -> (HandoffState, String) {
    let report = roster.report_of(name).unwrap().pop().unwrap();
    // Until it has said which models it serves.
    let Some(handoff) = report.handoff else { return (HandoffState::Checking, String::new()) };
    assert!(handoff.reason.is_none() || report.trouble.is_some(), "what is wrong is shown");
    (handoff.state, handoff.reason.unwrap_or_default())
}

fn together(roster: &Roster) -> Together {
    roster.report_disaggregation()[0].state
}

fn candidates(roster: &Roster, among: Among) -> Vec<String> {
    let facts = RequestFacts::new("id", "m", Endpoint::Completions);
    let candidates = roster.snapshot().candidates_among(&facts, among);
    let mut names: Vec<String> =
        candidates.map(|all| all.iter().map(|worker| worker.spec.name.clone()).collect()).unwrap_or_default();
    names.sort();
    names
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..6000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it did not come to be: {what}");
}

#[tokio::test]
async fn a_pair_hands_a_prompt_of_more_than_a_block_over_before_the_first_request() {
    let (roster, prefill, decode) = pair(Splits::default(), Splits::default()).await;
    assert_eq!((state(&roster, "p").0, state(&roster, "d").0), (HandoffState::Ready, HandoffState::Ready));
    assert_eq!((together(&roster), candidates(&roster, Among::Beginning)), (Together::Split, vec!["p".to_owned()]));
    assert_eq!((prefill.legs(), decode.legs()), (vec!["prefill"], vec!["decode"]));
    let prompt = prefill.asked.lock().unwrap()[0].1.clone();
    assert!(prompt.split(' ').count() > 16 && prompt == decode.asked.lock().unwrap()[0].1, "{prompt}");
}

#[tokio::test]
async fn a_prefill_engine_without_transfer_parameters_is_refused_and_comes_back_by_itself() {
    let broken = Splits { prefills: AtomicBool::new(false), ..Splits::default() };
    let (roster, prefill, decode) = pair(broken, Splits::default()).await;
    let (found, reason) = state(&roster, "p");
    assert!(found == HandoffState::Refused && reason.contains("no transfer parameters"), "{reason}");
    assert_eq!(state(&roster, "d").0, HandoffState::Checking, "nothing is known of it yet");
    assert!(decode.legs().is_empty());
    assert_eq!(
        (together(&roster), candidates(&roster, Among::Beginning)),
        (Together::NoPair, vec!["d".to_owned()]),
        "served whole"
    );
    prefill.prefills.store(true, SeqCst);
    eventually("it is given hand-offs", || together(&roster) == Together::Split).await;
}

#[tokio::test]
async fn of_two_who_fail_the_one_is_at_fault_that_is_not_proven() {
    let (roster, ..) = pair(Splits::default(), Splits::default()).await;
    let broken = Arc::new(Splits { decodes: AtomicBool::new(false), ..Splits::default() });
    add(&roster, "e,role=decode", &broken);
    eventually("it is refused", || state(&roster, "e").0 == HandoffState::Refused).await;
    assert!(state(&roster, "e").1.contains("it cannot decode what p prefilled: e answered 500"), "{}", state(&roster, "e").1);
    assert_eq!((state(&roster, "p").0, together(&roster)), (HandoffState::Ready, Together::Split));
    roster.publish();
    let snapshot = roster.snapshot();
    let group = |name: &str| snapshot.fleet().workers().iter().find(|worker| worker.spec.name == name).unwrap().handoff.group;
    assert!(group("p").is_some() && group("p") == group("d") && group("e").is_none());
}

#[tokio::test]
async fn a_decode_engine_that_computes_the_prompt_itself_is_refused() {
    let (roster, ..) = pair(Splits::default(), Splits { fetches: Some(false), ..Splits::default() }).await;
    let (found, reason) = state(&roster, "d");
    assert!(found == HandoffState::Refused && reason.contains("computed the prompt itself"), "{reason}");
    let fetching = Splits { fetches: Some(true), ..Splits::default() };
    let (roster, ..) = pair(Splits::default(), fetching).await;
    assert_eq!((state(&roster, "d").0, together(&roster)), (HandoffState::Ready, Together::Split));
}

#[tokio::test]
async fn engines_of_other_blocks_or_another_model_are_refused_without_a_try() {
    let other = Splits { block_size: AtomicU32::new(32), ..Splits::default() };
    let (roster, prefill, decode) = pair(Splits::default(), other).await;
    assert!(state(&roster, "d").1.contains("mismatched block sizes"), "{:?}", state(&roster, "d"));
    // It is restarted as it should be: its next reading says so.
    decode.block_size.store(16, SeqCst);
    eventually("they fit", || together(&roster) == Together::Split).await;
    assert_eq!(prefill.legs(), ["prefill"]);
    let (roster, prefill, decode) = pair(Splits::default(), Splits { ids: vec![4], ..Splits::default() }).await;
    eventually("it is told", || state(&roster, "d").1.contains("other tokens of a text")).await;
    assert!(prefill.legs().is_empty() && decode.legs().is_empty(), "a wrong prompt can end an engine");
}

#[tokio::test]
async fn an_engine_that_was_away_has_to_show_it_again_and_begins_anew() {
    let (roster, _, decode) = pair(Splits::default(), Splits::default()).await;
    let slots: Vec<u32> = roster.snapshot().fleet().workers().iter().map(|worker| worker.load.index()).collect();
    roster.links().arrived(slots[0], slots[1], 100, 1.0);
    roster.links().arrived(slots[1], slots[0], 100, 1.0);
    assert_eq!(roster.report_links().len(), 2);
    decode.is_up.store(false, SeqCst);
    decode.decodes.store(false, SeqCst);
    eventually("it is away", || together(&roster) == Together::NoDecode).await;
    assert_eq!(candidates(&roster, Among::Beginning), ["p"], "what is left serves");
    decode.is_up.store(true, SeqCst);
    eventually("it is refused", || state(&roster, "d").0 == HandoffState::Refused).await;
    assert!(roster.report_links().is_empty(), "what was known of its links is forgotten");
    decode.decodes.store(true, SeqCst);
    eventually("it is back", || together(&roster) == Together::Split).await;
}

#[tokio::test]
async fn engines_that_serve_no_whole_requests_are_waited_for_until_they_are_checked() {
    let split = || Splits { protocol: Protocol::Bootstrap, ..Splits::default() };
    let roster = roster();
    let (prefill, decode) = (Arc::new(split()), Arc::new(split()));
    add(&roster, "p,role=prefill", &prefill);
    add(&roster, "d,role=decode", &decode);
    roster.start(Duration::from_secs(60)).await;
    assert_eq!((together(&roster), candidates(&roster, Among::Beginning)), (Together::Split, vec!["p".to_owned()]));
    assert!(candidates(&roster, Among::Whole).is_empty());
    // A link that keeps failing is better than none.
    let snapshot = roster.snapshot();
    let of = |name: &str| snapshot.fleet().workers().iter().find(|worker| worker.spec.name == name).unwrap();
    let [from, to] = [of("p"), of("d")];
    for _ in 0..dynamo_host_core::links::FAILURES {
        roster.links().failed(from.load.index(), to.load.index(), roster.clock.now_ms());
    }
    assert!(snapshot.reaches(from, to, roster.links()));
    let member = Arc::clone(&roster.members()["d"]);
    assert_eq!(roster.hand_over_with(&member).await, Some(Ok(())), "its canary is a hand-off");
    decode.decodes.store(false, SeqCst);
    assert!(roster.hand_over_with(&member).await.unwrap().is_err());
}

#[tokio::test]
async fn a_useless_prefill_of_a_request_ends_hand_offs_until_one_went_well() {
    let (roster, prefill, _) = pair(Splits::default(), Splits::default()).await;
    let snapshot = roster.snapshot();
    let worker = snapshot.fleet().workers().iter().find(|worker| worker.spec.name == "p").unwrap();
    prefill.prefills.store(false, SeqCst);
    roster.report_no_handoff(worker.id, snapshot.engine(worker.id), &Splits::refusal());
    assert_eq!(state(&roster, "p").0, HandoffState::Refused);
    assert_eq!((together(&roster), candidates(&roster, Among::Beginning)), (Together::NoPair, vec!["d".to_owned()]));
    prefill.prefills.store(true, SeqCst);
    eventually("it is back", || together(&roster) == Together::Split).await;
}

#[tokio::test]
async fn a_role_that_nobody_has_is_said_and_requests_are_served_whole() {
    let roster = roster();
    let engine = || Arc::new(Splits::default());
    add(&roster, "p,role=prefill", &engine());
    roster.start(Duration::from_secs(60)).await;
    assert_eq!((together(&roster), candidates(&roster, Among::Beginning)), (Together::NoDecode, vec!["p".to_owned()]));
    assert!(roster.report_disaggregation()[0].reason.as_ref().unwrap().contains("add one"));
    add(&roster, "d,role=decode", &engine());
    eventually("it is split", || together(&roster) == Together::Split).await;
}

#[tokio::test]
async fn a_link_that_keeps_failing_is_told_and_others_are_not() {
    let (roster, ..) = pair(Splits::default(), Splits::default()).await;
    let snapshot = roster.snapshot();
    let slots: Vec<u32> = snapshot.fleet().workers().iter().map(|worker| worker.load.index()).collect();
    let fail = || roster.links().failed(slots[0], slots[1], roster.clock.now_ms());
    roster.links().arrived(slots[1], slots[0], 1000, 10.0);
    (0..dynamo_host_core::links::FAILURES).for_each(|_| fail());
    roster.show_links(&snapshot);
    let links = roster.report_links();
    let avoided: Vec<bool> = links.iter().map(|link| link.avoided_ms.is_some()).collect();
    assert_eq!(avoided.iter().filter(|&&avoided| avoided).count(), 1, "{links:?}");
    assert_eq!(roster.avoided.lock().unwrap().len(), 1);
}
