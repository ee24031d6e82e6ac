//! Looks after one engine for as long as it is a member: probes it, asks for its models, and reads its load.
//!
//! What its requests tell comes first: an engine whose tokens come is hardly probed, one that failed a request is probed at once.
//!
//! Bounds: each engine has one probe and one reading at a time, each with a time-out; all engines together have a bounded
//! number of both, so that thousands can begin at once and a network that swallows everything holds few sockets.

use std::{
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::Duration,
};

use dynamo_engine_api::{EngineError, ModelCard, RankLoad};
use dynamo_host_core::{WorkerState, load::READINGS_PER_SECOND};

use super::{
    GivenUp, Member, Roster, listen,
    pulse::{Finding, NoSign, Pulse},
};
use crate::text::plain;

/// How long an adapter may take to probe for the first time, or by a probe that takes its time, and to list models: it has
/// bounds of its own, which are lower.
const PROBE_PATIENCE: Duration = Duration::from_secs(10);
/// Between two probes that failed requests call for: many fail together.
const CALLED_EVERY: Duration = Duration::from_millis(100);
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
    pub(super) async fn tend(&self, member: &Arc<Member>) {
        let mut pulse = Pulse::default();
        self.probe(member, &mut pulse).await;
        self.probed.send_modify(|probed| *probed += 1);
        tokio::join!(
            self.keep_probing(member, pulse),
            self.keep_reading(member),
            self.keep_asking(member),
            listen::keep_listening(member, self.clock)
        );
    }

    async fn keep_probing(&self, member: &Member, mut pulse: Pulse) {
        loop {
            let is_well = member.standing().found().is_eligible();
            let least = self.least_pause();
            let every = self.health().probe_every().max(least);
            // Thousands that are away at once must not be asked as often as a few.
            let pause = jittered(pulse.pause(is_well, every).max(least));
            // Woken early by a request that failed.
            let is_called = tokio::time::timeout(pause, member.probe_now.notified()).await.is_ok();
            pulse.look(member.output_tokens(), self.clock.now_ms());
            if is_called || !is_well || pulse.is_due(every.mul_f64(0.7), self.clock.now_ms()) {
                self.probe(member, &mut pulse).await;
                if is_called {
                    tokio::time::sleep(CALLED_EVERY).await;
                }
            }
        }
    }

    /// Probes an engine and takes down what it found.
    async fn probe(&self, member: &Member, pulse: &mut Pulse) {
        let begun_ms = self.clock.now_ms();
        let (found, loads) = {
            let _permit = self.probes.acquire().await;
            let was_probed = member.standing().was_probed;
            // SGLang's older sign of life takes a second and more.
            let takes_its_time = !was_probed || member.engine.kind() == "sglang";
            let patience = if takes_its_time { PROBE_PATIENCE } else { self.health().probe_timeout() };
            let found = ask(member, patience).await;
            // The first reading tells the ranks: with it, the first workers are the right ones.
            let loads =
                if found.is_ok() && !was_probed { within(LOAD_PATIENCE, member, member.engine.load()).await.ok() } else { None };
            (found, loads)
        };
        let mut is_other = false;
        let found = match found {
            Ok(cards) => {
                pulse.answered(self.clock.now_ms());
                let lists_nothing = cards.as_ref().is_some_and(Vec::is_empty) && member.config.model.is_none();
                is_other |= member.learn_models(cards, &self.home());
                is_other |= member.learn_protocol();
                if lists_nothing { Err("it lists no model; set model= for it".to_owned()) } else { Ok(()) }
            }
            Err(error) => {
                pulse.look(member.output_tokens(), self.clock.now_ms());
                let is_dead = match pulse.failed(sign(&error), self.health().probe_tries, begun_ms, self.clock.now_ms()) {
                    Finding::Alive => return,
                    Finding::Unsure => return member.probe_now.notify_one(),
                    Finding::Out { is_dead } => is_dead,
                };
                if sign(&error) == NoSign::Nobody {
                    member.standing().is_fresh = true;
                }
                member.standing().was_probed = true;
                // Nobody was there, and now somebody says that it cannot serve yet.
                let is_starting = sign(&error) == NoSign::Refusal && member.standing().is_fresh;
                let state = if is_starting { WorkerState::Starting } else { WorkerState::Unreachable };
                self.settle_as(member, state, Some(error.to_string()), is_other);
                if is_dead {
                    // Who goes on elsewhere must not find it among the workers, and neither must whoever reads that it is given up.
                    self.publish();
                    member.give_up(GivenUp::Unresponsive);
                }
                return;
            }
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
            tokio::time::sleep(jittered(LOAD_EVERY.max(self.least_pause()))).await;
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

    /// How often an engine is asked at most: the more of them there are, the less often each.
    fn least_pause(&self) -> Duration {
        Duration::from_secs_f64(self.members().len() as f64 / READINGS_PER_SECOND)
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
                // Who may be gone is not left to the next probe.
                if sign(&error) == NoSign::Nobody {
                    member.probe_now.notify_one();
                }
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
        let state = if found.is_ok() { WorkerState::Healthy } else { WorkerState::Unreachable };
        self.settle_as(member, state, found.err(), is_other);
    }

    pub(super) fn settle_as(&self, member: &Member, state: WorkerState, trouble: Option<String>, is_other: bool) {
        let name = &member.config.name;
        let mut standing = member.standing();
        // Those that there was room for are served all the same.
        let crowded = (standing.left_out > 0)
            .then(|| format!("there is no room for {} of its workers; raise limits.max_workers", standing.left_out));
        // An engine's words may be in it.
        let trouble = trouble.or(crowded).as_deref().map(plain);
        let is_news = standing.found() != state;
        match &trouble {
            None if is_news => tracing::info!(worker = name, "worker is ready"),
            Some(trouble) if is_news && state == WorkerState::Starting => {
                tracing::info!(worker = name, "worker is starting: {trouble}");
            }
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
        if state.is_eligible() {
            standing.is_fresh = false;
            if is_news {
                // What it did before it was away says nothing of it.
                standing.vitals.iter().for_each(|vitals| vitals.recover(self.clock.now_ms()));
                standing.forget_handoffs(&self.links);
            }
        }
        let is_other_state = standing.find(state);
        drop(standing);
        if state.is_eligible() && *member.given_up.borrow() == GivenUp::Unresponsive {
            member.give_up(GivenUp::Not);
        }
        if is_other_state || is_other {
            self.publish_soon();
        }
    }
}

/// Asks an engine for a sign of life, and for its models. Where the configuration names the model, or the engine has listed
/// them before, the list only tells what is new, and an engine may do without, or be slow.
async fn ask(member: &Member, patience: Duration) -> Found {
    within(patience, member, member.engine.probe()).await?;
    match within(PROBE_PATIENCE, member, member.engine.models()).await {
        Ok(cards) => Ok(Some(cards)),
        Err(_) if member.config.model.is_some() => Ok(None),
        Err(EngineError::Timeout { .. }) if member.standing().has_listed() => Ok(None),
        Err(error) => Err(error),
    }
}

/// What a failed probe tells.
fn sign(error: &EngineError) -> NoSign {
    match error {
        EngineError::Timeout { .. } => NoSign::Silence,
        EngineError::Connect { .. } | EngineError::Broken { .. } => NoSign::Nobody,
        EngineError::Incomplete { .. }
        | EngineError::InStream { .. }
        | EngineError::Unhealthy { .. }
        | EngineError::Protocol { .. } => NoSign::Refusal,
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
