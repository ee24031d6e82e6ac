//! The queue of one host: bounded in requests and in tokens, in front of pools with room for so much at once.
//!
//! **Order.** In each pool for itself, since work of one takes nothing from another: strict tiers; in a tier classes, and in a
//! class tenants, share by weight, in tokens of work; a tenant's own requests go by priority, then by the earliest deadline, then
//! as they came. Shares are kept by start-time fair queueing ([`shares`]), chosen over
//! - deficit round-robin, which is O(1), but serves a newcomer after a whole round, and a round of long prompts is seconds;
//! - weighted fair queueing by finish tags, which needs to know beforehand what a request will be, and lets a tenant gain by saying less;
//! - stride or lottery scheduling over requests, which counts a prompt of ten tokens like one of a hundred thousand.
//!
//! A request is charged when it starts, also if it never waited, with what it is expected to be, and settled when it ends with
//! what it was: what a client claims of its request changes when it is charged, not how much. Who was away brings
//! no credit, and finds nobody before it for that. Between two classes of a tier, or tenants of a class, with requests waiting all the
//! time, work started per weight differs by no more than one's and the other's largest request per weight.
//!
//! **Room.** Only the request that is next in its pool may start. If the pool's room in tokens is too small for it, the pool
//! waits until it fits, so that small ones do not pass it for ever; that lasts as long as prompts that are being
//! computed take, since what decodes counts as a request only.
//!
//! **Bounds** hold over all pools. When the queue is full, an arrival takes the places of requests with less claim, who are told
//! by [`Action::Refuse`]: of any later tier; in its own tier of whoever has most of the queue for its weight (the pool, in it the
//! class, in that the tenant, and the next one where a tenant's are not enough), as long as that keeps no less than the arrival's
//! own then has; of its own tenant, those that would be served after it. So neither a pool nor a tenant that floods the queue gets
//! others refused, and two that displace each other come to an end: whoever had less has no more than the other then.
//!
//! **Cost.** Nothing depends on how many wait but by a logarithm, and on how many yield to one arrival, each of which came once;
//! what is waiting, running, or lately gone takes memory.

mod audit;
mod pool;
mod shares;
mod slots;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};

use dynamo_host_core::{Admitted, admission::TIERS, id};

pub use self::pool::{PoolLoad, Room};
use self::{
    pool::Pool,
    shares::{Shares, Standing},
    slots::{NONE, Request, Slots, Stage},
};

/// One request's place, from its arrival to its end. Never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket {
    number: u64,
    slot: u32,
}

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
    /// When it must have been started, in milliseconds of the host's clock; or sooner, if it was admitted for less.
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
    /// The queue is full, and another with a better claim has taken its place.
    Refuse(Ticket),
}

/// The queue and what runs.
#[derive(Debug)]
pub struct Flow {
    bounds: Bounds,
    slots: Slots,
    shares: Shares,
    pools: Vec<Option<Pool>>,
    pool_places: HashMap<u64, u32>,
    /// Pools whose next request may start.
    ready: BTreeSet<u32>,
    /// Waiting requests by deadline.
    deadlines: BTreeSet<(u64, u32)>,
    /// Requests that have lost their places, and do not know.
    displaced: BTreeSet<Ticket>,
    waiting: u32,
    waiting_tokens: u64,
    /// What waits in each tier: requests and tokens.
    tiers: [(u32, u64); TIERS as usize],
    running: u32,
}

impl Flow {
    /// An empty one, with pools that have no workers.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            slots: Slots::default(),
            shares: Shares::default(),
            pools: Vec::new(),
            pool_places: HashMap::new(),
            ready: BTreeSet::new(),
            deadlines: BTreeSet::new(),
            displaced: BTreeSet::new(),
            waiting: 0,
            waiting_tokens: 0,
            tiers: [(0, 0); TIERS as usize],
            running: 0,
        }
    }

    /// Bounds that hold for whoever arrives from now on.
    pub fn set_bounds(&mut self, bounds: Bounds) {
        self.bounds = bounds;
    }

    /// What a pool can run from now on. What runs beyond it goes on. A pool without workers is forgotten when it is empty.
    pub fn set_room(&mut self, pool: u64, room: Room) {
        let place = self.pool_place(pool);
        self.at_mut(place).room = room;
        self.refresh(place);
    }

    /// A request comes: it runs at once if there is room and nobody waits before it. If it has to wait, [`select`](Self::select)
    /// may find something to do at once.
    ///
    /// # Errors
    /// Why it cannot wait.
    pub fn arrive(&mut self, demand: Demand, now_ms: u64) -> Result<Arrival, Refusal> {
        let Demand { pool, tenant, admitted, prompt_tokens, work, deadline_ms } = demand;
        let deadline_ms =
            admitted.deadline_ms.map_or(deadline_ms, |within| deadline_ms.min(now_ms.saturating_add(within.into())));
        if deadline_ms <= now_ms {
            return Err(Refusal::Late);
        }
        let standing = standing(&admitted, tenant);
        let place = self.pool_place(pool);
        let ticket = self.slots.ticket();
        let request = Request {
            ticket,
            stage: Stage::Waiting,
            pool: place,
            tenant: self.shares.tenant(self.at(place).root, &standing),
            tier: standing.tier,
            prompt_tokens,
            work,
            part: self.part_of(1, prompt_tokens.into()),
            rank: [sooner_first(admitted.priority), deadline_ms, ticket.number],
            deadline_ms,
            since_ms: now_ms,
            older: NONE,
            newer: NONE,
        };
        let pool = self.at(place);
        if pool.queued == 0 && pool.has_room(prompt_tokens) {
            self.slots.put(request);
            self.shares.start(request.tenant, ticket.number, work);
            self.run(ticket.slot, now_ms);
            return Ok(Arrival::Started(ticket));
        }
        match self.yielding(&request) {
            Ok(yielding) => {
                self.slots.put(request);
                self.queue(ticket.slot);
                self.make_way(yielding);
                Ok(Arrival::Queued(ticket))
            }
            Err(refusal) => {
                self.shares.release(request.tenant);
                self.refresh(place);
                Err(refusal)
            }
        }
    }

    /// What is to be done now, the most urgent first; `None`: nothing.
    #[must_use]
    pub fn select(&self, now_ms: u64) -> Option<Action> {
        if let Some(&ticket) = self.displaced.first() {
            return Some(Action::Refuse(ticket));
        }
        if let Some(&(deadline_ms, slot)) = self.deadlines.first()
            && deadline_ms <= now_ms
        {
            return Some(Action::Expire(self.slots.at(slot).ticket));
        }
        let pool = *self.ready.first()?;
        self.next(pool).map(|request| Action::Start(request.ticket))
    }

    /// Does what was selected, at that time.
    pub fn apply(&mut self, action: Action, now_ms: u64) {
        match action {
            Action::Start(ticket) => {
                if let Some(&Request { stage: Stage::Waiting, tenant, work, .. }) = self.slots.get(ticket) {
                    self.shares.start(tenant, ticket.number, work);
                    self.unqueue(ticket.slot);
                    self.run(ticket.slot, now_ms);
                }
            }
            Action::Expire(ticket) | Action::Refuse(ticket) => self.leave(ticket),
        }
    }

    /// When there may be something to do though nothing happens, in milliseconds of the host's clock.
    #[must_use]
    pub fn wake_at(&self) -> Option<u64> {
        self.deadlines.first().map(|&(deadline_ms, _)| deadline_ms)
    }

    /// The prompt of one that runs has been computed.
    pub fn prefilled(&mut self, ticket: Ticket) {
        if let Some(&Request { stage: Stage::Prefilling, pool, prompt_tokens, .. }) = self.slots.get(ticket) {
            self.slots.at_mut(ticket.slot).stage = Stage::Running;
            self.at_mut(pool).prefill_tokens -= u64::from(prompt_tokens);
            self.refresh(pool);
        }
    }

    /// One that runs has ended, and was this many tokens of work; or one that waits is gone.
    pub fn finish(&mut self, ticket: Ticket, work: u32, now_ms: u64) {
        self.prefilled(ticket);
        let Some(&request) = self.slots.get(ticket) else { return };
        if request.stage != Stage::Running {
            return self.leave(ticket);
        }
        let pool = self.at_mut(request.pool);
        pool.running -= 1;
        pool.running_work -= u64::from(request.work);
        pool.ended(request.work, now_ms.saturating_sub(request.since_ms));
        self.running -= 1;
        self.shares.end(request.tenant, ticket.number, request.work, work);
        self.forget(ticket.slot);
    }

    /// A pool's part.
    #[must_use]
    pub fn pool(&self, key: u64, now_ms: u64) -> PoolLoad {
        let Some(pool) = self.pool_places.get(&key).map(|&place| self.at(place)) else {
            return PoolLoad { free: Some(0), predicted_wait_ms: f32::NAN, ..PoolLoad::default() };
        };
        let oldest = (pool.oldest != NONE).then(|| now_ms.saturating_sub(self.slots.at(pool.oldest).since_ms));
        PoolLoad {
            running: pool.running,
            free: pool.free(),
            queued: pool.queued,
            queued_tokens: pool.queued_tokens,
            oldest_age_ms: oldest.unwrap_or(0).try_into().unwrap_or(u32::MAX),
            predicted_wait_ms: pool.wait_ms(pool.queued_work as f64),
        }
    }

    /// A pool's part, with the wait of a request of this standing.
    #[must_use]
    pub fn pool_for(&self, key: u64, tenant: u64, admitted: &Admitted, now_ms: u64) -> PoolLoad {
        PoolLoad { predicted_wait_ms: self.predicted_wait_ms(key, tenant, admitted), ..self.pool(key, now_ms) }
    }

    /// What a request of this standing would wait in a pool, in milliseconds; NaN if that cannot be said yet.
    #[must_use]
    pub fn predicted_wait_ms(&self, pool: u64, tenant: u64, admitted: &Admitted) -> f32 {
        self.pool_places.get(&pool).map_or(f32::NAN, |&place| {
            let pool = self.at(place);
            pool.wait_ms(self.shares.before(pool.root, &standing(admitted, tenant)))
        })
    }

    /// Requests that wait.
    #[must_use]
    pub fn waiting(&self) -> u32 {
        self.waiting
    }

    /// Tokens of their prompts.
    #[must_use]
    pub fn waiting_tokens(&self) -> u64 {
        self.waiting_tokens
    }

    /// Requests that run.
    #[must_use]
    pub fn running(&self) -> u32 {
        self.running
    }

    fn at(&self, place: u32) -> &Pool {
        self.pools[place as usize].as_ref().expect("a pool is there while its requests are")
    }

    fn at_mut(&mut self, place: u32) -> &mut Pool {
        self.pools[place as usize].as_mut().expect("a pool is there while its requests are")
    }

    fn pool_place(&mut self, key: u64) -> u32 {
        if let Some(&place) = self.pool_places.get(&key) {
            return place;
        }
        let place = self.pools.iter().position(Option::is_none).unwrap_or_else(|| {
            self.pools.push(None);
            self.pools.len() - 1
        });
        self.pools[place] = Some(Pool::new(key, self.shares.add_pool()));
        self.pool_places.insert(key, place as u32);
        place as u32
    }

    /// What requests take of the queue: of its places and of its tokens.
    fn part_of(&self, requests: u32, tokens: u64) -> u64 {
        let Bounds { max_requests, max_tokens } = self.bounds;
        // More than all of it cannot wait anyway, and sums of this cannot overflow.
        let of_tokens = (u128::from(tokens) << 32) / u128::from(max_tokens.max(1));
        u64::from(requests) * ((1 << 32) / u64::from(max_requests.max(1))) + of_tokens.min(1 << 32) as u64
    }

    /// The request that is next in a pool.
    fn next(&self, pool: u32) -> Option<&Request> {
        self.shares.next(self.at(pool).root).map(|slot| self.slots.at(slot))
    }

    /// Finds out anew whether a pool's next request may start, and whether there is a pool at all.
    fn refresh(&mut self, place: u32) {
        let pool = self.at(place);
        let (key, root, is_gone) = (pool.key, pool.root, pool.is_gone());
        if self.next(place).is_some_and(|next| pool.has_room(next.prompt_tokens)) {
            self.ready.insert(place);
        } else {
            self.ready.remove(&place);
        }
        if is_gone {
            self.pool_places.remove(&key);
            self.shares.remove_pool(root);
            self.pools[place as usize] = None;
        }
    }

    /// Requests of an arrival's own tier that have to make room for it, besides all that there is of later tiers.
    fn yielding(&self, arrival: &Request) -> Result<Vec<u32>, Refusal> {
        let Bounds { max_requests, max_tokens } = self.bounds;
        let later = self.tiers[arrival.tier as usize + 1..].iter();
        let (later_requests, later_tokens) = later.fold((0, 0), |sum, tier| (sum.0 + tier.0, sum.1 + tier.1));
        let requests = (self.waiting - later_requests + 1).saturating_sub(max_requests);
        let tokens = (self.waiting_tokens - later_tokens + u64::from(arrival.prompt_tokens)).saturating_sub(max_tokens);
        if (requests, tokens) == (0, 0) {
            return Ok(Vec::new());
        }
        let refusal = if requests > 0 { Refusal::Requests { max: max_requests } } else { Refusal::Tokens { max: max_tokens } };
        // Where pools or classes are even, one's own may still have a tenant with more than its share.
        (0..=2).find_map(|within| self.enough(arrival, within, requests, tokens)).ok_or(refusal)
    }

    /// Requests that yield so many places and tokens to an arrival, if there are enough.
    fn enough(&self, arrival: &Request, within: usize, mut requests: u32, mut tokens: u64) -> Option<Vec<u32>> {
        let mut slots = Vec::new();
        let least_part = self.part_of(requests, tokens);
        let mut yielding = self.shares.yielding(arrival.tenant, &arrival.item(), within, least_part)?;
        while requests > 0 || tokens > 0 {
            let slot = yielding.next(|slot| self.slots.at(slot).part)?;
            requests = requests.saturating_sub(1);
            tokens = tokens.saturating_sub(self.slots.at(slot).prompt_tokens.into());
            slots.push(slot);
        }
        Some(slots)
    }

    /// Takes these requests out of the queue, and of later tiers what is over the bounds then.
    fn make_way(&mut self, yielding: Vec<u32>) {
        yielding.into_iter().for_each(|slot| self.displace(slot));
        while self.waiting > self.bounds.max_requests || self.waiting_tokens > self.bounds.max_tokens {
            let worst = self.shares.worst().expect("what is over the bounds waits");
            self.displace(worst);
        }
    }

    fn displace(&mut self, slot: u32) {
        let (tenant, pool) = (self.slots.at(slot).tenant, self.slots.at(slot).pool);
        self.unqueue(slot);
        self.shares.release(tenant);
        self.refresh(pool);
        let request = self.slots.at_mut(slot);
        request.stage = Stage::Displaced;
        self.displaced.insert(request.ticket);
    }

    /// One that does not run is gone.
    fn leave(&mut self, ticket: Ticket) {
        match self.slots.get(ticket).map(|request| request.stage) {
            Some(Stage::Waiting) => {
                self.unqueue(ticket.slot);
                self.forget(ticket.slot);
            }
            Some(Stage::Displaced) => {
                self.displaced.remove(&ticket);
                self.slots.remove(ticket.slot);
            }
            _ => (),
        }
    }

    fn forget(&mut self, slot: u32) {
        let &Request { tenant, pool, .. } = self.slots.at(slot);
        self.slots.remove(slot);
        self.shares.release(tenant);
        self.refresh(pool);
    }

    fn run(&mut self, slot: u32, now_ms: u64) {
        let request = *self.slots.at(slot);
        let pool = self.at_mut(request.pool);
        pool.running += 1;
        pool.running_work += u64::from(request.work);
        pool.prefill_tokens += u64::from(request.prompt_tokens);
        self.running += 1;
        let running = self.slots.at_mut(slot);
        (running.stage, running.since_ms) = (Stage::Prefilling, now_ms);
        self.refresh(request.pool);
    }

    fn queue(&mut self, slot: u32) {
        let request = *self.slots.at(slot);
        self.shares.push(request.tenant, &request.item());
        self.deadlines.insert((request.deadline_ms, slot));
        let pool = self.at_mut(request.pool);
        let older = std::mem::replace(&mut pool.newest, slot);
        if older == NONE {
            pool.oldest = slot;
        }
        pool.queued += 1;
        pool.queued_work += u64::from(request.work);
        pool.queued_tokens += u64::from(request.prompt_tokens);
        self.slots.at_mut(slot).older = older;
        if older != NONE {
            self.slots.at_mut(older).newer = slot;
        }
        self.waiting += 1;
        self.waiting_tokens += u64::from(request.prompt_tokens);
        let tier = &mut self.tiers[request.tier as usize];
        *tier = (tier.0 + 1, tier.1 + u64::from(request.prompt_tokens));
        self.refresh(request.pool);
    }

    fn unqueue(&mut self, slot: u32) {
        let request = *self.slots.at(slot);
        self.shares.pop(request.tenant, &request.item());
        self.deadlines.remove(&(request.deadline_ms, slot));
        let Request { older, newer, .. } = request;
        let pool = self.at_mut(request.pool);
        if older == NONE {
            pool.oldest = newer;
        }
        if newer == NONE {
            pool.newest = older;
        }
        pool.queued -= 1;
        pool.queued_work -= u64::from(request.work);
        pool.queued_tokens -= u64::from(request.prompt_tokens);
        if older != NONE {
            self.slots.at_mut(older).newer = newer;
        }
        if newer != NONE {
            self.slots.at_mut(newer).older = older;
        }
        self.waiting -= 1;
        self.waiting_tokens -= u64::from(request.prompt_tokens);
        let tier = &mut self.tiers[request.tier as usize];
        *tier = (tier.0 - 1, tier.1 - u64::from(request.prompt_tokens));
    }
}

fn standing(admitted: &Admitted, tenant: u64) -> Standing {
    Standing {
        tier: admitted.tier.min(TIERS - 1),
        class: admitted.class.as_deref().map_or(0, |class| id::key(class.as_bytes())),
        class_weight: admitted.class_weight,
        tenant,
        tenant_weight: admitted.tenant_weight,
    }
}

/// A rank by which higher priorities come first; what is no number is no priority.
fn sooner_first(priority: f32) -> u64 {
    // Without the sign of 0; and in the order of their bits, as IEEE 754 has it.
    let bits = if priority.is_nan() { 0.0f32 } else { priority + 0.0 }.to_bits();
    let ascending = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    u64::from(!ascending)
}
