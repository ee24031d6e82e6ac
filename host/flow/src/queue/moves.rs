//! One request's moves: into the queue and out of it, to a place among those that run, and away. Every sum and every order follows here.

use super::{
    Flow, Ticket,
    slots::{NONE, Request, Stage},
};

impl Flow {
    /// One that does not run is gone.
    pub(super) fn leave(&mut self, ticket: Ticket) {
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

    pub(super) fn forget(&mut self, slot: u32) {
        let &Request { tenant, pool, .. } = self.slots.at(slot);
        self.slots.remove(slot);
        self.shares.release(tenant);
        self.refresh(pool);
    }

    pub(super) fn run(&mut self, slot: u32, now_ms: u64) {
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

    pub(super) fn queue(&mut self, slot: u32) {
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

    pub(super) fn unqueue(&mut self, slot: u32) {
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
