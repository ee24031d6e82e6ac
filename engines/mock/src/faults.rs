//! Faults: what an engine does wrong when it is told to, at its start or while it runs.
//!
//! Contract: faults are set as a whole; setting none heals what can be healed (not death). Those of the engine concern all
//! that it does; those of a request strike the requests that `share` and `next` pick, by the seed and in the order of
//! arrival, so that the same requests in the same order are struck in every run.
//!
//! Amounts of tokens are those that a struck request had, over its choices: `0` is before the first, or for the engine's own
//! faults at once.

mod steps;
mod switches;

use dynamo_engine_api::sse::DONE_FRAME;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use self::switches::Switches;
pub(crate) use self::{
    steps::{FetchFailed, Step, Steps, Tear},
    switches::{Pace, Strike},
};
use crate::service::ApiError;

/// What an engine does wrong.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Faults {
    /// Of what is random.
    pub seed: u64,
    /// The share of requests that is struck.
    pub share: f64,
    /// How many requests are struck at most; all without.
    pub next: Option<u32>,
    /// It dies after so many tokens, as by SIGKILL. In process, without [`Switches::die_with`]: it stops.
    pub die: Option<u32>,
    /// After so many tokens nothing is answered any more, and nothing goes on: connections are taken, that is all.
    pub hang: Option<u32>,
    /// After so many tokens it generates no more, while all else is answered: probes see nothing.
    pub wedge: Option<u32>,
    /// How many times as long its steps take.
    pub slow: f64,
    /// `GET /health` says 503.
    pub unhealthy: bool,
    /// When it is told to stop it takes no more connections, and its streams stay open and silent for ever.
    pub stall_on_stop: bool,
    /// Requests are refused.
    pub refuse: Option<Refusal>,
    /// After so many tokens comes an error event, then `[DONE]` and a clean end, as from a vLLM whose core died.
    pub error_event: Option<u32>,
    /// After so many tokens the connection is cut within the next event.
    pub cut: Option<u32>,
    /// After so many tokens the connection is cut within the next character of several bytes. There is none in most
    /// outputs but those of `script=wide`.
    pub cut_character: Option<u32>,
    /// After so many tokens the stream ends as HTTP wants it, with no finish reason and no `[DONE]`.
    pub end: Option<u32>,
    /// The answer is 200 with a page of this content type.
    pub content_type: Option<String>,
    /// The head of the answer does not end.
    pub endless_headers: bool,
    /// Prefills for other engines are refused. Of what concerns hand-offs, `share` and `next` pick among prefills for others, or
    /// among fetches.
    pub prefill_refuse: Option<Refusal>,
    /// Prefills for other engines are answered so many milliseconds later.
    pub prefill_delay_ms: Option<u32>,
    /// Prefills for other engines are answered without a word of the KV, and none is kept.
    pub prefill_silent: bool,
    /// Whoever fetches KV has its connection cut within it; the KV stays.
    pub fetch_cut: bool,
    /// It dies when KV is fetched, by it or from it.
    pub fetch_die: Option<FetchMoment>,
}

/// When in a fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FetchMoment {
    /// Before any of the KV came.
    Before,
    /// When half of it came.
    Within,
}

/// What a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Requests of clients.
    Request,
    /// Those that compute a prompt for another engine, besides.
    Prefill,
    /// Fetches of KV.
    Fetch,
}

/// How a request is refused, in vLLM's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// 500: its core died.
    DeadCore,
    /// 500: it was told to stop, and waits for what runs.
    Draining,
    /// 503: its queue is full.
    Busy,
}

/// Faults that an engine cannot have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultError {
    /// A fault that does not exist.
    #[error("mock engine fault {key:?} is not known; use {}", Faults::keys().join(", "))]
    UnknownKey {
        /// Which.
        key: String,
    },
    /// A value that is not possible.
    #[error("mock engine fault {key}={value} is not possible; {reason}")]
    Value {
        /// Of which fault.
        key: String,
        /// What it was.
        value: String,
        /// What it may be.
        reason: String,
    },
    /// Not an object of faults.
    #[error("not a JSON object of mock engine faults: {reason}; {{}} heals it, the keys are {}", Faults::keys().join(", "))]
    Object {
        /// Why not.
        reason: String,
    },
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            seed: 0,
            share: 1.0,
            next: None,
            die: None,
            hang: None,
            wedge: None,
            slow: 1.0,
            unhealthy: false,
            stall_on_stop: false,
            refuse: None,
            error_event: None,
            cut: None,
            cut_character: None,
            end: None,
            content_type: None,
            endless_headers: false,
            prefill_refuse: None,
            prefill_delay_ms: None,
            prefill_silent: false,
            fetch_cut: false,
            fetch_die: None,
        }
    }
}

impl Faults {
    /// Reads a JSON object.
    ///
    /// # Errors
    /// Names what is not known or not possible.
    pub fn from_json(body: &[u8]) -> Result<Self, FaultError> {
        let members: Map<String, Value> =
            serde_json::from_slice(body).map_err(|error| FaultError::Object { reason: error.to_string() })?;
        let mut faults = Self::default();
        for (key, value) in members {
            faults.put(&key, value)?;
        }
        Ok(faults)
    }

    /// Sets one fault from text.
    ///
    /// # Errors
    /// If there is no such fault, or the value is not possible.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), FaultError> {
        let read = serde_json::from_str(value).ok().filter(|read: &Value| read.is_number() || read.is_boolean());
        self.put(key, read.unwrap_or_else(|| value.into()))
    }

    /// Names of all faults.
    #[must_use]
    pub fn keys() -> Vec<String> {
        Self::default().fields().into_iter().map(|(key, _)| key).collect()
    }

    /// As they are written.
    #[must_use]
    pub fn to_json(&self) -> Value {
        Value::Object(self.fields())
    }

    fn put(&mut self, key: &str, value: Value) -> Result<(), FaultError> {
        let mut fields = self.fields();
        let field = fields.get_mut(key).ok_or_else(|| FaultError::UnknownKey { key: key.to_owned() })?;
        let wrong = |reason: String| FaultError::Value { key: key.to_owned(), value: value.to_string(), reason };
        field.clone_from(&value);
        let faults: Self = serde_json::from_value(Value::Object(fields)).map_err(|error| wrong(error.to_string()))?;
        if !(0.0..=1.0).contains(&faults.share) {
            return Err(wrong("use a number from 0 to 1".to_owned()));
        }
        if !(1.0..=1e6).contains(&faults.slow) {
            return Err(wrong("use a factor from 1 to 1000000".to_owned()));
        }
        *self = faults;
        Ok(())
    }

    fn fields(&self) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(fields)) => fields,
            other => unreachable!("a struct serializes to an object, not {other:?}"),
        }
    }

    /// Whether any of them strikes such targets one by one.
    fn strikes(&self, target: Target) -> bool {
        match target {
            Target::Request => self.strikes_requests(),
            Target::Prefill => self.prefill_refuse.is_some() || self.prefill_delay_ms.is_some() || self.prefill_silent,
            Target::Fetch => self.fetch_cut || self.fetch_die.is_some(),
        }
    }

    fn strikes_requests(&self) -> bool {
        let after = [self.die, self.hang, self.wedge].into_iter().flatten().any(|tokens| tokens > 0);
        let within = [self.error_event, self.cut, self.cut_character, self.end].iter().any(Option::is_some);
        after || within || self.refuse.is_some() || self.content_type.is_some() || self.endless_headers
    }
}

impl Refusal {
    pub(crate) fn error(self) -> ApiError {
        match self {
            Self::DeadCore => dead_core(),
            Self::Draining => ApiError::internal("cannot schedule new futures after shutdown"),
            Self::Busy => ApiError::unavailable(
                "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance.",
            ),
        }
    }
}

/// What vLLM says when its core died.
pub(crate) fn dead_core() -> ApiError {
    ApiError::internal(DEAD_CORE)
}

/// The message of it.
pub(crate) const DEAD_CORE: &str = "EngineCore encountered an issue. See stack trace (above) for the root cause.";

/// What it says within a stream: with spaces, since Python wrote it, and the end of a good stream after it.
pub(crate) fn error_event() -> Vec<u8> {
    let status = StatusCode::INTERNAL_SERVER_ERROR.as_u16();
    let event = format!(
        r#"data: {{"error": {{"message": "{DEAD_CORE}", "type": "InternalServerError", "param": null, "code": {status}}}}}"#
    );
    [event.as_bytes(), b"\n\n", DONE_FRAME].concat()
}

#[cfg(test)]
mod tests;
