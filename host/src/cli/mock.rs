//! `dynamo-host mock-engine`.

use std::sync::Arc;

use dynamo_engine_mock::{Faults, MockEngine, MockOptions, server};

use super::MockFlags;
use crate::serve::{announce, listen, stop_signal};

/// What shells say of a process that was killed.
const KILLED: i32 = 137;

pub(super) async fn run(flags: MockFlags) -> Result<(), String> {
    let mut options = MockOptions { name: "mock".to_owned(), model: flags.model, ..MockOptions::default() };
    for property in &flags.profile {
        let (key, value) = key_and_value("--profile", property, MockOptions::keys)?;
        options.set(key, value).map_err(|error| error.to_string())?;
    }
    for (key, value) in [("role", &flags.role), ("kv_lease_seconds", &flags.kv_lease_seconds)] {
        let _ = value.as_ref().map(|value| options.set(key, value)).transpose().map_err(|error| error.to_string())?;
    }
    for fault in &flags.fault {
        let (key, value) = key_and_value("--fault", fault, Faults::keys)?;
        options.faults.set(key, value).map_err(|error| error.to_string())?;
    }
    let engine = MockEngine::start(options).map_err(|error| error.to_string())?;
    engine.switches().die_with(|| std::process::exit(KILLED));
    engine.publish_kv_events().await.map_err(|error| error.to_string())?;
    let listener = listen("mock engine", flags.http, "--http").await.map_err(|error| error.to_string())?;
    announce("mock engine", &listener, false);
    let served = async { server::serve(listener, Arc::new(engine), stop_signal()).await.map_err(|error| error.to_string()) };
    tokio::select! {
        ended = served => ended,
        // The first lets it finish what it has, if it can.
        () = async { stop_signal().await; stop_signal().await } => Ok(()),
    }
}

fn key_and_value<'a>(flag: &str, text: &'a str, keys: fn() -> Vec<String>) -> Result<(&'a str, &'a str), String> {
    text.split_once('=').ok_or_else(|| format!("{flag} {text:?} is not KEY=VALUE; the keys are {}", keys().join(", ")))
}
