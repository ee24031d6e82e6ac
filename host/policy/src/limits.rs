//! What a policy may use. Every bound is here, with its reason.

use std::time::Duration;

/// Bounds on policies.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Size of a component. Routing policies are tens to hundreds of kilobytes; compiling is quadratic at worst.
    pub component_bytes: usize,
    /// Fuel of one decision, about one unit per WebAssembly instruction: deterministic, so that a decision is bounded
    /// alike in production and in replay. The default is about 1 ms of work.
    pub decision_fuel: u64,
    /// Fuel of `configure` and `settings-schema`, which run once and parse JSON.
    pub setup_fuel: u64,
    /// Backstop for what fuel does not count, a host call that takes long or a thread that is pre-empted: a call ends
    /// between this and a tick more. (Bulk memory instructions cost fuel by their length.)
    pub backstop: Duration,
    /// Linear memory of one instance.
    pub memory_bytes: usize,
    /// Elements of all tables of one instance.
    pub table_elements: usize,
    /// Native stack of a guest.
    pub stack_bytes: usize,
    /// Bytes that the host hands out and takes in during one call; each call across the boundary counts as
    /// [`Limits::HOST_CALL_BYTES`] more, since neither fuel nor epochs interrupt host calls.
    pub host_bytes: usize,
    /// Log lines of one call.
    pub log_lines: u32,
    /// Bytes of one log line; the rest is cut.
    pub log_line_bytes: usize,
    /// Metric updates of one call.
    pub metric_updates: u32,
    /// Instances that exist at once, of all versions together.
    pub instances: u32,
}

impl Limits {
    /// What a call across the boundary counts besides its bytes.
    pub const HOST_CALL_BYTES: usize = 1024;
    /// How often the backstop looks.
    pub const BACKSTOP_TICK: Duration = Duration::from_millis(25);
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            component_bytes: 16 << 20,
            decision_fuel: 2_000_000,
            setup_fuel: 200_000_000,
            backstop: Duration::from_millis(50),
            memory_bytes: 16 << 20,
            table_elements: 20_000,
            stack_bytes: 256 << 10,
            host_bytes: 32 << 20,
            log_lines: 16,
            log_line_bytes: 1024,
            metric_updates: 32,
            instances: 256,
        }
    }
}
