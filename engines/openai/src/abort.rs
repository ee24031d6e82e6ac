//! Cancellation by name, for engines that take seconds to notice a closed connection (SGLang: 2 s).
//!
//! Contract: a request carries an id of ours; a guard that goes without having been told of the request's end has the
//! engine told to abort it. Telling is bounded in number and time, and is best effort: the closed connection ends
//! the request all the same, later. Ids are unique and of one length, since SGLang aborts whatever *begins* with one.

use std::{
    collections::hash_map::RandomState,
    hash::BuildHasher as _,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use dynamo_engine_api::{Chunk, ChunkStream, EngineError};
use futures_core::Stream;
use futures_util::{StreamExt as _, stream};
use tokio::{sync::mpsc, task::JoinSet};

use crate::control::Control;

/// Aborts that wait to be sent; beyond them the engine finds out by itself.
const QUEUE: usize = 1024;
/// Aborts that are under way at once.
const AT_ONCE: usize = 8;

/// The aborts of one engine.
#[derive(Debug)]
pub(crate) struct Aborts {
    control: Arc<Control>,
    /// Of this process among all that speak to the engine.
    host: u64,
    requests: AtomicU64,
    /// Made with the first request, since it needs a runtime.
    sender: OnceLock<Sender>,
}

#[derive(Debug)]
struct Sender {
    queue: mpsc::Sender<Abort>,
    _task: JoinSet<()>,
}

/// What ends a request: a path, and what is told there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Abort {
    pub(crate) path: &'static str,
    pub(crate) body: String,
}

impl Aborts {
    pub(crate) fn new(control: Arc<Control>) -> Self {
        let host = RandomState::new().hash_one(std::process::id());
        Self { control, host, requests: AtomicU64::new(0), sender: OnceLock::new() }
    }

    /// An id that no other request to this engine has.
    pub(crate) fn request_id(&self) -> String {
        format!("{:016x}{:016x}", self.host, self.requests.fetch_add(1, Ordering::Relaxed))
    }

    /// Sends `abort` unless the guard hears of the request's end. Needs a tokio runtime.
    pub(crate) fn unless_ended(&self, abort: Abort) -> Guard {
        let sender = self.sender.get_or_init(|| Sender::start(self.control.clone()));
        Guard { queue: sender.queue.clone(), abort: Some(abort) }
    }
}

impl Sender {
    fn start(control: Arc<Control>) -> Self {
        let (queue, aborts) = mpsc::channel(QUEUE);
        let aborts = stream::unfold(aborts, |mut aborts| async { Some((aborts.recv().await?, aborts)) });
        let sending = aborts.for_each_concurrent(AT_ONCE, move |abort: Abort| {
            let control = control.clone();
            // Whether it arrived makes no difference to anybody here.
            async move { drop(control.post(abort.path, abort.body).await) }
        });
        let mut task = JoinSet::new();
        task.spawn(sending);
        Self { queue, _task: task }
    }
}

/// A request under way.
#[derive(Debug)]
pub(crate) struct Guard {
    queue: mpsc::Sender<Abort>,
    abort: Option<Abort>,
}

impl Guard {
    /// The engine has ended the request, or never got it.
    pub(crate) fn ended(&mut self) {
        self.abort = None;
    }

    /// Guards a stream until its last chunk.
    pub(crate) fn over(self, chunks: ChunkStream) -> ChunkStream {
        Box::pin(Guarded { chunks, guard: self })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(abort) = self.abort.take() {
            let _ = self.queue.try_send(abort);
        }
    }
}

struct Guarded {
    // Dropped first: the connection is closed before the engine is told.
    chunks: ChunkStream,
    guard: Guard,
}

impl Stream for Guarded {
    type Item = Result<Chunk, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let polled = self.chunks.poll_next_unpin(context);
        if matches!(&polled, Poll::Ready(Some(Ok(chunk))) if chunk.summary.done) {
            self.guard.ended();
        }
        polled
    }
}
