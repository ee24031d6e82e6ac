//! Logs: human-readable or JSON lines on stderr, filtered by `RUST_LOG` or `--log-level`.

use clap::ValueEnum;
use serde::Deserialize;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::{
    EnvFilter, Layer as _, filter::Targets, layer::SubscriberExt as _, registry, util::SubscriberInitExt as _,
};

use crate::trace::Traces;

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

/// Installs the subscriber of this process: the log, and what traces are to hear. A filter that does not parse is said,
/// and `info` used instead.
pub(crate) fn install(format: LogFormat, level: &str, traces: Option<&Traces>) {
    let wanted = std::env::var("RUST_LOG").unwrap_or_else(|_| level.to_owned());
    let filter = EnvFilter::try_new(&wanted);
    let complaint = filter.as_ref().err().map(ToString::to_string);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    let lines = match format {
        LogFormat::Pretty => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let filter = filter.unwrap_or_else(|_| EnvFilter::new("info"));
    // A second server in one process, as tests may have, goes on with the first's.
    let _ = match traces {
        // One filter for all: what it leaves out costs a load and a comparison.
        None => registry().with(lines).with(filter).try_init(),
        Some(traces) => {
            let ours = Targets::new().with_target("dynamo_host", LevelFilter::DEBUG);
            registry().with(lines.with_filter(filter)).with(traces.layer().with_filter(ours)).try_init()
        }
    };
    if let Some(complaint) = complaint {
        tracing::warn!("log filter {wanted:?} is not understood, using info: {complaint}");
    }
}
