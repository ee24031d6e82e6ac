//! The contract's open codes by name.
//!
//! They are `u32` and not enums because later hosts may add values: treat one that you do not know as "something else",
//! never as an error.

/// What is asked of the engine: values of [`Request::endpoint`](crate::Request::endpoint).
pub mod endpoint {
    /// A chat completion.
    pub const CHAT_COMPLETION: u32 = 0;
    /// A text completion.
    pub const TEXT_COMPLETION: u32 = 1;
    /// An embedding.
    pub const EMBEDDING: u32 = 2;
    /// A response, in the sense of the Responses API.
    pub const RESPONSE: u32 = 3;
    /// A message, in the sense of the Messages API.
    pub const MESSAGE: u32 = 4;
    /// A count of the tokens that a message would have. Hosts of release 0.1.0 have no such requests.
    pub const TOKEN_COUNT: u32 = 5;
}

/// Which part of the work is being placed: values of [`Request::stage`](crate::Request::stage).
pub mod stage {
    /// Prefill and decode on one worker.
    pub const WHOLE: u32 = 0;
    /// Prefill alone.
    pub const PREFILL: u32 = 1;
    /// Decode alone.
    pub const DECODE: u32 = 2;
}

/// Bits of [`Request::flags`](crate::Request::flags).
pub mod flags {
    /// The answer is streamed.
    pub const STREAM: u32 = 1;
    /// The request offers tools.
    pub const TOOLS: u32 = 2;
    /// Output is guided: constrained to a grammar or schema.
    pub const GUIDED: u32 = 4;
    /// Log probabilities are asked for.
    pub const LOGPROBS: u32 = 8;
    /// The session's last request.
    pub const SESSION_FINAL: u32 = 16;
    /// The input is a tool's result.
    pub const TOOL_RESULT: u32 = 32;
}

/// What work a worker does: values of [`Candidates::role`](crate::Candidates::role).
pub mod role {
    /// Prefill and decode.
    pub const AGGREGATED: u32 = 0;
    /// Prefill alone.
    pub const PREFILL: u32 = 1;
    /// Decode alone.
    pub const DECODE: u32 = 2;
    /// All of it: whole requests, prefill for others, decode of what others have prefilled. Since 0.1.3.
    pub const BOTH: u32 = 3;
}

/// How a worker fares: values of [`Candidates::state`](crate::Candidates::state).
pub mod worker_state {
    /// It answers.
    pub const HEALTHY: u32 = 0;
    /// It failed recently and is still tried.
    pub const SUSPECT: u32 = 1;
}

/// Levels of placement domains, for [`Candidates::topology`](crate::Candidates::topology).
pub mod topology {
    /// One machine.
    pub const HOST: u32 = 0;
    /// Machines of one rack.
    pub const RACK: u32 = 1;
    /// Racks of one zone.
    pub const ZONE: u32 = 2;
    /// Zones of one region.
    pub const REGION: u32 = 3;
}

/// How an attempt ended: values of [`Outcomes::end`](crate::Outcomes::end).
pub mod end {
    /// The answer is complete.
    pub const DONE: u32 = 0;
    /// The client cancelled it.
    pub const CANCELLED: u32 = 1;
    /// The worker failed it.
    pub const FAILED: u32 = 2;
    /// The engine refused it as the client's mistake: it says nothing about the worker.
    pub const REFUSED: u32 = 3;
    /// Its time to wait ran out in the host's queue: it came to no worker. Told to admission alone.
    pub const EXPIRED: u32 = 4;
}
