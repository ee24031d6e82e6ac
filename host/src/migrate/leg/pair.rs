//! A continuation over a pair: one worker computes the prompt and what there is of the answer, another makes the rest.
//!
//! Only where nobody is left who serves whole requests, which are workers of concurrent protocols: both are asked for the same
//! continuation at once, with a ticket that was made for it. It counts as one attempt, whoever of both fails it.

use std::{sync::Arc, time::Instant};

use dynamo_engine_api::{EngineError, Leg as EngineLeg};
use dynamo_host_core::WorkerId;
use dynamo_host_index::Prompt;
use tokio::time::timeout_at;

use super::{
    Leg,
    give::{Came, Parts, is_passing},
};
use crate::{
    account::Account,
    dispatch::{Opened, Post, answered, open},
    error::RequestError,
    handoff::{self, Abreast, PrefillLeg, Unprefilled, abreast},
    migrate::ask::Ask,
    place::{Inquiry, Part, Placing, place},
    request::Notes,
};

impl Leg {
    /// Gives it to a worker that prefills and to one that decodes: this one, or whoever is chosen.
    pub(super) async fn give_pair(
        &mut self,
        prefill: Post<'_>,
        decode: Option<u32>,
        prompt: &Prompt,
    ) -> Result<Came, RequestError> {
        self.begin_attempt();
        let chosen: Placing;
        let decode = match decode.map(|row| Post::new(prefill.placing, row)) {
            Some(post) => post,
            None => {
                let Some(placing) = self.place_decode(prefill.worker.id, prompt).await? else { return Ok(Came::Failed) };
                chosen = placing;
                let Some(row) = chosen.rows().next() else { return Ok(Came::Failed) };
                Post::new(&chosen, row)
            }
        };
        let ask = match self.ask_of(decode) {
            Ok(ask) => ask,
            Err(came) => return Ok(came),
        };
        let came = self.both(prefill, decode, ask, prompt).await;
        if let Some(protocol) = prefill.engine().handoff() {
            let result = match &came {
                Ok(Came::Taken) => "answered",
                Ok(_) => "fell_back",
                Err(_) => "failed",
            };
            handoff::count(protocol, result);
        }
        came
    }

    /// Asks who decodes what a worker prefills of it. `None`: nobody any more.
    async fn place_decode(&mut self, prefill: WorkerId, prompt: &Prompt) -> Result<Option<Placing>, RequestError> {
        let shared = Arc::clone(&self.shared);
        let course = &shared.course;
        let (part, recorder, patience) = (Part::Decode(prefill), course.recorder.as_ref(), &course.patience);
        let inquiry = Inquiry { part, pinned: &course.pinned, prompt, recorder, patience, until: None };
        match place(&course.lane, &inquiry, &mut self.facts, &mut Notes::default()).await {
            Ok(placing) => Ok(Some(placing)),
            Err(RequestError::NoWorker { .. }) => {
                handoff::fell_back("no_decode_pool");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Both legs at once.
    async fn both(&mut self, prefill: Post<'_>, decode: Post<'_>, ask: Ask, prompt: &Prompt) -> Result<Came, RequestError> {
        let shared = Arc::clone(&self.shared);
        let (course, patience) = (&shared.course, shared.course.patience);
        let booking = Account::book_decode(&course.lane, &self.facts, decode.worker, decode.placing);
        let mut account = self.open_account(decode, booking);
        account.be_decode();
        let booking = Account::book(&course.lane, &self.facts, prefill.worker, prefill.placing);
        let mut beside = self.open_account(prefill, booking);
        beside.be_prefill();
        beside.be_beside();
        let rank = prefill.placing.snapshot.rank(prefill.worker);
        let ticket = match timeout_at(patience.deadline.into(), prefill.engine().ticket(rank)).await {
            Ok(Ok(ticket)) => ticket,
            Ok(Err(error)) => return Ok(self.unprefilled(prefill, account, beside, error)),
            Err(_) => {
                account.set_aside();
                beside.set_aside();
                return Err(patience.exceeded());
            }
        };
        self.say_it_goes_on(decode, &ask, Some(prefill));
        let leg = PrefillLeg {
            engine: Arc::clone(prefill.engine()),
            ask: self.request(prefill, &ask, EngineLeg::Prefill(Some(ticket.clone()))),
            worker: prefill.worker.clone(),
            patience,
            vigil: self.vigil(prefill),
            account: beside,
        };
        let mut vigil = self.vigil(decode);
        let may_leave = || course.has_other(decode.worker.id);
        let request = self.request(decode, &ask, EngineLeg::Decode(ticket));
        let opening = open(&**decode.engine(), request, decode.worker, &patience, &mut vigil, &may_leave);
        let sent = Instant::now();
        let Ok(came) = timeout_at(patience.deadline.into(), abreast(leg, opening)).await else {
            account.abandon();
            return Err(patience.exceeded());
        };
        let links = course.lane.roster.links();
        match came {
            Abreast::Unprefilled(unprefilled) => match *unprefilled {
                Unprefilled::Answered(beside, reply) if !is_passing(reply.status) => {
                    // Both were asked the same.
                    account.set_aside();
                    beside.set_aside();
                    Err(self.refused(prefill, ask.form, &reply))
                }
                Unprefilled::Answered(beside, reply) => Ok(self.unprefilled(prefill, account, beside, answered(prefill, &reply))),
                Unprefilled::Failed(mut beside, error @ EngineError::InStream { refused: true, .. }) => {
                    account.set_aside();
                    beside.blame(&error);
                    beside.abandon();
                    Err(error.into())
                }
                Unprefilled::Failed(beside, error) => Ok(self.unprefilled(prefill, account, beside, error)),
            },
            Abreast::Decode(opened, tail) => {
                let beside = match &opened {
                    Ok(Opened::Stream(..)) => {
                        let [from, to] = [prefill, decode].map(|post| post.worker.load.index());
                        let ms = sent.elapsed().as_secs_f32() * 1000.0;
                        links.arrived(from, to, self.facts.prompt.tokens, ms);
                        self.taken_up(prefill, ask.endpoint, prompt);
                        tail.beside(patience.deadline)
                    }
                    Err(error) if handoff::is_the_links(&course.lane, decode.worker.id, error) => {
                        handoff::link_failed(&course.lane, prefill, decode);
                        handoff::fell_back("decode_failed");
                        account.abandon_unblamed();
                        self.rest(decode.worker.id, error.clone());
                        return Ok(Came::Failed);
                    }
                    _ => {
                        handoff::fell_back("decode_failed");
                        None
                    }
                };
                self.opened(decode, ask, prompt, opened, Parts { account, vigil, beside })
            }
        }
    }

    /// The prefill leg failed, and with it the other one.
    fn unprefilled(&mut self, prefill: Post<'_>, decode: Account, beside: Account, error: EngineError) -> Came {
        decode.set_aside();
        handoff::fell_back("prefill_failed");
        self.fail_at(beside, prefill.engine(), error);
        Came::Failed
    }
}
