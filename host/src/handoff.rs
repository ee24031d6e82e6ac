//! Hand-off: a request over two workers, one of which computes the prompt, and the other the output.
//!
//! One state machine over legs that engine adapters make ([`Leg`](dynamo_engine_api::Leg)). In *sequential* protocols:
//!
//! ```text
//! prefill ──▶ staged ──▶ who decodes? ──▶ decode ──first chunk──▶ relayed like any stream
//!    │           ▲            │              │
//!    │           └────────────│── nothing was sent: another decodes
//!    ▼                        ▼              ▼
//! another way          nobody, or the lease is over, or the KV may have been fetched: placed anew
//! ```
//!
//! In *concurrent* ones who decodes is asked first, then both legs go out together ([`together`]); what the decode worker answers is
//! the answer, and either leg that fails before its first chunk ends the other.
//!
//! Invariants: a ticket is given to an engine once, and again only if it was not sent; one whose lease may be over is never sent;
//! KV that is staged and will not be fetched is given up ([`staged`]); the client's request is counted once, in the account of
//! the worker that decodes. After the first chunk it is a stream like any other: it goes on elsewhere on one worker, or over another
//! pair where nobody serves whole requests ([`migrate`](crate::migrate)).

mod beside;
mod decode;
mod finished;
mod prefill;
mod staged;
mod together;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::response::Response;
use dynamo_engine_api::{EngineError, Protocol, Usage, WholeReply};
use dynamo_host_core::{RequestFacts, Role, Worker, WorkerId};
use http::StatusCode;
use metrics::{Counter, counter, histogram};
use serde::Deserialize;
use tokio::sync::Semaphore;

pub(crate) use self::beside::{Abreast, Beside, PrefillLeg, Unprefilled, abreast};
use self::staged::Staged;
use crate::{
    account::{Account, Booking},
    dispatch::{Dispatch, Given, Post, answered, is_busy},
    error::RequestError,
    place::{Part, Placing, Way, place},
    request::{Lane, Notes},
};

/// Hand-offs that are given up at once at most; of those beyond, the engine lets go when the lease is over.
const RELEASES: usize = 64;

/// What all hand-offs of a host share.
pub(crate) struct Handoffs {
    releases: Arc<Semaphore>,
    remote: Counter,
    local: Counter,
    aggregated: Counter,
}

impl Handoffs {
    pub(crate) fn new() -> Self {
        let prefilled = |place: &'static str| counter!("dynamo_host_prefill_where_total", "where" => place);
        Self {
            releases: Arc::new(Semaphore::new(RELEASES)),
            remote: prefilled("remote"),
            local: prefilled("local"),
            aggregated: prefilled("aggregated"),
        }
    }

    /// A worker of this role computed the prompt and goes on itself.
    pub(crate) fn prefilled_alone(&self, role: Role) {
        let counter = if role == Role::Decode { &self.local } else { &self.aggregated };
        counter.increment(1);
    }
}

/// Gives a request to a worker that prefills, and to one that decodes: this one (a row of the same placing), or whoever is chosen.
///
/// # Errors
/// What it failed with for good.
pub(crate) async fn carry_out(
    dispatch: &mut Dispatch<'_>,
    prefill: Post<'_>,
    decode: Option<u32>,
    booking: Booking,
    facts: &mut RequestFacts,
    notes: &mut Notes,
) -> Result<Given, RequestError> {
    let Some(protocol) = prefill.engine().handoff() else {
        // It has said so since it was placed.
        fell_back("not_handed_over");
        return dispatch.give(prefill, booking, facts).await;
    };
    let mut handoff = Handoff { dispatch, facts, notes, prefill, protocol };
    let given =
        if protocol.is_concurrent() { handoff.together(decode, booking).await } else { handoff.in_turn(decode, booking).await };
    let result = match &given {
        Ok(Given::Answered(_)) => "answered",
        Ok(Given::Failed | Given::Anew) => "fell_back",
        Err(_) => "failed",
    };
    count(protocol, result);
    given
}

/// One request on its way over two workers.
struct Handoff<'h, 'd> {
    dispatch: &'h mut Dispatch<'d>,
    facts: &'h mut RequestFacts,
    notes: &'h mut Notes,
    prefill: Post<'h>,
    protocol: Protocol,
}

/// What came of prefill.
enum Prefill {
    /// Its KV waits for whoever decodes.
    Staged(Box<Staged>),
    /// It did not come so far, or needs nobody to decode.
    Given(Given),
}

/// What came of decode.
enum Decode {
    Answered(Response),
    /// Nothing was sent: the ticket is as good as before.
    Unsent,
    /// The KV is lost, or may be: prefill anew.
    Spent,
}

impl Handoff<'_, '_> {
    /// One leg after the other.
    async fn in_turn(&mut self, mut decode: Option<u32>, booking: Booking) -> Result<Given, RequestError> {
        let mut staged = match self.prefill(booking).await? {
            Prefill::Staged(staged) => staged,
            Prefill::Given(given) => return Ok(given),
        };
        loop {
            // One that was placed with it is asked nothing about, if it is still there.
            let fixed = decode.take().filter(|&row| self.is_there(self.prefill.placing.candidates.worker(row)));
            let came = if let Some(row) = fixed {
                let post = Post::new(self.prefill.placing, row);
                let booking = Account::book_decode(self.dispatch.lane, self.facts, post.worker, post.placing);
                self.decode(post, booking, &mut staged).await?
            } else {
                let Some((placing, row, booking)) = self.place_decode(Some(&staged)).await? else { return Ok(Given::Anew) };
                self.decode(Post::new(&placing, row), booking, &mut staged).await?
            };
            match came {
                Decode::Answered(response) => return Ok(Given::Answered(response)),
                Decode::Unsent => self.dispatch.try_again(),
                Decode::Spent => return Ok(Given::Anew),
            }
        }
    }

    /// Whether a worker may still decode what the present one prefills.
    fn is_there(&self, decode: &Worker) -> bool {
        let snapshot = self.dispatch.lane.roster.snapshot();
        let links = self.dispatch.lane.roster.links();
        !self.facts.failed_workers.contains(&decode.id)
            && snapshot.is_eligible(decode.id)
            && snapshot.reaches(self.prefill.worker, decode, links)
    }

    /// Asks who decodes, and books it there. `None`: nobody, so that it is to be placed anew.
    async fn place_decode(&mut self, staged: Option<&Staged>) -> Result<Option<(Placing, u32, Booking)>, RequestError> {
        let dispatch = &*self.dispatch;
        let part = Part::Decode(self.prefill.worker.id);
        let inquiry = dispatch.asked().inquiry(part, &dispatch.patience, staged.map(Staged::until));
        let placing = match place(dispatch.lane, &inquiry, self.facts, self.notes).await {
            Ok(placing) => placing,
            Err(RequestError::NoWorker { .. }) if dispatch.has_attempts() => {
                fell_back("no_decode_pool");
                return Ok(None);
            }
            Err(RequestError::Deadline { .. })
                if staged.is_some_and(Staged::is_lost)
                    && Instant::now() < dispatch.patience.deadline
                    && dispatch.has_attempts() =>
            {
                lost_lease();
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let mut ways: Vec<Way> = placing.ways.clone();
        let book = |worker: &Worker| Account::book_decode(dispatch.lane, self.facts, worker, &placing);
        let booking = dispatch.lane.queue.book(&mut ways, &placing.candidates, self.facts, book);
        let row = ways.first().map(|way| way.first());
        Ok(row.zip(booking).map(|(row, booking)| (placing, row, booking)))
    }

    /// The decode worker has the KV, and goes on.
    fn handed_over(&self, decode: Post<'_>, since: Instant, sent: Instant, bytes: Option<u64>, is_stream: bool) {
        let lane = self.dispatch.lane;
        let (from, to) = (self.prefill.worker.load.index(), decode.worker.load.index());
        if is_stream {
            let ms = sent.elapsed().as_secs_f32() * 1000.0;
            lane.roster.links().arrived(from, to, self.facts.prompt.tokens, ms);
            histogram!("dynamo_host_handoff_seconds", "protocol" => self.protocol.name()).record(since.elapsed());
        } else {
            lane.roster.links().worked(from, to);
        }
        if let Some(bytes) = bytes {
            counter!("dynamo_host_handoff_bytes_total", "protocol" => self.protocol.name()).increment(bytes);
        }
        lane.handoffs.remote.increment(1);
        self.dispatch.taken_up(decode, self.facts);
    }
}

/// A hand-off failed that neither worker is to blame for, as far as one can tell.
pub(crate) fn link_failed(lane: &Lane, prefill: Post<'_>, decode: Post<'_>) {
    let [from, to] = [prefill, decode].map(|post| post.worker.load.index());
    lane.roster.links().failed(from, to, lane.clock.now_ms());
    tracing::warn!(prefill = prefill.name(), decode = decode.name(), "KV was not handed over from one worker to the other");
}

/// Whether what failed a decode leg before its first token is the link's fault, and not the worker's.
pub(crate) fn is_the_links(lane: &Lane, decode: WorkerId, error: &EngineError) -> bool {
    match error {
        EngineError::InStream { refused, .. } => !refused,
        EngineError::Timeout { .. } => lane.roster.snapshot().is_eligible(decode),
        EngineError::Connect { .. }
        | EngineError::Broken { .. }
        | EngineError::Incomplete { .. }
        | EngineError::Unhealthy { .. }
        | EngineError::Protocol { .. } => false,
    }
}

/// Counts a hand-off by how it ended.
pub(crate) fn count(protocol: Protocol, result: &'static str) {
    counter!("dynamo_host_handoffs_total", "protocol" => protocol.name(), "result" => result).increment(1);
}

/// Counts a request that was to be handed over and goes another way now.
pub(crate) fn fell_back(cause: &'static str) {
    counter!("dynamo_host_handoff_fallbacks_total", "cause" => cause).increment(1);
}

/// Counts staged KV that could not be used in time.
fn lost_lease() {
    counter!("dynamo_host_handoff_leases_lost_total").increment(1);
    fell_back("lease_lost");
}

/// Whether an engine's answer is its no to the request, and not its own trouble.
fn is_refusal(reply: &WholeReply) -> bool {
    reply.status.is_client_error() && reply.status != StatusCode::TOO_MANY_REQUESTS
}

/// That an engine which was to decode answered with a status that is no answer: it is ill, or the hand-off came to nothing.
fn no_answer(decode: Post<'_>, reply: &WholeReply) -> EngineError {
    if is_busy(reply) {
        return answered(decode, reply);
    }
    let message = format!("it answered {}", reply.status);
    EngineError::InStream { engine: decode.name().to_owned(), message, refused: false }
}

/// What a whole answer says of its tokens.
fn usage_of(reply: &WholeReply) -> Option<Usage> {
    #[derive(Deserialize)]
    struct WithUsage {
        usage: Usage,
    }
    serde_json::from_slice::<WithUsage>(&reply.body).ok().map(|with| with.usage)
}

/// A duration, for people.
fn ms(duration: Duration) -> u128 {
    duration.as_millis()
}
