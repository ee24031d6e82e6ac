//! What the host offers besides facts. Natively, in tests, each is a stand-in that belongs to the test's thread.

/// Small state that outlives an instance, shared by all instances and versions of a slot's policies.
///
/// Keys are 1 to 128 bytes, values at most 4 KiB. A `ttl` of zero keeps an entry for as long as the host runs.
pub mod state {
    use std::time::Duration;

    use crate::{bindings::dynamo::policy::state as host, testing::state as native};

    /// Why state was not kept. Open code.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct StateError(pub u32);

    impl StateError {
        /// The slot's quota of entries or bytes is used up.
        pub const QUOTA: Self = Self(1);
        /// The key or the value is too large.
        pub const TOO_LARGE: Self = Self(2);
        /// The entry is of another kind (bytes, counter or bucket).
        pub const WRONG_KIND: Self = Self(3);
    }

    fn millis(ttl: Duration) -> u32 {
        u32::try_from(ttl.as_millis()).unwrap_or(u32::MAX)
    }

    /// The bytes last set.
    #[must_use]
    pub fn get(key: &str) -> Option<Vec<u8>> {
        if cfg!(target_arch = "wasm32") { host::get(key) } else { native::get(key) }
    }

    /// Keeps bytes.
    ///
    /// # Errors
    /// If they were not kept.
    pub fn set(key: &str, value: &[u8], ttl: Duration) -> Result<(), StateError> {
        if cfg!(target_arch = "wasm32") {
            host::set(key, value, millis(ttl)).map_err(StateError)
        } else {
            native::set(key, value);
            Ok(())
        }
    }

    /// Adds to a counter, atomically, starting from 0; returns the sum.
    ///
    /// # Errors
    /// If it was not kept.
    pub fn add(key: &str, delta: i64, ttl: Duration) -> Result<i64, StateError> {
        if cfg!(target_arch = "wasm32") {
            host::add(key, delta, millis(ttl)).map_err(StateError)
        } else {
            Ok(native::add(key, delta))
        }
    }

    /// Takes from a token bucket that refills at `per_second` up to `burst`; returns what remains.
    ///
    /// # Errors
    /// Milliseconds until the amount will be there, or [`UNKNOWN`](crate::UNKNOWN) if never.
    pub fn take(key: &str, amount: f64, per_second: f64, burst: f64) -> Result<f64, u32> {
        if cfg!(target_arch = "wasm32") {
            host::take(key, amount, per_second, burst)
        } else {
            native::take(key, amount, per_second, burst)
        }
    }
}

/// Time, constant during one call.
pub mod clock {
    use crate::{bindings::dynamo::policy::clock as host, testing};

    /// Milliseconds since an arbitrary start; never goes back.
    #[must_use]
    pub fn monotonic_ms() -> u64 {
        if cfg!(target_arch = "wasm32") { host::monotonic_ms() } else { testing::now_ms() }
    }

    /// Milliseconds since 1970-01-01 UTC.
    #[must_use]
    pub fn unix_ms() -> u64 {
        if cfg!(target_arch = "wasm32") { host::unix_ms() } else { testing::now_ms() }
    }
}

/// Randomness from the decision's seed, so that a replay decides the same.
pub mod entropy {
    use crate::{bindings::dynamo::policy::entropy as host, testing};

    /// The next 64 bits.
    #[must_use]
    pub fn next() -> u64 {
        if cfg!(target_arch = "wasm32") { host::next() } else { testing::next_random() }
    }
}

/// What a policy says about itself. Everything has a quota per call.
pub mod telemetry {
    use crate::bindings::dynamo::policy::telemetry as host;
    pub use host::Level;

    /// A line in the host's log.
    pub fn log(level: Level, message: &str) {
        if cfg!(target_arch = "wasm32") {
            host::log(level, message);
        }
    }

    /// Adds to a counter metric of the policy's own.
    pub fn counter_add(name: &str, by: f64) {
        if cfg!(target_arch = "wasm32") {
            host::counter_add(name, by);
        }
    }

    /// Sets a gauge metric of the policy's own.
    pub fn gauge_set(name: &str, value: f64) {
        if cfg!(target_arch = "wasm32") {
            host::gauge_set(name, value);
        }
    }
}
