//! Lets requests in, and has them wait for their turn: what they hold from then to their end.
//!
//! Contract: a request that finds room never waits. One that does not waits here, where it can still be overtaken, and not
//! inside an engine; for a bounded time, among a bounded number. A client that leaves frees its place at once, whether its
//! request waits or runs. What generates nothing and takes no place in an engine, counting tokens, is let through.

mod meters;
mod pool;
mod queue;
mod recent;
mod room;

use std::{
    fmt,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use dynamo_host_core::{Endpoint, RequestFacts, request::flags};
use dynamo_host_flow::{Refusal, Ticket};

pub(crate) use self::queue::Queue;
use self::{
    meters::{Waits, count_shed},
    pool::Pool,
    queue::{Came, Told},
};
use crate::{error::RequestError, request::Lane, trace};

/// Tokens of a stream after which the time between them is observed once more.
const ITL_EVERY: u32 = 8;
/// When to come back where the queue cannot say how long it will take.
const RETRY_AFTER_MS: u32 = 1000;
/// The latest that is said: what the queue will be like then nobody knows.
const MAX_RETRY_AFTER_MS: u32 = 60_000;

/// One request's place among those that run, over all its attempts. Dropped, another may take it.
pub(crate) struct Permit(Option<Place>);

struct Place {
    queue: Arc<Queue>,
    pool: Arc<Pool>,
    ticket: Ticket,
    prompt_tokens: u32,
    choices: u32,
    is_stream: bool,
    waited: Duration,
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
    facts.slo = settings.slo(facts);
    let admitted = settings.natively(facts);
    facts.tier = admitted.tier;
    facts.class.clone_from(&admitted.class);
    facts.slo = settings.slo(facts);
    let meters = queue.meters.of(&admitted);
    lane.meters.admission.record(begun.elapsed());
    trace::stage("admission", begun);

    let came = Instant::now();
    let arrival = queue.come(&pool, facts, admitted, &settings);
    let passed = came.elapsed();
    lane.meters.queue.record(passed);
    let told = match arrival {
        Came::Started(ticket) => Ok((ticket, Duration::ZERO)),
        Came::Waits(ticket, told) => {
            let waits = meters.waits(&pool.model, facts.prompt.tokens);
            let mut waiting = Waiting { queue, pool: &pool, ticket: Some(ticket), _waits: waits };
            let told = told.await.unwrap_or(Told::Late);
            // From here on it is the permit's, or it has been taken out already.
            waiting.ticket = None;
            let waited = came.elapsed();
            match told {
                Told::Start => Ok((ticket, waited)),
                Told::Late => Err((RequestError::QueueTimeout { waited_ms: waited.as_millis() as u64 }, "timeout")),
                Told::NoWorker => Err((RequestError::NoWorker { model: facts.model.clone() }, "no_worker")),
            }
        }
        Came::Refused(refusal, load) => {
            let retry_after_ms = match load.predicted_wait_ms {
                ms if ms.is_finite() => (ms.max(0.0) as u32).clamp(RETRY_AFTER_MS, MAX_RETRY_AFTER_MS),
                _ => RETRY_AFTER_MS,
            };
            Err(match refusal {
                Refusal::Late => (RequestError::QueueTimeout { waited_ms: 0 }, "late"),
                Refusal::Requests { .. } => (RequestError::QueueFull { refusal, retry_after_ms }, "requests"),
                Refusal::Tokens { .. } => (RequestError::QueueFull { refusal, retry_after_ms }, "tokens"),
            })
        }
    };
    trace::stage("queue", came);
    pool.count(told.is_err(), queue.now_ms());
    meters.wait.record(told.as_ref().map_or_else(|_| came.elapsed(), |(_, waited)| *waited));
    match told {
        Ok((ticket, waited)) => {
            meters.admitted.increment(1);
            Ok(Permit(Some(Place::new(queue, pool, ticket, facts, waited))))
        }
        Err((error, reason)) => {
            meters.shed.increment(1);
            count_shed(reason);
            Err(error)
        }
    }
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
    _waits: Waits,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            count_shed("left");
            self.queue.go(ticket, self.pool, 0);
        }
    }
}

impl Place {
    fn new(queue: &Arc<Queue>, pool: Arc<Pool>, ticket: Ticket, facts: &RequestFacts, waited: Duration) -> Self {
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
        let ms = (now - last).as_secs_f32() * 1000.0;
        match is_first {
            true => self.pool.ttft.observe(ms, self.queue.now_ms()),
            // Each choice has its own tokens.
            false => self.pool.itl.observe(ms * self.choices as f32 / fresh as f32, self.queue.now_ms()),
        }
        self.observed = (now, self.output);
    }
}

impl Permit {
    /// Tokens of output came; the first ones tell that the prompt is computed.
    pub(crate) fn output(&mut self, tokens: u32) {
        if let Some(place) = &mut self.0
            && tokens > 0
        {
            place.output(tokens);
        }
    }

    /// How long its request waited.
    pub(crate) fn waited(&self) -> Duration {
        self.0.as_ref().map_or(Duration::ZERO, |place| place.waited)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.output > 0 {
            self.pool.answered(self.output as f32 / self.choices as f32);
        }
        self.pool.running.fetch_sub(1, Relaxed);
        self.queue.go(self.ticket, &self.pool, self.prompt_tokens.saturating_add(self.output));
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Permit").field(&self.0.as_ref().map(|place| place.ticket)).finish()
    }
}
