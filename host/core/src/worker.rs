//! Workers: schedulable engine endpoints.

use std::{collections::BTreeMap, fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{id::WorkerId, load::LoadSlot};

/// What a worker does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Prefill and decode in one engine.
    #[default]
    Aggregated,
    /// Prefill only.
    Prefill,
    /// Decode only.
    Decode,
    /// All of it: whole requests, prefill for others, decode of what others have prefilled.
    Both,
}

impl Role {
    /// All of them, by their codes.
    pub const ALL: [Self; 4] = [Self::Aggregated, Self::Prefill, Self::Decode, Self::Both];

    /// The role of a code; `None` if it is not known.
    #[must_use]
    pub fn of_code(code: u32) -> Option<Self> {
        Self::ALL.get(code as usize).copied()
    }

    /// The contract's code (`candidates.role`).
    #[must_use]
    pub fn code(self) -> u32 {
        match self {
            Self::Aggregated => 0,
            Self::Prefill => 1,
            Self::Decode => 2,
            Self::Both => 3,
        }
    }

    /// Whether it computes prompts that others decode.
    #[must_use]
    pub fn prefills(self) -> bool {
        matches!(self, Self::Prefill | Self::Both)
    }

    /// Whether it decodes what others have prefilled.
    #[must_use]
    pub fn decodes(self) -> bool {
        matches!(self, Self::Decode | Self::Both)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Aggregated => "aggregated",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Both => "both",
        })
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "aggregated" => Ok(Self::Aggregated),
            "prefill" => Ok(Self::Prefill),
            "decode" => Ok(Self::Decode),
            "both" => Ok(Self::Both),
            _ => Err(format!("role {text:?} is not known; use aggregated, prefill, decode or both")),
        }
    }
}

/// Whether a worker can be given requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkerState {
    /// Not probed yet.
    #[default]
    Starting,
    /// Answers its probe.
    Healthy,
    /// Failed lately, or was too slow, and is tried again: a candidate for a few requests at once, or since there is nobody else.
    Suspect,
    /// Answers its probe and failed too many requests: not a candidate for a while.
    Tripped,
    /// Much slower than the others of its pool: not a candidate for a while.
    Ejected,
    /// Does not answer its probe: not a candidate.
    Unreachable,
    /// Finishes what it has: not a candidate.
    Draining,
}

impl WorkerState {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Starting, Self::Healthy, Self::Suspect, Self::Tripped, Self::Ejected, Self::Unreachable, Self::Draining];

    /// Whether the worker may be a candidate.
    #[must_use]
    pub fn is_eligible(self) -> bool {
        matches!(self, Self::Healthy | Self::Suspect)
    }

    /// The contract's code (`candidates.state`).
    #[must_use]
    pub fn code(self) -> u32 {
        u32::from(self == Self::Suspect)
    }
}

/// What a worker is, as configured or discovered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WorkerSpec {
    /// Name of the engine, unique within a host: `host:port` unless configured.
    pub name: String,
    /// Model that it serves.
    pub model: String,
    /// What it does.
    pub role: Role,
    /// Data-parallel rank within the engine.
    pub rank: u32,
    /// Tokens per KV block, if configured; else what the engine reports counts.
    pub block_size: Option<u32>,
    /// The operator's labels.
    pub labels: BTreeMap<String, String>,
}

impl WorkerSpec {
    /// The worker's identity within `namespace`.
    #[must_use]
    pub fn id(&self, namespace: &str) -> WorkerId {
        WorkerId::new(namespace, &self.name, &self.model, self.rank)
    }
}

/// What a worker can do with the KV of others of its model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handoff {
    /// Whether it serves whole requests, whatever its role: some engines of split pools refuse them.
    pub serves_whole: bool,
    /// Key of those that it can hand KV to and take it from: one way of doing it, one block size. `None`: nobody.
    pub group: Option<u64>,
}

impl Default for Handoff {
    fn default() -> Self {
        Self { serves_whole: true, group: None }
    }
}

/// One row of a fleet.
#[derive(Clone, Debug)]
pub struct Worker {
    /// Identity.
    pub id: WorkerId,
    /// What it is.
    pub spec: Arc<WorkerSpec>,
    /// Whether it can be given requests.
    pub state: WorkerState,
    /// LoRA adapters of its model that it has loaded.
    pub adapters: Arc<[String]>,
    /// What it can do with the KV of others.
    pub handoff: Handoff,
    /// When it joined, in milliseconds of the host's monotonic clock.
    pub joined_ms: u64,
    /// Its place on the load board, shared by all snapshots.
    pub load: Arc<LoadSlot>,
}
