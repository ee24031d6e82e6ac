//! The one place where tasks are spawned: each has a name, and one that panics is in the log and in the metrics.

use std::future::Future;

use tokio::task::AbortHandle;

/// Spawns a task that runs beside requests. It ends when its work is done or the runtime stops.
#[expect(clippy::disallowed_methods, reason = "this is the place that names and watches tasks")]
pub(crate) fn spawn(name: &'static str, work: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
    let task = tokio::spawn(work);
    let handle = task.abort_handle();
    tokio::spawn(async move {
        if let Err(error) = task.await
            && error.is_panic()
        {
            metrics::counter!("dynamo_host_task_panics_total", "task" => name).increment(1);
            tracing::error!(task = name, "a background task panicked; the host goes on without it until it is restarted");
        }
    });
    handle
}
