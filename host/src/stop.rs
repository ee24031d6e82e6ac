//! How the host ends: the phases of a graceful stop, and what becomes of the requests that it finds running.
//!
//! *Leaving*: `/ready` says no, and all is served still, for balancers that need time to see it. *Draining*: new requests are
//! answered 503; those that are here, in the queue too, run on. *Over*, when none is left or their time is: an answer
//! that has not begun is a 503, a stream ends with an error event and without `[DONE]`; nobody is cut in silence.
//! Each answer from *leaving* on closes its connection, so that clients go elsewhere.
//!
//! Whoever waits looks at the phase when it is polled, and registers for nothing: a request lives in its connection's
//! task, which is woken when it is over (`listener`). A token costs one atomic read.

use std::{
    convert::Infallible,
    future::poll_fn,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::{Body, BodyDataStream, HttpBody},
    response::Response,
};
use bytes::Bytes;
use dynamo_engine_api::Endpoint;
use futures_core::Stream;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    time::Instant,
};

use crate::error::{Audience, RequestError};

/// How often is looked whether the last request has ended.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// How long clients have at least to take their last words, and how long after a second signal.
const LAST_WORDS: Duration = Duration::from_secs(2);
const LAST_WORDS_AT_ONCE: Duration = Duration::from_millis(250);

/// Where the host stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Phase {
    Serving,
    Leaving,
    Draining,
    Over,
}

/// A signal to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    Interrupt,
    Terminate,
}

impl Signal {
    /// What shells report for whoever is ended by it.
    pub(crate) fn exit_code(self) -> u8 {
        match self {
            Self::Interrupt => 130,
            Self::Terminate => 143,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Interrupt => "SIGINT",
            Self::Terminate => "SIGTERM",
        }
    }
}

/// The signals to stop, heard from now on.
pub(crate) struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    /// # Errors
    /// If the system gives no handlers; the signals then end the process at once.
    pub(crate) fn hear() -> std::io::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// The next one.
    pub(crate) async fn next(&mut self) -> Signal {
        tokio::select! {
            Some(()) = self.interrupt.recv() => Signal::Interrupt,
            Some(()) = self.terminate.recv() => Signal::Terminate,
            else => std::future::pending().await,
        }
    }
}

/// Where the host stands between serving and its end, and how many requests it has.
#[derive(Clone)]
pub(crate) struct Stopping(Arc<Shared>);

struct Shared {
    phase: AtomicU8,
    told: watch::Sender<Phase>,
    running: AtomicUsize,
}

/// A request that is here; dropping it tells that it has ended.
pub(crate) struct Running(Stopping);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.0.running.fetch_sub(1, SeqCst);
    }
}

impl Stopping {
    pub(crate) fn serving() -> Self {
        let phase = AtomicU8::new(Phase::Serving as u8);
        Self(Arc::new(Shared { phase, told: watch::Sender::new(Phase::Serving), running: AtomicUsize::new(0) }))
    }

    pub(crate) fn has_reached(&self, phase: Phase) -> bool {
        self.0.phase.load(SeqCst) >= phase as u8
    }

    fn advance(&self, phase: Phase) {
        self.0.phase.store(phase as u8, SeqCst);
        self.0.told.send_replace(phase);
    }

    /// Waits for a phase.
    pub(crate) async fn reached(&self, phase: Phase) {
        // The sender is in our hands.
        drop(self.0.told.subscribe().wait_for(|now| *now >= phase).await);
    }

    /// Lets a new request in.
    ///
    /// # Errors
    /// From *draining* on.
    pub(crate) fn enter(&self) -> Result<Running, RequestError> {
        self.0.running.fetch_add(1, SeqCst);
        // Counted before the look: whoever drains sees it, or is seen.
        let running = Running(self.clone());
        if self.has_reached(Phase::Draining) { Err(RequestError::ShuttingDown) } else { Ok(running) }
    }

    /// Goes through the phases. Returns how long clients may take to read their last words, and the second signal if one came.
    pub(crate) async fn wind_down(&self, delay: Duration, grace: Duration, signals: &mut Signals) -> (Duration, Option<Signal>) {
        // Whoever reads that the host is not ready can rely on it: without a delay nothing lies between.
        self.advance(if delay.is_zero() { Phase::Draining } else { Phase::Leaving });
        let until = Instant::now() + delay + grace;
        let phases = async {
            tokio::time::sleep(delay).await;
            self.advance(Phase::Draining);
            while Instant::now() < until && self.0.running.load(SeqCst) > 0 {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        let second = tokio::select! {
            () = phases => None,
            signal = signals.next() => Some(signal),
        };
        let running = self.0.running.load(SeqCst);
        if running > 0 {
            tracing::warn!("{running} requests outlive their time and are ended; raise limits.drain_s to give them more");
        }
        self.advance(Phase::Over);
        let left = until.saturating_duration_since(Instant::now());
        (if second.is_some() { LAST_WORDS_AT_ONCE } else { left.max(LAST_WORDS) }, second)
    }

    /// Runs a request's work until it is over.
    pub(crate) async fn unless_over<T>(&self, work: impl Future<Output = Result<T, RequestError>>) -> Result<T, RequestError> {
        let mut work = pin!(work);
        poll_fn(|context| match work.as_mut().poll(context) {
            Poll::Pending if self.has_reached(Phase::Over) => Poll::Ready(Err(RequestError::ShuttingDown)),
            other => other,
        })
        .await
    }
}

/// An answer that says so if its end is not its own. What is known to its end needs nobody to say so.
pub(crate) fn with_last_words(response: Response, running: Running, endpoint: Endpoint, audience: Audience) -> Response {
    let (head, body) = response.into_parts();
    if HttpBody::size_hint(&body).exact().is_some() {
        return Response::from_parts(head, body);
    }
    let body = LastWords { inner: Some(body.into_data_stream()), running, endpoint, audience };
    Response::from_parts(head, Body::from_stream(body))
}

struct LastWords {
    /// `None` when the stream has ended.
    inner: Option<BodyDataStream>,
    running: Running,
    endpoint: Endpoint,
    audience: Audience,
}

impl Stream for LastWords {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(inner) = &mut self.inner else { return Poll::Ready(None) };
        let polled = Pin::new(inner).poll_next(context);
        match polled {
            // One that goes on must not go on for ever; what it says now could be all but its end.
            Poll::Ready(Some(Ok(chunk))) if !self.running.0.has_reached(Phase::Over) => Poll::Ready(Some(Ok(chunk))),
            Poll::Pending if !self.running.0.has_reached(Phase::Over) => Poll::Pending,
            Poll::Ready(None | Some(Err(_))) => {
                self.inner = None;
                Poll::Ready(None)
            }
            _ => {
                self.inner = None;
                let error = RequestError::ShuttingDown;
                error.record();
                Poll::Ready(Some(Ok(error.event(self.endpoint, self.audience))))
            }
        }
    }
}
