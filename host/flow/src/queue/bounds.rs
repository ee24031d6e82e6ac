//! Bounds over all pools: who makes way for whom when the queue is full.

use super::{
    Flow, Refusal,
    slots::{Request, Stage},
};

/// How much the queue takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Requests that wait at most.
    pub max_requests: u32,
    /// Tokens of prompts that wait at most.
    pub max_tokens: u64,
}

impl Flow {
    /// What requests take of the queue: of its places and of its tokens.
    pub(super) fn part_of(&self, requests: u32, tokens: u64) -> u64 {
        let Bounds { max_requests, max_tokens } = self.bounds;
        // More than all of it cannot wait anyway, and sums of this cannot overflow.
        let of_tokens = (u128::from(tokens) << 32) / u128::from(max_tokens.max(1));
        u64::from(requests) * ((1 << 32) / u64::from(max_requests.max(1))) + of_tokens.min(1 << 32) as u64
    }

    /// Requests of an arrival's own tier that have to make room for it, besides all that there is of later tiers.
    pub(super) fn yielding(&self, arrival: &Request) -> Result<Vec<u32>, Refusal> {
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
    pub(super) fn make_way(&mut self, yielding: Vec<u32>) {
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
}
