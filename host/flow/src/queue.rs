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
mod bounds;
mod load;
mod moves;
mod order;
mod pool;
mod shares;
mod slots;
mod terms;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};

use dynamo_host_core::admission::TIERS;

pub use self::{
    bounds::Bounds,
    pool::{PoolLoad, Room},
    terms::{Action, Arrival, Demand, Refusal, Ticket},
};
use self::{
    order::{sooner_first, standing},
    pool::Pool,
    shares::Shares,
    slots::{NONE, Request, Slots, Stage},
};

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
}
