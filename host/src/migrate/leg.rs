//! Leg: one choice's way to its end, over as many workers as it takes; those of pairs in [`pair`](super::pair).
//!
//! Bounds: workers asked (`migration.max_attempts`), the wait while there is none (`health.hold_s`), pauses between attempts
//! that fail, the request's deadline.

use std::{
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use dynamo_engine_api::{
    ChatContinuation, Chunk, ChunkStream, Continues, Endpoint, Engine, EngineError, GenerateRequest, Leg as EngineLeg, WholeReply,
};
use dynamo_host_core::{Among, RequestFacts, WorkerId};
use dynamo_host_index::Prompt;
use futures_util::StreamExt;
use http::StatusCode;
use tokio::time::{Instant as At, timeout, timeout_at};

use super::{
    Course,
    ask::{Ask, Next, Original, Unsound},
    record::Choice,
    seam::Seam,
    splice::Splice,
    vigil::{LOOK_EVERY, Lost, Vigil},
};
use crate::{
    account::{Account, Booking},
    dispatch::{Opened, Post, answered, open},
    error::RequestError,
    handoff::Beside,
    place::{Inquiry, Part, Placing, Way, place},
    request::Notes,
    text::plain,
};

/// How long a worker that failed a choice is left alone, even if there is no other.
const REST: Duration = Duration::from_secs(1);
/// The pause before a second continuation in a row; each further one is twice as long, and none longer than the last.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long a worker that has finished a choice may take to say what it counted.
const TAIL: Duration = Duration::from_secs(1);

/// An engine that can do everything.
const EVERYTHING: Continues = Continues { gives_ids: true, takes_ids: true, chat: Some(ChatContinuation::Prefill) };

/// What all legs of a stream share.
pub(super) struct Shared {
    pub(super) course: Course,
    pub(super) original: Original,
    pub(super) splice: Splice,
}

impl Shared {
    /// Sees to it that the prompt of a choice is counted: by the engine where it can, else as far as it can be reckoned.
    async fn count_prompt(&self, index: u32, reckoned: Option<u32>, engine: &dyn Engine) {
        let prompt = self.original.prompt_of(index);
        if self.splice.tally.knows(prompt) {
            return;
        }
        let counted = match self.original.with_prompt_of(index) {
            Some(body) => {
                let asked = timeout(TAIL, engine.tokenize(self.original.endpoint(), body)).await;
                asked.ok().and_then(Result::ok).flatten()
            }
            None => None,
        };
        if let Some(tokens) = counted.map(|ids| ids.len() as u32).or(reckoned) {
            self.splice.tally.prompt(prompt, tokens);
        }
    }
}

/// One choice's way to its end.
pub(super) struct Leg {
    pub(super) shared: Arc<Shared>,
    index: u32,
    choice: Choice,
    pub(super) facts: RequestFacts,
    /// Workers that it was given to.
    attempts: u32,
    failed: Vec<(WorkerId, Instant)>,
    /// What it failed with last, and under which label.
    failure: EngineError,
    cause: &'static str,
    /// Since when its client waits.
    silent_since: Instant,
    is_resumed: bool,
    /// Attempts since something came.
    in_vain: u32,
    /// How long the client's prompt is, by an engine that was told text.
    reckoned: Option<u32>,
    /// Whether its output was counted, where that takes an engine.
    is_counted: bool,
    running: Option<Running>,
}

/// A worker's part of it.
struct Running {
    /// The first chunk, which told that the worker takes it.
    first: Option<Chunk>,
    chunks: ChunkStream,
    engine: Arc<dyn Engine>,
    account: Account,
    vigil: Vigil,
    /// What works beside it.
    _beside: Option<Beside>,
    last: Instant,
    seam: Seam,
    is_by_ids: bool,
    /// Output tokens that its prompt holds.
    before: u32,
    /// Whether they are in its prompt as they were made: text may be cut into other tokens.
    is_exact: bool,
}

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

/// Frames for the client, and how many tokens they hold.
pub(super) struct Piece {
    pub(super) frames: Bytes,
    pub(super) tokens: u32,
}

impl Leg {
    /// A choice that a worker has failed.
    pub(super) fn new(shared: Arc<Shared>, index: u32, choice: Choice, lost: &super::Loss) -> Self {
        let mut facts = shared.course.facts.clone();
        (facts.choices, facts.prompts) = (1, 1);
        // The one that is lost now is among those that it was given to.
        let now = Instant::now();
        let failed = facts.failed_workers.iter().map(|&worker| (worker, now)).collect();
        let attempts = shared.course.attempts;
        Self {
            index,
            choice,
            facts,
            attempts,
            failed,
            failure: lost.failure.clone(),
            cause: lost.cause,
            silent_since: lost.silent_since,
            is_resumed: false,
            in_vain: 0,
            reckoned: None,
            is_counted: false,
            running: None,
            shared,
        }
    }

    /// What the client gets next; `None`: the choice is finished.
    ///
    /// # Errors
    /// Why it cannot be.
    pub(super) async fn next(&mut self) -> Result<Option<Piece>, RequestError> {
        loop {
            if self.choice.is_finished {
                self.finish().await;
                return Ok(None);
            }
            if self.running.is_none()
                && let Some(frames) =
                    self.resume().await.inspect_err(|error| self.count(if is_unsound(error) { "unsound" } else { "failed" }))?
            {
                return Ok(Some(Piece { frames, tokens: 0 }));
            }
            match self.read().await {
                Ok(Some(piece)) => return Ok(Some(piece)),
                Ok(None) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn count(&self, result: &'static str) {
        metrics::counter!("dynamo_host_migrations_total", "cause" => self.cause, "result" => result).increment(1);
    }

    /// Reads a chunk of the worker that has it. `None`: it held nothing for the client, or the worker is lost.
    async fn read(&mut self) -> Result<Option<Piece>, RequestError> {
        let course = &self.shared.course;
        let Some(running) = &mut self.running else { return Ok(None) };
        let chunk = match running.first.take() {
            Some(first) => Ok(first),
            None => loop {
                let look = (At::now() + LOOK_EVERY).min(course.patience.deadline.into());
                match timeout_at(look, running.chunks.next()).await {
                    Ok(Some(chunk)) => break chunk.map_err(|error| (error.label(), error)),
                    Ok(None) => {
                        let error = EngineError::Incomplete { engine: format!("worker {}", running.account.worker()) };
                        break Err((error.label(), error));
                    }
                    Err(_) => {
                        let now = Instant::now();
                        if now >= course.patience.deadline {
                            running.account.fail();
                            return Err(course.patience.exceeded());
                        }
                        if let Some(lost) = running.vigil.within(running.last, now, running.account.has_tokens())
                            && (!matches!(lost, Lost::Stalled { .. }) || course.has_other(running.account.worker_id()))
                        {
                            break Err((lost.label(), lost.error(running.account.worker(), course.patience.idle)));
                        }
                    }
                }
            },
        };
        match chunk {
            Ok(chunk) => Ok(self.pass(&chunk)),
            Err((_, refusal @ EngineError::InStream { refused: true, .. })) => {
                running.account.blame(&refusal);
                Err(refusal.into())
            }
            Err((cause, failure)) => {
                self.lose(cause, failure);
                Ok(None)
            }
        }
    }

    fn pass(&mut self, chunk: &Chunk) -> Option<Piece> {
        let running = self.running.as_mut()?;
        let now = Instant::now();
        running.account.chunk(chunk, now);
        running.last = now;
        self.hear_usage(chunk);
        let running = self.running.as_mut()?;
        let before = self.choice.tokens;
        let Running { seam, is_by_ids, .. } = running;
        let spliced = self.shared.splice.frames(&chunk.bytes, self.index, &mut self.choice, seam, *is_by_ids);
        if spliced.is_stopped {
            running.account.stop();
        }
        running.account.relayed += now.elapsed();
        if spliced.frames.is_empty() {
            return None;
        }
        if !std::mem::replace(&mut self.is_resumed, true) {
            metrics::histogram!("dynamo_host_migration_pause_seconds").record(now - self.silent_since);
        }
        self.in_vain = 0;
        self.silent_since = now;
        Some(Piece { frames: spliced.frames.into(), tokens: self.choice.tokens.saturating_sub(before) })
    }

    /// Learns from what the engine counted how long the client's own prompt is.
    fn hear_usage(&mut self, chunk: &Chunk) {
        if let (Some(usage), Some(running)) = (chunk.summary.usage, &self.running)
            && usage.prompt_tokens > running.before
        {
            let tokens = usage.prompt_tokens - running.before;
            if running.is_exact {
                self.shared.splice.tally.prompt(self.shared.original.prompt_of(self.index), tokens);
            } else {
                self.reckoned = Some(tokens);
            }
        }
    }

    /// Hears a worker out that has finished the choice: what it counted comes last.
    async fn finish(&mut self) {
        let Some(running) = &mut self.running else { return };
        let engine = Arc::clone(&running.engine);
        if running.account.has_ended() {
            self.running = None;
        }
        let until = At::now() + TAIL;
        while let Some(running) = &mut self.running {
            match timeout_at(until, running.chunks.next()).await {
                Ok(Some(Ok(chunk))) => {
                    running.account.chunk(&chunk, Instant::now());
                    self.hear_usage(&chunk);
                }
                _ => {
                    running.account.stop();
                    self.running = None;
                }
            }
        }
        self.shared.count_prompt(self.index, self.reckoned, &*engine).await;
    }

    /// The worker that has it is lost.
    fn lose(&mut self, cause: &'static str, failure: EngineError) {
        let Some(Running { chunks, engine, account, .. }) = self.running.take() else { return };
        // The engine is to stop before another begins.
        drop(chunks);
        (self.cause, self.is_resumed) = (cause, false);
        self.fail_at(account, &engine, failure);
    }

    /// Finds a worker that goes on. Frames: none was needed.
    async fn resume(&mut self) -> Result<Option<Bytes>, RequestError> {
        self.choice.settle();
        self.count_output().await;
        let shared = Arc::clone(&self.shared);
        let (course, splice) = (&shared.course, &shared.splice);
        splice.tally.output(self.index, self.choice.tokens);
        let kind = self.some_engine();
        if let Next::Full = self.next_ask(kind, course.lane.roster.snapshot().max_model_len(&self.facts))? {
            return Ok(Some(self.full().await));
        }
        self.prepare_facts();
        let prompt = match (&self.choice.prompt_ids, course.prompt.is_exact()) {
            (Some(ids), true) if **ids == **course.prompt.tokens() => Arc::new(course.prompt.followed_by(&self.choice.ids)),
            _ => Arc::clone(&course.prompt),
        };
        loop {
            if self.attempts >= course.migration.max_attempts {
                return Err(self.failure.clone().into());
            }
            let (pause, deadline) = (self.pause(), course.patience.deadline);
            tokio::time::sleep_until((Instant::now() + pause).min(deadline).into()).await;
            if Instant::now() >= deadline {
                return Err(course.patience.exceeded());
            }
            self.facts.attempt = self.attempts;
            self.facts.failed_workers = self.failed.iter().map(|(worker, _)| *worker).collect();
            let placing = self.place(&prompt).await?;
            let mut unsound = None;
            for &way in &placing.ways {
                let post = Post::new(&placing, way.first());
                let came = match way {
                    Way::Alone(_) => self.give(post, &prompt).await?,
                    Way::Prefill(_) => self.give_pair(post, None, &prompt).await?,
                    Way::Pair(_, decode) => self.give_pair(post, Some(decode), &prompt).await?,
                };
                match came {
                    Came::Taken => {
                        self.count("continued");
                        return Ok(None);
                    }
                    Came::Full => return Ok(Some(self.full().await)),
                    Came::Unsound(error) => unsound = Some(error),
                    // Others may have come, or be known to be gone.
                    Came::Failed => {
                        unsound = None;
                        break;
                    }
                }
            }
            if let Some(error) = unsound {
                return Err(error);
            }
        }
    }

    /// Ends a choice that has all its tokens.
    async fn full(&mut self) -> Bytes {
        // Nobody goes on with it who would say how long its prompt is.
        if let Some(engine) = self.engines().into_iter().next() {
            self.shared.count_prompt(self.index, self.reckoned, &*engine).await;
        }
        self.shared.splice.full(self.index, &mut self.choice).into()
    }

    /// Counts the output of a stream that tells no ids, once. A busy engine puts several tokens into one event, so that events
    /// are too few; its tokenizer cuts the text into about as many as were made.
    async fn count_output(&mut self) {
        let is_counted = !self.shared.original.is_retold() || self.choice.text.is_empty();
        if std::mem::replace(&mut self.is_counted, true) || is_counted {
            return;
        }
        let Some(engine) = self.engines().into_iter().find(|engine| engine.continues().gives_ids) else { return };
        let body = self.shared.original.text_alone(&self.choice.text);
        let asked = timeout(TAIL, engine.tokenize(Endpoint::Completions, body)).await;
        if let Some(ids) = asked.ok().and_then(Result::ok).flatten() {
            self.choice.tokens = self.choice.tokens.max(ids.len() as u32);
        }
    }

    /// Engines that could have it.
    fn engines(&self) -> Vec<Arc<dyn Engine>> {
        let snapshot = self.shared.course.lane.roster.snapshot();
        // To count it is enough that one answers, also if it failed the choice.
        let facts = RequestFacts { failed_workers: Vec::new(), ..self.facts.clone() };
        let Ok(candidates) = snapshot.candidates(&facts) else { return Vec::new() };
        (0..candidates.count()).map(|row| Arc::clone(snapshot.engine(candidates.worker(row).id))).collect()
    }

    /// What a worker is asked, or why nobody needs to ask it.
    pub(super) fn ask_of(&self, post: Post<'_>) -> Result<Ask, Came> {
        match self.next_ask(post.engine().continues(), post.placing.snapshot.max_model_len(&self.facts)) {
            Ok(Next::Ask(ask)) => Ok(ask),
            Ok(Next::Full) => Err(Came::Full),
            Err(error) => Err(Came::Unsound(error)),
        }
    }

    /// Gives it to a worker.
    async fn give(&mut self, post: Post<'_>, prompt: &Prompt) -> Result<Came, RequestError> {
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

    /// What an engine can do that could go on with it: without any, nothing is worth waiting for.
    fn some_engine(&self) -> Continues {
        let snapshot = self.shared.course.lane.roster.snapshot();
        let facts = RequestFacts { failed_workers: Vec::new(), ..self.facts.clone() };
        let mut kinds: Vec<Continues> = Vec::new();
        // Where nobody serves whole requests, it is those that decode who go on.
        let whole = snapshot.candidates(&facts);
        if let Ok(candidates) = whole.or_else(|_| snapshot.candidates_among(&facts, Among::Decoders)) {
            for row in 0..candidates.count() {
                let kind = snapshot.engine(candidates.worker(row).id).continues();
                if !kinds.contains(&kind) {
                    kinds.push(kind);
                }
            }
        }
        // Nobody is there: whoever comes may do anything.
        let Some(&first) = kinds.first() else { return EVERYTHING };
        let max_model_len = snapshot.max_model_len(&facts);
        kinds.into_iter().find(|&kind| self.next_ask(kind, max_model_len).is_ok()).unwrap_or(first)
    }

    fn next_ask(&self, engine: Continues, max_model_len: Option<u32>) -> Result<Next, RequestError> {
        self.shared.original.next(self.index, &self.choice, engine, max_model_len).map_err(|unsound| self.unsound(unsound))
    }

    fn unsound(&self, Unsound(reason): Unsound) -> RequestError {
        RequestError::MigrationUnsound { failure: self.failure.clone(), reason }
    }

    /// What policies may know of it now.
    fn prepare_facts(&mut self) {
        let base = &self.shared.course.facts;
        let generated = self.choice.tokens;
        self.facts.generated_tokens = generated;
        self.facts.prompt.tokens = base.prompt.tokens.saturating_add(generated);
        self.facts.max_output_tokens = base.max_output_tokens.map(|most| most.saturating_sub(generated));
        self.facts.expected_output_tokens = base.expected_output_tokens.map(|expected| expected.saturating_sub(generated));
    }

    /// How long to wait after what was in vain: not always the same.
    fn pause(&self) -> Duration {
        let Some(doublings) = self.in_vain.checked_sub(1) else { return Duration::ZERO };
        let longest = (PAUSE * 2u32.saturating_pow(doublings.min(8))).min(LONGEST_PAUSE);
        let chance = RandomState::new().hash_one(self.in_vain) as u8;
        longest.mul_f32(0.5 + f32::from(chance) / 510.0)
    }

    /// Asks where it shall go; waits while there is nobody.
    async fn place(&mut self, prompt: &Prompt) -> Result<Placing, RequestError> {
        let shared = Arc::clone(&self.shared);
        let course = &shared.course;
        let until = (Instant::now() + course.lane.roster.health().hold()).min(course.patience.deadline);
        let mut changes = course.lane.roster.changes();
        loop {
            let (recorder, patience) = (course.recorder.as_ref(), &course.patience);
            let inquiry = Inquiry { part: Part::Whole, pinned: &course.pinned, prompt, recorder, patience, until: None };
            let error = match place(&course.lane, &inquiry, &mut self.facts, &mut Notes::default()).await {
                Err(error @ RequestError::NoWorker { .. }) => error,
                other => return other,
            };
            let now = Instant::now();
            if now >= course.patience.deadline {
                return Err(course.patience.exceeded());
            }
            // Whoever failed it may be the only one, and be well again.
            let before = self.facts.failed_workers.len();
            self.facts.failed_workers =
                self.failed.iter().filter(|(_, at)| now - *at < REST).map(|(worker, _)| *worker).collect();
            if self.facts.failed_workers.len() < before {
                self.failed.retain(|(_, at)| now - *at < REST);
                continue;
            }
            if now >= until {
                return Err(error);
            }
            let _ = timeout(LOOK_EVERY.min(until - now), changes.changed()).await;
        }
    }
}

fn is_unsound(error: &RequestError) -> bool {
    matches!(error, RequestError::MigrationUnsound { .. })
}

/// Whether what an engine answered is its state, and not what it thinks of the request.
pub(super) fn is_passing(status: StatusCode) -> bool {
    status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS
}
