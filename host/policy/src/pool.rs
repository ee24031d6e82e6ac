//! Warm instances, spread over shards so that threads do not meet at one lock.
//!
//! An instance is taken out for a call and put back after a good one; one that failed is dropped. A thread that finds
//! its shard empty looks into the others. New instances are made off the request path.

use std::{
    cell::Cell,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed},
    },
};

use wasmtime::{Store, component::TypedFunc};

use crate::call::Guest;

/// A guest that is configured and ready.
pub(crate) struct Instance {
    pub(crate) store: Store<Guest>,
    pub(crate) decide: TypedFunc<(), ()>,
    pub(crate) observe: TypedFunc<(), ()>,
    /// Held for as long as the instance exists.
    pub(crate) _permit: Permit,
}

/// The right to make one instance, within the bound of all that may exist.
pub(crate) struct Permit(Arc<AtomicU32>);

impl Permit {
    /// `None` if `max` instances exist.
    pub(crate) fn take(count: &Arc<AtomicU32>, max: u32) -> Option<Self> {
        count.fetch_update(Relaxed, Relaxed, |count| (count < max).then_some(count + 1)).ok()?;
        Some(Self(Arc::clone(count)))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

pub(crate) struct Pool {
    shards: Box<[Mutex<Vec<Instance>>]>,
}

/// Instances that a shard keeps: a thread runs one decision at a time, and one more is there when that one fails.
pub(crate) const KEPT_PER_SHARD: usize = 2;

impl Pool {
    pub(crate) fn new(shards: usize) -> Self {
        Self { shards: (0..shards).map(|_| Mutex::default()).collect() }
    }

    /// A warm instance, if one is free.
    pub(crate) fn take(&self) -> Option<Instance> {
        let own = self.own_shard();
        let others = (1..self.shards.len()).map(|step| (own + step) % self.shards.len());
        self.lock(own).pop().or_else(|| others.into_iter().find_map(|shard| self.lock(shard).pop()))
    }

    /// Shards with fewer than `kept` instances, once for each that is missing.
    pub(crate) fn vacancies(&self, kept: usize) -> Vec<usize> {
        let missing = |shard| kept.min(KEPT_PER_SHARD).saturating_sub(self.lock(shard).len());
        (0..self.shards.len()).flat_map(|shard| std::iter::repeat_n(shard, missing(shard))).collect()
    }

    /// Lets go of what a shard has beyond `kept` instances.
    pub(crate) fn trim(&self, kept: usize) {
        for shard in 0..self.shards.len() {
            let surplus: Vec<Instance> = {
                let mut instances = self.lock(shard);
                let kept = kept.min(instances.len());
                instances.drain(kept..).collect()
            };
            // Freed without the lock.
            drop(surplus);
        }
    }

    /// Gives an instance back to this thread's shard.
    pub(crate) fn put(&self, instance: Instance) {
        self.put_into(self.own_shard(), instance);
    }

    /// Gives an instance to a shard; one too many is dropped.
    pub(crate) fn put_into(&self, shard: usize, instance: Instance) {
        let mut kept = self.lock(shard);
        if kept.len() < KEPT_PER_SHARD {
            kept.push(instance);
        }
    }

    /// Held for a push or a pop only.
    fn lock(&self, shard: usize) -> MutexGuard<'_, Vec<Instance>> {
        self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn own_shard(&self) -> usize {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        thread_local! {
            static OWN: Cell<usize> = Cell::new(NEXT.fetch_add(1, Relaxed));
        }
        OWN.get() % self.shards.len()
    }
}
