//! The pools of all models that are served, by name.
//!
//! Contract: a pool is there while somebody has it: the line-up, for as long as there is a worker of its model, and its requests.
//! One that nobody has is kept for a while, since most workers that go come back, and what was learnt of the model with them; then
//! it is forgotten, so that models that come and go take no memory for ever.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock, atomic::Ordering::Relaxed},
};

use super::pool::Pool;

/// For how long a pool is kept that has no worker: as long as its latencies say anything.
const KEPT_MS: u64 = 60_000;

/// All pools.
#[derive(Debug, Default)]
pub(super) struct Pools(RwLock<HashMap<String, Arc<Pool>>>);

impl Pools {
    /// A model's pool.
    pub(super) fn of(&self, model: &str, now_ms: u64) -> Arc<Pool> {
        if let Some(pool) = self.0.read().unwrap_or_else(PoisonError::into_inner).get(model) {
            return Arc::clone(pool);
        }
        let mut pools = self.0.write().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(pools.entry(model.to_owned()).or_insert_with(|| Arc::new(Pool::new(model, now_ms))))
    }

    /// All of them, by name.
    pub(super) fn all(&self) -> Vec<Arc<Pool>> {
        let mut pools: Vec<_> = self.0.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        pools.sort_by(|a, b| a.model.cmp(&b.model));
        pools
    }

    /// Forgets those that nobody has had for long.
    pub(super) fn forget(&self, now_ms: u64) {
        let is_over = |pool: &Arc<Pool>| {
            let since = pool.empty_since_ms.load(Relaxed);
            // Whoever wants one more must come here for it.
            Arc::strong_count(pool) == 1 && since != u64::MAX && now_ms >= since.saturating_add(KEPT_MS)
        };
        // Mostly there is none, and no request is to wait for that.
        if self.0.read().unwrap_or_else(PoisonError::into_inner).values().any(is_over) {
            self.0.write().unwrap_or_else(PoisonError::into_inner).retain(|_, pool| !is_over(pool));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(pools: &Pools) -> Vec<String> {
        pools.all().iter().map(|pool| pool.model.clone()).collect()
    }

    #[test]
    fn a_model_is_forgotten_that_nobody_has_had_for_long() {
        let pools = Pools::default();
        let (served, left) = (pools.of("served", 0), pools.of("left", 0));
        served.empty_since_ms.store(u64::MAX, Relaxed);
        left.answered(9.0);
        drop(left);
        pools.forget(KEPT_MS - 1);
        assert_eq!(names(&pools), ["left", "served"], "its workers may be back soon");
        assert_eq!(pools.of("left", KEPT_MS - 1).expected_output(None), 9, "what was learnt of it holds");
        pools.forget(KEPT_MS);
        assert_eq!(names(&pools), ["served"]);
        assert_eq!(pools.of("left", KEPT_MS).expected_output(None), 256, "it begins anew");
    }

    #[test]
    fn a_model_is_not_forgotten_that_has_workers_or_requests() {
        let pools = Pools::default();
        pools.of("ready", 0).empty_since_ms.store(u64::MAX, Relaxed);
        let request = pools.of("waits", 0);
        pools.forget(10 * KEPT_MS);
        assert_eq!(names(&pools), ["ready", "waits"]);
        assert!(Arc::ptr_eq(&request, &pools.of("waits", 10 * KEPT_MS)), "all of its requests have the same one");
        drop(request);
        pools.forget(10 * KEPT_MS);
        assert_eq!(names(&pools), ["ready"]);
    }
}
