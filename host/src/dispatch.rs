//! Carries rankings out: gives a request to worker after worker until one takes it.
//!
//! Invariants: a worker that failed the request is asked again only where there is no other, and it has been away; a request is
//! given to few workers altogether, since it may be what breaks them (who could not be reached does not count: those are as many
//! as there are workers at most, within the request's time and the budget of all retries); what an engine answered, if only an
//! error, is the answer, unless it was that another worker would be a better choice and there is one. A whole answer is asked
//! for again from the start, as long as nothing of it was sent: the client has none of it, so that nothing can be lost or doubled.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::response::Response;
use dynamo_engine_api::{Chunk, ChunkStream, Engine, EngineError, GenerateRequest, Leg, Reply, WholeReply};
use dynamo_host_core::{RequestFacts, Worker, WorkerId};
use dynamo_host_index::Prompt;
use dynamo_host_policy::Pinned;
use futures_util::StreamExt;
use http::StatusCode;

use crate::{
    account::{Account, Booking, Client},
    admit::{Heard, Permit},
    config::Migration,
    error::RequestError,
    handoff::{self, Beside},
    migrate::{Course, LOOK_EVERY, Lost, Vigil},
    place::{Inquiry, Part, Placing, Way},
    receipts::Recorder,
    relay::{self, Begun, Head, Patience},
    request::{Lane, Notes},
    text::plain,
};

/// How long it takes at most until a worker that is gone is seen to be, after it failed a request.
const SEEN_WITHIN: Duration = Duration::from_secs(2);

/// What a request asks for, and by whom it is decided.
pub(crate) struct Asked {
    pub(crate) ask: GenerateRequest,
    pub(crate) pinned: Pinned,
    pub(crate) prompt: Arc<Prompt>,
    pub(crate) recorder: Option<Recorder>,
    /// Whether the client itself wants token ids.
    pub(crate) returns_ids: bool,
}

/// One request on its way to a worker.
pub(crate) struct Dispatch<'a> {
    pub(crate) lane: &'a Arc<Lane>,
    asked: Asked,
    migration: Arc<Migration>,
    /// Until the answer has it.
    permit: Option<Permit>,
    client: Client,
    pub(crate) patience: Patience,
    /// Workers, or pairs of them, that it may still be given to.
    attempts_left: u32,
    /// Whether it may begin on one worker and end on another.
    may_be_split: bool,
    /// What the last worker failed it with.
    failure: Option<EngineError>,
    /// Whether one of them had begun with it, as far as anybody knows.
    is_lost_work: bool,
    /// Whether workers that were at no fault were asked again, since nobody else was left.
    was_asked_again: bool,
    /// Until when it waits for workers that are well again.
    outlasts_until: Option<Instant>,
}

/// A worker that is given a request or a part of it, as it was placed.
#[derive(Clone, Copy)]
pub(crate) struct Post<'a> {
    pub(crate) placing: &'a Placing,
    pub(crate) worker: &'a Worker,
}

/// What came of one way to serve a request.
pub(crate) enum Given {
    /// The client has its answer, or the beginning of it.
    Answered(Response),
    /// It failed, and the next one may be tried.
    Failed,
    /// It failed in a way that makes the others worth less than placing it anew.
    Anew,
}

/// A streamed answer that has begun, and what goes with it.
pub(crate) struct Answer {
    pub(crate) account: Account,
    pub(crate) head: Head,
    pub(crate) first: Chunk,
    pub(crate) chunks: ChunkStream,
    pub(crate) vigil: Vigil,
    /// What works beside it, for as long as the client is there.
    pub(crate) beside: Option<Beside>,
}

/// The beginning of an engine's answer.
pub(crate) enum Opened {
    Whole(WholeReply),
    Stream(Chunk, ChunkStream),
}

impl Asked {
    /// What the policy is asked of a part of it.
    pub(crate) fn inquiry<'a>(&'a self, part: Part, patience: &'a Patience, until: Option<Instant>) -> Inquiry<'a> {
        let Self { pinned, prompt, recorder, .. } = self;
        Inquiry { part, pinned, prompt, recorder: recorder.as_ref(), patience, until }
    }
}

impl<'a> Post<'a> {
    pub(crate) fn new(placing: &'a Placing, row: u32) -> Self {
        Self { placing, worker: placing.candidates.worker(row) }
    }

    pub(crate) fn engine(&self) -> &'a Arc<dyn Engine> {
        self.placing.snapshot.engine(self.worker.id)
    }

    pub(crate) fn name(&self) -> &'a str {
        &self.worker.spec.name
    }
}

impl<'a> Dispatch<'a> {
    pub(crate) fn new(
        lane: &'a Arc<Lane>,
        asked: Asked,
        permit: Permit,
        client: Client,
        patience: Patience,
        migration: Arc<Migration>,
    ) -> Self {
        lane.roster.note_request();
        let attempts_left = migration.max_attempts;
        let permit = Some(permit);
        Self {
            lane,
            asked,
            migration,
            permit,
            client,
            patience,
            attempts_left,
            may_be_split: true,
            failure: None,
            is_lost_work: false,
            was_asked_again: false,
            outlasts_until: None,
        }
    }

    pub(crate) fn asked(&self) -> &Asked {
        &self.asked
    }

    /// Which part of it is to be placed.
    pub(crate) fn part(&self) -> Part {
        if self.may_be_split { Part::Beginning } else { Part::Whole }
    }

    /// What the last worker failed it with, if one did.
    pub(crate) fn into_failure(self) -> Option<EngineError> {
        self.failure
    }

    /// Waits, now that all workers have failed it, until one of them has gone and come back. `false`: none did. One that could
    /// not even be reached has cost nothing: whoever waits here does so for work that was lost.
    pub(crate) async fn outlasts(&mut self, facts: &mut RequestFacts) -> bool {
        if !self.migration.enabled || !self.is_lost_work || self.attempts_left == 0 {
            return false;
        }
        let begun = Instant::now();
        let held_until = (begun + self.lane.roster.health().hold()).min(self.patience.deadline);
        let until = *self.outlasts_until.get_or_insert(held_until);
        let mut changes = self.lane.roster.changes();
        let mut away: Vec<WorkerId> = Vec::new();
        loop {
            let snapshot = self.lane.roster.snapshot();
            for &worker in &facts.failed_workers {
                let is_there = snapshot.is_eligible(worker);
                if is_there && away.contains(&worker) {
                    // One that serves in pairs only may have come back, and not been seen to hand over yet.
                    let others = facts.failed_workers.iter().copied().filter(|&failed| failed != worker).collect();
                    let again = RequestFacts { failed_workers: others, ..facts.clone() };
                    if snapshot.has_way(&again, self.lane.roster.links()) {
                        facts.failed_workers = again.failed_workers;
                        return true;
                    }
                }
                if !is_there && !away.contains(&worker) {
                    away.push(worker);
                }
            }
            let now = Instant::now();
            let until = if away.is_empty() { until.min(begun + SEEN_WITHIN) } else { until };
            if now >= until {
                return false;
            }
            let _ = tokio::time::timeout_at(until.into(), changes.changed()).await;
        }
    }

    /// Goes the first way that leads to an answer. `None`: none did, and the request may be placed anew.
    ///
    /// # Errors
    /// What it failed with for good.
    pub(crate) async fn carry_out(
        &mut self,
        placing: &Placing,
        facts: &mut RequestFacts,
        notes: &mut Notes,
    ) -> Result<Option<Response>, RequestError> {
        let book = |worker: &Worker| Account::book(self.lane, facts, worker, placing);
        let mut ways = placing.ways.clone();
        let mut booked = self.lane.queue.book(&mut ways, &placing.candidates, facts, book);
        for (nth, way) in ways.into_iter().enumerate() {
            // What has come, gone or been drained since may concern the rest of the ranking.
            if nth > 0 && !Arc::ptr_eq(&placing.snapshot, &self.lane.roster.snapshot()) {
                return Ok(None);
            }
            self.try_again();
            let post = Post::new(placing, way.first());
            let booking = booked.take().unwrap_or_else(|| Account::book(self.lane, facts, post.worker, placing));
            let given = match way {
                Way::Alone(_) => self.give(post, booking, facts).await?,
                Way::Prefill(_) => handoff::carry_out(self, post, None, booking, facts, notes).await?,
                Way::Pair(_, decode) => handoff::carry_out(self, post, Some(decode), booking, facts, notes).await?,
            };
            match given {
                Given::Answered(response) => return Ok(Some(response)),
                Given::Failed => {}
                Given::Anew => return Ok(None),
            }
        }
        Ok(None)
    }

    /// Gives it to a worker, all of it.
    pub(crate) async fn give(
        &mut self,
        post: Post<'_>,
        booking: Booking,
        facts: &mut RequestFacts,
    ) -> Result<Given, RequestError> {
        let Post { placing, worker } = post;
        let mut account = Account::open(self.lane, facts, placing, worker, booking, self.heard(), self.client());
        let head = self.head(post, None);
        tracing::debug!(worker = worker.spec.name, policy = head.policy, "dispatch");
        let mut vigil = self.vigil(post);
        vigil.may_make(facts.max_output_tokens);
        facts.failed_workers.push(worker.id);
        let error = match self.open(post, Leg::Whole, &mut vigil, facts).await {
            Ok(Ok(Opened::Whole(reply))) if is_busy(&reply) && self.has_alternative(facts) => answered(post, &reply),
            Ok(Ok(Opened::Whole(reply))) => {
                if reply.status.is_success() {
                    self.taken_up(post, facts);
                    self.lane.handoffs.prefilled_alone(worker.spec.role);
                }
                return Ok(Given::Answered(relay::whole(account, self.permit.take(), head, reply)));
            }
            Ok(Ok(Opened::Stream(first, chunks))) => {
                self.taken_up(post, facts);
                self.lane.handoffs.prefilled_alone(worker.spec.role);
                return Ok(Given::Answered(self.relay(
                    post,
                    Answer { account, head, first, chunks, vigil, beside: None },
                    facts,
                )));
            }
            Ok(Err(error)) => error,
            Err(late) => {
                account.abandon();
                return Err(late);
            }
        };
        account.blame(&error);
        account.abandon();
        let is_worth_another = is_worth_another(&error);
        self.failed(post, error, is_worth_another)?;
        Ok(Given::Failed)
    }

    /// Asks a worker for its part, and waits for the beginning of its answer.
    ///
    /// # Errors
    /// If the request's time is over.
    pub(crate) async fn open(
        &self,
        post: Post<'_>,
        leg: Leg,
        vigil: &mut Vigil,
        facts: &RequestFacts,
    ) -> Result<Result<Opened, EngineError>, RequestError> {
        let may_leave = || self.has_alternative(facts);
        let opening = open(&**post.engine(), self.ask(post, leg), post.worker, &self.patience, vigil, &may_leave);
        tokio::time::timeout_at(self.patience.deadline.into(), opening).await.map_err(|_| self.patience.exceeded())
    }

    /// What a worker is asked.
    pub(crate) fn ask(&self, post: Post<'_>, leg: Leg) -> GenerateRequest {
        GenerateRequest { rank: post.placing.snapshot.rank(post.worker), leg, ..self.asked.ask.clone() }
    }

    pub(crate) fn vigil(&self, post: Post<'_>) -> Vigil {
        let signs = post.placing.snapshot.signs(post.worker.id);
        Vigil::new(&post.worker.load, signs, self.patience.idle, self.migration.enabled)
    }

    /// Relays a stream that has begun.
    pub(crate) fn relay(&mut self, post: Post<'_>, answer: Answer, facts: &RequestFacts) -> Response {
        let Answer { account, head, first, chunks, vigil, beside } = answer;
        let course = self.migration.enabled.then(|| self.course(facts));
        let begun = Begun { account, permit: self.permit.take(), first, chunks, vigil, patience: self.patience, beside };
        relay::stream(begun, head, course, Arc::clone(post.engine()), self.lane.audience())
    }

    /// One more worker, or pair of them, is tried.
    pub(crate) fn try_again(&mut self) {
        if let Some(error) = &self.failure {
            metrics::counter!("dynamo_host_retries_total", "cause" => error.label()).increment(1);
        }
        self.attempts_left = self.attempts_left.saturating_sub(1);
    }

    /// A worker failed it before its first token.
    ///
    /// # Errors
    /// What it failed with, if nobody else is to have it.
    pub(crate) fn failed(&mut self, post: Post<'_>, error: EngineError, is_worth_another: bool) -> Result<(), RequestError> {
        let reason = plain(&error.to_string());
        tracing::warn!(worker = post.worker.spec.name, "worker failed before its first token: {reason}");
        self.lane.roster.report_failed(post.worker.id, post.engine(), &error);
        let is_unsent = matches!(error, EngineError::Connect { .. });
        if is_unsent {
            // It cannot be what breaks engines that it never reached: as long as there are others, that costs no attempt.
            self.attempts_left = self.migration.max_attempts.min(self.attempts_left + 1);
        }
        if self.attempts_left == 0 || !is_worth_another || !self.lane.roster.take_retry() {
            return Err(error.into());
        }
        self.is_lost_work |= !is_unsent;
        self.failure = Some(error);
        Ok(())
    }

    /// Whether a worker that failed it, and was at no fault, may have it again: once, where nobody else is left.
    pub(crate) fn may_ask_again(&self, facts: &RequestFacts) -> bool {
        !self.was_asked_again && self.attempts_left > 0 && !self.has_alternative(facts)
    }

    /// A worker that was at no fault is asked again, if it may be.
    pub(crate) fn ask_again(&mut self, worker: WorkerId, facts: &mut RequestFacts) {
        if self.may_ask_again(facts) {
            facts.failed_workers.retain(|&failed| failed != worker);
            self.was_asked_again = true;
            self.keep_whole();
        }
    }

    /// Somebody had begun with it who was not to blame that nothing came of it.
    pub(crate) fn lost_work(&mut self) {
        self.is_lost_work = true;
    }

    /// From here on it is given to nobody in parts, as long as somebody serves it whole.
    pub(crate) fn keep_whole(&mut self) {
        self.may_be_split = false;
    }

    pub(crate) fn has_attempts(&self) -> bool {
        self.attempts_left > 0
    }

    pub(crate) fn heard(&self) -> Option<Arc<Heard>> {
        self.permit.as_ref().and_then(Permit::heard)
    }

    pub(crate) fn permit(&mut self) -> &mut Option<Permit> {
        &mut self.permit
    }

    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }

    /// What it takes to go on elsewhere, should the worker be lost that has it now.
    fn course(&self, facts: &RequestFacts) -> Box<Course> {
        let Asked { ask, pinned, prompt, recorder, returns_ids, .. } = &self.asked;
        Box::new(Course {
            lane: Arc::clone(self.lane),
            migration: Arc::clone(&self.migration),
            pinned: pinned.clone(),
            facts: facts.clone(),
            attempts: self.migration.max_attempts - self.attempts_left,
            prompt: Arc::clone(prompt),
            ask: ask.clone(),
            recorder: recorder.clone(),
            patience: self.patience,
            client: self.client(),
            heard: self.heard(),
            returns_ids: *returns_ids,
        })
    }

    /// The worker has the prompt's KV.
    pub(crate) fn taken_up(&self, post: Post<'_>, facts: &RequestFacts) {
        let feed = post.placing.snapshot.feed(post.worker.id);
        self.lane.prefixes.taken_up(facts.endpoint, feed, &self.asked.prompt, post.worker.spec.block_size);
    }

    /// What the host says of an answer of this worker, and of who computed its prompt if that is another.
    pub(crate) fn head(&self, post: Post<'_>, prefill: Option<Post<'_>>) -> Head {
        let name = |post: Post<'_>| self.lane.expose_worker.then(|| post.worker.spec.name.clone());
        Head {
            policy: post.placing.policy.clone(),
            worker: name(post),
            prefill_worker: prefill.and_then(name),
            request_id: Arc::clone(&self.asked.ask.request_id),
        }
    }

    /// Whether the request can still go to a worker that has not failed it.
    pub(crate) fn has_alternative(&self, facts: &RequestFacts) -> bool {
        self.attempts_left > 0 && self.lane.roster.snapshot().has_way(facts, self.lane.roster.links())
    }
}

/// That an engine answered with a status that is its failure.
pub(crate) fn answered(post: Post<'_>, reply: &WholeReply) -> EngineError {
    EngineError::Unhealthy { engine: post.worker.spec.name.clone(), reason: format!("it answered {}", reply.status) }
}

/// Asks an engine and waits for the beginning of its answer; for that of a stream until its first chunk. A whole answer tells
/// nothing of its progress: it is waited for until its worker is given up, or moves for nobody. `may_leave`: whether somebody else could do it; if
/// not, a worker that is slow is still the best one.
pub(crate) async fn open(
    engine: &dyn Engine,
    ask: GenerateRequest,
    worker: &Worker,
    patience: &Patience,
    vigil: &mut Vigil,
    may_leave: &(dyn Fn() -> bool + Sync),
) -> Result<Opened, EngineError> {
    // Of a prompt's KV, too, nothing comes but the sign that it is there.
    let has_first = ask.stream || matches!(ask.leg, Leg::Prefill(_));
    let asked = Instant::now();
    let opening = async {
        let mut chunks = match engine.generate(ask).await? {
            Reply::Whole(reply) => return Ok(Opened::Whole(reply)),
            Reply::Stream(chunks) => chunks,
        };
        match chunks.next().await {
            Some(first) => Ok(Opened::Stream(first?, chunks)),
            None => Err(EngineError::Incomplete { engine: format!("worker {}", worker.spec.name) }),
        }
    };
    tokio::pin!(opening);
    loop {
        if let Ok(opened) = tokio::time::timeout(LOOK_EVERY, &mut opening).await {
            return opened;
        }
        let lost = if has_first { vigil.before_first(asked, Instant::now()) } else { vigil.whole(asked, Instant::now()) };
        if let Some(lost) = lost
            && (!matches!(lost, Lost::Stalled { .. }) || may_leave())
        {
            return Err(lost.error(&worker.spec.name, patience.idle));
        }
    }
}

/// Whether another worker may do better. Not if the request took its whole time already, and not if the engine itself
/// said no: it may be the request.
fn is_worth_another(error: &EngineError) -> bool {
    match error {
        EngineError::Connect { .. }
        | EngineError::Broken { .. }
        | EngineError::Incomplete { .. }
        | EngineError::InStream { refused: false, .. }
        | EngineError::Unhealthy { .. } => true,
        EngineError::Timeout { .. } | EngineError::InStream { .. } | EngineError::Protocol { .. } => false,
    }
}

/// Whether an engine says that another one would be a better choice. A vLLM that is stopping, or whose core is dead, says so
/// with a plain 500.
pub(crate) fn is_busy(reply: &WholeReply) -> bool {
    const DYING: [&[u8]; 3] = [b"cannot schedule new futures", b"EngineCore", b"EngineDead"];
    match reply.status {
        StatusCode::SERVICE_UNAVAILABLE | StatusCode::BAD_GATEWAY => true,
        StatusCode::INTERNAL_SERVER_ERROR => DYING.iter().any(|words| memchr::memmem::find(&reply.body, words).is_some()),
        _ => false,
    }
}
