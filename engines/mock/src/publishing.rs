//! Publishing: the tape over ZeroMQ, as vLLM does it.

use std::sync::{Arc, OnceLock};

use dynamo_engine_kv_events::{PublishError, Publisher};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::engine::MockEngine;

/// A publisher with the task that feeds it.
#[derive(Debug)]
pub(crate) struct Publishing {
    publisher: Arc<Publisher>,
    _task: JoinSet<()>,
}

impl MockEngine {
    /// Publishes its KV events as its options say, if they do. Once: a second call changes nothing.
    ///
    /// # Errors
    /// If an endpoint cannot be had.
    pub async fn publish_kv_events(&self) -> Result<(), PublishError> {
        if !self.options().publishes_kv_events || self.publishing().get().is_some() {
            return Ok(());
        }
        let publisher = Arc::new(Publisher::start(self.options().publisher.clone()).await?);
        let Ok(mut tape) = self.tape().await else { return Ok(()) };
        let mut task = JoinSet::new();
        let to = Arc::clone(&publisher);
        task.spawn(async move {
            while let Some(batch) = tape.recv().await {
                to.publish(batch.to_vec()).await;
            }
        });
        let _ = self.publishing().set(Publishing { publisher, _task: task });
        Ok(())
    }

    /// `GET /kv_event_sources`.
    pub(crate) fn kv_event_sources(&self) -> Value {
        let Some(Publishing { publisher, .. }) = self.publishing().get() else { return json!({}) };
        let options = &self.options().publisher;
        json!({ "0": {
            "enable_kv_cache_events": true,
            "publisher": "zmq",
            "bind": !options.connects,
            "endpoint": publisher.endpoint().to_string(),
            "replay_endpoint": publisher.replay().map(ToString::to_string),
            "buffer_steps": options.buffer_steps,
            "topic": options.topic,
        }})
    }
}

pub(crate) type Once = OnceLock<Publishing>;
