//! For a policy's own tests: requests and candidates with the facts that a test gives, and stand-ins for the host.
//!
//! What a test does not give is unknown, as it may be in production.

use std::{
    cell::{Cell, OnceCell, RefCell},
    collections::BTreeMap,
};

use crate::{Candidates, Request};

thread_local! {
    static NOW_MS: Cell<u64> = const { Cell::new(0) };
    static RANDOM: Cell<u64> = const { Cell::new(0) };
    static BYTES: RefCell<BTreeMap<String, Vec<u8>>> = const { RefCell::new(BTreeMap::new()) };
    static COUNTERS: RefCell<BTreeMap<String, i64>> = const { RefCell::new(BTreeMap::new()) };
    static BUCKETS: RefCell<BTreeMap<String, (f64, u64)>> = const { RefCell::new(BTreeMap::new()) };
}

pub(crate) fn now_ms() -> u64 {
    NOW_MS.get()
}

/// splitmix64 (Steele et al. 2014) from a fixed seed: a test decides the same in every run.
pub(crate) fn next_random() -> u64 {
    let state = RANDOM.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
    RANDOM.set(state);
    let x = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Stand-in for the host's state: no quota, no expiry.
pub(crate) mod state {
    use super::{BUCKETS, BYTES, COUNTERS, now_ms};

    pub(crate) fn get(key: &str) -> Option<Vec<u8>> {
        BYTES.with_borrow(|bytes| bytes.get(key).cloned())
    }

    pub(crate) fn set(key: &str, value: &[u8]) {
        BYTES.with_borrow_mut(|bytes| bytes.insert(key.to_owned(), value.to_vec()));
    }

    pub(crate) fn add(key: &str, delta: i64) -> i64 {
        COUNTERS.with_borrow_mut(|counters| {
            let counter = counters.entry(key.to_owned()).or_default();
            *counter = counter.wrapping_add(delta);
            *counter
        })
    }

    pub(crate) fn take(key: &str, amount: f64, per_second: f64, burst: f64) -> Result<f64, u32> {
        BUCKETS.with_borrow_mut(|buckets| {
            let (level, at_ms) = buckets.entry(key.to_owned()).or_insert((burst, now_ms()));
            *level = (*level + (now_ms() - *at_ms) as f64 / 1000.0 * per_second).min(burst);
            *at_ms = now_ms();
            if *level >= amount {
                *level -= amount;
                Ok(*level)
            } else if amount > burst || per_second <= 0.0 {
                Err(u32::MAX)
            } else {
                Err(((amount - *level) / per_second * 1000.0).ceil() as u32)
            }
        })
    }
}

fn given<T>(value: T) -> OnceCell<T> {
    OnceCell::from(value)
}

impl Request {
    /// A request for a test: what no `with_` gives is unknown.
    #[must_use]
    pub fn test() -> Self {
        Self::default()
    }

    /// Gives the model.
    #[must_use]
    pub fn with_model(self, model: &str) -> Self {
        Self { model: given(model.to_owned()), ..self }
    }

    /// Gives the prompt's length.
    #[must_use]
    pub fn with_prompt_tokens(self, tokens: u32) -> Self {
        Self { prompt_tokens: given(tokens), ..self }
    }

    /// Gives the limit on output tokens.
    #[must_use]
    pub fn with_max_output_tokens(self, tokens: u32) -> Self {
        Self { max_output_tokens: given(tokens), ..self }
    }

    /// Gives the session's key.
    #[must_use]
    pub fn with_session_key(self, key: u64) -> Self {
        Self { session_key: given(Some(key)), ..self }
    }

    /// Gives the prefix key.
    #[must_use]
    pub fn with_prefix_key(self, key: u64) -> Self {
        Self { prefix_key: given(key), ..self }
    }

    /// Gives the tenant's key.
    #[must_use]
    pub fn with_tenant_key(self, key: u64) -> Self {
        Self { tenant_key: given(key), ..self }
    }

    /// Gives the attempt.
    #[must_use]
    pub fn with_attempt(self, attempt: u32) -> Self {
        Self { attempt: given(attempt), ..self }
    }

    /// Gives an attribute.
    #[must_use]
    pub fn with_attribute(mut self, key: &str, value: &str) -> Self {
        self.attributes.push((key.to_owned(), value.to_owned()));
        self
    }
}

impl Candidates {
    /// Candidates for a test, with worker ids 0, 1, 2, …: a column that no `with_` gives is unknown.
    #[must_use]
    pub fn test(count: u32) -> Self {
        Self { count: given(count), worker_id: given((0..u64::from(count)).collect()), ..Self::default() }
    }

    /// # Panics
    /// If the column is not as long as the candidates.
    fn column<T>(&self, values: impl Into<Vec<T>>) -> OnceCell<Vec<T>> {
        let values = values.into();
        assert_eq!(values.len(), self.count() as usize, "a column has one value per candidate");
        given(values)
    }

    /// Gives a column.
    #[must_use]
    pub fn with_worker_id(self, values: impl Into<Vec<u64>>) -> Self {
        Self { worker_id: self.column(values), ..self }
    }

    /// Gives a column.
    #[must_use]
    pub fn with_block_size(self, values: impl Into<Vec<u32>>) -> Self {
        Self { block_size: self.column(values), ..self }
    }

    /// Gives a column.
    #[must_use]
    pub fn with_cached_device_tokens(self, values: impl Into<Vec<u32>>) -> Self {
        Self { cached_device_tokens: self.column(values), ..self }
    }

    /// Gives a column.
    #[must_use]
    pub fn with_cached_host_tokens(self, values: impl Into<Vec<u32>>) -> Self {
        Self { cached_host_tokens: self.column(values), ..self }
    }

    /// Gives a column.
    #[must_use]
    pub fn with_cached_disk_tokens(self, values: impl Into<Vec<u32>>) -> Self {
        Self { cached_disk_tokens: self.column(values), ..self }
    }

    /// Gives a column.
    #[must_use]
    pub fn with_active_prefill_tokens(self, values: impl Into<Vec<u32>>) -> Self {
        Self { active_prefill_tokens: self.column(values), ..self }
    }

    /// Gives a column.
    #[must_use]
    pub fn with_active_decode_tokens(self, values: impl Into<Vec<u32>>) -> Self {
        Self { active_decode_tokens: self.column(values), ..self }
    }

    /// Gives a column.
    #[must_use]
    pub fn with_active_requests(self, values: impl Into<Vec<u32>>) -> Self {
        Self { active_requests: self.column(values), ..self }
    }

    /// Gives a column.
    #[must_use]
    pub fn with_kv_tokens_free(self, values: impl Into<Vec<u32>>) -> Self {
        Self { kv_tokens_free: self.column(values), ..self }
    }

    /// Gives a column.
    #[must_use]
    pub fn with_load_age_ms(self, values: impl Into<Vec<u32>>) -> Self {
        Self { load_age_ms: self.column(values), ..self }
    }

    /// Gives a column.
    #[must_use]
    pub fn with_recent_ttft_ms(self, values: impl Into<Vec<f32>>) -> Self {
        Self { recent_ttft_ms: self.column(values), ..self }
    }

    /// Gives a column.
    #[must_use]
    pub fn with_error_rate(self, values: impl Into<Vec<f32>>) -> Self {
        Self { error_rate: self.column(values), ..self }
    }

    /// Gives a column.
    #[must_use]
    pub fn with_preference(self, values: impl Into<Vec<f32>>) -> Self {
        Self { preference: self.column(values), ..self }
    }

    /// Gives a label's codes.
    #[must_use]
    pub fn with_label(mut self, key: &str, codes: impl Into<Vec<u32>>) -> Self {
        self.labels.push((key.to_owned(), codes.into()));
        self
    }

    /// Gives a signal.
    #[must_use]
    pub fn with_signal(mut self, name: &str, values: impl Into<Vec<f32>>) -> Self {
        self.signals.push((name.to_owned(), values.into()));
        self
    }
}
