//! Looks after one engine for as long as it is a member: probes it, asks for its models, and reads its load.
//!
//! Bounds: each engine has one probe and one reading at a time, each with a time-out; all engines together have a bounded
//! number of both, so that thousands can begin at once and a network that swallows everything holds few sockets.

use std::{
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::Duration,
};

use dynamo_engine_api::{Engine, EngineError, ModelCard, RankLoad};
use dynamo_host_core::{WorkerState, load::READINGS_PER_SECOND};

use super::{Member, Roster, listen};
use crate::text::plain;

/// How often an engine that answers is probed.
pub(super) const PROBE_EVERY: Duration = Duration::from_secs(2);
/// How often one that does not is.
const RETRY_EVERY: Duration = Duration::from_millis(500);
/// How long an adapter may take to probe, and to list models: it has bounds of its own, which are lower.
const PROBE_PATIENCE: Duration = Duration::from_secs(10);
/// How often an engine's load is read while it answers.
const LOAD_EVERY: Duration = Duration::from_secs(1);
/// How often one is asked that did not say anything of its load.
const SILENT_EVERY: u32 = 10;
/// How long an adapter may take to read it.
const LOAD_PATIENCE: Duration = Duration::from_secs(5);
/// Probes at once, over all engines.
pub(super) const PROBES: usize = 256;
/// Readings of load at once, over all engines: a page of metrics takes a hundred microseconds and more to read.
pub(super) const READINGS: usize = 64;

/// What a probe found.
type Found = Result<Option<Vec<ModelCard>>, EngineError>;

impl Roster {
    /// Looks after a member until the task is ended.
    pub(super) async fn tend(&self, member: &Member) {
        self.probe(member).await;
        self.probed.send_modify(|probed| *probed += 1);
        tokio::join!(self.keep_probing(member), self.keep_reading(member), listen::keep_listening(member, self.clock));
    }

    async fn keep_probing(&self, member: &Member) {
        loop {
            let is_well = member.standing().found().is_eligible();
            let pause = jittered(if is_well { PROBE_EVERY } else { RETRY_EVERY });
            // Woken early by a request that failed; not more often than a dead engine is retried anyway.
            if tokio::time::timeout(pause, member.probe_now.notified()).await.is_ok() {
                tokio::time::sleep(RETRY_EVERY).await;
            }
            self.probe(member).await;
        }
    }

    /// Probes an engine and takes down what it found.
    async fn probe(&self, member: &Member) {
        let (found, loads) = {
            let _permit = self.probes.acquire().await;
            let found = within(PROBE_PATIENCE, member, ask(&*member.engine, member.config.model.is_some())).await;
            // The first reading tells the ranks: with it, the first workers are the right ones.
            let loads = if found.is_ok() && !member.standing().was_probed {
                within(LOAD_PATIENCE, member, member.engine.load()).await.ok()
            } else {
                None
            };
            (found, loads)
        };
        let mut is_other = false;
        let found = match found {
            Ok(cards) => {
                let lists_nothing = cards.as_ref().is_some_and(Vec::is_empty) && member.config.model.is_none();
                is_other |= member.learn_models(cards, &self.home());
                if lists_nothing { Err("it lists no model; set model= for it".to_owned()) } else { Ok(()) }
            }
            Err(error) => Err(error.to_string()),
        };
        if let Some(loads) = loads {
            is_other |= member.learn_load(&loads, &self.home());
        }
        member.standing().was_probed = true;
        self.settle(member, found, is_other);
    }

    async fn keep_reading(&self, member: &Member) {
        let mut skip = 0;
        loop {
            let least = Duration::from_secs_f64(self.members().len() as f64 / READINGS_PER_SECOND);
            tokio::time::sleep(jittered(LOAD_EVERY.max(least))).await;
            member.sample_output(self.clock.now_ms());
            if skip > 0 {
                skip -= 1;
                continue;
            }
            if !member.standing().found().is_eligible() {
                continue;
            }
            let read = {
                let _permit = self.readings.acquire().await;
                within(LOAD_PATIENCE, member, member.engine.load()).await
            };
            skip = skips_after(&read);
            self.take_load(member, read);
        }
    }

    /// Takes down a reading of load. One that failed leaves what was known: it ages.
    pub(super) fn take_load(&self, member: &Member, read: Result<Vec<RankLoad>, EngineError>) {
        match read {
            Ok(loads) => {
                if member.learn_load(&loads, &self.home()) {
                    self.publish_soon();
                }
            }
            Err(error) => {
                metrics::counter!("dynamo_host_load_failures_total", "cause" => error.label()).increment(1);
                let trouble = plain(&error.to_string());
                let mut standing = member.standing();
                if standing.load_trouble.as_ref() != Some(&trouble) {
                    tracing::debug!(worker = member.config.name, "its load cannot be read: {trouble}");
                    standing.load_trouble = Some(trouble);
                }
            }
        }
    }

    /// Takes down what was found of an engine; has it published if that changed anything.
    pub(super) fn settle(&self, member: &Member, found: Result<(), String>, is_other: bool) {
        let name = &member.config.name;
        let mut standing = member.standing();
        let state = if found.is_ok() { WorkerState::Healthy } else { WorkerState::Unreachable };
        // Those that there was room for are served all the same.
        let crowded = (standing.left_out > 0)
            .then(|| format!("there is no room for {} of its workers; raise limits.max_workers", standing.left_out));
        // An engine's words may be in it.
        let trouble = found.err().or(crowded).as_deref().map(plain);
        let is_news = standing.found() != state;
        match &trouble {
            None if is_news => tracing::info!(worker = name, "worker is ready"),
            Some(trouble) if is_news && !state.is_eligible() => {
                tracing::warn!(worker = name, "worker is out of service: {trouble}");
            }
            Some(trouble) if standing.trouble.is_none() || is_news => tracing::warn!(worker = name, "{trouble}"),
            _ => {}
        }
        standing.trouble = trouble;
        if is_news && !state.is_eligible() {
            standing.feeds.iter().for_each(|feed| feed.forget_expected());
        }
        let is_other_state = standing.find(state);
        drop(standing);
        if is_other_state || is_other {
            self.publish_soon();
        }
    }
}

/// Asks an engine for a sign of life, and for its models. Where the configuration names the model, the list only tells
/// adapters and bounds, and an engine may do without.
async fn ask(engine: &dyn Engine, model_is_set: bool) -> Found {
    engine.probe().await?;
    match engine.models().await {
        Ok(cards) => Ok(Some(cards)),
        Err(_) if model_is_set => Ok(None),
        Err(error) => Err(error),
    }
}

async fn within<T>(
    patience: Duration,
    member: &Member,
    work: impl Future<Output = Result<T, EngineError>>,
) -> Result<T, EngineError> {
    let late = |_| Err(EngineError::Timeout { engine: format!("worker {}", member.config.name), after: patience });
    tokio::time::timeout(patience, work).await.unwrap_or_else(late)
}

/// How many turns pass before an engine's load is read again. One that cannot be read is not one that says nothing.
pub(super) fn skips_after(read: &Result<Vec<RankLoad>, EngineError>) -> u32 {
    if read.as_ref().is_ok_and(Vec::is_empty) { SILENT_EVERY } else { 0 }
}

/// A pause between three quarters and five quarters of this: engines that were started together are not probed together.
pub(super) fn jittered(pause: Duration) -> Duration {
    // A hash under keys from the system's randomness, which std draws for every map.
    let random = RandomState::new().hash_one(0u8) as u32;
    pause.mul_f64(0.75 + 0.5 * f64::from(random) / f64::from(u32::MAX))
}

/// Keeps publishing what has changed, until the task is ended.
pub(super) async fn keep_publishing(roster: Arc<Roster>) {
    loop {
        roster.publish_soon.notified().await;
        roster.publish();
        tokio::time::sleep(super::PUBLISH_EVERY).await;
    }
}
