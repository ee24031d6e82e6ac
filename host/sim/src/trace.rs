//! Traces: when requests came, how long their prompts and outputs were, and which prefixes they share.
//!
//! Two formats are read, told apart by their content: Mooncake's JSON lines ([`mooncake`]), which have prefixes, and
//! Azure's CSV ([`azure`]), which has none. [`synthetic`] makes traces of any size.

mod azure;
mod mooncake;
pub mod synthetic;

use std::{fs, path::Path, time::Duration};

use crate::prompt::Segment;

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceRequest {
    /// When it comes, since the start of the trace.
    pub at: Duration,
    /// What its prompt is made of.
    pub prompt: Box<[Segment]>,
    /// Tokens of output, at least 1.
    pub output_tokens: u32,
    /// The session that it is a turn of.
    pub session: Option<u32>,
}

impl TraceRequest {
    /// Tokens of its prompt.
    #[must_use]
    pub fn prompt_tokens(&self) -> u32 {
        self.prompt.iter().fold(0, |sum, segment| sum.saturating_add(segment.tokens))
    }
}

/// Requests in the order in which they come.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// What it is called in reports.
    pub name: String,
    /// Its requests.
    pub requests: Vec<TraceRequest>,
}

/// A trace that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// No such file, or it is not text.
    #[error("trace {file:?} cannot be read: {reason}; name a Mooncake JSONL or an Azure CSV file, or synthetic:requests=N")]
    Unreadable {
        /// The file.
        file: String,
        /// What the system said.
        reason: String,
    },
    /// Neither format.
    #[error("trace {file:?} is of no known format; its first line is to be {}, or {}", mooncake::EXPECTED, azure::EXPECTED)]
    UnknownFormat {
        /// The file.
        file: String,
    },
    /// A line that is not what it should be.
    #[error("trace {file:?} line {line}: {reason}; a line is {expected}")]
    Line {
        /// The file.
        file: String,
        /// Which line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
        /// What lines are like.
        expected: &'static str,
    },
    /// Nothing in it.
    #[error("trace {file:?} holds no request")]
    Empty {
        /// The file.
        file: String,
    },
    /// Options of a synthetic trace that cannot be.
    #[error("synthetic trace: {reason}; use synthetic:KEY=VALUE,… with {}", synthetic::Synthetic::KEYS)]
    Synthetic {
        /// What is wrong.
        reason: String,
    },
}

/// What is wrong with a line.
type Broken = String;

impl Trace {
    /// Reads a file, or makes a trace of `synthetic:KEY=VALUE,…` with this seed.
    ///
    /// # Errors
    /// Says what cannot be read, with the line and what was expected of it.
    pub fn open(source: &str, seed: u64) -> Result<Self, TraceError> {
        if let Some(options) = source.strip_prefix("synthetic:").or_else(|| (source == "synthetic").then_some("")) {
            return Ok(synthetic::Synthetic::parse(options)?.generate(source, seed));
        }
        let unreadable = |reason: String| TraceError::Unreadable { file: source.to_owned(), reason };
        let text = fs::read_to_string(source).map_err(|error| unreadable(error.to_string()))?;
        let name = Path::new(source).file_name().map_or(source.into(), |name| name.to_string_lossy()).into_owned();
        Self::parse(&name, &text)
    }

    /// Reads the text of a trace.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn parse(name: &str, text: &str) -> Result<Self, TraceError> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let first =
            text.lines().find(|line| !line.trim().is_empty()).ok_or_else(|| TraceError::Empty { file: name.to_owned() })?;
        let (requests, expected) = if first.trim_start().starts_with('{') {
            (mooncake::read(text), mooncake::EXPECTED)
        } else if azure::is_header(first) {
            (azure::read(text), azure::EXPECTED)
        } else {
            return Err(TraceError::UnknownFormat { file: name.to_owned() });
        };
        let mut requests =
            requests.map_err(|(line, reason)| TraceError::Line { file: name.to_owned(), line, reason, expected })?;
        // Stable: requests of one moment stay in the order of the file.
        requests.sort_by_key(|request| request.at);
        let start = requests.first().ok_or_else(|| TraceError::Empty { file: name.to_owned() })?.at;
        requests.iter_mut().for_each(|request| request.at -= start);
        Ok(Self { name: name.to_owned(), requests })
    }

    /// Keeps the first `limit` requests.
    pub fn truncate(&mut self, limit: usize) {
        self.requests.truncate(limit);
    }

    /// Tokens of the longest request, prompt and output together.
    #[must_use]
    pub fn longest(&self) -> u32 {
        self.requests.iter().map(|request| request.prompt_tokens().saturating_add(request.output_tokens)).max().unwrap_or(0)
    }

    /// From the first request to the last.
    #[must_use]
    pub fn span(&self) -> Duration {
        self.requests.last().map_or(Duration::ZERO, |request| request.at)
    }
}

#[cfg(test)]
mod tests;
