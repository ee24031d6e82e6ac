//! Files that are read again when they change: what tells that they have, and a watch over keys and certificates.
//!
//! Contract: what is looked at is each file's time, length and identity, once a second, so that a file replaced by
//! renaming, or a link that now leads elsewhere, is a change too. What cannot be loaded is said once and tried again
//! at every look; until then what was loaded before stays in force.

use std::{
    fmt::Display,
    fs::{self, Metadata},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use tokio::task::AbortHandle;

use crate::tasks;

const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What tells that a file is another than before: written to, or replaced under its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    modified: Option<SystemTime>,
    bytes: u64,
    inode: u64,
}

impl Stamp {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self { modified: metadata.modified().ok(), bytes: metadata.len(), inode: metadata.ino() }
    }

    /// `None`: it is not there, or cannot be looked at.
    pub(crate) fn at(path: &Path) -> Option<Self> {
        fs::metadata(path).ok().as_ref().map(Self::of)
    }
}

/// Reloads whenever one of the files has changed. `what` names it in the log and in the metric
/// `dynamo_host_reload_failures_total`.
pub(crate) fn files<E: Display>(
    what: &'static str,
    paths: Vec<PathBuf>,
    reload: impl Fn() -> Result<(), E> + Send + 'static,
) -> AbortHandle {
    // Looked at here: what is changed once the caller goes on is a change, however late the task begins.
    let mut seen: Vec<_> = paths.iter().map(|path| Stamp::at(path)).collect();
    tasks::spawn(what, async move {
        let mut complaint = None;
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let now = look(&paths).await;
            if now == seen && complaint.is_none() {
                continue;
            }
            seen = now;
            let failed = reload().err().map(|error| error.to_string());
            match &failed {
                None => tracing::info!("{what} were read again"),
                Some(said) if failed != complaint => {
                    metrics::counter!("dynamo_host_reload_failures_total", "what" => what).increment(1);
                    tracing::error!("{what} could not be read again, what was read before stays in force: {said}");
                }
                Some(_) => {}
            }
            complaint = failed;
        }
    })
}

async fn look(paths: &[PathBuf]) -> Vec<Option<Stamp>> {
    let mut looks = Vec::with_capacity(paths.len());
    for path in paths {
        looks.push(tokio::fs::metadata(path).await.ok().as_ref().map(Stamp::of));
    }
    looks
}
