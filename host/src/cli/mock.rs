//! `dynamo-host mock-engine`.

use std::sync::Arc;

use dynamo_engine_mock::{MockEngine, MockOptions, server};

use super::MockFlags;
use crate::serve::{announce, listen, stop_signal};

pub(super) async fn run(flags: MockFlags) -> Result<(), String> {
    let mut options = MockOptions { name: "mock".to_owned(), model: flags.model, ..MockOptions::default() };
    for property in &flags.profile {
        let (key, value) = property
            .split_once('=')
            .ok_or_else(|| format!("--profile {property:?} is not KEY=VALUE; the keys are {}", MockOptions::keys().join(", ")))?;
        options.set(key, value).map_err(|error| error.to_string())?;
    }
    let engine = MockEngine::start(options).map_err(|error| error.to_string())?;
    engine.publish_kv_events().await.map_err(|error| error.to_string())?;
    let listener = listen("mock engine", flags.http, "--http").await.map_err(|error| error.to_string())?;
    announce("mock engine", &listener, false);
    server::serve(listener, Arc::new(engine), stop_signal()).await.map_err(|error| error.to_string())
}
