//! The queue of one host: bounded in requests and in tokens, in front of pools with room for so much at once.

use std::collections::{BTreeMap, HashMap};

use dynamo_host_core::Admitted;

/// One request's place, from its arrival to its end. Never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

/// What a request asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Demand {
    /// Key of the pool that shall serve it.
    pub pool: u64,
    /// Key of its tenant; 0 for nobody's.
    pub tenant: u64,
    /// How it was let in.
    pub admitted: Admitted,
    /// Tokens of its prompt: what it takes of a queue's and of a pool's bound in tokens.
    pub prompt_tokens: u32,
    /// Tokens of work that it is expected to be, prompt and output: what fair shares are counted in.
    pub work: u32,
    /// When it must have been started, in milliseconds of the host's clock.
    pub deadline_ms: u64,
}

/// How much the queue takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Requests that wait at most.
    pub max_requests: u32,
    /// Tokens of prompts that wait at most.
    pub max_tokens: u64,
}

/// What a pool can run at once. `None`: nothing limits it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Workers that accept requests. Without any nothing starts.
    pub workers: u32,
    /// Requests, over all workers.
    pub requests: Option<u32>,
    /// Tokens of prompts that are not computed yet, over all workers. A request that is larger starts when none other is
    /// waiting for its prefill.
    pub tokens: Option<u32>,
}

/// What became of a request that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It runs: there was room, and nobody before it.
    Started(Ticket),
    /// It waits.
    Queued(Ticket),
}

/// Why a request cannot wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Too many requests wait.
    #[error("{max} requests wait already")]
    Requests {
        /// The bound.
        max: u32,
    },
    /// Too many tokens wait.
    #[error("the prompts of those that wait already, with this one, have more than {max} tokens")]
    Tokens {
        /// The bound.
        max: u64,
    },
    /// Its deadline is over.
    #[error("its deadline is over")]
    Late,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Let it run.
    Start(Ticket),
    /// Its deadline is over.
    Expire(Ticket),
}

/// A pool's part of the flow.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PoolLoad {
    /// Requests that run.
    pub running: u32,
    /// Requests that could start at once; `None`: nothing limits them.
    pub free: Option<u32>,
    /// Requests that wait.
    pub queued: u32,
    /// Tokens of their prompts.
    pub queued_tokens: u64,
    /// Age of the oldest in milliseconds; 0 if none waits.
    pub oldest_age_ms: u32,
    /// What a request of no special standing would wait, in milliseconds; NaN if that cannot be said yet.
    pub predicted_wait_ms: f32,
}

/// The queue and what runs.
#[derive(Debug)]
pub struct Flow {
    bounds: Bounds,
    next: u64,
    pools: HashMap<u64, Pool>,
    waiting: BTreeMap<Ticket, (Demand, u64)>,
    running: HashMap<Ticket, Demand>,
    waiting_tokens: u64,
}

#[derive(Debug, Default)]
struct Pool {
    room: Room,
    running: u32,
    prefill_tokens: u64,
}

impl Flow {
    /// An empty one, with pools that have no workers.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        Self { bounds, next: 0, pools: HashMap::new(), waiting: BTreeMap::new(), running: HashMap::new(), waiting_tokens: 0 }
    }

    /// Bounds that hold for whoever arrives from now on.
    pub fn set_bounds(&mut self, bounds: Bounds) {
        self.bounds = bounds;
    }

    /// What a pool can run from now on. What runs beyond it goes on.
    pub fn set_room(&mut self, pool: u64, room: Room) {
        self.pools.entry(pool).or_default().room = room;
    }

    /// A request comes: it runs at once if there is room and nobody waits before it.
    ///
    /// # Errors
    /// Why it cannot wait.
    pub fn arrive(&mut self, demand: Demand, now_ms: u64) -> Result<Arrival, Refusal> {
        if demand.deadline_ms <= now_ms {
            return Err(Refusal::Late);
        }
        let ticket = Ticket(self.next);
        let is_first = !self.waiting.values().any(|(waiting, _)| waiting.pool == demand.pool);
        if is_first && self.has_room(&demand) {
            self.next += 1;
            self.start(ticket, demand);
            return Ok(Arrival::Started(ticket));
        }
        let Bounds { max_requests, max_tokens } = self.bounds;
        if self.waiting.len() >= max_requests as usize {
            return Err(Refusal::Requests { max: max_requests });
        }
        if self.waiting_tokens + u64::from(demand.prompt_tokens) > max_tokens {
            return Err(Refusal::Tokens { max: max_tokens });
        }
        self.next += 1;
        self.waiting_tokens += u64::from(demand.prompt_tokens);
        self.waiting.insert(ticket, (demand, now_ms));
        Ok(Arrival::Queued(ticket))
    }

    /// What is to be done now, the most urgent first; `None`: nothing.
    #[must_use]
    pub fn select(&self, now_ms: u64) -> Option<Action> {
        let expired = self.waiting.iter().find(|(_, (demand, _))| demand.deadline_ms <= now_ms);
        let startable = || self.waiting.iter().find(|(_, (demand, _))| self.has_room(demand));
        expired.map(|(&ticket, _)| Action::Expire(ticket)).or_else(|| startable().map(|(&ticket, _)| Action::Start(ticket)))
    }

    /// Does what was selected.
    pub fn apply(&mut self, action: Action) {
        match action {
            Action::Start(ticket) => {
                if let Some(demand) = self.unqueue(ticket) {
                    self.start(ticket, demand);
                }
            }
            Action::Expire(ticket) => drop(self.unqueue(ticket)),
        }
    }

    /// When there may be something to do though nothing happens, in milliseconds of the host's clock.
    #[must_use]
    pub fn wake_at(&self) -> Option<u64> {
        self.waiting.values().map(|(demand, _)| demand.deadline_ms).min()
    }

    /// The prompt of one that runs has been computed.
    pub fn prefilled(&mut self, ticket: Ticket) {
        if let Some(demand) = self.running.get_mut(&ticket)
            && let Some(pool) = self.pools.get_mut(&demand.pool)
        {
            pool.prefill_tokens -= u64::from(std::mem::take(&mut demand.prompt_tokens));
        }
    }

    /// One that runs has ended, and was this many tokens of work; or one that waits is gone.
    pub fn finish(&mut self, ticket: Ticket, _work: u32, _now_ms: u64) {
        self.prefilled(ticket);
        if let Some(demand) = self.running.remove(&ticket) {
            self.pools.entry(demand.pool).or_default().running -= 1;
        }
        self.unqueue(ticket);
    }

    /// A pool's part.
    #[must_use]
    pub fn pool(&self, key: u64, now_ms: u64) -> PoolLoad {
        let waiting = self.waiting.values().filter(|(demand, _)| demand.pool == key);
        let pool = self.pools.get(&key);
        let running = pool.map_or(0, |pool| pool.running);
        let oldest = waiting.clone().map(|(_, since)| now_ms.saturating_sub(*since)).max();
        PoolLoad {
            running,
            free: pool.and_then(|pool| Some(pool.room.requests?.saturating_sub(running))),
            queued: waiting.clone().count() as u32,
            queued_tokens: waiting.map(|(demand, _)| u64::from(demand.prompt_tokens)).sum(),
            oldest_age_ms: oldest.unwrap_or(0) as u32,
            predicted_wait_ms: f32::NAN,
        }
    }

    fn has_room(&self, demand: &Demand) -> bool {
        self.pools.get(&demand.pool).is_some_and(|pool| {
            let tokens = pool.prefill_tokens + u64::from(demand.prompt_tokens);
            pool.room.workers > 0
                && pool.room.requests.is_none_or(|max| pool.running < max)
                && (pool.prefill_tokens == 0 || pool.room.tokens.is_none_or(|max| tokens <= u64::from(max)))
        })
    }

    fn start(&mut self, ticket: Ticket, demand: Demand) {
        let pool = self.pools.entry(demand.pool).or_default();
        pool.running += 1;
        pool.prefill_tokens += u64::from(demand.prompt_tokens);
        self.running.insert(ticket, demand);
    }

    fn unqueue(&mut self, ticket: Ticket) -> Option<Demand> {
        let (demand, _) = self.waiting.remove(&ticket)?;
        self.waiting_tokens -= u64::from(demand.prompt_tokens);
        Some(demand)
    }
}
