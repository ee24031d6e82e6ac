//! What is simulated, and by whom it is decided.

use std::time::Duration;

use dynamo_engine_mock::{Profile, ProfileError};
use dynamo_host_core::Role;
use dynamo_host_policy::{LoadError, RuntimeError};

use crate::{engine::EngineSpec, faults::Faults, queueing::Queueing, trace::Trace};

/// What is simulated.
#[derive(Clone, Debug)]
pub struct Options {
    /// The engines, one for each worker.
    pub workers: Vec<EngineSpec>,
    /// The ways by which KV goes from one to another.
    pub links: Links,
    /// Arrivals come this many times as fast as in the trace.
    pub speed: f64,
    /// Seed of all that is left to chance.
    pub seed: u64,
    /// How often each engine's load is read.
    pub load_interval: Duration,
    /// How long a cache event takes from the end of the engine's step to the index.
    pub kv_event_lag: Duration,
    /// The queue in front of the engines; `None`: there is none, and requests wait inside engines.
    pub queueing: Option<Queueing>,
    /// How engines fail; `None`: they do not.
    pub faults: Option<Faults>,
    /// After how many events all books are checked in full; the sums are after each. `None`: never.
    pub audit_every: Option<u64>,
}

/// How fast KV goes from one engine to another. Each engine has a port for each direction, which its transfers share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Links {
    /// Bytes a second through a port, in each direction.
    pub bytes_per_second: f64,
    /// What a transfer takes before its first byte comes.
    pub latency: Duration,
}

impl Default for Links {
    fn default() -> Self {
        Self { bytes_per_second: 64e9, latency: Duration::from_millis(1) }
    }
}

impl Options {
    /// Engines that do not fail, with no queue before them.
    #[must_use]
    pub fn new(workers: impl IntoIterator<Item = impl Into<EngineSpec>>) -> Self {
        Self {
            workers: workers.into_iter().map(Into::into).collect(),
            links: Links::default(),
            speed: 1.0,
            seed: 0,
            load_interval: Duration::from_secs(1),
            kv_event_lag: Duration::from_millis(5),
            queueing: None,
            faults: None,
            audit_every: None,
        }
    }

    /// Whether any worker does a part of the work only, or may.
    #[must_use]
    pub fn has_roles(&self) -> bool {
        self.workers.iter().any(|worker| worker.role != Role::Aggregated)
    }

    /// Whether it can be run over this trace.
    pub(super) fn check(&self, trace: &Trace) -> Result<(), SimulationError> {
        if !(self.speed.is_finite() && self.speed > 0.0) {
            return Err(SimulationError::Speed(self.speed));
        }
        let bandwidth = self.links.bytes_per_second;
        if !(bandwidth.is_finite() && bandwidth >= 1.0) {
            return Err(SimulationError::Bandwidth(bandwidth));
        }
        self.check_roles()?;
        let longest = self.workers.iter().map(|worker| worker.profile.max_model_len);
        let max_model_len = longest.min().ok_or(SimulationError::NoWorker)?;
        let (tokens, workers) = (trace.longest(), self.workers.len());
        if tokens > max_model_len { Err(SimulationError::TooLong { tokens, max_model_len, workers }) } else { Ok(()) }
    }

    /// Half a pair is a mistake: what it is for would never happen.
    fn check_roles(&self) -> Result<(), SimulationError> {
        let of = |role: Role| self.workers.iter().filter(move |worker| worker.role == role);
        for (role, other) in [(Role::Prefill, Role::Decode), (Role::Decode, Role::Prefill)] {
            let count = of(role).count();
            if count > 0 && of(other).chain(of(Role::Both)).next().is_none() {
                return Err(SimulationError::NoPartner { count, role, other });
            }
            let fits = |one: &EngineSpec, other: &EngineSpec| one.handoff_group() == other.handoff_group();
            let alone = of(role).find(|one| !of(other).chain(of(Role::Both)).any(|other| fits(one, other)));
            if let Some(EngineSpec { profile, .. }) = alone {
                let (block_size, kv_bytes_per_token) = (profile.block_size, profile.kv_bytes_per_token);
                return Err(SimulationError::NoFit { role, other, block_size, kv_bytes_per_token });
            }
        }
        Ok(())
    }
}

/// What decides in a run.
#[derive(Clone, Debug)]
pub struct Contender {
    /// Its name in reports.
    pub name: String,
    /// A component and its settings; the native fallback if `None`.
    pub policy: Option<(Vec<u8>, String)>,
}

/// A run that cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum SimulationError {
    /// The sandbox.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// A policy that cannot be loaded.
    #[error("policy {name}: {source}")]
    Policy {
        /// Its name in the report.
        name: String,
        /// Why.
        source: LoadError,
    },
    /// An engine that cannot be.
    #[error("the engine profile: {0}")]
    Profile(#[from] ProfileError),
    /// Requests that no worker could ever run.
    #[error(
        "the trace has a request of {tokens} tokens, more than max_model_len={max_model_len} of the engine profile; \
         raise it (and kv_blocks with it), for example with --workers {workers},max_model_len={tokens}"
    )]
    TooLong {
        /// The longest request.
        tokens: u32,
        /// What the engine takes.
        max_model_len: u32,
        /// Workers.
        workers: usize,
    },
    /// No worker at all.
    #[error("there is no worker; simulate at least 1")]
    NoWorker,
    /// Half a pair.
    #[error(
        "{count} workers have the role {role}, and there is none to share the work with; add some that do the rest, for example \
         with --workers {count},role={other}, or leave role={role} away"
    )]
    NoPartner {
        /// How many.
        count: usize,
        /// What they do.
        role: Role,
        /// What is missing.
        other: Role,
    },
    /// Engines that cannot read each other's KV.
    #[error(
        "a worker of the role {role} has block_size={block_size} and kv_bytes_per_token={kv_bytes_per_token}, as no worker of the \
         role {other} has, so that KV cannot go between them; give both the same"
    )]
    NoFit {
        /// What it does.
        role: Role,
        /// What the others do.
        other: Role,
        /// Its blocks.
        block_size: u32,
        /// Its tokens' KV.
        kv_bytes_per_token: u32,
    },
    /// The books do not agree: a mistake of the simulator or of the queue.
    #[error("after {events} events, at {at:?}: {what}")]
    Books {
        /// Events so far.
        events: u64,
        /// Virtual time.
        at: Duration,
        /// What does not agree.
        what: String,
    },
    /// The arrivals' speed.
    #[error("speed {0} is not possible; use a number above 0")]
    Speed(f64),
    /// The links' bandwidth.
    #[error("a link of {0} bytes a second is not possible; use at least 1")]
    Bandwidth(f64),
}

impl From<Profile> for EngineSpec {
    fn from(profile: Profile) -> Self {
        Self { profile, role: Role::Aggregated }
    }
}
