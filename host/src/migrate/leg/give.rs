//! A choice given to a worker, and what that answers first.

use std::{sync::Arc, time::Instant};

use dynamo_engine_api::{Endpoint, Engine, EngineError, GenerateRequest, Leg as EngineLeg, WholeReply};
use dynamo_host_core::WorkerId;
use dynamo_host_index::Prompt;
use http::StatusCode;
use tokio::time::timeout_at;

use super::{Leg, Running};
use crate::{
    account::{Account, Booking},
    dispatch::{Opened, Post, answered, open},
    error::RequestError,
    handoff::Beside,
    migrate::{
        ask::{Ask, Next, Unsound},
        vigil::Vigil,
    },
    text::plain,
};

/// What goes with an answer that has begun.
pub(super) struct Parts {
    pub(super) account: Account,
    pub(super) vigil: Vigil,
    pub(super) beside: Option<Beside>,
}

/// What came of one way to go on.
pub(super) enum Came {
    /// Somebody does.
    Taken,
    /// Nobody needs to: it has all tokens that it may have.
    Full,
    /// It cannot be said to this engine.
    Unsound(RequestError),
    Failed,
}

impl Leg {
    /// What a worker is asked, or why nobody needs to ask it.
    pub(super) fn ask_of(&self, post: Post<'_>) -> Result<Ask, Came> {
        match self.next_ask(post.engine().continues(), post.placing.snapshot.max_model_len(&self.facts)) {
            Ok(Next::Ask(ask)) => Ok(ask),
            Ok(Next::Full) => Err(Came::Full),
            Err(error) => Err(Came::Unsound(error)),
        }
    }

    /// Gives it to a worker.
    pub(super) async fn give(&mut self, post: Post<'_>, prompt: &Prompt) -> Result<Came, RequestError> {
        let ask = match self.ask_of(post) {
            Ok(ask) => ask,
            Err(came) => return Ok(came),
        };
        let shared = Arc::clone(&self.shared);
        let course = &shared.course;
        self.begin_attempt();
        let booking = Account::book(&course.lane, &self.facts, post.worker, post.placing);
        let account = self.open_account(post, booking);
        self.say_it_goes_on(post, &ask, None);
        let mut vigil = self.vigil(post);
        let may_leave = || course.has_other(post.worker.id);
        let request = self.request(post, &ask, EngineLeg::Whole);
        let opening = open(&**post.engine(), request, post.worker, &course.patience, &mut vigil, &may_leave);
        match timeout_at(course.patience.deadline.into(), opening).await {
            Ok(opened) => self.opened(post, ask, prompt, opened, Parts { account, vigil, beside: None }),
            Err(_) => {
                account.abandon();
                Err(course.patience.exceeded())
            }
        }
    }

    /// An account of what a worker does of it, for which the client's request is counted elsewhere.
    pub(super) fn open_account(&self, post: Post<'_>, booking: Booking) -> Account {
        let course = &self.shared.course;
        let heard = course.heard.clone();
        let mut account =
            Account::open(&course.lane, &self.facts, post.placing, post.worker, booking, heard, course.client.clone());
        account.be_part(true);
        account
    }

    pub(super) fn say_it_goes_on(&self, post: Post<'_>, ask: &Ask, prefill: Option<Post<'_>>) {
        let (worker, form, tokens) = (post.name(), ask.form, self.choice.tokens);
        let prefill = prefill.map(|prefill| prefill.name());
        tracing::info!(worker, prefill, choice = self.index, form, tokens, cause = self.cause, "stream goes on");
    }

    pub(super) fn vigil(&self, post: Post<'_>) -> Vigil {
        let signs = post.placing.snapshot.signs(post.worker.id);
        Vigil::new(&post.worker.load, signs, self.shared.course.patience.idle, true)
    }

    /// A worker's part of what is asked.
    pub(super) fn request(&self, post: Post<'_>, ask: &Ask, leg: EngineLeg) -> GenerateRequest {
        let (endpoint, body, rank) = (ask.endpoint, ask.body.clone(), post.placing.snapshot.rank(post.worker));
        GenerateRequest { endpoint, body, stream: true, rank, leg, wants_token_ids: true, ..self.shared.course.ask.clone() }
    }

    /// Takes what a worker answered first.
    pub(super) fn opened(
        &mut self,
        post: Post<'_>,
        ask: Ask,
        prompt: &Prompt,
        opened: Result<Opened, EngineError>,
        parts: Parts,
    ) -> Result<Came, RequestError> {
        let Parts { mut account, vigil, beside } = parts;
        let Ask { endpoint, seam, is_by_ids, form, .. } = ask;
        match opened {
            Ok(Opened::Stream(first, chunks)) => {
                account.answer(StatusCode::OK, None);
                let (is_anew, tokens) = (form == "anew", self.choice.tokens);
                if !is_anew {
                    self.taken_up(post, endpoint, prompt);
                }
                // Of ids, some may stand for text that was told before them.
                let is_exact = is_anew || (is_by_ids && self.choice.ids.len() as u32 == tokens);
                if !is_by_ids {
                    self.choice.rebase();
                }
                let before = if is_anew { 0 } else { tokens };
                let (first, engine, last) = (Some(first), Arc::clone(post.engine()), Instant::now());
                let running =
                    Running { first, chunks, engine, account, vigil, _beside: beside, last, seam, is_by_ids, before, is_exact };
                self.running = Some(running);
                Ok(Came::Taken)
            }
            Ok(Opened::Whole(reply)) if !is_passing(reply.status) => {
                account.abandon();
                Err(self.refused(post, form, &reply))
            }
            Err(error @ EngineError::InStream { refused: true, .. }) => {
                account.blame(&error);
                account.abandon();
                Err(error.into())
            }
            Ok(Opened::Whole(reply)) => {
                self.fail_at(account, post.engine(), answered(post, &reply));
                Ok(Came::Failed)
            }
            Err(error) => {
                self.fail_at(account, post.engine(), error);
                Ok(Came::Failed)
            }
        }
    }

    /// A worker has the KV of all that there is.
    pub(super) fn taken_up(&self, post: Post<'_>, endpoint: Endpoint, prompt: &Prompt) {
        let feed = post.placing.snapshot.feed(post.worker.id);
        self.shared.course.lane.prefixes.taken_up(endpoint, feed, prompt, post.worker.spec.block_size);
    }

    pub(super) fn refused(&self, post: Post<'_>, form: &'static str, reply: &WholeReply) -> RequestError {
        let (status, said) = (reply.status.as_u16(), plain(&String::from_utf8_lossy(&reply.body)));
        tracing::warn!(worker = post.name(), form, status, "a continuation was refused: {said}");
        self.unsound(Unsound("the worker that should go on with it refused what was sent"))
    }

    /// A worker failed it, be it before it went on or after.
    pub(super) fn fail_at(&mut self, mut account: Account, engine: &Arc<dyn Engine>, failure: EngineError) {
        account.span.in_scope(|| {
            let failure = plain(&failure.to_string());
            tracing::warn!(worker = account.worker(), choice = self.index, "worker lost: {failure}");
        });
        self.shared.course.lane.roster.report_failed(account.worker_id(), engine, &failure);
        account.blame(&failure);
        self.rest(account.worker_id(), failure);
        account.abandon();
    }

    /// A worker is left alone for a while.
    pub(super) fn rest(&mut self, worker: WorkerId, failure: EngineError) {
        self.failed.push((worker, Instant::now()));
        self.failure = failure;
    }

    /// One more worker, or pair of them, is given it.
    pub(super) fn begin_attempt(&mut self) {
        self.attempts += 1;
        self.in_vain += 1;
    }
}

/// Whether what an engine answered is its state, and not what it thinks of the request.
pub(super) fn is_passing(status: StatusCode) -> bool {
    status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS
}
