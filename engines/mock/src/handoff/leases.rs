//! Leases: KV that is kept for somebody, for a while.
//!
//! Contract: each lease ends once: by being fetched, or by its time. Time does not end one that is being fetched; a fetch
//! that breaks off begins the time anew, since another may follow.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use crate::driver::{Courier, Ticket};

/// KV that is kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lease {
    pub(crate) ticket: Ticket,
    /// Tokens of the prompt.
    pub(crate) tokens: u32,
    /// Which prompt.
    pub(crate) digest: u64,
}

/// All of an engine.
#[derive(Debug)]
pub(crate) struct Leases {
    lasts: Duration,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// By the ids that requests are known by elsewhere; with when they end, unless they are being fetched.
    kept: HashMap<String, (Lease, Option<Instant>)>,
    /// When to look at which, in the order of the times.
    ends: VecDeque<(Instant, String)>,
    expired: u64,
}

impl Leases {
    pub(super) fn new(lasts: Duration) -> Self {
        Self { lasts, state: Mutex::default(), changed: Notify::new() }
    }

    pub(super) fn take(&self, now: Instant, request_id: String, lease: Lease) {
        self.put(&mut self.state(), now, request_id, lease);
    }

    /// Somebody begins to fetch. `None` if there is no such lease, or somebody else is at it.
    pub(super) fn begin(&self, request_id: &str) -> Option<Lease> {
        let mut state = self.state();
        let (lease, ends) = state.kept.get_mut(request_id)?;
        ends.take().map(|_| *lease)
    }

    /// A fetch has ended, with all of the KV or before it. Returns what is not needed any more.
    pub(super) fn end(&self, now: Instant, request_id: &str, arrived: bool) -> Option<Ticket> {
        let mut state = self.state();
        let (lease, _) = state.kept.remove(request_id)?;
        if arrived {
            return Some(lease.ticket);
        }
        self.put(&mut state, now, request_id.to_owned(), lease);
        None
    }

    pub(super) fn expired(&self) -> u64 {
        self.state().expired
    }

    fn put(&self, state: &mut State, now: Instant, request_id: String, lease: Lease) {
        let end = now + self.lasts;
        state.kept.insert(request_id.clone(), (lease, Some(end)));
        state.ends.push_back((end, request_id));
        self.changed.notify_one();
    }

    /// Ends what has lasted long enough; returns that, and when to look again.
    fn expire(&self, now: Instant) -> (Vec<Ticket>, Option<Instant>) {
        let mut state = self.state();
        let mut over = Vec::new();
        while let Some((end, request_id)) = state.ends.pop_front() {
            if end > now {
                state.ends.push_front((end, request_id));
                return (over, Some(end));
            }
            // Fetched, being fetched, or kept anew: another entry says when.
            if state.kept.get(&request_id).is_some_and(|(_, ends)| *ends == Some(end)) {
                over.extend(state.kept.remove(&request_id).map(|(lease, _)| lease.ticket));
                state.expired += 1;
            }
        }
        (over, None)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends leases as their time comes.
pub(super) async fn expire(leases: Arc<Leases>, courier: Courier) {
    loop {
        let (over, next) = leases.expire(Instant::now());
        over.into_iter().for_each(|ticket| courier.release(ticket));
        match next {
            Some(at) => sleep_until(at).await,
            None => leases.changed.notified().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LASTS: Duration = Duration::from_secs(30);

    fn lease(ticket: Ticket) -> Lease {
        Lease { ticket, tokens: 1, digest: 0 }
    }

    #[test]
    fn a_lease_ends_by_its_time_or_by_being_fetched() {
        let leases = Leases::new(LASTS);
        let begun = Instant::now();
        leases.take(begun, "a".to_owned(), lease(1));
        leases.take(begun, "b".to_owned(), lease(2));
        assert!(leases.begin("a").is_some() && leases.begin("a").is_none(), "one at a time");
        assert_eq!(leases.end(begun, "a", true), Some(1));
        assert!(leases.begin("a").is_none(), "once");
        assert_eq!(leases.expire(begun + LASTS / 2), (vec![], Some(begun + LASTS)));
        assert_eq!(leases.expire(begun + LASTS), (vec![2], None));
        assert!(leases.begin("b").is_none());
        assert_eq!(leases.expired(), 1);
    }

    #[test]
    fn a_fetch_that_breaks_off_begins_the_time_anew() {
        let leases = Leases::new(LASTS);
        let begun = Instant::now();
        leases.take(begun, "a".to_owned(), lease(1));
        leases.begin("a").unwrap();
        assert_eq!(leases.expire(begun + 2 * LASTS).0, Vec::<Ticket>::new(), "it is being fetched");
        assert_eq!(leases.end(begun + LASTS, "a", false), None);
        assert_eq!(leases.expire(begun + 2 * LASTS - Duration::from_secs(1)).0, Vec::<Ticket>::new());
        assert_eq!(leases.expire(begun + 2 * LASTS), (vec![1], None));
    }
}
