//! The admission slot's part: what it is told of a request and its pool, what it says, and who hears what became of it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use dynamo_host_core::{Admitted, OnError, RequestFacts, admission::Verdict};
use dynamo_host_policy::{AdmissionCall, DecidedBy, Decision, OutcomeRow, PolicyVersion};

use super::pool::Pool;
use crate::{clock::unix_ms, error::RequestError, observe::Observer, request::Lane};

/// Code of a request whose time to wait ran out: `outcomes.end` of the contract.
const TIMED_OUT: u32 = 4;
/// Of one whose client left.
const CANCELLED: u32 = 1;
/// Of one that came to no worker for another reason.
const FAILED: u32 = 2;

/// The version that let a request in, and wants to hear what became of it: of each attempt on a worker, or that there was
/// none.
pub(crate) struct Heard {
    observer: Observer,
    version: Arc<PolicyVersion>,
    decision_id: u64,
    queue_ms: f32,
    is_told: AtomicBool,
}

/// How a request is let in, and who wants to hear of it.
pub(super) type Word = (Admitted, Option<Heard>);

/// Asks the admission slot; without a policy, what the configuration says holds.
///
/// # Errors
/// It is not let in.
pub(super) fn ask(lane: &Lane, facts: &RequestFacts, pool: &Pool, native: Admitted) -> Result<Word, RequestError> {
    let slot = &lane.admission;
    let pinned = slot.pin();
    if pinned.0.is_none() && slot.on_error() == OnError::Fallback && !slot.is_bypassed() {
        return Ok((native, None));
    }
    let decision_id = lane.decisions.fetch_add(1, Relaxed);
    let now_ms = lane.clock.now_ms();
    let load = lane.queue.load_for(pool, facts.tenant_key().unwrap_or(0), &native);
    lane.queue.refresh(pool);
    let call = AdmissionCall {
        request: Arc::new(RequestFacts { decision_id, ..facts.clone() }),
        pools: pool.states(load, now_ms).into(),
        native,
        now_ms,
        unix_ms: unix_ms(),
        seed: decision_id,
    };
    let Decision { verdict, by, .. } = slot.decide(&pinned, call);
    match verdict {
        Verdict::Admit(admitted) => {
            let version = by.version().filter(|version| version.observes()).map(Arc::clone);
            let heard = |version| Heard {
                observer: lane.observer.clone(),
                version,
                decision_id,
                queue_ms: f32::NAN,
                is_told: AtomicBool::new(false),
            };
            Ok((admitted, version.map(heard)))
        }
        Verdict::Shed(rejection) if matches!(by, DecidedBy::Nobody(_)) => Err(RequestError::PolicyFailed(rejection)),
        Verdict::Shed(rejection) => Err(RequestError::Shed(rejection)),
    }
}

impl Heard {
    /// For how long it waited until it ran.
    pub(super) fn after(self, queue_ms: f32) -> Self {
        Self { queue_ms, ..self }
    }

    /// One attempt has ended, as its router is told.
    pub(crate) fn tell(&self, attempt: OutcomeRow) {
        self.is_told.store(true, Relaxed);
        let row = OutcomeRow { decision_id: self.decision_id, queue_ms: self.queue_ms, ..attempt };
        self.observer.tell(Arc::clone(&self.version), row);
    }

    /// It ended in the queue: its time ran out, or it was left, or nobody could take it.
    pub(super) fn tell_waited(self, queue_ms: f32, is_late: bool, is_left: bool) {
        let end = match (is_late, is_left) {
            (true, _) => TIMED_OUT,
            (_, true) => CANCELLED,
            _ => FAILED,
        };
        self.after(queue_ms).tell_none(end);
    }

    /// It ran for nobody, if nothing was told of it until now.
    pub(super) fn close(&self) {
        if !self.is_told.load(Relaxed) {
            self.tell_none(FAILED);
        }
    }

    fn tell_none(&self, end: u32) {
        let (ttft_ms, itl_ms) = (f32::NAN, f32::NAN);
        self.tell(OutcomeRow { decision_id: 0, worker_id: u64::MAX, ttft_ms, itl_ms, queue_ms: 0.0, output_tokens: 0, end });
    }
}
