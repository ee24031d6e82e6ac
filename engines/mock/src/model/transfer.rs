//! Transfer: KV on its way between engines, in virtual time.
//!
//! Each worker has a port, with so many bytes per second out and in. Transfers that are under way share the ports max-min fairly:
//! nobody has more than a port gives each of its transfers, except what others cannot use since they are held up at their other
//! end. A transfer has ended a *latency* after its last byte left.
//!
//! Contract: no clock. Times that are told never go back. The state after [`advance`](KvLinks::advance) does not depend on how
//! often it was called before; each transfer ends once, by it or by [`cancel`](KvLinks::cancel).
//!
//! Invariants: all is counted in whole billionths of a byte, so that nothing is lost or made by rounding; rates are whole bytes per second,
//! and their sum over a port is at most its own, unless that is less than a byte per second for each. A transfer ends at the first nanosecond at which all its bytes have arrived.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// A transfer; later ones have greater ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TransferId(u64);

/// What a worker's network gives to transfers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// Bytes per second to others.
    pub egress: u64,
    /// Bytes per second from others.
    pub ingress: u64,
}

impl Port {
    /// As much in as out.
    #[must_use]
    pub fn both(bytes_per_second: u64) -> Self {
        Self { egress: bytes_per_second, ingress: bytes_per_second }
    }
}

/// A transfer that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Which.
    pub transfer: TransferId,
    /// When it did, which may be before the time of the call that tells of it.
    pub at: Duration,
}

/// Ports of workers, and what goes through them.
#[derive(Debug)]
pub struct KvLinks {
    ports: Vec<Port>,
    latency: Duration,
    now: Duration,
    next_id: u64,
    moving: BTreeMap<TransferId, Moving>,
    /// Those whose last byte has left, and when it arrives.
    arriving: BTreeSet<(Duration, TransferId)>,
}

/// A transfer that has bytes to send.
#[derive(Clone, Copy, Debug)]
struct Moving {
    from: usize,
    to: usize,
    /// Billionths of a byte: what a byte per second moves in a nanosecond.
    left: u128,
    /// Bytes per second.
    rate: u64,
}

impl Moving {
    fn drains_in(&self) -> Duration {
        let nanoseconds = self.left.div_ceil(u128::from(self.rate.max(1)));
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }
}

impl KvLinks {
    /// Ports of workers, which are numbered from 0, and what each transfer takes besides its bytes.
    #[must_use]
    pub fn new(ports: Vec<Port>, latency: Duration) -> Self {
        let (moving, arriving) = (BTreeMap::new(), BTreeSet::new());
        Self { ports, latency, now: Duration::ZERO, next_id: 0, moving, arriving }
    }

    /// Another worker's port; returns its number.
    pub fn add(&mut self, port: Port) -> usize {
        self.ports.push(port);
        self.ports.len() - 1
    }

    /// Begins to move `bytes` from one worker to another.
    ///
    /// # Panics
    /// If there is no such worker.
    pub fn begin(&mut self, now: Duration, from: usize, to: usize, bytes: u64) -> TransferId {
        assert!(from.max(to) < self.ports.len(), "{from} to {to} of {} workers", self.ports.len());
        self.move_to(now);
        let id = TransferId(self.next_id);
        self.next_id += 1;
        if bytes == 0 {
            self.arriving.insert((self.now.saturating_add(self.latency), id));
            return id;
        }
        self.moving.insert(id, Moving { from, to, left: u128::from(bytes) * 1_000_000_000, rate: 0 });
        self.share();
        id
    }

    /// When to [`advance`](Self::advance) next: nothing ends before. `None` if nothing is under way.
    #[must_use]
    pub fn next_end(&self) -> Option<Duration> {
        let drained = self.next_drained().map(|at| at.saturating_add(self.latency));
        let arrives = self.arriving.first().map(|&(at, _)| at);
        drained.into_iter().chain(arrives).min()
    }

    /// Appends the transfers that have ended by `now`, in the order of their ends.
    pub fn advance(&mut self, now: Duration, ended: &mut Vec<Ended>) {
        self.move_to(now);
        while let Some(&(at, transfer)) = self.arriving.first()
            && at <= self.now
        {
            self.arriving.pop_first();
            ended.push(Ended { transfer, at });
        }
    }

    /// Ends a transfer without its bytes. Returns whether there was such a one.
    pub fn cancel(&mut self, now: Duration, id: TransferId) -> bool {
        self.move_to(now);
        if self.moving.remove(&id).is_some() {
            self.share();
            return true;
        }
        let arriving = self.arriving.len();
        self.arriving.retain(|&(_, transfer)| transfer != id);
        self.arriving.len() < arriving
    }

    /// Transfers that have not been told to have ended.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.moving.len() + self.arriving.len()
    }

    fn next_drained(&self) -> Option<Duration> {
        self.moving.values().map(Moving::drains_in).min().map(|time| self.now.saturating_add(time))
    }

    /// Moves all bytes that can be moved by `now`.
    fn move_to(&mut self, now: Duration) {
        while let Some(at) = self.next_drained().filter(|&at| at <= now) {
            self.flow(at);
            let (latency, arriving) = (self.latency, &mut self.arriving);
            self.moving.retain(|&id, moving| {
                if moving.left == 0 {
                    arriving.insert((at.saturating_add(latency), id));
                }
                moving.left > 0
            });
            self.share();
        }
        self.flow(now);
    }

    /// Lets all flow at their present rates.
    fn flow(&mut self, until: Duration) {
        let nanoseconds = until.saturating_sub(self.now).as_nanos();
        for moving in self.moving.values_mut() {
            moving.left = moving.left.saturating_sub(u128::from(moving.rate) * nanoseconds);
        }
        self.now = self.now.max(until);
    }

    /// Shares the ports anew: again and again, the port that gives its transfers the least settles what those have.
    fn share(&mut self) {
        // Egress of all ports, then their ingress: what is left of each, and among how many.
        let count = self.ports.len();
        let rates = self.ports.iter().map(|port| port.egress).chain(self.ports.iter().map(|port| port.ingress));
        let mut sides: Vec<(u64, u64)> = rates.map(|rate| (rate, 0)).collect();
        for moving in self.moving.values() {
            sides[moving.from].1 += 1;
            sides[count + moving.to].1 += 1;
        }
        let mut open: Vec<_> = self.moving.values_mut().collect();
        while let Some((tightest, share)) = least(&sides) {
            open.retain_mut(|moving| {
                let (out, into) = (moving.from, count + moving.to);
                if out != tightest && into != tightest {
                    return true;
                }
                // Of less than a byte per second for each there would be no end.
                moving.rate = share.max(1);
                for side in [out, into] {
                    sides[side].0 = sides[side].0.saturating_sub(share);
                    sides[side].1 -= 1;
                }
                false
            });
        }
    }
}

/// The side that gives each of its transfers the least, and how much.
fn least(sides: &[(u64, u64)]) -> Option<(usize, u64)> {
    let shares = sides.iter().enumerate().filter(|(_, (_, among))| *among > 0);
    shares.map(|(side, &(left, among))| (side, left / among)).min_by_key(|&(_, share)| share)
}

#[cfg(test)]
mod tests;
