//! A response body as a stream of chunks.
//!
//! Invariant: once the stream has failed, or is dropped, its connection is closed. After the last chunk the connection
//! goes back to the pool if the engine ends its HTTP answer, too, which takes one more poll; so poll to the end.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use dynamo_engine_api::{Chunk, ChunkStream, Endpoint, EngineError};
use futures_core::Stream;
use tokio::time::Sleep;

use crate::{pool::Body, relay::Relay};

/// How long an engine may take from its last event to the end of its HTTP answer before its connection is given up.
/// Servers write both at once, or a moment apart (uvicorn).
const TAIL_TIMEOUT: Duration = Duration::from_millis(100);

/// Relays `body` by the rules in [`Relay`].
pub(crate) fn chunks(engine: Arc<str>, endpoint: Endpoint, body: Body) -> ChunkStream {
    Box::pin(Source { relay: Relay::new(engine, endpoint), body, tail: None })
}

struct Source {
    relay: Relay,
    body: Body,
    /// Runs while the end of the HTTP answer is waited for.
    tail: Option<Pin<Box<Sleep>>>,
}

impl Source {
    /// Ready when the connection may be kept, or is not worth the wait.
    fn poll_tail(&mut self, context: &mut Context<'_>) -> Poll<()> {
        while let Poll::Ready(read) = Pin::new(&mut self.body).poll_next(context) {
            if !matches!(read, Some(Ok(_))) {
                return Poll::Ready(());
            }
        }
        let tail = self.tail.get_or_insert_with(|| Box::pin(tokio::time::sleep(TAIL_TIMEOUT)));
        ready!(tail.as_mut().poll(context));
        self.body.give_up();
        Poll::Ready(())
    }
}

impl Stream for Source {
    type Item = Result<Chunk, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let source = &mut *self;
        loop {
            if let Some(item) = source.relay.next() {
                if item.is_err() {
                    source.body.give_up();
                }
                return Poll::Ready(Some(item));
            }
            if source.body.is_over() {
                return Poll::Ready(None);
            }
            if source.relay.is_over() {
                ready!(source.poll_tail(context));
                return Poll::Ready(None);
            }
            match ready!(Pin::new(&mut source.body).poll_next(context)) {
                Some(Ok(piece)) => source.relay.read(piece),
                Some(Err(failure)) => source.relay.broke(failure.to_string()),
                None => source.relay.end(),
            }
        }
    }
}
