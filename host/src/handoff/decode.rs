//! The decode leg of a sequential hand-off: the output, from KV that another worker has computed.
//!
//! Who is to blame for a failure before the first token: an engine that could not be reached, broke off or says that it is ill,
//! the worker; one that answers an error, or is silent for one request alone, the link. Where nothing was sent the ticket is as
//! good as before; else the KV may have been fetched, and freed with that.

use std::time::Instant;

use dynamo_engine_api::{EngineError, Leg, WholeReply};
use dynamo_host_core::Among;

use super::{Decode, Handoff, Staged, fell_back, is_refusal, lost_lease, ms};
use crate::{
    account::{Account, Booking},
    dispatch::{Answer, Opened, Post, answered, is_busy},
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
        let mut account = Account::open(lane, self.facts, post.placing, post.worker, booking, heard, self.dispatch.accepted());
        account.be_decode();
        let head = self.dispatch.head(post, Some(self.prefill));
        tracing::debug!(worker = post.name(), policy = head.policy, prefill = self.prefill.name(), "decode");
        let mut vigil = self.dispatch.vigil(post);
        vigil.may_make(self.facts.max_output_tokens);
        self.facts.failed_workers.push(post.worker.id);
        let sent = Instant::now();
        let error = match self.dispatch.open(post, Leg::Decode(ticket.clone()), &mut vigil, self.facts).await {
            Ok(Ok(Opened::Stream(first, chunks))) => {
                self.handed_over(post, staged.since, sent, staged.bytes, true);
                let answer = Answer { account, head, first, chunks, vigil, beside: None };
                return Ok(Decode::Answered(self.dispatch.relay(post, answer, self.facts)));
            }
            Ok(Ok(Opened::Whole(reply))) if is_refusal(&reply) => {
                // It was not fetched.
                staged.give_back(ticket);
                return Ok(self.decode_refused(account, head, reply));
            }
            Ok(Ok(Opened::Whole(reply))) if reply.status.is_success() || !self.dispatch.has_alternative(self.facts) => {
                if reply.status.is_success() {
                    self.handed_over(post, staged.since, sent, staged.bytes, false);
                }
                return Ok(Decode::Answered(relay::whole(account, self.dispatch.permit().take(), head, reply)));
            }
            Ok(Ok(Opened::Whole(reply))) if is_busy(&reply) => answered(post, &reply),
            Ok(Ok(Opened::Whole(reply))) => {
                let message = format!("it answered {}", reply.status);
                EngineError::InStream { engine: post.name().to_owned(), message, refused: false }
            }
            Ok(Err(error)) => error,
            Err(late) => {
                account.abandon();
                return Err(late);
            }
        };
        self.decode_failed(post, account, &error);
        let is_unsent = matches!(error, EngineError::Connect { .. });
        if is_unsent {
            staged.give_back(ticket);
        } else {
            tracing::debug!(after_ms = ms(sent.elapsed()), "the KV may be gone: it is prefilled anew");
            fell_back("decode_failed");
        }
        let is_refused = matches!(error, EngineError::InStream { refused: true, .. });
        self.dispatch.failed(post, error, !is_refused)?;
        Ok(if is_unsent { Decode::Unsent } else { Decode::Spent })
    }

    /// A decode leg failed before its first token: its worker is blamed, or the link.
    pub(super) fn decode_failed(&self, post: Post<'_>, mut account: Account, error: &EngineError) {
        let is_the_links = match error {
            EngineError::InStream { refused, .. } => !refused,
            EngineError::Timeout { .. } => self.dispatch.lane.roster.snapshot().is_eligible(post.worker.id),
            EngineError::Connect { .. }
            | EngineError::Broken { .. }
            | EngineError::Incomplete { .. }
            | EngineError::Unhealthy { .. }
            | EngineError::Protocol { .. } => false,
        };
        if is_the_links {
            self.link_failed(post);
            return account.abandon_unblamed();
        }
        account.blame(error);
        account.abandon();
    }

    /// The engine that was to decode says no: it, or somebody else, may take the request as a whole.
    fn decode_refused(&mut self, account: Account, head: relay::Head, reply: WholeReply) -> Decode {
        let snapshot = self.dispatch.lane.roster.snapshot();
        self.facts.failed_workers.pop();
        if !self.dispatch.has_attempts() || snapshot.candidates_among(self.facts, Among::Whole).is_err() {
            return Decode::Answered(relay::whole(account, self.dispatch.permit().take(), head, reply));
        }
        tracing::debug!(prefill = self.prefill.name(), status = reply.status.as_u16(), "decode was refused");
        account.set_aside();
        fell_back("refused");
        self.dispatch.keep_whole();
        Decode::Spent
    }

    /// Nothing failed, and it still cannot be tried again.
    fn out_of_attempts(&self) -> RequestError {
        self.dispatch.lane.roster.snapshot().no_worker(self.facts)
    }
}
