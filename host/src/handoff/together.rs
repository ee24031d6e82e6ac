//! A concurrent hand-off: both legs go out together, with a ticket that was made for them and is never used again.
//!
//! What the decode worker answers is the answer; the prefill worker's is read to its end and not told to anybody, unless it is a
//! no. As long as nothing was answered, a leg that fails ends the other one: each would wait for the other in vain.

use std::sync::Arc;

use dynamo_engine_api::{EngineError, Leg};
use tokio::time::timeout_at;

use super::{Abreast, Given, Handoff, Placing, PrefillLeg, Unprefilled, abreast, fell_back, is_refusal, no_answer};
use crate::{
    account::{Account, Booking},
    dispatch::{Answer, Opened, Post, answered, is_busy},
    error::RequestError,
    relay,
};

impl Handoff<'_, '_> {
    /// Both legs at once.
    pub(super) async fn together(&mut self, decode: Option<u32>, booking: Booking) -> Result<Given, RequestError> {
        let fixed = decode.filter(|&row| self.is_there(self.prefill.placing.candidates.worker(row)));
        let chosen: Placing;
        let (post, decode_booking) = if let Some(row) = fixed {
            let post = Post::new(self.prefill.placing, row);
            (post, Account::book_decode(self.dispatch.lane, self.facts, post.worker, post.placing))
        } else {
            let Some((placing, row, booking)) = self.place_decode(None).await? else { return Ok(Given::Anew) };
            chosen = placing;
            (Post::new(&chosen, row), booking)
        };
        self.both(post, booking, decode_booking).await
    }

    async fn both(&mut self, post: Post<'_>, booking: Booking, decode_booking: Booking) -> Result<Given, RequestError> {
        let (lane, patience, prefill) = (self.dispatch.lane, self.dispatch.patience, self.prefill);
        let client = self.dispatch.client();
        let open_account = |post: Post<'_>, booking, heard| {
            Account::open(lane, self.facts, post.placing, post.worker, booking, heard, client.clone())
        };
        let mut account = open_account(post, decode_booking, self.dispatch.heard());
        account.be_decode();
        let mut beside_account = open_account(prefill, booking, None);
        beside_account.be_prefill();
        beside_account.be_beside();
        let rank = prefill.placing.snapshot.rank(prefill.worker);
        let ticket = match timeout_at(patience.deadline.into(), prefill.engine().ticket(rank)).await {
            Ok(Ok(ticket)) => ticket,
            Ok(Err(error)) => return self.prefill_failed(account, beside_account, error, false),
            Err(_) => {
                account.abandon();
                return Err(patience.exceeded());
            }
        };
        let head = self.dispatch.head(post, Some(prefill));
        tracing::debug!(worker = post.name(), policy = head.policy, prefill = prefill.name(), "prefill and decode");
        let bytes = ticket.bytes;
        let leg = PrefillLeg {
            engine: Arc::clone(prefill.engine()),
            ask: self.dispatch.ask(prefill, Leg::Prefill(Some(ticket.clone()))),
            worker: prefill.worker.clone(),
            patience,
            vigil: self.dispatch.vigil(prefill),
            account: beside_account,
        };
        let mut vigil = self.dispatch.vigil(post);
        vigil.may_make(self.facts.max_output_tokens);
        self.facts.failed_workers.push(post.worker.id);
        let sent = std::time::Instant::now();
        let came = abreast(leg, self.dispatch.open(post, Leg::Decode(ticket), &mut vigil, self.facts)).await;
        let (opened, tail) = match came {
            Abreast::Decode(opened, tail) => (opened, tail),
            Abreast::Unprefilled(unprefilled) => {
                self.facts.failed_workers.pop();
                return match *unprefilled {
                    Unprefilled::Answered(beside, reply) if is_refusal(&reply) => {
                        // Both were asked the same.
                        beside.set_aside();
                        Ok(Given::Answered(relay::whole(account, self.dispatch.permit().take(), head, reply)))
                    }
                    Unprefilled::Answered(beside, reply) => {
                        self.prefill_failed(account, beside, answered(prefill, &reply), !is_busy(&reply))
                    }
                    Unprefilled::Failed(beside, error) => {
                        let may_be_the_links = matches!(error, EngineError::InStream { refused: false, .. });
                        self.prefill_failed(account, beside, error, may_be_the_links)
                    }
                };
            }
        };
        let error = match opened {
            Err(late) => {
                account.abandon();
                return Err(late);
            }
            Ok(Ok(Opened::Stream(first, chunks))) => {
                self.dispatch.taken_up(prefill, self.facts);
                self.handed_over(post, sent, sent, bytes, true);
                let beside = tail.beside(patience.deadline);
                let answer = Answer { account, head, first, chunks, vigil, beside };
                return Ok(Given::Answered(self.dispatch.relay(post, answer, self.facts)));
            }
            Ok(Ok(Opened::Whole(reply))) if reply.status.is_success() || is_refusal(&reply) || !self.has_another_try(&reply) => {
                if reply.status.is_success() {
                    self.dispatch.taken_up(prefill, self.facts);
                    self.handed_over(post, sent, sent, bytes, false);
                    tail.hear_out();
                }
                return Ok(Given::Answered(relay::whole(account, self.dispatch.permit().take(), head, reply)));
            }
            Ok(Ok(Opened::Whole(reply))) => no_answer(post, &reply),
            Ok(Err(error)) => error,
        };
        // The other leg would wait for a worker that does not come. It may have computed the prompt by now.
        drop(tail);
        self.dispatch.lost_work();
        fell_back("decode_failed");
        self.decode_failed(post, account, error)?;
        Ok(Given::Anew)
    }

    /// The prefill leg failed, and with it the other one. `may_be_the_links`: it may be asked again, if nobody else is left.
    fn prefill_failed(
        &mut self,
        decode: Account,
        mut prefill: Account,
        error: EngineError,
        may_be_the_links: bool,
    ) -> Result<Given, RequestError> {
        decode.set_aside();
        prefill.blame(&error);
        prefill.abandon();
        fell_back("prefill_failed");
        self.facts.failed_workers.push(self.prefill.worker.id);
        if may_be_the_links {
            self.dispatch.ask_again(self.prefill.worker.id, self.facts);
        }
        self.dispatch.failed(self.prefill, error, true)?;
        Ok(Given::Failed)
    }
}
