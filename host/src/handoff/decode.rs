//! The decode leg of a sequential hand-off: the output, from KV that another worker has computed.
//!
//! Who is to blame for a failure before the first token: an engine that could not be reached, broke off or says that it is ill,
//! the worker; one that answers an error, or is silent for one request alone, the link. Where nothing was sent the ticket is as
//! good as before; else the KV may have been fetched, and freed with that.
//!
//! An engine that has the ticket may keep the request in its queue until the lease is over, and then go on from whatever is in those
//! blocks by then, without an error. So the first token of a stream must have come in time. Of a whole answer nothing is seen before
//! its end: it must have come in time as well, unless the engine had no queue when it was asked, by its last report. NIXL only:
//! of others nobody has seen that.

use std::time::Instant;

use dynamo_engine_api::{EngineError, Leg, Protocol, WholeReply};
use dynamo_host_core::load::Reported;

use super::{Decode, Handoff, Staged, fell_back, is_refusal, is_the_links, link_failed, lost_lease, ms, no_answer};
use crate::{
    account::{Account, Booking},
    dispatch::{Answer, Opened, Post, is_busy},
    error::RequestError,
    relay,
};

impl Handoff<'_, '_> {
    /// Has a worker go on with what is staged.
    pub(super) async fn decode(&mut self, post: Post<'_>, booking: Booking, staged: &mut Staged) -> Result<Decode, RequestError> {
        let lane = self.dispatch.lane;
        let Some(ticket) = staged.take() else {
            lost_lease();
            return if self.dispatch.has_attempts() { Ok(Decode::Spent) } else { Err(self.out_of_attempts()) };
        };
        let heard = self.dispatch.heard();
        let mut account = Account::open(lane, self.facts, post.placing, post.worker, booking, heard, self.dispatch.client());
        account.be_decode();
        let head = self.dispatch.head(post, Some(self.prefill));
        tracing::debug!(worker = post.name(), policy = head.policy, prefill = self.prefill.name(), "decode");
        let mut vigil = self.dispatch.vigil(post);
        vigil.may_make(self.facts.max_output_tokens);
        self.facts.failed_workers.push(post.worker.id);
        let sent = Instant::now();
        let may_queue = post.worker.load.get_reported(Reported::QueuedRequests) != Some(0);
        let is_stream = self.dispatch.asked().ask.stream;
        let must_be_in_time = is_stream || self.protocol == Protocol::Nixl && may_queue;
        let until = if must_be_in_time { staged.fetched_by() } else { self.dispatch.patience.deadline };
        let opening = self.dispatch.open(post, Leg::Decode(ticket.clone()), &mut vigil, self.facts);
        // Dropped, it hangs up: the engine gives up what it has not fetched.
        let opened = match tokio::time::timeout_at(until.into(), opening).await {
            Ok(opened) => opened,
            Err(_) if Instant::now() >= self.dispatch.patience.deadline => Err(self.dispatch.patience.exceeded()),
            Err(_) => return self.came_too_late(post, account, is_stream),
        };
        let error = match opened {
            Ok(Ok(Opened::Stream(first, chunks))) => {
                self.handed_over(post, staged.since, sent, staged.bytes, true);
                let answer = Answer { account, head, first, chunks, vigil, beside: None };
                return Ok(Decode::Answered(self.dispatch.relay(post, answer, self.facts)));
            }
            Ok(Ok(Opened::Whole(reply))) if reply.status.is_success() || is_refusal(&reply) || !self.has_another_try(&reply) => {
                if reply.status.is_success() {
                    self.handed_over(post, staged.since, sent, staged.bytes, false);
                } else if is_refusal(&reply) {
                    // It was not fetched.
                    staged.give_back(ticket);
                }
                return Ok(Decode::Answered(relay::whole(account, self.dispatch.permit().take(), head, reply)));
            }
            Ok(Ok(Opened::Whole(reply))) => no_answer(post, &reply),
            Ok(Err(error)) => error,
            Err(late) => {
                account.abandon();
                return Err(late);
            }
        };
        let is_unsent = matches!(error, EngineError::Connect { .. });
        if is_unsent {
            staged.give_back(ticket);
        } else {
            tracing::debug!(after_ms = ms(sent.elapsed()), "the KV may be gone: it is prefilled anew");
            fell_back("decode_failed");
        }
        self.decode_failed(post, account, error)?;
        Ok(if is_unsent { Decode::Unsent } else { Decode::Spent })
    }

    /// Nothing came as long as the KV was there for sure. Nobody is to blame: the worker had others before it.
    fn came_too_late(&mut self, post: Post<'_>, account: Account, is_stream: bool) -> Result<Decode, RequestError> {
        tracing::warn!(
            prefill = self.prefill.name(),
            decode = post.name(),
            "KV was not fetched before its lease was over, as far as one can tell: the prompt is computed anew"
        );
        account.abandon_unblamed();
        lost_lease();
        if !is_stream {
            // The answer may just take long, and would do so again.
            self.dispatch.keep_whole();
        }
        if self.dispatch.has_attempts() && !self.dispatch.has_alternative(self.facts) {
            self.facts.failed_workers.retain(|&failed| failed != post.worker.id);
        }
        if self.dispatch.has_attempts() { Ok(Decode::Spent) } else { Err(self.out_of_attempts()) }
    }

    /// A decode leg failed before its first token: its worker is blamed, or the link. One that is at no fault may still serve the
    /// request whole, if nobody else can.
    ///
    /// # Errors
    /// What it failed with, if nobody else is to have it.
    pub(super) fn decode_failed(&mut self, post: Post<'_>, mut account: Account, error: EngineError) -> Result<(), RequestError> {
        let is_refused = matches!(error, EngineError::InStream { refused: true, .. });
        let lane = self.dispatch.lane;
        if is_the_links(lane, post.worker.id, &error) {
            link_failed(lane, self.prefill, post);
            account.abandon_unblamed();
            self.dispatch.ask_again(post.worker.id, self.facts);
        } else {
            account.blame(&error);
            account.abandon();
        }
        self.dispatch.failed(post, error, !is_refused)
    }

    /// Whether an answer that is none is not the client's yet: somebody else may do better, or the same ones if they are at no fault.
    pub(super) fn has_another_try(&self, reply: &WholeReply) -> bool {
        self.dispatch.has_alternative(self.facts) || !is_busy(reply) && self.dispatch.may_ask_again(self.facts)
    }

    /// Nothing failed, and it still cannot be tried again.
    fn out_of_attempts(&self) -> RequestError {
        self.dispatch.lane.roster.snapshot().no_worker(self.facts)
    }
}
