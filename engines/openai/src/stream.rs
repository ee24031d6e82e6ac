//! A response body as a stream of chunks.
//!
//! Invariant: once the stream has failed, or is dropped, its connection is closed. After `[DONE]` the connection
//! goes back to the pool if the engine ends its HTTP answer, too, which takes one more poll; so poll to the end.

use std::{sync::Arc, time::Duration};

use dynamo_engine_api::{Chunk, ChunkStream, EngineError};
use futures_util::{StreamExt as _, stream};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use tokio::time::timeout;

use crate::{client::root_cause, relay::Relay};

/// How long an engine may take from `[DONE]` to the end of its HTTP answer before its connection is given up.
/// Servers write both at once, or a moment apart (uvicorn).
const TAIL_TIMEOUT: Duration = Duration::from_millis(100);

/// Relays `body` by the rules in [`Relay`].
pub(crate) fn chunks(engine: Arc<str>, body: Incoming) -> ChunkStream {
    let source = Source { relay: Relay::new(engine), body: Some(body) };
    stream::unfold(source, |mut source| async move { Some((source.next().await?, source)) }).fuse().boxed()
}

struct Source {
    relay: Relay,
    /// Absent once nothing is to be read any more.
    body: Option<Incoming>,
}

impl Source {
    async fn next(&mut self) -> Option<Result<Chunk, EngineError>> {
        loop {
            if let Some(item) = self.relay.next() {
                if item.is_err() {
                    self.body = None;
                }
                return Some(item);
            }
            let body = self.body.as_mut()?;
            if self.relay.is_over() {
                // Running out of time here costs a connection, not an answer.
                let _ = timeout(TAIL_TIMEOUT, async { while let Some(Ok(_)) = body.frame().await {} }).await;
                self.body = None;
                return None;
            }
            match body.frame().await {
                Some(Ok(frame)) => {
                    // Trailers say nothing of the stream.
                    if let Ok(data) = frame.into_data() {
                        self.relay.read(data);
                    }
                }
                Some(Err(error)) => self.relay.broke(root_cause(&error)),
                None => {
                    self.body = None;
                    self.relay.end();
                }
            }
        }
    }
}
