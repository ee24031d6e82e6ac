//! From a worker's configuration to the adapter of its engine, and the files that this is made of.

use std::{fs, sync::Arc, time::Duration};

use dynamo_engine_api::Engine;
use dynamo_engine_mock::{MockEngine, MockOptions};
use dynamo_engine_openai::{Bearer, OpenAiEngine, OpenAiOptions};
use sha2::{Digest, Sha256};

use crate::{config::WorkerConfig, watch::Stamp};

/// An engine's adapter, with what it was made of.
#[derive(Clone)]
pub(super) struct Connection {
    pub(super) engine: Arc<dyn Engine>,
    pub(super) credentials: Credentials,
}

/// A worker's token and certificates as they were at one moment: with others, its connection is another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Credentials {
    bearer: Option<[u8; 32]>,
    ca: Option<Stamp>,
}

impl Credentials {
    /// As they are now. Blocks on the disk where they are files.
    pub(super) fn of(config: &WorkerConfig) -> Self {
        let token = config.bearer.as_ref().and_then(|bearer| bearer.read().ok());
        let ca = config.ca_file.as_ref().and_then(|path| fs::metadata(path).ok());
        Self { bearer: token.map(|token| Sha256::digest(token).into()), ca: ca.as_ref().map(Stamp::of) }
    }
}

/// Longer than any request may take.
const NO_BOUND: Duration = Duration::from_secs(2 * 365 * 24 * 3600);

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

/// The adapter for a worker's engine. Nothing is sent yet. Blocks on the disk.
///
/// # Errors
/// Says what is wrong and what is accepted.
pub(super) fn connect(config: &WorkerConfig) -> Result<Connection, String> {
    // Taken first: what is written between the two is then seen to be other.
    let credentials = Credentials::of(config);
    let engine: Arc<dyn Engine> = if config.url.starts_with("mock://") {
        Arc::new(MockEngine::from_url(&config.url).map_err(|error| error.to_string())?)
    } else {
        Arc::new(OpenAiEngine::new(&config.url, options(config)?).map_err(|error| error.to_string())?)
    };
    Ok(Connection { engine, credentials })
}

/// An engine of no roster, for a command that speaks to one. Blocks on the disk.
///
/// # Errors
/// Says what is wrong and what is accepted.
pub(crate) fn engine(config: &WorkerConfig) -> Result<Arc<dyn Engine>, String> {
    connect(config).map(|connection| connection.engine)
}

/// The adapter's options.
fn options(config: &WorkerConfig) -> Result<OpenAiOptions, String> {
    let bearer = config.bearer.as_ref().map(|bearer| {
        let token = bearer.read()?;
        Bearer::new(&token).map_err(|error| error.to_string())
    });
    let default = OpenAiOptions::default();
    Ok(OpenAiOptions {
        kind: config.kind,
        handoff: config.handoff,
        bootstrap_host: config.bootstrap_host.clone(),
        bootstrap_port: config.bootstrap_port.unwrap_or(default.bootstrap_port),
        bearer: bearer.transpose()?,
        ca_file: config.ca_file.clone(),
        forward_priority: config.forward_priority,
        kv_events: config.kv.events.clone(),
        kv_replay: config.kv.replay.clone(),
        kv_topic: config.kv.topic.clone(),
        ranks: config.ranks.unwrap_or(1),
        // A request's own deadline bounds it.
        head_timeout: NO_BOUND,
        ..default
    })
}
