//! Workers from Kubernetes: the ready endpoints of a namespace's EndpointSlices that a label selector matches.
//!
//! Here is the watch, which kube keeps up: a list, then changes, and both anew with growing pauses when the API server is
//! away. Meanwhile the workers stay as they were. What a slice means is in [`slices`], which needs no cluster.

mod slices;

use std::{collections::BTreeMap, pin::pin, sync::Arc, time::Duration};

use futures_util::StreamExt;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::{
    Api, Client, Config,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use tokio::time::Instant;

use self::slices::Slices;
use super::{Origin, Problem};
use crate::{roster::Roster, tasks, text::plain};

/// For how long changes are collected: a rollout is many.
const COLLECT_FOR: Duration = Duration::from_millis(100);

/// Begins to watch, in the cluster that the host runs in, or that `KUBECONFIG` names.
pub(super) async fn start(namespace: &str, selector: &str, roster: Arc<Roster>, origin: Origin) -> Result<(), String> {
    let unknown = |reason: String| {
        format!("no cluster is known: {reason}; run inside of one with a service account, or name a file with KUBECONFIG")
    };
    let config = Config::infer().await.map_err(|error| unknown(plain(&error.to_string())))?;
    let client = Client::try_from(config).map_err(|error| unknown(plain(&error.to_string())))?;
    let api: Api<EndpointSlice> = Api::namespaced(client, namespace);
    roster.await_source(&origin);
    let selector = selector.to_owned();
    tasks::spawn("discovery", async move { watch(api, &selector, &roster, &origin).await });
    Ok(())
}

async fn watch(api: Api<EndpointSlice>, selector: &str, roster: &Arc<Roster>, origin: &Origin) {
    let mut events = pin!(watcher(api, watcher::Config::default().labels(selector)).default_backoff());
    let mut slices = Slices::default();
    // What a list brings counts when the list is complete.
    let mut listed: Option<BTreeMap<String, EndpointSlice>> = None;
    let mut trouble: Option<String> = None;
    let mut tell_at: Option<Instant> = None;
    loop {
        let event = match tell_at {
            Some(at) => match tokio::time::timeout_at(at, events.next()).await {
                Ok(event) => event,
                Err(_) => {
                    tell_at = None;
                    roster.apply(origin, slices.found());
                    continue;
                }
            },
            None => events.next().await,
        };
        let Some(event) = event else { return tracing::error!(source = %origin, "the watch has ended") };
        match event {
            Ok(event) => {
                trouble = None;
                let is_news = match event {
                    Event::Init => {
                        listed = Some(BTreeMap::new());
                        false
                    }
                    Event::InitApply(slice) => {
                        listed.get_or_insert_default().insert(name_of(&slice), slice);
                        false
                    }
                    Event::InitDone => {
                        slices.replace(listed.take().unwrap_or_default());
                        true
                    }
                    Event::Apply(slice) => {
                        slices.put(name_of(&slice), slice);
                        true
                    }
                    Event::Delete(slice) => {
                        slices.remove(&name_of(&slice));
                        true
                    }
                };
                if is_news {
                    tell_at.get_or_insert_with(|| Instant::now() + COLLECT_FOR);
                }
            }
            Err(error) => {
                let reason = plain(&chain(&error));
                if trouble.as_ref() != Some(&reason) {
                    tracing::warn!(source = %origin, "the API server cannot be watched, workers stay as they were: {reason}");
                }
                let mut problems = slices.found().problems;
                problems.push(Problem { place: "API server".to_owned(), reason: reason.clone() });
                roster.keep_problems(origin, problems);
                trouble = Some(reason);
            }
        }
    }
}

fn name_of(slice: &EndpointSlice) -> String {
    slice.metadata.name.clone().unwrap_or_default()
}

/// An error with what caused it, where it does not say that itself.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
