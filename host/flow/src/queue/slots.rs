//! Requests of the flow, in places that are used again.

use super::{
    Ticket,
    shares::{Item, NodeId, Rank},
};

/// No place.
pub(super) const NONE: u32 = u32::MAX;

/// Where a request is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Waiting,
    /// It lost its place in the queue, and nobody was told yet.
    Displaced,
    /// It runs; its prompt is not computed yet.
    Prefilling,
    Running,
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) ticket: Ticket,
    pub(super) stage: Stage,
    pub(super) pool: u32,
    /// Its tenant's node.
    pub(super) tenant: NodeId,
    pub(super) tier: u32,
    pub(super) prompt_tokens: u32,
    pub(super) work: u32,
    /// What it takes of the queue.
    pub(super) part: u64,
    pub(super) rank: Rank,
    pub(super) deadline_ms: u64,
    /// When it came; once it runs, when it started.
    pub(super) since_ms: u64,
    /// The waiting requests of its pool that came before and after it.
    pub(super) older: u32,
    pub(super) newer: u32,
}

impl Request {
    pub(super) fn item(&self) -> Item {
        let Ticket { number, slot } = self.ticket;
        Item { slot, rank: self.rank, number, work: self.work, part: self.part }
    }
}

#[derive(Debug, Default)]
pub(super) struct Slots {
    requests: Vec<Option<Request>>,
    free: Vec<u32>,
    given: u64,
}

impl Slots {
    /// The ticket that the next request gets.
    pub(super) fn ticket(&self) -> Ticket {
        let slot = self.free.last().copied().unwrap_or(self.requests.len() as u32);
        Ticket { number: self.given, slot }
    }

    /// Keeps a request that has this ticket.
    pub(super) fn put(&mut self, request: Request) {
        self.given += 1;
        if self.free.pop().is_none() {
            self.requests.push(None);
        }
        self.requests[request.ticket.slot as usize] = Some(request);
    }

    pub(super) fn get(&self, ticket: Ticket) -> Option<&Request> {
        self.requests.get(ticket.slot as usize)?.as_ref().filter(|request| request.ticket == ticket)
    }

    /// The request at a place that is known to be taken.
    pub(super) fn at(&self, slot: u32) -> &Request {
        self.requests[slot as usize].as_ref().expect("a place in an order is taken")
    }

    pub(super) fn at_mut(&mut self, slot: u32) -> &mut Request {
        self.requests[slot as usize].as_mut().expect("a place in an order is taken")
    }

    pub(super) fn remove(&mut self, slot: u32) {
        self.requests[slot as usize] = None;
        self.free.push(slot);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Request> {
        self.requests.iter().flatten()
    }
}
