//! Carries rankings out: gives a request to worker after worker until one takes it.
//!
//! Invariants: a worker that failed the request is asked again only where there is no other, and it has been away; a request is
//! given to few workers altogether, since it may be what breaks them; what an engine answered, if only an error, is the answer,
//! unless it was that another worker would be a better choice and there is one. A whole answer is asked for again from the
//! start, as long as nothing of it was sent: the client has none of it, so that nothing can be lost or doubled.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::response::Response;
use dynamo_engine_api::{Chunk, ChunkStream, Engine, EngineError, GenerateRequest, Reply, WholeReply};
use dynamo_host_core::{RequestFacts, Worker, WorkerId};
use dynamo_host_index::Prompt;
use dynamo_host_policy::Pinned;
use futures_util::StreamExt;
use http::StatusCode;

use crate::{
    account::Account,
    admit::{Heard, Permit},
    config::Migration,
    error::RequestError,
    migrate::{Course, LOOK_EVERY, Lost, Vigil},
    receipts::Recorder,
    relay::{self, Begun, Head, Patience},
    request::{Lane, Placing},
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
    lane: &'a Arc<Lane>,
    asked: Asked,
    migration: Arc<Migration>,
    /// Until the answer has it.
    permit: Option<Permit>,
    accepted: Instant,
    patience: Patience,
    attempts_left: u32,
    /// What the last worker failed it with.
    failure: Option<EngineError>,
    /// Whether one of them had begun with it, as far as anybody knows.
    is_lost_work: bool,
    /// Until when it waits for workers that are well again.
    outlasts_until: Option<Instant>,
}

/// The beginning of an engine's answer.
pub(crate) enum Opened {
    Whole(WholeReply),
    Stream(Chunk, ChunkStream),
}

impl<'a> Dispatch<'a> {
    pub(crate) fn new(
        lane: &'a Arc<Lane>,
        asked: Asked,
        permit: Permit,
        accepted: Instant,
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
            accepted,
            patience,
            attempts_left,
            failure: None,
            is_lost_work: false,
            outlasts_until: None,
        }
    }

    pub(crate) fn asked(&self) -> &Asked {
        &self.asked
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
                    facts.failed_workers.retain(|&failed| failed != worker);
                    return true;
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

    /// Gives the request to the first worker of the ranking that takes it. `None`: all of them failed it, and it may be
    /// placed anew.
    ///
    /// # Errors
    /// What it failed with for good.
    pub(crate) async fn carry_out(
        &mut self,
        placing: &Placing,
        facts: &mut RequestFacts,
    ) -> Result<Option<Response>, RequestError> {
        let book = |worker: &Worker| Account::book(self.lane, facts, worker, placing);
        let mut rows = placing.rows.clone();
        let mut booked = self.lane.queue.book(&mut rows, &placing.candidates, facts, book);
        for (nth, row) in rows.into_iter().enumerate() {
            // What has come, gone or been drained since may concern the rest of the ranking.
            if nth > 0 && !Arc::ptr_eq(&placing.snapshot, &self.lane.roster.snapshot()) {
                return Ok(None);
            }
            if let Some(error) = &self.failure {
                metrics::counter!("dynamo_host_retries_total", "cause" => error.label()).increment(1);
            }
            self.attempts_left -= 1;
            let worker = placing.candidates.worker(row);
            let engine = placing.snapshot.engine(worker.id);
            let booking = booked.take().unwrap_or_else(|| Account::book(self.lane, facts, worker, placing));
            let heard = self.permit.as_ref().and_then(Permit::heard);
            let mut account = Account::open(self.lane, facts, placing, worker, booking, heard.clone(), self.accepted);
            let patience = self.patience;
            let head = self.head(placing, worker);
            tracing::debug!(worker = worker.spec.name, policy = head.policy, "dispatch");
            let ask = GenerateRequest { rank: placing.snapshot.rank(worker), ..self.asked.ask.clone() };
            let signs = placing.snapshot.signs(worker.id);
            let mut vigil = Vigil::new(&worker.load, signs, patience.idle, self.migration.enabled);
            vigil.may_make(facts.max_output_tokens);
            facts.failed_workers.push(worker.id);
            let may_leave = || self.has_alternative(facts);
            let opening = open(&**engine, ask, worker, &patience, &mut vigil, &may_leave);
            let opened = tokio::time::timeout_at(patience.deadline.into(), opening).await;
            let error = match opened {
                Ok(Ok(Opened::Whole(reply))) if is_busy(&reply) && self.has_alternative(facts) => {
                    EngineError::Unhealthy { engine: worker.spec.name.clone(), reason: format!("it answered {}", reply.status) }
                }
                Ok(Ok(Opened::Whole(reply))) => {
                    if reply.status.is_success() {
                        self.taken_up(placing, worker, facts);
                    }
                    return Ok(Some(relay::whole(account, self.permit.take(), head, reply)));
                }
                Ok(Ok(Opened::Stream(first, chunks))) => {
                    self.taken_up(placing, worker, facts);
                    let begun = Begun { account, permit: self.permit.take(), first, chunks, vigil, patience };
                    let course = self.migration.enabled.then(|| self.course(facts, patience, heard));
                    return Ok(Some(relay::stream(begun, head, course, Arc::clone(engine), self.lane.audience())));
                }
                Ok(Err(error)) => error,
                Err(_) => {
                    account.abandon();
                    return Err(patience.exceeded());
                }
            };
            account.blame(&error);
            account.abandon();
            let reason = plain(&error.to_string());
            tracing::warn!(worker = worker.spec.name, "worker failed before its first token: {reason}");
            self.lane.roster.report_failed(worker.id, engine, &error);
            if self.attempts_left == 0 || !is_worth_another(&error) || !self.lane.roster.take_retry() {
                return Err(error.into());
            }
            self.is_lost_work |= !matches!(error, EngineError::Connect { .. });
            self.failure = Some(error);
        }
        Ok(None)
    }

    /// What it takes to go on elsewhere, should the worker be lost that has it now.
    fn course(&self, facts: &RequestFacts, patience: Patience, heard: Option<Arc<Heard>>) -> Box<Course> {
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
            patience,
            accepted: self.accepted,
            heard,
            returns_ids: *returns_ids,
        })
    }

    /// The worker has computed the prompt.
    fn taken_up(&self, placing: &Placing, worker: &Worker, facts: &RequestFacts) {
        let feed = placing.snapshot.feed(worker.id);
        self.lane.prefixes.taken_up(facts.endpoint, feed, &self.asked.prompt, worker.spec.block_size);
    }

    fn head(&self, placing: &Placing, worker: &Worker) -> Head {
        Head {
            policy: placing.policy.clone(),
            worker: self.lane.expose_worker.then(|| worker.spec.name.clone()),
            request_id: Arc::clone(&self.asked.ask.request_id),
        }
    }

    /// Whether the request can still go to a worker that has not failed it.
    fn has_alternative(&self, facts: &RequestFacts) -> bool {
        self.attempts_left > 0 && self.lane.roster.snapshot().candidates(facts).is_ok()
    }
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
    let is_stream = ask.stream;
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
        let lost = if is_stream { vigil.before_first(asked, Instant::now()) } else { vigil.whole(asked, Instant::now()) };
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
fn is_busy(reply: &WholeReply) -> bool {
    const DYING: [&[u8]; 3] = [b"cannot schedule new futures", b"EngineCore", b"EngineDead"];
    match reply.status {
        StatusCode::SERVICE_UNAVAILABLE | StatusCode::BAD_GATEWAY => true,
        StatusCode::INTERNAL_SERVER_ERROR => DYING.iter().any(|words| memchr::memmem::find(&reply.body, words).is_some()),
        _ => false,
    }
}
