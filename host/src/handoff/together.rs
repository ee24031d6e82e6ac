//! A concurrent hand-off: both legs go out together, with a ticket that was made for them and is never used again.
//!
//! What the decode worker answers is the answer; the prefill worker's is read to its end and not told to anybody, unless it is a
//! no. As long as nothing was answered, a leg that fails ends the other one: each would wait for the other in vain.

use std::{sync::Arc, time::Duration};

use dynamo_engine_api::{Engine, EngineError, GenerateRequest, Leg, WholeReply};
use dynamo_host_core::Worker;
use futures_util::StreamExt;
use tokio::time::{Instant, timeout, timeout_at};

use super::{Beside, Given, Handoff, Placing, fell_back, is_refusal, no_answer, usage_of};
use crate::{
    account::{Account, Booking},
    dispatch::{Answer, Opened, Post, answered, open},
    error::RequestError,
    migrate::Vigil,
    relay::{self, Patience},
    tasks,
};

/// How long a prefill worker's answer may go on when the decode worker's is there as a whole.
const TAIL: Duration = Duration::from_secs(5);

/// The prefill leg, which works beside the other one.
struct PrefillLeg {
    engine: Arc<dyn Engine>,
    ask: GenerateRequest,
    worker: Worker,
    patience: Patience,
    vigil: Vigil,
    account: Account,
}

/// How it ended.
enum Ended {
    Well,
    Answered(Account, WholeReply),
    Failed(Account, EngineError),
}

impl PrefillLeg {
    async fn run(self) -> Ended {
        let Self { engine, ask, worker, patience, mut vigil, account } = self;
        let mut chunks = match open(&*engine, ask, &worker, &patience, &mut vigil, &|| true).await {
            Ok(Opened::Whole(reply)) if reply.status.is_success() => {
                account.prefilled(usage_of(&reply));
                return Ended::Well;
            }
            Ok(Opened::Whole(reply)) => return Ended::Answered(account, reply),
            Ok(Opened::Stream(_, chunks)) => chunks,
            Err(error) => return Ended::Failed(account, error),
        };
        account.prefilled(None);
        // What it says of its output nobody needs: it is the other one's.
        while let Some(Ok(_)) = chunks.next().await {}
        Ended::Well
    }
}

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
            Ok(Err(error)) => return self.prefill_failed(account, beside_account, error),
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
        let mut beside = Box::pin(leg.run());
        let mut is_prefilled = false;
        let mut vigil = self.dispatch.vigil(post);
        vigil.may_make(self.facts.max_output_tokens);
        self.facts.failed_workers.push(post.worker.id);
        let sent = std::time::Instant::now();
        let came = {
            let opening = self.dispatch.open(post, Leg::Decode(ticket), &mut vigil, self.facts);
            tokio::pin!(opening);
            loop {
                tokio::select! {
                    biased;
                    opened = &mut opening => break Ok(opened),
                    ended = &mut beside, if !is_prefilled => match ended {
                        Ended::Well => is_prefilled = true,
                        failed => break Err(failed),
                    },
                }
            }
        };
        let error = match came {
            Err(ended) => {
                self.facts.failed_workers.pop();
                return match ended {
                    Ended::Answered(beside, reply) if is_refusal(&reply) => {
                        // Both were asked the same.
                        beside.set_aside();
                        Ok(Given::Answered(relay::whole(account, self.dispatch.permit().take(), head, reply)))
                    }
                    Ended::Answered(beside, reply) => self.prefill_failed(account, beside, answered(prefill, &reply)),
                    Ended::Failed(beside, error) => self.prefill_failed(account, beside, error),
                    Ended::Well => unreachable!("the other leg is waited for then"),
                };
            }
            Ok(Err(late)) => {
                account.abandon();
                return Err(late);
            }
            Ok(Ok(Ok(Opened::Stream(first, chunks)))) => {
                self.dispatch.taken_up(prefill, self.facts);
                self.handed_over(post, sent, sent, bytes, true);
                let beside = (!is_prefilled).then(|| {
                    let deadline = Instant::from_std(patience.deadline);
                    Beside(tasks::spawn("prefill leg", async move { drop(timeout_at(deadline, beside).await) }))
                });
                let answer = Answer { account, head, first, chunks, vigil, beside };
                return Ok(Given::Answered(self.dispatch.relay(post, answer, self.facts)));
            }
            Ok(Ok(Ok(Opened::Whole(reply))))
                if reply.status.is_success() || is_refusal(&reply) || !self.dispatch.has_alternative(self.facts) =>
            {
                if reply.status.is_success() {
                    self.dispatch.taken_up(prefill, self.facts);
                    self.handed_over(post, sent, sent, bytes, false);
                    if !is_prefilled {
                        tasks::spawn("prefill leg", async move { drop(timeout(TAIL, beside).await) });
                    }
                }
                return Ok(Given::Answered(relay::whole(account, self.dispatch.permit().take(), head, reply)));
            }
            Ok(Ok(Ok(Opened::Whole(reply)))) => no_answer(post, &reply),
            Ok(Ok(Err(error))) => error,
        };
        // The other leg would wait for a worker that does not come.
        drop(beside);
        fell_back("decode_failed");
        self.decode_failed(post, account, error)?;
        Ok(Given::Anew)
    }

    /// The prefill leg failed, and with it the other one.
    fn prefill_failed(&mut self, decode: Account, mut prefill: Account, error: EngineError) -> Result<Given, RequestError> {
        decode.set_aside();
        prefill.blame(&error);
        prefill.abandon();
        fell_back("prefill_failed");
        self.facts.failed_workers.push(self.prefill.worker.id);
        self.dispatch.failed(self.prefill, error, true)?;
        Ok(Given::Failed)
    }
}
