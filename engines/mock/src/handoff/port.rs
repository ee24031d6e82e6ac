//! Port: one direction of an engine's network, in real time.
//!
//! Each engine knows its own ports only, so that a fetch takes as long as the slower of its two ends alone would make it.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use crate::model::{KvLinks, Port as Rates, TransferId};

/// A port, and what goes through it.
#[derive(Debug)]
pub(super) struct Port {
    start: Instant,
    links: Mutex<KvLinks>,
    /// Something has ended, and left its share to the others.
    freed: Notify,
}

impl Port {
    pub(super) fn new(bytes_per_second: f64, latency: Duration) -> Self {
        // The other end is someone's else.
        let ports = vec![Rates { egress: bytes_per_second as u64, ingress: 1 }, Rates { egress: 1, ingress: u64::MAX }];
        Self { start: Instant::now(), links: Mutex::new(KvLinks::new(ports, latency)), freed: Notify::new() }
    }

    /// Moves bytes.
    ///
    /// # Cancel safety
    /// Dropping the future gives up its share.
    pub(super) async fn transfer(&self, bytes: u64) {
        let id = self.links().begin(self.start.elapsed(), 0, 1, bytes);
        let _moving = Moving { port: self, id };
        loop {
            let freed = self.freed.notified();
            let Some(end) = self.end(id) else { return };
            tokio::select! {
                () = sleep_until(self.start + end) => {}
                () = freed => {}
            }
        }
    }

    /// When to look again at one; `None` when it has ended.
    fn end(&self, id: TransferId) -> Option<Duration> {
        let mut links = self.links();
        let mut ended = Vec::new();
        links.advance(self.start.elapsed(), &mut ended);
        if !ended.is_empty() {
            self.freed.notify_waiters();
        }
        links.next_end().filter(|_| links.is_under_way(id))
    }

    fn links(&self) -> MutexGuard<'_, KvLinks> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Moving<'a> {
    port: &'a Port,
    id: TransferId,
}

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        if self.port.links().cancel(self.port.start.elapsed(), self.id) {
            self.port.freed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn transfers_share_it_and_end_no_sooner_than_they_can() {
        let port = Port::new(1000.0, Duration::from_millis(1));
        let begun = Instant::now();
        let at = async |bytes| {
            port.transfer(bytes).await;
            begun.elapsed().as_millis()
        };
        let (half, all, nothing) = tokio::join!(at(20), at(40), at(0));
        assert!(half >= 41 && all >= 61 && nothing >= 1, "{half} {all} {nothing}");
        assert!(tokio::time::timeout(Duration::from_millis(10), port.transfer(1_000_000)).await.is_err());
        assert_eq!(port.links().under_way(), 0, "who leaves takes no more of it");
    }
}
