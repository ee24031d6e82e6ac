//! Staged KV: computed by one worker, and kept by it for whoever decodes, for a while.
//!
//! Contract: dropped before it was given to somebody, it is given up: a worker that could have fetched it says so to the one that
//! keeps it ([`Engine::release`](dynamo_engine_api::Engine::release)), which else keeps it until the lease is over. That is bounded in time and in number.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use dynamo_engine_api::{GenerateRequest, Leg, Ticket, handoff::LEASE};
use dynamo_host_core::{RequestFacts, WorkerId};
use tokio::{runtime::Handle, time::timeout};

use crate::{request::Lane, roster::Kept, tasks};

/// How long before its end a lease is taken for over: the ticket must arrive, and be taken up by an engine that may be busy, and
/// the engine that prefilled answers a second after its lease began (docs/disaggregation.md). A vLLM that fetches too late says
/// nothing of it, and goes on from whatever is in those blocks by then: rather prefill once more than trust that.
const MARGIN: Duration = Duration::from_secs(10);
/// How long before its end KV must have been fetched: that is seen by the first token alone, and the host's clock of the lease
/// begins when the answer has come, up to some seconds after the engine's.
const FETCH_MARGIN: Duration = Duration::from_secs(5);
/// How long giving it up may take.
const RELEASE_WITHIN: Duration = Duration::from_secs(5);

/// Staged KV of a request.
pub(super) struct Staged {
    lane: Arc<Lane>,
    /// Until somebody has it.
    ticket: Option<Ticket>,
    /// When the prompt was computed, as far as the host knows.
    pub(super) since: Instant,
    pub(super) bytes: Option<u64>,
    /// What whoever decodes is asked, but for its own part.
    ask: GenerateRequest,
    facts: RequestFacts,
    by: WorkerId,
    /// The worker that keeps it is not idle until it is fetched or given up.
    _kept: Option<Kept>,
}

impl Staged {
    pub(super) fn new(lane: &Arc<Lane>, ticket: Ticket, ask: GenerateRequest, facts: &RequestFacts, by: WorkerId) -> Self {
        // Whoever failed the request may still say that nobody comes for it.
        let facts = RequestFacts { failed_workers: Vec::new(), ..facts.clone() };
        let (lane, bytes) = (Arc::clone(lane), ticket.bytes);
        let kept = lane.roster.keep(by);
        Self { lane, ticket: Some(ticket), since: Instant::now(), bytes, ask, facts, by, _kept: kept }
    }

    /// Until when it may be given to somebody.
    pub(super) fn until(&self) -> Instant {
        self.since + (LEASE - MARGIN)
    }

    /// Until when whoever has the ticket must have fetched the KV.
    pub(super) fn fetched_by(&self) -> Instant {
        self.since + (LEASE - FETCH_MARGIN)
    }

    /// Whether it is too late to give it to anybody.
    pub(super) fn is_lost(&self) -> bool {
        Instant::now() >= self.until()
    }

    /// The ticket, for somebody who is sent it now; `None` if it is too late, or somebody was.
    pub(super) fn take(&mut self) -> Option<Ticket> {
        if self.is_lost() { None } else { self.ticket.take() }
    }

    /// It was not sent, or not used: it is as good as before, or to be given up.
    pub(super) fn give_back(&mut self, ticket: Ticket) {
        self.ticket = Some(ticket);
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket.take() else { return };
        let snapshot = self.lane.roster.snapshot();
        let Ok(decoders) = snapshot.decoders(&self.facts, self.by, self.lane.roster.links()) else { return };
        let worker = decoders.worker((self.facts.decision_id % u64::from(decoders.count())) as u32);
        let Ok(permit) = Arc::clone(&self.lane.handoffs.releases).try_acquire_owned() else { return };
        let request =
            GenerateRequest { rank: snapshot.rank(worker), leg: Leg::Decode(ticket), stream: false, ..self.ask.clone() };
        let engine = Arc::clone(snapshot.engine(worker.id));
        if Handle::try_current().is_ok() {
            tasks::spawn("release staged KV", async move {
                let _ = timeout(RELEASE_WITHIN, engine.release(request)).await;
                drop(permit);
            });
        }
    }
}
