//! Logs: human-readable or JSON lines on stderr, filtered by `RUST_LOG` or `--log-level`.

use clap::ValueEnum;
use serde::Deserialize;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::{
    EnvFilter, Layer, Registry, filter::Targets, fmt, layer::SubscriberExt as _, registry, reload, util::SubscriberInitExt as _,
};

use crate::trace::Traces;

/// Overrides flags and configuration.
const OVERRIDE: &str = "RUST_LOG";

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    /// For people.
    #[default]
    Pretty,
    /// One JSON object a line.
    Json,
}

/// The filter of this process's log.
#[derive(Clone)]
pub(crate) struct LogLevel(reload::Handle<EnvFilter, Registry>);

impl LogLevel {
    /// Sets another filter, unless the environment's `RUST_LOG` does.
    ///
    /// # Errors
    /// If it is not understood.
    pub(crate) fn set(&self, level: &str) -> Result<(), String> {
        if std::env::var_os(OVERRIDE).is_some() {
            return Ok(());
        }
        let filter = parse(level)?;
        self.0.reload(filter).map_err(|error| error.to_string())
    }
}

/// Reads a filter.
///
/// # Errors
/// If it is not understood.
pub(crate) fn parse(level: &str) -> Result<EnvFilter, String> {
    EnvFilter::try_new(level).map_err(|error| format!("log filter {level:?} is not understood: {error}"))
}

/// Installs the subscriber of this process: the log, and what traces are to hear. A filter that does not parse is said,
/// and `info` used instead.
pub(crate) fn install(format: LogFormat, level: &str, traces: Option<&Traces>) -> LogLevel {
    let wanted = std::env::var(OVERRIDE).unwrap_or_else(|_| level.to_owned());
    let filter = parse(&wanted);
    let complaint = filter.as_ref().err().cloned();
    let (filter, handle) = reload::Layer::new(filter.unwrap_or_else(|_| EnvFilter::new("info")));
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    let lines = match format {
        LogFormat::Pretty => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let subscriber = registry().with(lines.with_filter(filter));
    // A second server in one process, as tests may have, goes on with the first's.
    let _ = match traces {
        None => subscriber.try_init(),
        Some(traces) => {
            let ours = Targets::new().with_target("dynamo_host", LevelFilter::DEBUG);
            subscriber.with(traces.layer().with_filter(ours)).try_init()
        }
    };
    if let Some(complaint) = complaint {
        tracing::warn!("{complaint}; using info");
    }
    LogLevel(handle)
}
