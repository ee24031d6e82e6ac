//! Carries rankings out: gives a request to worker after worker until one takes it.
//!
//! Invariants: a worker that failed the request is never asked again; a request is given to few workers altogether,
//! since it may be what breaks them; what an engine answered, if only an error, is the answer, unless it was that another
//! worker would be a better choice and there is one.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::response::Response;
use dynamo_engine_api::{Chunk, ChunkStream, Engine, EngineError, GenerateRequest, Reply, WholeReply};
use dynamo_host_core::{Held, RequestFacts, Worker};
use dynamo_host_index::Prompt;
use futures_util::StreamExt;
use http::StatusCode;

use crate::{
    account::Account,
    admit::Permit,
    error::RequestError,
    relay::{self, Head, Patience},
    request::{Lane, Placing},
    text::plain,
};

/// Workers that one request is given to, over all its placings.
const MAX_ATTEMPTS: u32 = 4;

/// One request on its way to a worker.
pub(crate) struct Dispatch<'a> {
    lane: &'a Arc<Lane>,
    ask: GenerateRequest,
    /// Until the answer has it.
    permit: Option<Permit>,
    accepted: Instant,
    /// How long its client gives it.
    timeout: Option<Duration>,
    attempts_left: u32,
    /// What the last worker failed it with.
    failure: Option<EngineError>,
}

/// The beginning of an engine's answer: from here on, there is no other worker.
enum Opened {
    Whole(WholeReply),
    Stream(Chunk, ChunkStream),
}

impl<'a> Dispatch<'a> {
    pub(crate) fn new(
        lane: &'a Arc<Lane>,
        ask: GenerateRequest,
        permit: Permit,
        accepted: Instant,
        timeout: Option<Duration>,
    ) -> Self {
        lane.roster.note_request();
        Self { lane, ask, permit: Some(permit), accepted, timeout, attempts_left: MAX_ATTEMPTS, failure: None }
    }

    /// What the last worker failed it with, if one did.
    pub(crate) fn into_failure(self) -> Option<EngineError> {
        self.failure
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
        prompt: &Prompt,
    ) -> Result<Option<Response>, RequestError> {
        for (nth, &row) in placing.rows.iter().enumerate() {
            // What has come, gone or been drained since may concern the rest of the ranking.
            if nth > 0 && !Arc::ptr_eq(&placing.snapshot, &self.lane.roster.snapshot()) {
                return Ok(None);
            }
            if let Some(error) = &self.failure {
                metrics::counter!("dynamo_host_retries_total", "cause" => error.label()).increment(1);
            }
            self.attempts_left -= 1;
            let worker = placing.candidates.worker(row);
            let cached = placing.overlap.of(worker.load.index()).map_or(0, Held::total);
            let mut account = Account::open(self.lane, facts, worker, cached, placing, self.accepted);
            account.admission = self.permit.as_ref().and_then(Permit::heard);
            let patience = Patience::since(self.accepted, &self.lane.limits(), self.timeout);
            let head = self.head(placing, worker);
            metrics::counter!("dynamo_host_worker_requests_total", "worker" => worker.spec.name.clone()).increment(1);
            tracing::debug!(worker = worker.spec.name, policy = head.policy, "dispatch");
            let ask = GenerateRequest { rank: placing.snapshot.rank(worker), ..self.ask.clone() };
            let opening = open(&**placing.snapshot.engine(worker.id), ask, worker, &patience);
            let opened = tokio::time::timeout_at(patience.deadline.into(), opening).await;
            facts.failed_workers.push(worker.id);
            let error = match opened {
                Ok(Ok(Opened::Whole(reply))) if is_busy(reply.status) && self.has_alternative(facts) => {
                    EngineError::Unhealthy { engine: worker.spec.name.clone(), reason: format!("it answered {}", reply.status) }
                }
                Ok(Ok(Opened::Whole(reply))) => {
                    if reply.status.is_success() {
                        self.taken_up(placing, worker, facts, prompt);
                    }
                    return Ok(Some(relay::whole(account, self.permit.take(), head, reply)));
                }
                Ok(Ok(Opened::Stream(first, chunks))) => {
                    self.taken_up(placing, worker, facts, prompt);
                    let permit = self.permit.take();
                    return Ok(Some(relay::stream(account, permit, head, first, chunks, patience, self.lane.audience())));
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
            if matches!(error, EngineError::Connect { .. }) {
                self.lane.roster.report_unreachable(worker.id, placing.snapshot.engine(worker.id), &error);
            }
            if self.attempts_left == 0 || !is_worth_another(&error) || !self.lane.roster.take_retry() {
                return Err(error.into());
            }
            self.failure = Some(error);
        }
        Ok(None)
    }

    /// The worker has computed the prompt.
    fn taken_up(&self, placing: &Placing, worker: &Worker, facts: &RequestFacts, prompt: &Prompt) {
        let feed = placing.snapshot.feed(worker.id);
        self.lane.prefixes.taken_up(facts.endpoint, feed, prompt, worker.spec.block_size);
    }

    fn head(&self, placing: &Placing, worker: &Worker) -> Head {
        Head {
            policy: placing.policy.clone(),
            worker: self.lane.expose_worker.then(|| worker.spec.name.clone()),
            request_id: Arc::clone(&self.ask.request_id),
        }
    }

    /// Whether the request can still go to a worker that has not failed it.
    fn has_alternative(&self, facts: &RequestFacts) -> bool {
        self.attempts_left > 0 && self.lane.roster.snapshot().candidates(facts).is_ok()
    }
}

/// Asks an engine and waits for the beginning of its answer; for that of a stream until its first chunk.
async fn open(engine: &dyn Engine, ask: GenerateRequest, worker: &Worker, patience: &Patience) -> Result<Opened, EngineError> {
    let mut chunks = match engine.generate(ask).await? {
        Reply::Whole(reply) => return Ok(Opened::Whole(reply)),
        Reply::Stream(chunks) => chunks,
    };
    let engine = || format!("worker {}", worker.spec.name);
    match tokio::time::timeout(patience.idle, chunks.next()).await {
        Ok(Some(first)) => Ok(Opened::Stream(first?, chunks)),
        Ok(None) => Err(EngineError::Incomplete { engine: engine() }),
        Err(_) => Err(EngineError::Timeout { engine: engine(), after: patience.idle }),
    }
}

/// Whether another worker may do better. Not if the request took its whole time already, and not if the engine itself
/// said no: it may be the request.
fn is_worth_another(error: &EngineError) -> bool {
    match error {
        EngineError::Connect { .. }
        | EngineError::Broken { .. }
        | EngineError::Incomplete { .. }
        | EngineError::Unhealthy { .. } => true,
        EngineError::Timeout { .. } | EngineError::InStream { .. } | EngineError::Protocol { .. } => false,
    }
}

/// Whether an engine says that another one would be a better choice.
fn is_busy(status: StatusCode) -> bool {
    matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::BAD_GATEWAY)
}
