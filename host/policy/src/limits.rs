//! What a policy may use. Every bound is here, with its reason.

use std::time::Duration;

/// Bounds on policies.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Size of a component. Routing policies are tens to hundreds of kilobytes; compiling is quadratic at worst.
    pub component_bytes: usize,
    /// Fuel of one decision, about one unit per WebAssembly instruction: deterministic, so that a decision is bounded
    /// alike in production and in replay. Calls of the host cost fuel too ([`Limits::HOST_CALL_FUEL`]). The default is
    /// about 1 ms of work.
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
    /// Bytes that the host takes in from one call across the boundary, before it looks at them.
    pub argument_bytes: usize,
    /// Log lines of one call.
    pub log_lines: u32,
    /// Bytes of one log line; the rest is cut.
    pub log_line_bytes: usize,
    /// Metric updates of one call.
    pub metric_updates: u32,
    /// Log lines of a slot's policies per second, over all calls; a burst may be four times that.
    pub log_lines_per_second: f64,
    /// Instances that exist at once, of all versions together. Where cores are many it is raised to what four versions need.
    pub instances: u32,
    /// How long a version whose instances cannot be made is left alone: making one may take `setup_fuel`, and all
    /// versions share the thread that does it.
    pub mending_pause: Duration,
    /// When a version is not asked any more.
    pub quarantine: QuarantineLimits,
}

/// When a version is quarantined, and when it is tried again.
#[derive(Clone, Debug)]
pub struct QuarantineLimits {
    /// Faults of its own, within `window`, that it takes: one request sent a few times over must not do.
    pub faults: u32,
    /// Least share of its calls within `window` that failed: what one request in ten thousand provokes is not worth
    /// losing the policy for.
    pub share: f64,
    /// What is looked at: long enough to hold `faults` on a quiet host, short enough to forget what is over.
    pub window: Duration,
    /// From the first quarantine to its trial. Short: what is wrong may be gone with the request that provoked it.
    pub first_backoff: Duration,
    /// The longest back-off; each failed trial, and each quarantine soon after another, doubles it up to here. A trial a
    /// minute costs nothing.
    pub max_backoff: Duration,
    /// A stretch out of quarantine that halves the next back-off.
    pub healthy: Duration,
}

impl Default for QuarantineLimits {
    fn default() -> Self {
        Self {
            faults: 8,
            share: 0.1,
            window: Duration::from_secs(10),
            first_backoff: Duration::from_secs(1),
            max_backoff: Duration::from_secs(60),
            healthy: Duration::from_secs(60),
        }
    }
}

impl Limits {
    /// Fuel of a call across the boundary, about what it takes in time.
    pub const HOST_CALL_FUEL: u64 = 100;
    /// Bytes handed across the boundary for one unit of fuel.
    pub const BYTES_PER_FUEL: usize = 8;
    /// Core instances, memories and tables of one component: its own module, and what wraps it.
    pub const CORE_INSTANCES: usize = 16;
    /// See [`Limits::CORE_INSTANCES`]. The bound on memory is for each.
    pub const MEMORIES: usize = 2;
    /// See [`Limits::CORE_INSTANCES`].
    pub const TABLES: usize = 8;
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
            argument_bytes: 1 << 20,
            log_lines: 16,
            log_line_bytes: 1024,
            metric_updates: 32,
            log_lines_per_second: 20.0,
            instances: 256,
            mending_pause: Duration::from_secs(1),
            quarantine: QuarantineLimits::default(),
        }
    }
}
