//! The books: whether everything that came is somewhere, once.

use super::{Run, SimulationError};
use crate::requests::{Fetching, Leg};

impl Run<'_> {
    /// Whether the sums agree; and now and then, whether all books do.
    pub(super) fn check(&mut self) -> Result<(), SimulationError> {
        self.events += 1;
        let Some(every) = self.options.audit_every else { return Ok(()) };
        let (came, ended) = (self.next as u64, self.tally.ended());
        if ended + self.open != came {
            return self.wrong(format!("{came} came, {ended} ended and {} are open", self.open));
        }
        if self.waiting.len() as u64 + self.on_engines != self.open {
            return self.wrong(format!(
                "{} wait and {} are on engines, and {} are open",
                self.waiting.len(),
                self.on_engines,
                self.open
            ));
        }
        if let Some(service) = &self.service
            && let Err(what) = service.check(self.open)
        {
            return self.wrong(what);
        }
        if self.events.is_multiple_of(every.max(1)) {
            return self.audit();
        }
        Ok(())
    }

    fn wrong(&self, what: String) -> Result<(), SimulationError> {
        Err(SimulationError::Books { events: self.events, at: self.now, what })
    }

    /// Whether all books agree, looked at in full.
    fn audit(&self) -> Result<(), SimulationError> {
        let mut kept = 0;
        for (number, engine) in self.engines.iter().enumerate() {
            let has = engine.model.snapshot();
            kept += engine.kept.len();
            if engine.requests.len() as u32 != has.running + has.waiting {
                return self.wrong(format!(
                    "engine {number} runs {}, has {} waiting, and was given {}",
                    has.running,
                    has.waiting,
                    engine.requests.len()
                ));
            }
            if engine.kept.len() as u32 != has.held {
                return self.wrong(format!(
                    "engine {number} keeps the KV of {}, and {} are to fetch it",
                    has.held,
                    engine.kept.len()
                ));
            }
        }
        let on_engines = self
            .placed
            .iter()
            .flatten()
            .filter(|placed| matches!(placed.leg, Leg::Decode { transfer: Fetching::Waits | Fetching::UnderWay(_), .. }));
        let waiting = self.waiting.values().filter(|waiting| waiting.kept.is_some_and(|kept| self.is_kept(&kept)));
        let wanted = on_engines.count() + waiting.count();
        if kept != wanted {
            return self.wrong(format!("engines keep the KV of {kept} requests, and {wanted} want it"));
        }
        if self.wires.under_way() != self.under_way.len() {
            let (links, known) = (self.wires.under_way(), self.under_way.len());
            return self.wrong(format!("{links} transfers are under way, and {known} are known"));
        }
        match self.service.as_ref().map_or(Ok(()), |service| service.flow().audit()) {
            Ok(()) => Ok(()),
            Err(what) => self.wrong(what),
        }
    }

    /// Whether nothing is left when all requests have ended.
    pub(super) fn audit_end(&self) -> Result<(), SimulationError> {
        if self.options.audit_every.is_none() {
            return Ok(());
        }
        self.audit()?;
        for (number, engine) in self.engines.iter().enumerate() {
            let used = engine.model.profile().kv_blocks - engine.model.free_blocks();
            if used > 0 {
                return self.wrong(format!("all requests have ended, and engine {number} has {used} blocks in use"));
            }
        }
        let (moved, fetched) = (self.tally.handoffs.transfer.count(), self.tally.handoffs.fetches);
        if moved != fetched {
            return self.wrong(format!("{fetched} transfers were begun, and {moved} have ended"));
        }
        Ok(())
    }
}
