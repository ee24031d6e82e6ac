//! Leg: one choice's way to its end, over as many workers as it takes.
//!
//! Here is what comes of the worker that has it; who goes on when that is lost is found in [`resume`], and given it in [`give`],
//! or over two workers in [`pair`]. What prompt and output count is in [`count`].
//!
//! Bounds: workers asked (`migration.max_attempts`), the wait while there is none (`health.hold_s`), pauses between attempts
//! that fail, the request's deadline.

mod count;
mod give;
mod pair;
mod resume;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use dynamo_engine_api::{Chunk, ChunkStream, Engine, EngineError};
use dynamo_host_core::{RequestFacts, WorkerId};
use futures_util::StreamExt;
use tokio::time::{Instant as At, timeout_at};

use super::{
    Course,
    ask::{Original, Unsound},
    record::Choice,
    seam::Seam,
    splice::Splice,
    vigil::{LOOK_EVERY, Lost, Vigil},
};
use crate::{account::Account, error::RequestError, handoff::Beside, relay::Patience};

/// How long a worker that has finished a choice may take to say what it counted, and an engine to count for the host.
const TAIL: Duration = Duration::from_secs(1);

/// What all legs of a stream share.
pub(super) struct Shared {
    pub(super) course: Course,
    pub(super) original: Original,
    pub(super) splice: Splice,
}

/// One choice's way to its end.
pub(super) struct Leg {
    shared: Arc<Shared>,
    index: u32,
    choice: Choice,
    facts: RequestFacts,
    /// Workers that it was given to.
    attempts: u32,
    /// Those that failed it, and when.
    failed: Vec<(WorkerId, Instant)>,
    /// What it failed with last, and under which label.
    failure: EngineError,
    cause: &'static str,
    /// Since when its client waits.
    silent_since: Instant,
    is_resumed: bool,
    /// Attempts since something came.
    in_vain: u32,
    /// How long the client's prompt is, by an engine that was told text.
    reckoned: Option<u32>,
    /// Whether its output was counted, where that takes an engine.
    is_counted: bool,
    running: Option<Running>,
}

/// A worker's part of it.
struct Running {
    /// The first chunk, which told that the worker takes it.
    first: Option<Chunk>,
    chunks: ChunkStream,
    engine: Arc<dyn Engine>,
    account: Account,
    vigil: Vigil,
    /// What works beside it.
    _beside: Option<Beside>,
    last: Instant,
    seam: Seam,
    is_by_ids: bool,
    /// Output tokens that its prompt holds.
    before: u32,
    /// Whether they are in its prompt as they were made: text may be cut into other tokens.
    is_exact: bool,
}

/// Frames for the client, and how many tokens they hold.
pub(super) struct Piece {
    pub(super) frames: Bytes,
    pub(super) tokens: u32,
}

impl Leg {
    /// A choice that a worker has failed.
    pub(super) fn new(shared: Arc<Shared>, index: u32, choice: Choice, lost: &super::Loss) -> Self {
        let mut facts = shared.course.facts.clone();
        (facts.choices, facts.prompts, facts.endpoint) = (1, 1, shared.original.endpoint());
        // The one that is lost now is among those that it was given to.
        let now = Instant::now();
        let failed = facts.failed_workers.iter().map(|&worker| (worker, now)).collect();
        let attempts = shared.course.attempts;
        Self {
            index,
            choice,
            facts,
            attempts,
            failed,
            failure: lost.failure.clone(),
            cause: lost.cause,
            silent_since: lost.silent_since,
            is_resumed: false,
            in_vain: 0,
            reckoned: None,
            is_counted: false,
            running: None,
            shared,
        }
    }

    /// What the client gets next; `None`: the choice is finished.
    ///
    /// # Errors
    /// Why it cannot be.
    pub(super) async fn next(&mut self) -> Result<Option<Piece>, RequestError> {
        loop {
            if self.choice.is_finished {
                self.finish().await;
                return Ok(None);
            }
            if self.running.is_none()
                && let Some(frames) =
                    self.resume().await.inspect_err(|error| self.count(if is_unsound(error) { "unsound" } else { "failed" }))?
            {
                return Ok(Some(Piece { frames, tokens: 0 }));
            }
            if let Some(piece) = self.read().await? {
                return Ok(Some(piece));
            }
        }
    }

    fn count(&self, result: &'static str) {
        metrics::counter!("dynamo_host_migrations_total", "cause" => self.cause, "result" => result).increment(1);
    }

    /// Reads a chunk of the worker that has it. `None`: it held nothing for the client, or the worker is lost.
    async fn read(&mut self) -> Result<Option<Piece>, RequestError> {
        let course = &self.shared.course;
        let Some(running) = &mut self.running else { return Ok(None) };
        match running.chunk(course).await {
            Some(Ok(chunk)) => Ok(self.pass(&chunk)),
            Some(Err((_, refusal @ EngineError::InStream { refused: true, .. }))) => {
                running.account.blame(&refusal);
                Err(refusal.into())
            }
            Some(Err((cause, failure))) => {
                self.lose(cause, failure);
                Ok(None)
            }
            None => {
                running.account.fail();
                Err(course.patience.exceeded())
            }
        }
    }

    fn pass(&mut self, chunk: &Chunk) -> Option<Piece> {
        let running = self.running.as_mut()?;
        let now = Instant::now();
        running.account.chunk(chunk, now);
        running.last = now;
        self.hear_usage(chunk);
        let running = self.running.as_mut()?;
        let before = self.choice.tokens;
        let Running { seam, is_by_ids, .. } = running;
        let spliced = self.shared.splice.frames(&chunk.bytes, self.index, &mut self.choice, seam, *is_by_ids);
        if spliced.is_stopped {
            running.account.stop();
        }
        running.account.relayed += now.elapsed();
        if spliced.frames.is_empty() {
            return None;
        }
        if !std::mem::replace(&mut self.is_resumed, true) {
            metrics::histogram!("dynamo_host_migration_pause_seconds").record(now - self.silent_since);
        }
        self.in_vain = 0;
        self.silent_since = now;
        Some(Piece { frames: spliced.frames.into(), tokens: self.choice.tokens.saturating_sub(before) })
    }

    /// The worker that has it is lost.
    fn lose(&mut self, cause: &'static str, failure: EngineError) {
        let Some(Running { chunks, engine, account, .. }) = self.running.take() else { return };
        // The engine is to stop before another begins.
        drop(chunks);
        (self.cause, self.is_resumed) = (cause, false);
        self.fail_at(account, &engine, failure);
    }

    fn unsound(&self, Unsound(reason): Unsound) -> RequestError {
        RequestError::MigrationUnsound { failure: self.failure.clone(), reason }
    }
}

impl Running {
    /// The worker's next chunk, or how it was lost, with the cause's label. `None`: the request's time is over.
    async fn chunk(&mut self, course: &Course) -> Option<Result<Chunk, (&'static str, EngineError)>> {
        if let Some(first) = self.first.take() {
            return Some(Ok(first));
        }
        let Patience { deadline, idle, .. } = course.patience;
        while Instant::now() < deadline {
            let look = (At::now() + LOOK_EVERY).min(deadline.into());
            match timeout_at(look, self.chunks.next()).await {
                Ok(Some(chunk)) => return Some(chunk.map_err(|error| (error.label(), error))),
                Ok(None) => {
                    let error = EngineError::Incomplete { engine: format!("worker {}", self.account.worker()) };
                    return Some(Err((error.label(), error)));
                }
                Err(_) => {}
            }
            let now = Instant::now();
            if let Some(lost) = self.vigil.within(self.last, now, self.account.has_tokens())
                && now < deadline
                && (!matches!(lost, Lost::Stalled { .. }) || course.has_other(self.account.worker_id()))
            {
                return Some(Err((lost.label(), lost.error(self.account.worker(), idle))));
            }
        }
        None
    }
}

fn is_unsound(error: &RequestError) -> bool {
    matches!(error, RequestError::MigrationUnsound { .. })
}
