//! Keeps the account of one request on one worker: tokens, latencies, load, and what came of it.

mod client;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use dynamo_engine_api::{Chunk, Endpoint, EngineError, Usage};
use dynamo_host_core::{
    Held, RequestFacts, Worker, WorkerId, WorkerSpec,
    load::{InFlight, Recent},
};
use dynamo_host_flow::{Ended, Failure};
use dynamo_host_policy::{OutcomeRow, PolicyVersion};
use http::StatusCode;

pub(crate) use self::client::{Client, Sum};
use crate::{
    admit::Heard,
    clock::{Clock, unix_ms},
    meters::RequestMeters,
    observe::Observer,
    place::Placing,
    receipts::{Hex, OutcomeLine, Recorder},
    request::Lane,
    roster::{Attempt, Outcome, failure},
    stop::{Phase, Stopping},
};

/// How a request ended: `outcomes.end` of the contract.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Done = 0,
    Cancelled = 1,
    Failed = 2,
    /// The engine took it for the client's mistake.
    Rejected = 3,
}

impl End {
    fn label(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
            Self::Rejected => "rejected",
        }
    }
}

/// One request on one worker, from dispatch to its end. Closing it is dropping it: there is no way out without.
pub(crate) struct Account {
    pub(crate) meters: RequestMeters,
    /// What is logged after the handler has returned belongs to the request all the same.
    pub(crate) span: tracing::Span,
    observer: Observer,
    stopping: Stopping,
    clock: Clock,
    version: Option<Arc<PolicyVersion>>,
    /// The admission policy that let it in, if it wants to hear of it.
    admission: Option<Arc<Heard>>,
    recorder: Option<Recorder>,
    in_flight: InFlight,
    /// The same request, for the worker's breaker.
    attempt: Attempt,
    blamed: Option<EngineError>,
    worker: WorkerId,
    spec: Arc<WorkerSpec>,
    decision_id: u64,
    endpoint: Endpoint,
    prompt_tokens: u32,
    /// What the worker is believed to hold of the prompt.
    cached_tokens: u32,
    /// The client's request.
    client: Client,
    /// When this worker was given it.
    dispatched: Instant,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    output_tokens: u32,
    /// Time that the host itself spent on the chunks of its stream.
    pub(crate) relayed: Duration,
    usage: Option<Usage>,
    status: StatusCode,
    /// Cancelled, until something else is known: a client that leaves just drops the account.
    end: End,
    /// It is one of several of an answer, whose request is counted elsewhere: a migrated stream's worker, or one that failed it.
    is_part: bool,
    /// What it made, the client has.
    is_answer: bool,
    /// Which part of the request its worker has.
    part: Part,
    /// Whether it is one of the requests that are being served: the second worker that works on one at the same time is not, and neither is a part.
    is_served: bool,
}

/// Which part of a request a worker has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Whole,
    /// Its prompt, for another.
    Prefill,
    /// Its output, of a prompt that another computes or has computed.
    Decode,
}

/// What is counted of a request whose answer several workers made; dropped at its end.
pub(crate) struct Books {
    meters: RequestMeters,
    pub(crate) span: tracing::Span,
    endpoint: Endpoint,
    model: String,
    client: Client,
    prompt_tokens: u32,
    output_tokens: u32,
}

impl Books {
    /// Takes over from the account of a worker that was lost within an answer.
    pub(crate) fn take_over(account: &mut Account) -> Self {
        account.end = End::Failed;
        account.be_part(false);
        Self {
            meters: account.meters.clone(),
            span: account.span.clone(),
            endpoint: account.endpoint,
            model: account.spec.model.clone(),
            client: account.client.clone(),
            prompt_tokens: account.usage.map_or(account.prompt_tokens, |usage| usage.prompt_tokens),
            output_tokens: account.output_tokens,
        }
    }

    /// Tokens came.
    pub(crate) fn tokens(&mut self, count: u32) {
        self.output_tokens = self.output_tokens.saturating_add(count);
    }

    /// What the whole answer had.
    pub(crate) fn usage(&mut self, prompt_tokens: u32, output_tokens: u32) {
        (self.prompt_tokens, self.output_tokens) = (prompt_tokens, output_tokens);
    }
}

impl Drop for Books {
    fn drop(&mut self) {
        let (prompt_tokens, completion_tokens) = (self.prompt_tokens, self.output_tokens);
        let usage = Usage { prompt_tokens, completion_tokens, prompt_tokens_details: None };
        // Its stream had begun.
        if self.client.count(&self.meters, (self.endpoint, &self.model), usage, StatusCode::OK) {
            tracing::debug!(parent: &self.span, status = 200, tokens = self.output_tokens, "request ended");
        }
    }
}

/// nginx's status for a client that left before its answer; it is only ever a metric label.
const CLIENT_LEFT: u16 = 499;

/// A request on the books of the worker that is to have it.
pub(crate) struct Booking {
    in_flight: InFlight,
    /// What the worker is believed to hold of the prompt.
    cached_tokens: u32,
}

impl Account {
    /// Books a request on a worker: from here on others see that it takes a place there.
    pub(crate) fn book(lane: &Lane, facts: &RequestFacts, worker: &Worker, placing: &Placing) -> Booking {
        let (load, tokens) = (&worker.load, facts.prompt.tokens);
        let cached_tokens = placing.overlap.of(load.index()).map_or(0, Held::total);
        let uncached = tokens.saturating_sub(cached_tokens);
        Booking { in_flight: InFlight::dispatch(Arc::clone(load), tokens, uncached, lane.clock.now_ms()), cached_tokens }
    }

    /// Books a request on a worker that gets the prompt's KV from another: it computes nothing of it.
    pub(crate) fn book_decode(lane: &Lane, facts: &RequestFacts, worker: &Worker, placing: &Placing) -> Booking {
        let (load, tokens) = (&worker.load, facts.prompt.tokens);
        let cached_tokens = placing.overlap.of(load.index()).map_or(0, Held::total);
        Booking { in_flight: InFlight::dispatch(Arc::clone(load), tokens, 0, lane.clock.now_ms()), cached_tokens }
    }

    /// A worker of this placing is given the request that was booked on it. `heard`: the admission policy that wants to hear of
    /// it.
    pub(crate) fn open(
        lane: &Lane,
        facts: &RequestFacts,
        placing: &Placing,
        worker: &Worker,
        booking: Booking,
        heard: Option<Arc<Heard>>,
        client: Client,
    ) -> Self {
        let Booking { in_flight, cached_tokens } = booking;
        let is_served = !client.is_part();
        if is_served {
            lane.meters.in_flight.increment(1.0);
        }
        let tokens = facts.prompt.tokens;
        Self {
            meters: lane.meters.clone(),
            span: tracing::Span::current(),
            observer: lane.observer.clone(),
            stopping: lane.stopping.clone(),
            clock: lane.clock,
            version: placing.observed_version(),
            admission: heard,
            recorder: placing.recorder.clone(),
            in_flight,
            attempt: lane.roster.attempt(&placing.snapshot, worker.id),
            blamed: None,
            worker: worker.id,
            spec: Arc::clone(&worker.spec),
            decision_id: placing.decision_id,
            endpoint: facts.endpoint,
            prompt_tokens: tokens,
            cached_tokens,
            client,
            dispatched: Instant::now(),
            first_token: None,
            last_token: None,
            output_tokens: 0,
            relayed: Duration::ZERO,
            usage: None,
            status: StatusCode::from_u16(CLIENT_LEFT).expect("499 is a status"),
            end: End::Cancelled,
            is_part: false,
            is_answer: true,
            part: Part::Whole,
            is_served,
        }
    }

    /// Its worker computes the prompt, for another.
    pub(crate) fn be_prefill(&mut self) {
        self.part = Part::Prefill;
    }

    /// Its worker was to compute the prompt for another, and had nothing to hand over: its answer is all of it.
    pub(crate) fn be_whole(&mut self) {
        self.part = Part::Whole;
    }

    /// Its worker gets the prompt's KV from another.
    pub(crate) fn be_decode(&mut self) {
        self.part = Part::Decode;
    }

    /// It works beside another one, in which the client's request is counted.
    pub(crate) fn be_beside(&mut self) {
        self.be_part(false);
        self.client.let_go();
        if std::mem::take(&mut self.is_served) {
            self.meters.in_flight.decrement(1.0);
        }
    }

    /// The prompt is computed, and who decodes goes on: the first token and the client's request are counted there.
    pub(crate) fn prefilled(mut self, usage: Option<Usage>) {
        self.be_part(false);
        if let Some(usage) = usage {
            self.correct(Usage { completion_tokens: 0, ..usage });
        }
        self.first_token = Some(Instant::now());
        self.attempt.progress();
        // It has moved.
        self.in_flight.tokens(1, self.clock.now_ms());
        self.end = End::Done;
    }

    /// Another took its part away, or never did its own: this worker is at no fault.
    pub(crate) fn set_aside(mut self) {
        self.be_part(false);
    }

    /// It failed it before its first token, which may be the fault of what it was to be given: the policy is told, its breaker is
    /// not.
    pub(crate) fn abandon_unblamed(mut self) {
        self.blamed = None;
        self.abandon();
    }

    /// The worker failed it, and what the client gets comes from elsewhere: only the worker's part is settled.
    pub(crate) fn abandon(mut self) {
        self.end = End::Failed;
        (self.is_part, self.is_answer) = (true, false);
    }

    /// The client's request is counted elsewhere. `is_answer`: it goes on with one that has begun, and is the answer if it ends well.
    pub(crate) fn be_part(&mut self, is_answer: bool) {
        (self.is_part, self.is_answer) = (true, is_answer);
    }

    /// It ended as the host wanted it, before the engine said so.
    pub(crate) fn stop(&mut self) {
        self.end = End::Done;
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.end == End::Done
    }

    pub(crate) fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    /// Whether a token came from its worker.
    pub(crate) fn has_tokens(&self) -> bool {
        self.first_token.is_some()
    }

    pub(crate) fn worker_id(&self) -> WorkerId {
        self.worker
    }

    /// What the client's answer is, and how it ended if that is known by now.
    pub(crate) fn answer(&mut self, status: StatusCode, end: Option<End>) {
        self.status = status;
        self.end = end.unwrap_or(self.end);
    }

    /// What its worker failed it with: said before it is abandoned or fails.
    pub(crate) fn blame(&mut self, error: &EngineError) {
        self.blamed = Some(error.clone());
    }

    pub(crate) fn fail(&mut self) {
        self.end = End::Failed;
    }

    pub(crate) fn worker(&self) -> &str {
        &self.spec.name
    }

    /// Its first token is there, for a client that wants a stream.
    pub(crate) fn first_token(&mut self) {
        let now = Instant::now();
        self.first_token = Some(now);
        self.attempt.progress();
        self.client.first_token(&self.meters, now);
    }

    /// All that a whole answer says of its tokens.
    pub(crate) fn usage(&mut self, usage: Usage) {
        self.tokens(usage.completion_tokens);
        self.correct(usage);
    }

    /// What the engine counted is better than what was estimated, in the books too.
    fn correct(&mut self, usage: Usage) {
        // Some leave the prompt out until the end; none has an empty one.
        if usage.prompt_tokens > 0 {
            // What engines say is cached is their own: KV that came from elsewhere is not.
            let cached = if self.part == Part::Decode { Some(usage.prompt_tokens) } else { cached(&usage) };
            self.in_flight.correct(usage.prompt_tokens, cached);
        }
        self.usage = Some(usage);
    }

    pub(crate) fn chunk(&mut self, chunk: &Chunk, now: Instant) {
        let summary = &chunk.summary;
        if summary.tokens > 0 {
            match self.last_token {
                None => {
                    self.first_token = Some(now);
                    self.attempt.progress();
                    // A continuation's first token is the client's next one.
                    if !self.is_part {
                        self.client.first_token(&self.meters, now);
                    }
                }
                Some(last) => self.meters.itl.record((now - last) / summary.tokens),
            }
            self.last_token = Some(now);
            self.tokens(summary.tokens);
        }
        if let Some(usage) = summary.usage {
            self.correct(usage);
        }
        if summary.done {
            self.end = End::Done;
        }
    }

    fn tokens(&mut self, count: u32) {
        self.output_tokens = self.output_tokens.saturating_add(count);
        self.in_flight.tokens(count, self.clock.now_ms());
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        // An answer that the host's end came before is one of ours, and is counted with it.
        let never_began = self.status.as_u16() == CLIENT_LEFT && self.stopping.has_reached(Phase::Over);
        self.is_part |= never_began;
        // What an engine says no to within a stream says nothing of the engine, or one client could have all of them left out.
        if matches!(self.blamed, Some(EngineError::InStream { refused: true, .. })) {
            self.end = End::Rejected;
        }
        // It was taken from a worker that drains for longer than it may: that says nothing of the worker.
        let is_moved = self.end == End::Failed && self.attempt.is_moved();
        if self.is_served {
            self.meters.in_flight.decrement(1.0);
        }
        let ms = |duration: Duration| duration.as_secs_f32() * 1000.0;
        // From here on it is the worker's time: what the request waited for before says nothing of it.
        let ttft_ms = self.first_token.map_or(f32::NAN, |first| ms(first - self.dispatched));
        let itl_ms = match (self.first_token, self.last_token) {
            (Some(first), Some(last)) if self.output_tokens > 1 => ms(last - first) / (self.output_tokens - 1) as f32,
            _ => f32::NAN,
        };
        let error = match self.end {
            End::Done | End::Rejected => 0.0,
            End::Failed if !is_moved => 1.0,
            End::Failed | End::Cancelled => f32::NAN,
        };
        let uncached_tokens = match self.part {
            Part::Decode => 0,
            Part::Whole | Part::Prefill => self.prompt_tokens.saturating_sub(self.cached_tokens),
        };
        let failure = self.blamed.as_ref().map(|error| failure(error, self.first_token.is_some()));
        let failure = failure.or_else(|| self.status.is_server_error().then_some(Failure::Unhealthy));
        let ended = match (self.end, failure) {
            (End::Done | End::Rejected, _) => Ended::Well,
            (End::Failed, Some(failure)) if !is_moved => Ended::Failed(failure),
            // Its client left, its time was over, or it was moved.
            (End::Cancelled | End::Failed, _) => Ended::Untold,
        };
        self.attempt.end(Outcome { ended, ttft_ms, itl_ms, uncached_tokens });
        let load = self.in_flight.slot();
        for (recent, value) in [(Recent::TtftMs, ttft_ms), (Recent::ItlMs, itl_ms), (Recent::ErrorRate, error)] {
            if !value.is_nan() {
                load.observe(recent, value);
                load.observed(self.clock.now_ms());
            }
        }
        let reported = self.usage.as_ref().and_then(cached);
        let usage = self.usage.unwrap_or(Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.output_tokens,
            prompt_tokens_details: None,
        });
        if self.relayed > Duration::ZERO {
            self.meters.relay.record(self.relayed);
        }
        let is_counted = !self.is_part && self.client.count(&self.meters, (self.endpoint, &self.spec.model), usage, self.status);
        if let Some(reported) = reported
            && self.part != Part::Decode
        {
            self.meters.prefix_predicted.increment(u64::from(self.cached_tokens));
            self.meters.prefix_reported.increment(u64::from(reported));
        }
        if let Some(recorder) = self.recorder.take() {
            let ms = |ms: f32| Some(ms).filter(|ms| ms.is_finite());
            recorder.outcome(OutcomeLine {
                v: crate::receipts::VERSION,
                id: Hex(self.decision_id),
                unix_ms: unix_ms(),
                worker: Hex(self.worker.0),
                name: self.spec.name.clone(),
                end: self.end.label().to_owned(),
                status: self.is_answer.then_some(self.status.as_u16()),
                ttft_ms: ms(ttft_ms),
                itl_ms: ms(itl_ms),
                prompt_tokens: usage.prompt_tokens,
                output_tokens: usage.completion_tokens,
                cached_predicted: self.cached_tokens,
                cached_reported: reported,
            });
        }
        let row = OutcomeRow {
            decision_id: self.decision_id,
            worker_id: self.worker.0,
            ttft_ms,
            itl_ms,
            queue_ms: f32::NAN,
            output_tokens: usage.completion_tokens,
            end: self.end as u32,
        };
        if let Some(heard) = self.admission.take() {
            heard.tell(row);
        }
        if let Some(version) = self.version.take() {
            self.observer.tell(version, row);
        }
        if is_counted {
            let (status, tokens) = (self.status.as_u16(), usage.completion_tokens);
            tracing::debug!(parent: &self.span, status, tokens, ttft_ms, itl_ms, "request ended");
        }
    }
}

/// Prompt tokens that an engine says were cached.
fn cached(usage: &Usage) -> Option<u32> {
    usage.prompt_tokens_details?.cached_tokens
}

/// Counts a request that has been answered, or left. `model` must be one that is served: clients may not make labels.
pub(crate) fn count_request(endpoint: &'static str, model: &str, status: StatusCode) {
    metrics::counter!(
        "dynamo_host_requests_total",
        "endpoint" => endpoint, "model" => model.to_owned(), "code" => status.as_u16().to_string()
    )
    .increment(1);
}
