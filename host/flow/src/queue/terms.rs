//! What the queue is asked and what it answers: its terms, for whoever owns it.

use dynamo_host_core::Admitted;

/// One request's place, from its arrival to its end. Never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket {
    pub(super) number: u64,
    pub(super) slot: u32,
}

/// What a request asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Demand {
    /// Key of the pool that shall serve it.
    pub pool: u64,
    /// Key of its tenant; 0 for nobody's.
    pub tenant: u64,
    /// How it was let in.
    pub admitted: Admitted,
    /// Tokens of its prompt: what it takes of a queue's and of a pool's bound in tokens.
    pub prompt_tokens: u32,
    /// Tokens of work that it is expected to be, prompt and output: what fair shares are counted in.
    pub work: u32,
    /// When it must have been started, in milliseconds of the host's clock; or sooner, if it was admitted for less.
    pub deadline_ms: u64,
}

/// What became of a request that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It runs: there was room, and nobody before it.
    Started(Ticket),
    /// It waits.
    Queued(Ticket),
}

/// Why a request cannot wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Too many requests wait.
    #[error("{max} requests wait already")]
    Requests {
        /// The bound.
        max: u32,
    },
    /// Too many tokens wait.
    #[error("the prompts of those that wait already, with this one, have more than {max} tokens")]
    Tokens {
        /// The bound.
        max: u64,
    },
    /// Its deadline is over.
    #[error("its deadline is over")]
    Late,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Let it run.
    Start(Ticket),
    /// Its deadline is over.
    Expire(Ticket),
    /// The queue is full, and another with a better claim has taken its place.
    Refuse(Ticket),
}
