//! Faults: why a policy did not decide, under a name that operators count by.

use std::fmt;

use dynamo_host_core::{AnswerFault, admission};
use wasmtime::Trap;

/// Why a policy did not decide. The text of each is a metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FaultCause {
    /// It trapped: a panic, a failed assertion, an access out of bounds.
    Trap,
    /// It used up its fuel: a loop, or too much work.
    Fuel,
    /// It asked for more memory or table elements than it may have.
    Memory,
    /// It used up its stack: deep recursion.
    Stack,
    /// It gave the host more in one call than it may.
    ArgumentBytes,
    /// The backstop ended it. Not held against it: its thread may have been pre-empted.
    HostStall,
    /// No instance was free and no more may be made. Not held against it.
    Busy,
    /// A new instance could not be made or configured.
    Instantiate,
    /// It was rolled back while the request was under way.
    Revoked,
    /// Its answer cannot be carried out; the label says in what way.
    Answer(&'static str),
    /// It held the request as often as it may.
    HoldExhausted,
    /// It failed too often lately and is not asked for a while.
    Quarantined,
    /// The slot should hold a policy, and it could not be brought back at the start.
    Missing,
}

impl FaultCause {
    /// Metric label.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Trap => "trap",
            Self::Fuel => "fuel",
            Self::Memory => "memory",
            Self::Stack => "stack",
            Self::ArgumentBytes => "argument-bytes",
            Self::HostStall => "host-stall",
            Self::Busy => "busy",
            Self::Instantiate => "instantiate",
            Self::Revoked => "revoked",
            Self::Answer(cause) => cause,
            Self::HoldExhausted => "hold-exhausted",
            Self::Quarantined => "quarantined",
            Self::Missing => "missing",
        }
    }

    /// Whether the policy is to blame, so that it counts towards its quarantine.
    #[must_use]
    pub fn is_the_policys_own(self) -> bool {
        match self {
            Self::Trap | Self::Fuel | Self::Memory | Self::Stack | Self::ArgumentBytes | Self::HoldExhausted => true,
            // To abstain is a policy's right.
            Self::Answer(cause) => cause != AnswerFault::NoAnswer.cause(),
            Self::HostStall | Self::Busy | Self::Instantiate | Self::Revoked | Self::Quarantined | Self::Missing => false,
        }
    }
}

impl fmt::Display for FaultCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A decision that a policy failed to make.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{cause}: {detail}")]
pub struct PolicyFault {
    /// Under what name it is counted.
    pub cause: FaultCause,
    /// For the operator: what happened, in the guest's words where it said any.
    pub detail: String,
}

impl From<AnswerFault> for PolicyFault {
    fn from(fault: AnswerFault) -> Self {
        Self { cause: FaultCause::Answer(fault.cause()), detail: fault.to_string() }
    }
}

impl From<admission::AnswerFault> for PolicyFault {
    fn from(fault: admission::AnswerFault) -> Self {
        Self { cause: FaultCause::Answer(fault.cause()), detail: fault.to_string() }
    }
}

/// How the host ends a call from within: carried through the guest as an error.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("it asked for more than {limit} bytes of memory")]
    Memory { limit: usize },
    #[error("it asked for more than {limit} table elements")]
    Table { limit: usize },
    #[error("it called {function} outside of {allowed}")]
    OutOfPlace { function: &'static str, allowed: &'static str },
}

impl PolicyFault {
    /// Reads what a call into the guest failed with. `said` is the guest's last error message, usually its panic.
    pub(crate) fn of(error: &wasmtime::Error, said: Option<String>) -> Self {
        let (cause, detail) = if let Some(refusal) = error.downcast_ref::<Refusal>() {
            let cause = match refusal {
                Refusal::Memory { .. } | Refusal::Table { .. } => FaultCause::Memory,
                Refusal::OutOfPlace { .. } => FaultCause::Trap,
            };
            (cause, refusal.to_string())
        } else {
            match error.downcast_ref::<Trap>() {
                Some(Trap::OutOfFuel) => {
                    (FaultCause::Fuel, "it used up its fuel: an endless loop, or more work than one decision may take".to_owned())
                }
                Some(Trap::Interrupt) => (FaultCause::HostStall, "it was interrupted by the backstop".to_owned()),
                Some(Trap::StackOverflow) => (FaultCause::Stack, "it used up its stack".to_owned()),
                // Toolchains put the guest's own stack at the bottom of its memory, so that this is what overflowing it looks like.
                Some(trap @ Trap::MemoryOutOfBounds) => {
                    (FaultCause::Trap, format!("{trap}, which is also how a stack overflow within linear memory shows"))
                }
                Some(trap) => (FaultCause::Trap, trap.to_string()),
                // wasmtime has no type for this one.
                None if error.root_cause().to_string().contains("too much data is being copied") => {
                    (FaultCause::ArgumentBytes, "it gave the host more in one call than it may".to_owned())
                }
                None => (FaultCause::Trap, error.root_cause().to_string()),
            }
        };
        let detail = match said {
            Some(said) => format!("{detail}; it said: {said}"),
            None => detail,
        };
        Self { cause, detail }
    }
}
