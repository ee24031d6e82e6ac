//! From a worker's configuration to the adapter of its engine.

use std::sync::Arc;

use dynamo_engine_api::Engine;
use dynamo_engine_mock::{MockEngine, MockOptions};
use dynamo_engine_openai::{Bearer, OpenAiEngine, OpenAiOptions};

use crate::config::WorkerConfig;

/// Checks what [`connect`] would make, without starting anything.
///
/// # Errors
/// Says what is wrong and what is accepted.
pub(crate) fn check(config: &WorkerConfig) -> Result<(), String> {
    if config.url.starts_with("mock://") {
        return MockOptions::from_url(&config.url).map(drop).map_err(|error| error.to_string());
    }
    OpenAiEngine::new(&config.url, options(config)?).map(drop).map_err(|error| error.to_string())
}

/// The adapter for a worker's engine. Nothing is sent yet.
///
/// # Errors
/// Says what is wrong and what is accepted.
pub(super) fn connect(config: &WorkerConfig) -> Result<Arc<dyn Engine>, String> {
    if config.url.starts_with("mock://") {
        return MockEngine::from_url(&config.url).map(|engine| Arc::new(engine) as Arc<dyn Engine>).map_err(|e| e.to_string());
    }
    OpenAiEngine::new(&config.url, options(config)?)
        .map(|engine| Arc::new(engine) as Arc<dyn Engine>)
        .map_err(|error| error.to_string())
}

/// The adapter's options.
fn options(config: &WorkerConfig) -> Result<OpenAiOptions, String> {
    let bearer = config.bearer.as_ref().map(|bearer| {
        let token = bearer.read()?;
        Bearer::new(&token).map_err(|error| error.to_string())
    });
    Ok(OpenAiOptions {
        kind: config.kind,
        bearer: bearer.transpose()?,
        ca_file: config.ca_file.clone(),
        forward_priority: config.forward_priority,
        ..OpenAiOptions::default()
    })
}
