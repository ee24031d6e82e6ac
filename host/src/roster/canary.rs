//! Canary: one token that is asked of a worker when nothing was heard of it for long.
//!
//! An engine can answer its probe and make no tokens any more. So a worker that had no request for `health.canary_idle_s`,
//! or that is half-open and gets none, is asked for one token; and so is one that has requests and has made no token for as
//! long, which whole answers cannot tell from work. If it makes none, whole answers are asked of another (`migrate::vigil`).
//! That is fair only where the token need not wait for what runs: an engine that says it is full, or has a queue, is left alone.
//! Where a worker is half-open it tries it as a request would, and takes no request's trial: one that hangs would keep all others away.
//! It is no request of anybody's: no policy, account, receipt or
//! metric of requests knows it. A worker that refuses it as a request (embeddings only) is asked no more.
//! One of an engine that serves its part of requests only hands over to another, or takes over from one, that is seen to work.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use dynamo_engine_api::{Endpoint, GenerateRequest, Protocol, Reply};
use dynamo_host_core::{
    Load, Role, Worker, WorkerId, WorkerState,
    load::{LoadSlot, Reported},
};
use dynamo_host_flow::{Ended, Failure};
use http::StatusCode;
use serde_json::json;

use super::{
    Member, Roster,
    tend::jittered,
    vitals::{self, Vitals},
};
use crate::config::Canary;

/// Canaries at once, over all engines.
pub(super) const CANARIES: usize = 16;
/// For how long a half-open worker gets no request before it gets a canary.
const HALF_OPEN_IDLE: Duration = Duration::from_secs(1);
/// How often is looked who has been idle.
const LOOK_AT_LEAST_EVERY: Duration = Duration::from_secs(1);
const LOOK_AT_MOST_EVERY: Duration = Duration::from_millis(200);
/// How soon an engine shall take it up: after all others.
pub(super) const PRIORITY: i32 = -1000;

/// What changes when a worker does something: while it has requests, only the tokens that it made.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Mark {
    is_busy: bool,
    moves: u64,
}

impl Mark {
    fn of(load: &LoadSlot) -> Self {
        let is_busy = load.get(Load::ActiveRequests) > 0;
        Self { is_busy, moves: load.output_tokens() + if is_busy { 0 } else { load.served() } }
    }
}

/// Whether a token would be made beside what runs, as far as its engine says.
fn has_place(load: &LoadSlot) -> bool {
    let max = load.get_reported(Reported::MaxRunningRequests).filter(|&max| max > 0);
    let running = load.get_reported(Reported::RunningRequests).unwrap_or(0).max(load.get(Load::ActiveRequests));
    load.get_reported(Reported::QueuedRequests).unwrap_or(0) == 0 && max.is_none_or(|max| running < max)
}

/// What is known of one worker between two looks.
struct Idle {
    mark: Mark,
    since_ms: u64,
    /// How it is asked; `None`: it makes no tokens.
    endpoint: Option<Endpoint>,
}

impl Roster {
    /// Asks a member's workers for a token whenever they have been idle for long, until the task is ended.
    pub(super) async fn keep_asking(&self, member: &Arc<Member>) {
        let mut idle: HashMap<WorkerId, Idle> = HashMap::new();
        loop {
            let pause = (self.health().canary_idle() / 8).clamp(LOOK_AT_MOST_EVERY, LOOK_AT_LEAST_EVERY);
            tokio::time::sleep(jittered(pause)).await;
            let is_asked = match self.health().canary {
                Canary::On => true,
                Canary::Off => false,
                // Behind an API that is not known to be an engine of ours, a token may cost money.
                Canary::Auto => member.engine.kind() != "openai",
            };
            let (workers, has_ranks) = {
                let standing = member.standing();
                // Only what answers its probe, and shall serve.
                let is_well = standing.state() == WorkerState::Healthy;
                if !is_asked || !is_well {
                    continue;
                }
                let pairs = standing.workers.iter().cloned().zip(standing.vitals.iter().cloned());
                (pairs.collect::<Vec<_>>(), standing.has_ranks)
            };
            idle.retain(|id, _| workers.iter().any(|(worker, _)| worker.id == *id));
            for (worker, vitals) in workers {
                let now_ms = self.clock.now_ms();
                let mark = Mark::of(&worker.load);
                let seen =
                    idle.entry(worker.id).or_insert(Idle { mark, since_ms: now_ms, endpoint: Some(Endpoint::Completions) });
                if seen.mark != mark || (mark.is_busy && !has_place(&worker.load)) {
                    (seen.mark, seen.since_ms) = (mark, now_ms);
                    continue;
                }
                let is_half_open = vitals.is_half_open(now_ms) && !mark.is_busy;
                let patience = if is_half_open { HALF_OPEN_IDLE } else { self.health().canary_idle() };
                if u128::from(now_ms.saturating_sub(seen.since_ms)) < patience.as_millis() {
                    continue;
                }
                // Those before it may have taken long, and it may be drained meanwhile.
                if member.standing().state() != WorkerState::Healthy {
                    break;
                }
                if let Some(endpoint) = seen.endpoint {
                    let rank = has_ranks.then_some(worker.spec.rank);
                    seen.endpoint = self.ask_for_a_token(member, &worker, &vitals, rank, endpoint, is_half_open).await;
                }
                seen.since_ms = self.clock.now_ms();
            }
        }
    }

    /// Asks one worker; returns how it is to be asked the next time.
    async fn ask_for_a_token(
        &self,
        member: &Arc<Member>,
        worker: &Worker,
        vitals: &Vitals,
        rank: Option<u32>,
        endpoint: Endpoint,
        is_half_open: bool,
    ) -> Option<Endpoint> {
        let begin = || vitals.begin_beside(self.clock.now_ms());
        let mut ticket = begin();
        let made = worker.load.output_tokens();
        let mut endpoint = endpoint;
        let mut failures = 0;
        loop {
            let ended = match self.token(member, worker, rank, endpoint).await {
                Ok(status) if status.is_success() => Ended::Well,
                Ok(StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) => Ended::Untold,
                Ok(status) if status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED => {
                    Ended::Failed(Failure::Unhealthy)
                }
                // It does not know such requests: alive it is.
                Ok(_) if endpoint == Endpoint::Completions => {
                    endpoint = Endpoint::ChatCompletions;
                    continue;
                }
                Ok(_) => {
                    vitals.end(ticket, Ended::Untold, &self.health().breaker_rules(), self.clock.now_ms());
                    return None;
                }
                Err(failure) => Ended::Failed(failure),
            };
            let label = if ended == Ended::Well { "token" } else { "none" };
            metrics::counter!("dynamo_host_canaries_total", "result" => label).increment(1);
            let Ended::Failed(failure) = ended else {
                vitals.end(ticket, ended, &self.health().breaker_rules(), self.clock.now_ms());
                break;
            };
            failures += 1;
            vitals.end(ticket, ended, &self.health().breaker_rules(), self.clock.now_ms());
            if is_half_open {
                break;
            }
            if made != worker.load.output_tokens() {
                // It makes tokens, if for others.
                break;
            }
            if failures == 2 {
                let name = &member.config.name;
                vitals.is_mute(failure, &self.health().breaker_rules(), self.clock.now_ms());
                tracing::warn!(worker = name, "worker answers its probe and makes no token: {failure}");
                break;
            }
            ticket = begin();
        }
        self.publish_soon();
        Some(endpoint)
    }

    /// Asks for one token, in the way that the engine can make one; returns the status of the answer.
    async fn token(
        &self,
        member: &Arc<Member>,
        worker: &Worker,
        rank: Option<u32>,
        endpoint: Endpoint,
    ) -> Result<StatusCode, Failure> {
        let serves_whole = member.config.role == Role::Aggregated || member.engine.handoff().is_none_or(Protocol::serves_whole);
        if serves_whole {
            return self.canary(member, worker, rank, endpoint).await;
        }
        let _permit = self.canaries.acquire().await;
        match self.hand_over_with(member).await {
            Some(Ok(())) => Ok(StatusCode::OK),
            Some(Err(_)) => Err(Failure::Unhealthy),
            // Nothing is told of it.
            None => Ok(StatusCode::SERVICE_UNAVAILABLE),
        }
    }

    /// Asks for one token; returns the status of the answer.
    async fn canary(
        &self,
        member: &Member,
        worker: &Worker,
        rank: Option<u32>,
        endpoint: Endpoint,
    ) -> Result<StatusCode, Failure> {
        let model = &worker.spec.model;
        let body = match endpoint {
            Endpoint::Completions => json!({ "model": model, "prompt": "1", "max_tokens": 1 }),
            _ => json!({ "model": model, "messages": [{ "role": "user", "content": "1" }], "max_tokens": 1 }),
        };
        let ask = GenerateRequest::new(endpoint, Bytes::from(body.to_string()), false, "canary".into());
        let ask = GenerateRequest { rank, priority: PRIORITY, ..ask };
        let _permit = self.canaries.acquire().await;
        match tokio::time::timeout(self.health().canary_timeout(), member.engine.generate(ask)).await {
            Ok(Ok(Reply::Whole(reply))) => Ok(reply.status),
            // It was asked for no stream, and answers all the same.
            Ok(Ok(Reply::Stream(_))) => Ok(StatusCode::OK),
            Ok(Err(error)) => Err(vitals::failure(&error, false)),
            Err(_) => Err(Failure::Timeout),
        }
    }
}
