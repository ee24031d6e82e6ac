//! The client's request that accounts are of, and what is counted of one whose parts have accounts of their own.
//!
//! Invariant: a request is counted once, whatever its parts are given to: its prompts once each, the output of all of them, the first of all
//! first tokens.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering::Relaxed},
    },
    time::Instant,
};

use dynamo_engine_api::{Endpoint, Usage};
use dynamo_host_core::RequestFacts;
use http::StatusCode;

use super::{CLIENT_LEFT, count_request};
use crate::{
    meters::RequestMeters,
    request::Lane,
    stop::{Phase, Stopping},
};

/// The status of a sum that is not to be counted.
const ELSEWHERE: u16 = 0;

/// The client's request that an account is of.
#[derive(Clone)]
pub(crate) struct Client {
    /// When it came.
    pub(crate) accepted: Instant,
    /// Where it is counted, and which prompt is meant, if it is one part of it.
    sum: Option<(Arc<Sum>, usize)>,
}

/// What is counted of a request that is served in parts. Dropped, it is.
pub(crate) struct Sum {
    meters: RequestMeters,
    span: tracing::Span,
    stopping: Stopping,
    endpoint: Endpoint,
    model: String,
    accepted: Instant,
    /// Tokens of each prompt.
    prompts: Box<[AtomicU32]>,
    output: AtomicU32,
    has_tokens: AtomicBool,
    status: AtomicU16,
}

impl Client {
    /// One that is served as it is.
    pub(crate) fn new(accepted: Instant) -> Self {
        Self { accepted, sum: None }
    }

    /// A part of one, of this prompt.
    pub(crate) fn part(sum: &Arc<Sum>, prompt: usize) -> Self {
        Self { accepted: sum.accepted, sum: Some((Arc::clone(sum), prompt)) }
    }

    /// Whether it is counted elsewhere.
    pub(super) fn is_part(&self) -> bool {
        self.sum.is_some()
    }

    /// It is no concern of this account any more.
    pub(super) fn let_go(&mut self) {
        self.sum = None;
    }

    /// A first token is there.
    pub(super) fn first_token(&self, meters: &RequestMeters, now: Instant) {
        if self.sum.as_ref().is_none_or(|(sum, _)| !sum.has_tokens.swap(true, Relaxed)) {
            meters.ttft.record(now - self.accepted);
        }
    }

    /// Counts what an account has of it: at once, or in the sum that it is a part of. Whether it was at once.
    pub(super) fn count(&self, meters: &RequestMeters, of: (Endpoint, &str), usage: Usage, status: StatusCode) -> bool {
        if let Some((sum, prompt)) = &self.sum {
            sum.prompts[*prompt].fetch_max(usage.prompt_tokens, Relaxed);
            sum.output.fetch_add(usage.completion_tokens, Relaxed);
            return false;
        }
        count(meters, of, (usage.prompt_tokens.into(), usage.completion_tokens.into()), self.accepted, status);
        true
    }
}

/// Counts a request that was answered: the tokens of its prompts and of its output, its time, and how it ended.
fn count(meters: &RequestMeters, of: (Endpoint, &str), tokens: (u64, u64), accepted: Instant, status: StatusCode) {
    meters.prompt_tokens.increment(tokens.0);
    meters.output_tokens.increment(tokens.1);
    meters.seconds.record(accepted.elapsed());
    count_request(of.0.label(), of.1, status);
}

impl Sum {
    /// Of a request with so many prompts.
    pub(crate) fn new(lane: &Lane, facts: &RequestFacts, accepted: Instant) -> Arc<Self> {
        lane.meters.in_flight.increment(1.0);
        Arc::new(Self {
            meters: lane.meters.clone(),
            span: tracing::Span::current(),
            stopping: lane.stopping.clone(),
            endpoint: facts.endpoint,
            model: facts.model.clone(),
            accepted,
            prompts: (0..facts.prompts).map(|_| AtomicU32::new(0)).collect(),
            output: AtomicU32::new(0),
            has_tokens: AtomicBool::new(false),
            status: AtomicU16::new(CLIENT_LEFT),
        })
    }

    /// What the client's answer is.
    pub(crate) fn answer(&self, status: StatusCode) {
        self.status.store(status.as_u16(), Relaxed);
    }

    /// It ends in an error of the host's, and is counted with that.
    pub(crate) fn set_aside(&self) {
        self.status.store(ELSEWHERE, Relaxed);
    }
}

impl Drop for Sum {
    fn drop(&mut self) {
        self.meters.in_flight.decrement(1.0);
        let status = *self.status.get_mut();
        // An answer that the host's end came before is one of ours, and is counted with it.
        let never_began = status == CLIENT_LEFT && self.stopping.has_reached(Phase::Over);
        let Some(status) = StatusCode::from_u16(status).ok().filter(|_| !never_began) else { return };
        let prompt_tokens: u64 = self.prompts.iter().map(|tokens| u64::from(tokens.load(Relaxed))).sum();
        let output_tokens = *self.output.get_mut();
        count(&self.meters, (self.endpoint, &self.model), (prompt_tokens, output_tokens.into()), self.accepted, status);
        tracing::debug!(parent: &self.span, status = status.as_u16(), tokens = output_tokens, "request ended");
    }
}
