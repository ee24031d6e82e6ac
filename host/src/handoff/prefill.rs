//! The prefill leg of a sequential hand-off: the prompt is computed, and its KV kept for whoever decodes.
//!
//! A worker that fails, is slow, or says nothing by which somebody could go on, is treated like any worker before the first
//! token: another way is tried. Its no to the request is the answer: that it can do its part was seen before it was given any.

use dynamo_engine_api::{EngineError, Leg, Prefilled, WholeReply};

use super::{Given, Handoff, Prefill, Staged, fell_back, finished, is_refusal, usage_of};
use crate::{
    account::{Account, Booking},
    dispatch::{Opened, answered},
    error::RequestError,
    relay,
};

impl Handoff<'_, '_> {
    /// Has the prompt computed.
    pub(super) async fn prefill(&mut self, booking: Booking) -> Result<Prefill, RequestError> {
        let (post, lane) = (self.prefill, self.dispatch.lane);
        let mut account = Account::open(lane, self.facts, post.placing, post.worker, booking, None, self.dispatch.client());
        account.be_prefill();
        tracing::debug!(worker = post.name(), policy = post.placing.policy, protocol = %self.protocol, "prefill");
        let mut vigil = self.dispatch.vigil(post);
        self.facts.failed_workers.push(post.worker.id);
        let (error, cause) = match self.dispatch.open(post, Leg::Prefill(None), &mut vigil, self.facts).await {
            Ok(Ok(Opened::Whole(reply))) if reply.status.is_success() => match post.engine().prefilled(&reply) {
                Ok(Prefilled::Ready(ticket)) => {
                    // It has not failed it.
                    self.facts.failed_workers.pop();
                    self.dispatch.taken_up(post, self.facts);
                    if let Some(permit) = self.dispatch.permit() {
                        permit.prefilled();
                    }
                    account.prefilled(usage_of(&reply));
                    let ask = self.dispatch.asked().ask.clone();
                    return Ok(Prefill::Staged(Box::new(Staged::new(lane, ticket, ask, self.facts, post.worker.id))));
                }
                Ok(Prefilled::Final) => {
                    self.dispatch.taken_up(post, self.facts);
                    lane.handoffs.prefilled_alone(post.worker.spec.role);
                    return Ok(Prefill::Given(self.finish(account, reply)));
                }
                Err(error) => {
                    lane.roster.report_no_handoff(post.worker.id, post.engine(), &error);
                    (error, "not_handed_over")
                }
            },
            Ok(Ok(Opened::Whole(reply))) if is_refusal(&reply) || !self.dispatch.has_alternative(self.facts) => {
                return Ok(Prefill::Given(self.pass(account, reply)));
            }
            Ok(Ok(Opened::Whole(reply))) => (answered(post, &reply), "prefill_failed"),
            Ok(Ok(Opened::Stream(..))) => {
                let reason = "it streams what was asked for as a whole".to_owned();
                (EngineError::Protocol { engine: post.name().to_owned(), reason }, "not_handed_over")
            }
            Ok(Err(error)) => (error, "prefill_failed"),
            Err(late) => {
                account.abandon();
                return Err(late);
            }
        };
        account.blame(&error);
        account.abandon();
        fell_back(cause);
        if cause == "not_handed_over" {
            lane.roster.report_no_handoff(post.worker.id, post.engine(), &error);
        }
        self.dispatch.failed(post, error, true)?;
        Ok(Prefill::Given(Given::Failed))
    }

    /// What the engine that prefills answered is the answer, if only an error.
    pub(super) fn pass(&mut self, account: Account, reply: WholeReply) -> Given {
        let head = self.dispatch.head(self.prefill, None);
        Given::Answered(relay::whole(account, self.dispatch.permit().take(), head, reply))
    }

    /// The engine that prefills has finished the answer: with its first token, as it were.
    fn finish(&mut self, mut account: Account, reply: WholeReply) -> Given {
        let asked = self.dispatch.asked();
        let (is_stream, returns_ids) = (asked.ask.stream, asked.returns_ids);
        let answer = if is_stream {
            finished::as_stream(&reply.body, &asked.ask.body, returns_ids)
        } else {
            finished::as_whole(&reply.body, returns_ids)
        };
        let Some(body) = answer else { return self.pass(account, reply) };
        account.be_whole();
        if !is_stream {
            return self.pass(account, WholeReply { body, ..reply });
        }
        let head = self.dispatch.head(self.prefill, None);
        Given::Answered(relay::finished(account, self.dispatch.permit().take(), head, body, usage_of(&reply)))
    }
}
