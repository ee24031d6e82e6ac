//! From a worker's configuration to the adapter of its engine.

use std::sync::Arc;

use dynamo_engine_api::Engine;
use dynamo_engine_mock::{MockEngine, MockOptions};
use dynamo_engine_openai::{OpenAiEngine, OpenAiOptions};

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
///
/// MERGE: this is the one place where the token, `kind` (by [`Kind::as_str`](crate::config::Kind::as_str)), `ca_file` and
/// `forward_priority` go into them, once the adapter has them. Until then they are only checked.
fn options(config: &WorkerConfig) -> Result<OpenAiOptions, String> {
    if let Some(bearer) = &config.bearer {
        bearer.read()?;
    }
    if let Some(path) = &config.ca_file {
        std::fs::metadata(path).map_err(|error| format!("ca_file {path:?} cannot be read: {error}"))?;
    }
    Ok(OpenAiOptions::default())
}
