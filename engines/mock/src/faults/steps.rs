//! Steps: one request's tokens as they come, and what goes wrong on the way.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures_core::future::BoxFuture;
use tokio::sync::watch;

use super::{Pace, Strike, Switches};
use crate::driver::{Output, Outputs};

/// What comes next of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// A token; with a tear, its event is the last of which anything comes.
    Token(Output, Option<Tear>),
    /// The end after the last token; the same of its events.
    Done(Option<Tear>),
    /// An error event, and the end.
    ErrorEvent,
    /// An end without a word.
    End,
    /// The engine is gone.
    Stopped,
}

/// The KV that a request was to go on from is not to be had, and it is not computed instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FetchFailed;

/// Where a connection is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tear {
    /// In the middle.
    Middle,
    /// Within a character of several bytes, if there is one.
    Character,
}

/// The steps of a request.
pub(crate) struct Steps {
    outputs: Outputs,
    strike: Strike,
    switches: Arc<Switches>,
    pace: watch::Receiver<Pace>,
    /// Tokens so far.
    tokens: u32,
    /// It made the engine hang or die already.
    is_spent: bool,
    /// While its KV is fetched from another engine: ready when it is there, or is computed; an error if it is not to be had.
    fetching: Option<BoxFuture<'static, Result<(), FetchFailed>>>,
    /// While the engine generates nothing: ready when it goes on.
    resumed: Option<BoxFuture<'static, ()>>,
}

impl Steps {
    pub(crate) fn new(outputs: Outputs, strike: Strike, switches: Arc<Switches>) -> Self {
        Self { outputs, strike, pace: switches.pace(), switches, tokens: 0, is_spent: false, fetching: None, resumed: None }
    }

    /// Its KV comes from another engine.
    pub(crate) fn after(self, fetching: impl Future<Output = Result<(), FetchFailed>> + Send + 'static) -> Self {
        Self { fetching: Some(Box::pin(fetching)), ..self }
    }

    /// The next step. After one that is no token, or has a tear, there is none.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Step> {
        if let Some(faults) = self.switches.still(&self.strike) {
            let is_due = |after: Option<u32>| after.is_some_and(|tokens| tokens <= self.tokens);
            if is_due(faults.error_event) {
                return Poll::Ready(Step::ErrorEvent);
            }
            if is_due(faults.end) {
                return Poll::Ready(Step::End);
            }
            // At once, they were done when they were set.
            let is_due = |after: Option<u32>| !self.is_spent && after.is_some_and(|after| after > 0 && after <= self.tokens);
            let (dies, hangs, wedges) = (is_due(faults.die), is_due(faults.hang), is_due(faults.wedge));
            self.is_spent |= dies || hangs || wedges;
            if dies {
                self.switches.die();
                return Poll::Ready(Step::Stopped);
            }
            if hangs {
                self.switches.hang();
            }
            if wedges {
                self.switches.wedge();
            }
        }
        ready!(self.poll_resumed(cx));
        if let Some(fetching) = &mut self.fetching {
            if ready!(fetching.as_mut().poll(cx)).is_err() {
                return Poll::Ready(Step::ErrorEvent);
            }
            self.fetching = None;
        }
        let tear = self.tear();
        Poll::Ready(match ready!(self.outputs.poll_next(cx)) {
            Ok(Some(output)) => {
                self.tokens += 1;
                Step::Token(output, tear)
            }
            Ok(None) => Step::Done(tear),
            Err(_) => Step::Stopped,
        })
    }

    /// The same, waiting.
    pub(crate) async fn next(&mut self) -> Step {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// Tokens that were generated before the engine hung do not come until it goes on.
    fn poll_resumed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let is_paused = |pace: &Pace| pace.is_paused && !pace.is_dead;
        while is_paused(&self.pace.borrow()) {
            let resumed = self.resumed.get_or_insert_with(|| {
                let mut pace = self.pace.clone();
                Box::pin(async move { drop(pace.wait_for(|pace| !is_paused(pace)).await) })
            });
            ready!(Pin::new(resumed).poll(cx));
            self.resumed = None;
        }
        Poll::Ready(())
    }

    fn tear(&self) -> Option<Tear> {
        let faults = self.switches.still(&self.strike)?;
        let is_due = |after: Option<u32>| after.is_some_and(|tokens| tokens <= self.tokens);
        if is_due(faults.cut_character) {
            return Some(Tear::Character);
        }
        is_due(faults.cut).then_some(Tear::Middle)
    }
}
