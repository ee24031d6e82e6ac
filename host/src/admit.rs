//! Lets requests in, and has them wait for their turn: what they hold from then to their end.
//!
//! Contract: a request that finds room never waits. One that does not waits here, where it can still be overtaken, and not
//! inside an engine; for a bounded time, among a bounded number. A client that leaves frees its place at once, whether its
//! request waits or runs. What generates nothing and takes no place in an engine, counting tokens, is let through.

mod meters;
mod pool;
mod pools;
mod queue;
mod room;
mod verdict;

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use dynamo_host_core::{Endpoint, RequestFacts, request::flags};
use dynamo_host_flow::{Refusal, Ticket};

use self::{
    meters::count_shed,
    pool::Pool,
    queue::{Came, Told},
};
pub(crate) use self::{queue::Queue, verdict::Heard};
use crate::{error::RequestError, request::Lane, trace};

/// Tokens of a stream after which the time between them is observed once more.
const ITL_EVERY: u32 = 8;
/// When to come back where the queue cannot say how long it will take.
const RETRY_AFTER_MS: u32 = 1000;
/// The latest that is said: what the queue will be like then nobody knows.
const MAX_RETRY_AFTER_MS: u32 = 60_000;

/// One request's place among those that run, over all its attempts and parts. Dropped, with all that share it, another may take it.
#[derive(Clone)]
pub(crate) struct Permit(Option<Arc<Mutex<Place>>>);

struct Place {
    queue: Arc<Queue>,
    pool: Arc<Pool>,
    ticket: Ticket,
    prompt_tokens: u32,
    choices: u32,
    is_stream: bool,
    waited: Duration,
    /// Who wants to hear what becomes of it.
    heard: Option<Arc<Heard>>,
    output: u32,
    /// When a latency was last observed, its start at first, and after how many tokens.
    observed: (Instant, u32),
}

/// Waits until a request may run.
///
/// # Errors
/// Why it may not. How long it has waited until then is for the caller to tell.
///
/// # Cancel safety
/// A request that is dropped while it waits is not there any more.
pub(crate) async fn enter(lane: &Lane, facts: &mut RequestFacts) -> Result<Permit, RequestError> {
    if !takes_room(facts.endpoint) {
        return Ok(Permit(None));
    }
    let queue = &lane.queue;
    queue.catch_up();
    let begun = Instant::now();
    let settings = queue.settings();
    let pool = queue.pool(&facts.model);
    if facts.endpoint != Endpoint::Embeddings {
        facts.expected_output_tokens = Some(pool.expected_output(facts.max_output_tokens));
    }
    let word = {
        let native = settings.natively(facts);
        settings.stand(facts, &native);
        verdict::ask(lane, facts, &pool, native)
    };
    lane.meters.admission.record(begun.elapsed());
    trace::stage("admission", begun);
    let (admitted, heard) = match word {
        Ok(word) => word,
        Err(error) => {
            pool.lately().came(true, queue.now_ms());
            // Who was not let in has no class but the configured one.
            queue.meters.of(facts.class.as_deref()).shed.increment(1);
            count_shed("policy");
            return Err(error);
        }
    };
    settings.stand(facts, &admitted);
    let meters = queue.meters.of(facts.class.as_deref());

    let came = Instant::now();
    let arrival = queue.come(&pool, facts, admitted, &settings);
    lane.meters.queue.record(came.elapsed());
    let (entered, heard) = match arrival {
        Came::Started(ticket) => (Ok((ticket, Duration::ZERO)), heard),
        Came::Waits(ticket, told) => {
            let mut waiting = Waiting { queue, pool: &pool, ticket: Some(ticket), came, heard };
            queue.count_waiting(ticket, meters.waiting(&pool.model, facts.prompt.tokens));
            let told = told.await.unwrap_or(Told::Late);
            // From here on it is the permit's, or it has been taken out already.
            waiting.ticket = None;
            let entered = if told == Told::Start { Ok((ticket, came.elapsed())) } else { Err(Why::Told(told)) };
            (entered, waiting.heard.take())
        }
        Came::Refused(refusal) => (Err(Why::Refused(refusal)), heard),
    };
    trace::stage("queue", came);
    pool.lately().came(entered.is_err(), queue.now_ms());
    let waited = entered.as_ref().map_or_else(|_| came.elapsed(), |(_, waited)| *waited);
    meters.wait.record(waited);
    match entered {
        Ok((ticket, waited)) => {
            meters.admitted.increment(1);
            let heard = heard.map(|heard| Arc::new(heard.after(ms(waited))));
            Ok(Permit(Some(Arc::new(Mutex::new(Place::new(queue, pool, ticket, facts, waited, heard))))))
        }
        Err(why) => {
            meters.shed.increment(1);
            count_shed(why.label());
            if let Some(heard) = heard {
                heard.tell_waited(ms(waited), why.is_late(), false);
            }
            Err(why.error(facts, waited, || retry_after_ms(queue, &pool)))
        }
    }
}

/// Why a request that was let in does not run.
#[derive(Clone, Copy)]
enum Why {
    Refused(Refusal),
    Told(Told),
}

impl Why {
    /// Whether its time was over, here or before it came.
    fn is_late(self) -> bool {
        matches!(self, Self::Refused(Refusal::Late) | Self::Told(Told::Late | Told::Start))
    }

    /// Metric label.
    fn label(self) -> &'static str {
        match self {
            Self::Refused(Refusal::Requests { .. }) => "requests",
            Self::Refused(Refusal::Tokens { .. }) => "tokens",
            Self::Refused(Refusal::Late) => "late",
            Self::Told(Told::Displaced) => "displaced",
            Self::Told(Told::NoWorker) => "no_worker",
            Self::Told(Told::Late | Told::Start) => "timeout",
        }
    }

    fn error(self, facts: &RequestFacts, waited: Duration, retry_after_ms: impl FnOnce() -> u32) -> RequestError {
        match self {
            Self::Refused(refusal @ (Refusal::Requests { .. } | Refusal::Tokens { .. })) => {
                RequestError::QueueFull { refusal: Some(refusal), retry_after_ms: retry_after_ms() }
            }
            Self::Told(Told::Displaced) => RequestError::QueueFull { refusal: None, retry_after_ms: retry_after_ms() },
            Self::Told(Told::NoWorker) => RequestError::NoWorker { model: facts.model.clone() },
            Self::Refused(Refusal::Late) | Self::Told(Told::Late | Told::Start) => {
                RequestError::QueueTimeout { waited_ms: waited.as_millis() as u64 }
            }
        }
    }
}

/// When the queue will have room again, as far as it can say.
fn retry_after_ms(queue: &Queue, pool: &Pool) -> u32 {
    let predicted = queue.load(pool).predicted_wait_ms;
    if predicted.is_nan() { RETRY_AFTER_MS } else { (predicted as u32).clamp(RETRY_AFTER_MS, MAX_RETRY_AFTER_MS) }
}

fn ms(duration: Duration) -> f32 {
    duration.as_secs_f32() * 1000.0
}

/// Whether a request takes a place in an engine.
fn takes_room(endpoint: Endpoint) -> bool {
    endpoint != Endpoint::CountTokens
}

/// One request that waits. Dropped, it is gone.
struct Waiting<'a> {
    queue: &'a Queue,
    pool: &'a Pool,
    ticket: Option<Ticket>,
    came: Instant,
    heard: Option<Heard>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            count_shed("left");
            self.queue.go(ticket, self.pool, 0);
            if let Some(heard) = self.heard.take() {
                heard.tell_waited(ms(self.came.elapsed()), false, true);
            }
        }
    }
}

impl Place {
    fn new(
        queue: &Arc<Queue>,
        pool: Arc<Pool>,
        ticket: Ticket,
        facts: &RequestFacts,
        waited: Duration,
        heard: Option<Arc<Heard>>,
    ) -> Self {
        pool.running.fetch_add(1, Relaxed);
        let is_stream = facts.flags & flags::STREAM != 0;
        if !is_stream {
            // An answer that comes as a whole does not tell when its prompt is computed.
            queue.prefilled(ticket);
        }
        Self {
            queue: Arc::clone(queue),
            pool,
            ticket,
            prompt_tokens: facts.prompt.tokens,
            choices: facts.choices.max(1),
            is_stream,
            waited,
            heard,
            output: 0,
            observed: (Instant::now(), 0),
        }
    }

    fn output(&mut self, tokens: u32) {
        let is_first = self.output == 0;
        self.output = self.output.saturating_add(tokens);
        if !self.is_stream {
            return;
        }
        let (last, so_far) = self.observed;
        let fresh = self.output - so_far;
        if is_first {
            self.queue.prefilled(self.ticket);
        } else if fresh < ITL_EVERY * self.choices {
            return;
        }
        let now = Instant::now();
        let (took, now_ms) = (ms(now - last), self.queue.now_ms());
        if is_first {
            self.pool.lately().first_token(took, now_ms);
        } else {
            // Each choice has its own tokens.
            self.pool.lately().tokens(took * self.choices as f32 / fresh as f32, now_ms);
        }
        self.observed = (now, self.output);
    }
}

impl Permit {
    /// Tokens of output came; the first ones tell that the prompt is computed.
    pub(crate) fn output(&self, tokens: u32) {
        if let Some(mut place) = self.place().filter(|_| tokens > 0) {
            place.output(tokens);
        }
    }

    /// The prompt is computed, and no token of output has come yet.
    pub(crate) fn prefilled(&self) {
        if let Some(place) = self.place() {
            place.queue.prefilled(place.ticket);
        }
    }

    /// The admission policy that wants to hear of each of its request's attempts.
    pub(crate) fn heard(&self) -> Option<Arc<Heard>> {
        self.place()?.heard.clone()
    }

    /// How long its request waited.
    pub(crate) fn waited(&self) -> Duration {
        self.place().map_or(Duration::ZERO, |place| place.waited)
    }

    /// Nobody else has it for long: the parts of a request run in one task.
    fn place(&self) -> Option<MutexGuard<'_, Place>> {
        self.0.as_ref().map(|place| place.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.output > 0 {
            self.pool.answered(self.output as f32 / self.choices as f32);
        }
        if let Some(heard) = &self.heard {
            heard.close();
        }
        self.pool.running.fetch_sub(1, Relaxed);
        self.queue.go(self.ticket, &self.pool, self.prompt_tokens.saturating_add(self.output));
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Permit").field(&self.place().map(|place| place.ticket)).finish()
    }
}
