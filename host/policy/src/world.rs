//! Worlds: the kinds of policy that the contract knows, and what sets one apart from another.

use std::{fmt, sync::Arc};

use dynamo_host_core::SlotKind;
use serde::{Serialize, Serializer};

use crate::{
    bench::{self, Cost},
    fault::PolicyFault,
    question::{AdmissionCall, Question, RouteCall},
    trial::{self, MemoryDependence, ProbeFailure},
    version::PolicyVersion,
};

/// What one kind of policy may import, must export and is asked.
pub struct World {
    /// Its name in the contract.
    pub name: &'static str,
    /// The slots that its policies decide in.
    pub slot: SlotKind,
    /// What the rows of its columns are.
    pub rows: &'static str,
    /// The interface that only its policies export, and the function in it that decides.
    pub(crate) decides: (&'static str, &'static str),
    /// Interfaces that its policies may import.
    pub(crate) imports: &'static [&'static str],
    /// Numbers of rows that a policy must decide for before it is activated.
    pub(crate) probes: &'static [u32],
    pub(crate) tried: Tried,
}

/// What is done with a version whose question is not known by its type.
pub(crate) struct Tried {
    pub(crate) probe: fn(&Arc<PolicyVersion>) -> Result<(), ProbeFailure>,
    pub(crate) memory: fn(&Arc<PolicyVersion>) -> Result<Option<MemoryDependence>, PolicyFault>,
    pub(crate) bench: fn(&Arc<PolicyVersion>, u32) -> Result<Cost, PolicyFault>,
    pub(crate) bench_native: fn(u32) -> Cost,
}

impl Tried {
    const fn with<Q: Question>() -> Self {
        Self {
            probe: trial::probe::<Q>,
            memory: trial::memory_dependence::<Q>,
            bench: bench::of_policy::<Q>,
            bench_native: bench::of_native::<Q>,
        }
    }
}

/// The interface that every policy exports, whatever its world.
pub(crate) const LIFECYCLE: &str = "lifecycle";

/// Chooses the workers for a request.
pub(crate) static ROUTER: World = World {
    name: "router",
    slot: SlotKind::Routing,
    rows: "candidates",
    decides: ("routing", "route"),
    imports: &["request", "candidates", "links", "routing-answer", "outcomes", "state", "clock", "entropy", "telemetry"],
    probes: &[1, 4, 64],
    tried: Tried::with::<RouteCall>(),
};

/// Lets requests in, orders them, or sheds them.
pub(crate) static ADMISSION: World = World {
    name: "admission",
    slot: SlotKind::Admission,
    rows: "pools",
    decides: ("admitting", "admit"),
    imports: &["request", "admission-pools", "admission-answer", "outcomes", "state", "clock", "entropy", "telemetry"],
    probes: &[1, 2, 8],
    tried: Tried::with::<AdmissionCall>(),
};

impl World {
    /// The worlds whose policies this host runs.
    pub const ALL: [&'static Self; 2] = [&ROUTER, &ADMISSION];

    /// The world whose policies decide in slots of a kind.
    #[must_use]
    pub fn of_slot(kind: SlotKind) -> Option<&'static Self> {
        Self::ALL.into_iter().find(|world| world.slot == kind)
    }
}

impl fmt::Display for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "World({self})")
    }
}

impl Serialize for World {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
