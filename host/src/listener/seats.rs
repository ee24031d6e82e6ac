//! How many connections each client's address has, where that is bounded.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

/// The count of each client's connections.
#[derive(Clone)]
pub(super) struct Seats {
    most: u32,
    taken: Arc<Mutex<HashMap<IpAddr, u32>>>,
}

/// One connection's place; dropping it gives it back.
pub(super) struct Seat {
    from: Option<(Seats, IpAddr)>,
}

impl Seats {
    /// `most` of 0: no bound, nothing is counted.
    pub(super) fn new(most: u32) -> Self {
        Self { most, taken: Arc::default() }
    }

    pub(super) fn take(&self, client: IpAddr) -> Option<Seat> {
        if self.most == 0 {
            return Some(Seat { from: None });
        }
        let client = client.to_canonical();
        let mut all = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = all.entry(client).or_default();
        if *taken == self.most {
            return None;
        }
        *taken += 1;
        Some(Seat { from: Some((self.clone(), client)) })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let Some((seats, client)) = self.from.take() else { return };
        let mut all = seats.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(taken) = all.get_mut(&client) {
            *taken -= 1;
            if *taken == 0 {
                all.remove(&client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_has_as_many_seats_as_there_may_be_and_gives_them_back() {
        let (seats, one, mapped) = (Seats::new(2), "10.0.0.1".parse().unwrap(), "::ffff:10.0.0.1".parse().unwrap());
        let (first, _second) = (seats.take(one).unwrap(), seats.take(mapped).unwrap());
        assert!(seats.take(one).is_none() && seats.take("10.0.0.2".parse().unwrap()).is_some());
        drop(first);
        assert!(seats.take(one).is_some());
        assert_eq!(seats.taken.lock().unwrap().len(), 1, "what nobody holds is forgotten");
        assert!((0..9).all(|_| Seats::new(0).take(one).is_some()));
    }
}
