//! Time as decisions see it: milliseconds, taken once per decision and handed on.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// The host's monotonic clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    start: Instant,
}

impl Clock {
    pub(crate) fn start() -> Self {
        Self { start: Instant::now() }
    }

    /// Milliseconds since the host started.
    pub(crate) fn now_ms(self) -> u64 {
        self.at_ms(Instant::now())
    }

    /// A moment on this clock.
    pub(crate) fn at_ms(self, instant: Instant) -> u64 {
        instant.saturating_duration_since(self.start).as_millis() as u64
    }
}

/// Milliseconds since 1970-01-01 UTC.
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
