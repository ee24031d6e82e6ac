//! The configuration file of a running host: read again when it changes, or at SIGHUP.
//!
//! Contract: what a running host can change is changed, what it cannot is named, and a file that cannot be run changes
//! nothing: the host goes on with what it last understood, says so once, and shows it in its status until it is mended.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde::Serialize;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    audit::{Audit, Entry, Who},
    clock::unix_ms,
    config::Config,
    request::Lane,
    roster::Roster,
    tasks,
    telemetry::LogLevel,
    text::plain,
    watch::Stamp,
};

/// How often the file is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// What a running host takes from its configuration file when that changes.
pub(crate) struct Reload {
    /// What the host was started with: what cannot change while it runs is as it says.
    start: Config,
    /// What was last taken over.
    last: Config,
    roster: Arc<Roster>,
    lane: Arc<Lane>,
    audit: Audit,
    log_level: LogLevel,
    status: ConfigStatus,
}

/// How the configuration file stands, for people and tools.
#[derive(Clone, Debug, Default)]
pub(crate) struct ConfigStatus(Arc<Mutex<ConfigReport>>);

/// How the configuration file stands.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct ConfigReport {
    /// `None`: flags only.
    file: Option<String>,
    /// When what runs was last taken from it, in milliseconds since 1970.
    loaded_unix_ms: u64,
    /// Changes that were taken over since the start.
    reloads: u64,
    /// Why the file as it is now is not what runs.
    trouble: Option<String>,
    /// Keys that it has changed and that count from the next start on.
    needs_restart: Vec<&'static str>,
}

impl ConfigStatus {
    pub(crate) fn report(&self) -> ConfigReport {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, change: impl FnOnce(&mut ConfigReport)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Reload {
    pub(crate) fn new(start: Config, roster: Arc<Roster>, lane: Arc<Lane>, audit: Audit, log_level: LogLevel) -> Self {
        let status = ConfigStatus::default();
        status.change(|report| {
            report.file = start.file().map(|path| path.display().to_string());
            report.loaded_unix_ms = unix_ms();
        });
        Self { last: start.clone(), start, roster, lane, audit, log_level, status }
    }

    /// How the file stands, now and later.
    pub(crate) fn status(&self) -> ConfigStatus {
        self.status.clone()
    }

    /// Starts to watch the file. Without one, SIGHUP does nothing.
    pub(crate) fn start(self) {
        tasks::spawn("reload", self.watch());
    }

    async fn watch(mut self) {
        // Without handlers the signal would end the process.
        let Ok(mut hangup) = signal(SignalKind::hangup()) else {
            return tracing::error!("SIGHUP cannot be heard; the configuration file is not read again");
        };
        let Some(path) = self.start.file().map(Path::to_owned) else {
            while hangup.recv().await.is_some() {
                tracing::info!("there is no configuration file to read again; start with --config FILE");
            }
            return;
        };
        let mut seen = Stamp::at(&path);
        // What was written while it was first read is read once more.
        let mut is_fresh = true;
        loop {
            let is_asked = tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => false,
                _ = hangup.recv() => true,
            };
            let stamp = Stamp::at(&path);
            if stamp == seen && !is_asked && !is_fresh {
                continue;
            }
            // Within one tick of a file system's clock a second write may not show: one look more.
            is_fresh = stamp != seen;
            seen = stamp;
            self = self.take_over(is_asked).await;
        }
    }

    /// Reads the file, and takes over what it says.
    async fn take_over(mut self, is_asked: bool) -> Self {
        let taken = tokio::task::spawn_blocking(move || {
            let now = match self.start.again() {
                Ok(now) => now,
                Err(error) => {
                    self.refuse(&error.to_string());
                    return self;
                }
            };
            if now == self.last && !is_asked && self.status.report().trouble.is_none() {
                return self;
            }
            if let Err(error) = self.roster.configure(&now.workers, now.models.clone()) {
                self.refuse(&error.to_string());
                return self;
            }
            self.roster.set_health(now.health.clone());
            self.lane.limits.store(Arc::new(now.limits.with_fixed_of(&self.start.limits)));
            self.lane.migration.store(Arc::new(now.migration.clone()));
            self.lane.queue.configure(&now);
            if let Err(reason) = self.log_level.set(&now.log_level) {
                tracing::warn!("{reason}; the log level stays as it was");
            }
            let needs_restart = now.needs_restart(&self.start);
            metrics::counter!("dynamo_host_config_reloads_total").increment(1);
            tracing::info!("configuration is read again");
            if !needs_restart.is_empty() {
                tracing::warn!("these keys count from the next start on: {}", needs_restart.join(", "));
            }
            let file = self.start.file().map(|path| path.display().to_string());
            let who = Who::System(if is_asked { "SIGHUP" } else { "the file has changed" });
            let entry = Entry { to: json!({ "needs_restart": needs_restart }), ..Entry::new("config reload", who, file) };
            self.audit.append_blocking(&entry);
            self.status.change(|report| {
                report.trouble = None;
                report.loaded_unix_ms = unix_ms();
                report.reloads += 1;
                report.needs_restart = needs_restart;
            });
            self.last = now;
            self
        });
        // It fails only if taking over panicked, which the task that waits here shall say.
        taken.await.expect("taking over a configuration does not panic")
    }

    fn refuse(&self, reason: &str) {
        let reason = plain(reason);
        if self.status.report().trouble.as_ref() == Some(&reason) {
            return;
        }
        metrics::counter!("dynamo_host_config_reload_failures_total").increment(1);
        tracing::error!("the configuration file cannot be run, so that nothing is changed: {reason}");
        self.status.change(|report| report.trouble = Some(reason));
    }
}
