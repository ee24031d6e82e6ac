//! The queue's own books, checked against what they are of: for tests and the simulator.

use super::{Flow, NONE, Stage, shares::ShareTotals};

impl Flow {
    /// Whether every sum and every order is of just what there is. Looks at everything.
    ///
    /// # Errors
    /// What is not so.
    pub fn audit(&self) -> Result<(), String> {
        let same = |what: &str, kept: u64, counted: u64| {
            (kept == counted).then_some(()).ok_or_else(|| format!("{what} are {kept} by the books, and {counted} when counted"))
        };
        let in_stage = |stages: &'static [Stage]| self.slots.iter().filter(|request| stages.contains(&request.stage));
        let waiting = || in_stage(&[Stage::Waiting]);
        let running = || in_stage(&[Stage::Prefilling, Stage::Running]);
        same("waiting requests", self.waiting.into(), waiting().count() as u64)?;
        same("waiting tokens", self.waiting_tokens, waiting().map(|request| u64::from(request.prompt_tokens)).sum())?;
        same("running requests", self.running.into(), running().count() as u64)?;
        same("displaced requests", self.displaced.len() as u64, in_stage(&[Stage::Displaced]).count() as u64)?;
        same("deadlines", self.deadlines.len() as u64, self.waiting.into())?;
        for (number, &(requests, tokens)) in self.tiers.iter().enumerate() {
            let in_tier = || waiting().filter(|request| request.tier as usize == number);
            same("requests of a tier", requests.into(), in_tier().count() as u64)?;
            same("tokens of a tier", tokens, in_tier().map(|request| u64::from(request.prompt_tokens)).sum())?;
        }
        let mut pools = 0;
        for (place, pool) in self.pools.iter().enumerate().filter_map(|(place, pool)| Some((place as u32, pool.as_ref()?))) {
            pools += 1;
            let queued = || waiting().filter(|request| request.pool == place);
            let runs = || running().filter(|request| request.pool == place);
            let prefilling = runs().filter(|request| request.stage == Stage::Prefilling);
            same("queued requests of a pool", pool.queued.into(), queued().count() as u64)?;
            same("queued tokens of a pool", pool.queued_tokens, queued().map(|request| u64::from(request.prompt_tokens)).sum())?;
            same("queued work of a pool", pool.queued_work, queued().map(|request| u64::from(request.work)).sum())?;
            same("running requests of a pool", pool.running.into(), runs().count() as u64)?;
            same("running work of a pool", pool.running_work, runs().map(|request| u64::from(request.work)).sum())?;
            same(
                "prefill tokens of a pool",
                pool.prefill_tokens,
                prefilling.map(|request| u64::from(request.prompt_tokens)).sum(),
            )?;
            let mut by_age = Vec::new();
            let mut slot = pool.oldest;
            while slot != NONE && by_age.len() <= pool.queued as usize {
                by_age.push(self.slots.at(slot).ticket);
                slot = self.slots.at(slot).newer;
            }
            same("requests by age of a pool", by_age.len() as u64, pool.queued.into())?;
            same("the ages in order of a pool", u64::from(by_age.is_sorted()), 1)?;
            let is_ready = self.next(place).is_some_and(|next| pool.has_room(next.prompt_tokens));
            same("whether a pool is ready", u64::from(self.ready.contains(&place)), is_ready.into())?;
            same("whether a pool is gone", pool.is_gone().into(), 0)?;
            let totals = self.shares.audit(pool.root)?;
            let kept = ShareTotals { waiting: pool.queued, running: pool.running, work: pool.queued_work };
            (totals == kept)
                .then_some(())
                .ok_or_else(|| format!("the shares of a pool have {totals:?}, and the pool {kept:?}"))?;
        }
        same("pools", self.pool_places.len() as u64, pools)?;
        self.shares.audit_arena()
    }
}
