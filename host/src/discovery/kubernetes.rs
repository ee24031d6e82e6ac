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
use super::{Found, Origin, Problem};
use crate::{roster::Roster, tasks, text::plain};

/// For how long changes are collected: a rollout is many.
const COLLECT_FOR: Duration = Duration::from_millis(100);
/// After how long without an error the watch is taken to work again where the cluster is quiet: a watch that goes on says
/// nothing. Longer than one lasts (290 s), after which one that does not work fails again.
const QUIET: Duration = Duration::from_secs(360);

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
    let mut watched = Watched::default();
    let mut tell_at: Option<Instant> = None;
    loop {
        let event = match tell_at.into_iter().chain(watched.quiet_at()).min() {
            Some(at) => match tokio::time::timeout_at(at, events.next()).await {
                Ok(event) => event,
                Err(_) => {
                    tell_at = None;
                    watched.forget_trouble(Instant::now());
                    watched.tell(roster, origin).await;
                    continue;
                }
            },
            None => events.next().await,
        };
        match event {
            None => return tracing::error!(source = %origin, "the watch has ended"),
            Some(Ok(event)) => {
                if watched.take(event) {
                    tell_at.get_or_insert_with(|| Instant::now() + COLLECT_FOR);
                }
            }
            Some(Err(error)) => {
                let reason = plain(&chain(&error));
                if watched.fail(&reason, Instant::now()) {
                    tracing::warn!(source = %origin, "the API server cannot be watched, workers stay as they were: {reason}");
                    watched.tell(roster, origin).await;
                }
            }
        }
    }
}

/// What a watch has brought.
#[derive(Default)]
struct Watched {
    slices: Slices,
    /// What a list brings counts when the list is complete.
    listed: Option<BTreeMap<String, EndpointSlice>>,
    /// Whether one was: before, nobody knows which workers there are.
    has_listed: bool,
    /// Why the API server cannot be watched, and when it last said so.
    trouble: Option<(String, Instant)>,
}

impl Watched {
    /// Takes an event; returns whether there is something to tell.
    fn take(&mut self, event: Event<EndpointSlice>) -> bool {
        match event {
            // A list that begins may fail still.
            Event::Init => {
                self.listed = Some(BTreeMap::new());
                return false;
            }
            Event::InitApply(slice) => {
                self.listed.get_or_insert_default().insert(name_of(&slice), slice);
                return false;
            }
            Event::InitDone => {
                self.slices.replace(self.listed.take().unwrap_or_default());
                self.has_listed = true;
            }
            Event::Apply(slice) => self.slices.put(name_of(&slice), slice),
            Event::Delete(slice) => self.slices.remove(&name_of(&slice)),
        }
        self.trouble = None;
        true
    }

    /// Takes an error; returns whether it is another than before.
    fn fail(&mut self, reason: &str, now: Instant) -> bool {
        let before = self.trouble.replace((reason.to_owned(), now));
        before.is_none_or(|(before, _)| before != reason)
    }

    /// When the watch is taken to work again, if nothing is heard until then.
    fn quiet_at(&self) -> Option<Instant> {
        self.trouble.as_ref().filter(|_| self.has_listed).map(|(_, since)| *since + QUIET)
    }

    /// Forgets an error after which it has been quiet for long enough.
    fn forget_trouble(&mut self, now: Instant) {
        if self.quiet_at().is_some_and(|at| at <= now) {
            self.trouble = None;
        }
    }

    /// All workers, and what is wrong.
    fn found(&self) -> Found {
        let mut found = self.slices.found();
        let problem = |(reason, _): &(String, Instant)| Problem { place: "API server".to_owned(), reason: reason.clone() };
        found.problems.extend(self.trouble.as_ref().map(problem));
        found
    }

    async fn tell(&self, roster: &Arc<Roster>, origin: &Origin) {
        let found = self.found();
        if self.has_listed { roster.hear(origin, found).await } else { roster.keep_problems(origin, found.problems) }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_ends_when_the_watch_says_something_or_nothing_for_long() {
        let now = Instant::now();
        let mut watched = Watched::default();
        assert!(watched.fail("refused", now) && !watched.fail("refused", now) && watched.fail("away", now));
        assert!(watched.quiet_at().is_none(), "nothing was ever listed");
        assert!(!watched.take(Event::Init) && watched.found().problems.len() == 1, "it may fail still");
        assert!(watched.take(Event::InitDone) && watched.found().problems.is_empty());
        assert!(watched.fail("refused", now));
        watched.forget_trouble(now + QUIET / 2);
        assert_eq!(watched.found().problems[0].place, "API server");
        watched.fail("refused", now + QUIET / 2);
        watched.forget_trouble(now + QUIET);
        assert_eq!(watched.found().problems.len(), 1, "it failed again meanwhile");
        watched.forget_trouble(watched.quiet_at().unwrap());
        assert!(watched.found().problems.is_empty() && watched.quiet_at().is_none());
    }
}
