//! What there is now, for whoever asks: what waits and runs, and how long it will take.

use dynamo_host_core::Admitted;

use super::{Flow, order::standing, pool::PoolLoad, slots::NONE};

impl Flow {
    /// A pool's part.
    #[must_use]
    pub fn pool(&self, key: u64, now_ms: u64) -> PoolLoad {
        let Some(pool) = self.pool_places.get(&key).map(|&place| self.at(place)) else {
            return PoolLoad { free: Some(0), predicted_wait_ms: f32::NAN, ..PoolLoad::default() };
        };
        let oldest = (pool.oldest != NONE).then(|| now_ms.saturating_sub(self.slots.at(pool.oldest).since_ms));
        PoolLoad {
            running: pool.running,
            free: pool.free(),
            queued: pool.queued,
            queued_tokens: pool.queued_tokens,
            oldest_age_ms: oldest.unwrap_or(0).try_into().unwrap_or(u32::MAX),
            predicted_wait_ms: pool.wait_ms(pool.queued_work as f64),
        }
    }

    /// A pool's part, with the wait of a request of this standing.
    #[must_use]
    pub fn pool_for(&self, key: u64, tenant: u64, admitted: &Admitted, now_ms: u64) -> PoolLoad {
        PoolLoad { predicted_wait_ms: self.predicted_wait_ms(key, tenant, admitted), ..self.pool(key, now_ms) }
    }

    /// What a request of this standing would wait in a pool, in milliseconds; NaN if that cannot be said yet.
    #[must_use]
    pub fn predicted_wait_ms(&self, pool: u64, tenant: u64, admitted: &Admitted) -> f32 {
        self.pool_places.get(&pool).map_or(f32::NAN, |&place| {
            let pool = self.at(place);
            pool.wait_ms(self.shares.before(pool.root, &standing(admitted, tenant)))
        })
    }

    /// Requests that wait.
    #[must_use]
    pub fn waiting(&self) -> u32 {
        self.waiting
    }

    /// Tokens of their prompts.
    #[must_use]
    pub fn waiting_tokens(&self) -> u64 {
        self.waiting_tokens
    }

    /// Requests that run.
    #[must_use]
    pub fn running(&self) -> u32 {
        self.running
    }
}
