//! Files that are read again when they change: keys, certificates.
//!
//! Contract: what is looked at is each file's time, length and identity, once a second, so that a file replaced by
//! renaming, or a link that now leads elsewhere, is a change too. What cannot be loaded is said once and tried again
//! at every look; until then what was loaded before stays in force.

use std::{fmt::Display, os::unix::fs::MetadataExt, path::PathBuf, time::Duration};

use tokio::task::AbortHandle;

use crate::tasks;

const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What tells that a file is another than before; none if it cannot be looked at.
type Look = Option<(i64, i64, u64, u64)>;

/// Reloads whenever one of the files has changed. `what` names it in the log and in the metric
/// `dynamo_host_reload_failures_total`.
pub(crate) fn files<E: Display>(
    what: &'static str,
    paths: Vec<PathBuf>,
    reload: impl Fn() -> Result<(), E> + Send + 'static,
) -> AbortHandle {
    tasks::spawn(what, async move {
        let mut seen = look(&paths).await;
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

async fn look(paths: &[PathBuf]) -> Vec<Look> {
    let mut looks = Vec::with_capacity(paths.len());
    for path in paths {
        let found = tokio::fs::metadata(path).await.ok();
        looks.push(found.map(|file| (file.mtime(), file.mtime_nsec(), file.size(), file.ino())));
    }
    looks
}
