//! What the host offers besides facts. Natively, in tests, each is a stand-in that belongs to the test's thread; see
//! [`testing`](crate::testing).

/// Small state that outlives an instance, shared by all instances and versions of a slot's policies.
///
/// A policy's own memory is only a cache and may vanish between any two calls. During `Router::new` and a probe, state
/// is a scratch copy: nothing of it stays.
///
/// Keys are 1 to 128 bytes, values at most 4 KiB, and a slot has a quota of entries and bytes. An entry is of one kind:
/// bytes ([`set`](state::set)), a counter ([`add`](state::add)) or a token bucket ([`take`](state::take)). A `ttl` of
/// zero keeps an entry for as long as the host runs; any other is rounded up to whole milliseconds.
///
/// ```
/// use std::time::Duration;
///
/// use dynamo_policy_sdk::{
///     Decision,
///     state::{self, Taken},
///     testing,
/// };
///
/// /// Rejects a tenant beyond 1000 tokens a second, with bursts of up to 8000.
/// fn limit(tenant_key: u64, tokens: u32) -> Option<Decision> {
///     let reject = |retry_after| Decision::Reject { status: 429, retry_after, reason: "too many tokens".to_owned() };
///     match state::take(&format!("tenant.{tenant_key:x}"), tokens.into(), 1000.0, 8000.0) {
///         Ok(Taken::Remaining(_)) => None,
///         Ok(Taken::RetryAfter(wait)) => Some(reject(Some(wait))),
///         Ok(Taken::Never) => Some(reject(None)),
///         // No bucket could be kept: the request is not at fault.
///         Err(_) => None,
///     }
/// }
///
/// assert_eq!(limit(7, 8000), None);
/// assert!(matches!(limit(7, 500), Some(Decision::Reject { retry_after: Some(wait), .. }) if wait.as_millis() == 500));
/// testing::advance(Duration::from_millis(500));
/// assert_eq!(limit(7, 500), None);
/// ```
pub mod state {
    use std::{fmt, time::Duration};

    use crate::{bindings::dynamo::policy::state as host, decision::millis, testing::services as native};

    /// Why state was not kept. Open code: later hosts may know further reasons.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct StateError(pub u32);

    impl StateError {
        /// The slot's quota of entries or bytes is used up.
        pub const QUOTA: Self = Self(1);
        /// The key or the value is too large, or the key is empty.
        pub const TOO_LARGE: Self = Self(2);
        /// The entry is of another kind (bytes, counter or bucket).
        pub const WRONG_KIND: Self = Self(3);
    }

    impl fmt::Display for StateError {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            match *self {
                Self::QUOTA => f.write_str("the slot's quota of state is used up"),
                Self::TOO_LARGE => f.write_str("the key is not of 1 to 128 bytes, or the value is larger than 4 KiB"),
                Self::WRONG_KIND => f.write_str("the entry is of another kind (bytes, counter or bucket)"),
                Self(code) => write!(f, "state was not kept, for reason {code}"),
            }
        }
    }

    impl std::error::Error for StateError {}

    /// What a token bucket gave.
    #[must_use]
    #[derive(Clone, Copy, Debug, PartialEq)]
    pub enum Taken {
        /// The amount; this is what remains.
        Remaining(f64),
        /// Nothing: the amount will be there after this time.
        RetryAfter(Duration),
        /// Nothing, and the amount will never be there: it is more than the bucket holds, or nothing flows in.
        Never,
    }

    impl From<Result<f64, u32>> for Taken {
        /// From the contract's answer: what remains, or milliseconds, of which the largest number means never.
        fn from(answer: Result<f64, u32>) -> Self {
            match answer {
                Ok(remaining) => Self::Remaining(remaining),
                Err(u32::MAX) => Self::Never,
                Err(ms) => Self::RetryAfter(Duration::from_millis(ms.into())),
            }
        }
    }

    /// The bytes last [`set`].
    #[must_use]
    pub fn get(key: &str) -> Option<Vec<u8>> {
        if cfg!(target_arch = "wasm32") { host::get(key) } else { native::get(key) }
    }

    /// Keeps bytes.
    ///
    /// # Errors
    /// If they were not kept.
    pub fn set(key: &str, value: &[u8], ttl: Duration) -> Result<(), StateError> {
        let ttl_ms = millis(ttl);
        if cfg!(target_arch = "wasm32") {
            host::set(key, value, ttl_ms).map_err(StateError)
        } else {
            native::set(key, value, ttl_ms)
        }
    }

    /// Adds to a counter, atomically, starting from 0, wrapping; returns the sum. The entry lives for `ttl` from this
    /// call on.
    ///
    /// # Errors
    /// If it was not kept.
    pub fn add(key: &str, delta: i64, ttl: Duration) -> Result<i64, StateError> {
        let ttl_ms = millis(ttl);
        if cfg!(target_arch = "wasm32") {
            host::add(key, delta, ttl_ms).map_err(StateError)
        } else {
            native::add(key, delta, ttl_ms)
        }
    }

    /// Takes from a token bucket, atomically: it begins full and refills at `per_second` up to `burst`. A bucket that
    /// would be full again is forgotten.
    ///
    /// # Errors
    /// If the bucket could not be kept; nobody has been limited then.
    pub fn take(key: &str, amount: f64, per_second: f64, burst: f64) -> Result<Taken, StateError> {
        if cfg!(target_arch = "wasm32") {
            host::take(key, amount, per_second, burst).map(Taken::from).map_err(StateError)
        } else {
            native::take(key, amount, per_second, burst).map(Taken::from)
        }
    }

    /// Gives back to a token bucket what was taken and not used, up to `burst`; `per_second` and `burst` as they were for
    /// [`take`]. A host before 0.1.2 of the contract does not know of it: there, what was taken stays taken.
    ///
    /// # Errors
    /// If the bucket could not be kept.
    pub fn give_back(key: &str, amount: f64, per_second: f64, burst: f64) -> Result<(), StateError> {
        take(key, -amount, per_second, burst).map(|_| ())
    }
}

/// Time, constant during one call.
pub mod clock {
    use crate::{bindings::dynamo::policy::clock as host, testing::services as native};

    /// Milliseconds since an arbitrary start; never goes back.
    #[must_use]
    pub fn monotonic_ms() -> u64 {
        if cfg!(target_arch = "wasm32") { host::monotonic_ms() } else { native::now_ms() }
    }

    /// Milliseconds since 1970-01-01 UTC.
    #[must_use]
    pub fn unix_ms() -> u64 {
        if cfg!(target_arch = "wasm32") { host::unix_ms() } else { native::now_ms() }
    }
}

/// Randomness from the decision's seed, so that a replay decides the same.
pub mod entropy {
    use crate::{bindings::dynamo::policy::entropy as host, testing::services as native};

    /// The next 64 bits.
    #[must_use]
    pub fn next() -> u64 {
        if cfg!(target_arch = "wasm32") { host::next() } else { native::next_random() }
    }
}

/// What a policy says about itself. Everything here has a quota per call; what exceeds it is dropped and counted.
pub mod telemetry {
    pub use crate::bindings::dynamo::policy::telemetry::Level;
    use crate::{bindings::dynamo::policy::telemetry as host, testing::services as native};

    /// A line in the host's log, with the policy's name and version.
    pub fn log(level: Level, message: &str) {
        if cfg!(target_arch = "wasm32") { host::log(level, message) } else { native::log(level, message) }
    }

    /// Adds to a counter metric of the policy's own; exported with the policy as a label.
    pub fn counter_add(name: &str, by: u64) {
        if cfg!(target_arch = "wasm32") { host::counter_add(name, by) } else { native::counter_add(name, by) }
    }

    /// Sets a gauge metric of the policy's own.
    pub fn gauge_set(name: &str, value: f64) {
        if cfg!(target_arch = "wasm32") { host::gauge_set(name, value) } else { native::gauge_set(name, value) }
    }
}
