//! The rules by which a stream of frames is relayed and ended, apart from the network.
//!
//! Invariants:
//! - whole frames pass verbatim and in order; nothing passes after the item that ends the stream;
//! - a good stream ends with the event that ends one in its API (`[DONE]`, `message_stop`, `response.completed`): the
//!   engine's own, or ours if the engine ended the stream after a finish reason without one (`transformers serve`);
//! - a stream without a finish reason is incomplete, `[DONE]` or not, and its `[DONE]` does not pass, so that the
//!   host can carry the stream on elsewhere;
//! - an error object ends the stream, `[DONE]` after it or not (vLLM sends both when its core dies, then a clean
//!   end), and is not relayed; what came before it in the same read is;
//! - what was cut off within a frame is not relayed: the client must not see half a token.
//!
//! How many choices a request asked for (`n`) is not known here: one that finished counts as finished. An engine
//! that drops some of several choices is found out by the host, which counts [`finishes`](dynamo_engine_api::Summary).

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use dynamo_engine_api::{Chunk, Endpoint, EngineError, Summary, sse::Framer};

/// One stream's way from what was read to what is relayed.
pub(crate) struct Relay {
    engine: Arc<str>,
    endpoint: Endpoint,
    framer: Framer,
    finished: bool,
    over: bool,
    ready: VecDeque<Result<Chunk, EngineError>>,
}

impl Relay {
    pub(crate) fn new(engine: Arc<str>, endpoint: Endpoint) -> Self {
        Self { engine, endpoint, framer: Framer::default(), finished: false, over: false, ready: VecDeque::new() }
    }

    /// Takes what was read.
    pub(crate) fn read(&mut self, bytes: Bytes) {
        if self.over {
            return;
        }
        match self.framer.push(bytes) {
            Ok(Some(chunk)) => self.relay(chunk),
            Ok(None) => {}
            Err(too_large) => self.fail(|engine| EngineError::Protocol { engine, reason: too_large.to_string() }),
        }
    }

    /// The engine ended its answer as HTTP wants it.
    pub(crate) fn end(&mut self) {
        if self.over {
            return;
        }
        // A last frame that lacks its blank line is whole if it can be read; anything else was cut off.
        if let Some(last) = self.framer.finish().filter(|last| last.summary != Summary::default()) {
            self.relay(last);
        }
        match (self.over, self.finished) {
            (true, _) => {}
            (false, true) => self.done(Chunk::done(self.endpoint)),
            (false, false) => self.fail(|engine| EngineError::Incomplete { engine }),
        }
    }

    /// The connection broke.
    pub(crate) fn broke(&mut self, reason: String) {
        if !self.over {
            self.fail(|engine| EngineError::Broken { engine, reason });
        }
    }

    /// The next item to relay.
    pub(crate) fn next(&mut self) -> Option<Result<Chunk, EngineError>> {
        self.ready.pop_front()
    }

    /// Whether what is read from now on does not matter.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }

    fn relay(&mut self, chunk: Chunk) {
        let Some(ending) = chunk.ending() else {
            self.finished |= chunk.summary.finishes > 0;
            self.ready.push_back(Ok(chunk));
            return;
        };
        let before = chunk.clone().until(ending.at.start);
        self.finished |= before.as_ref().is_some_and(|before| before.summary.finishes > 0);
        self.finished |= ending.summary.finishes > 0;
        let refused = ending.summary.refused;
        match (ending.summary.error, chunk.until(ending.at.end)) {
            (None, Some(to_the_end)) if self.finished => self.done(to_the_end),
            (error, _) => {
                self.ready.extend(before.map(Ok));
                self.fail(|engine| match error {
                    Some(message) => EngineError::InStream { engine, message, refused },
                    None => EngineError::Incomplete { engine },
                });
            }
        }
    }

    fn done(&mut self, chunk: Chunk) {
        self.over = true;
        self.ready.push_back(Ok(chunk));
    }

    fn fail(&mut self, error: impl FnOnce(String) -> EngineError) {
        self.over = true;
        self.ready.push_back(Err(error(self.engine.to_string())));
    }
}

#[cfg(test)]
mod tests;
