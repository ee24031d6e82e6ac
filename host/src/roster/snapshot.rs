//! All workers at one moment, with the engines behind them and the names that they serve: what one decision sees.

use std::{collections::HashSet, sync::Arc};

use dynamo_engine_api::Engine;
use dynamo_host_core::{Among, Candidates, Fleet, Load, LoadSlot, RequestFacts, Worker, WorkerId, WorkerState};
use dynamo_host_flow::BreakerRules;

use super::{
    Member,
    vitals::{Signs, Vitals},
};
use crate::{
    clock::Clock,
    error::RequestError,
    kv::KvFeed,
    models::{self, ListedModel, Listings, ModelNames, Resolved},
};

/// All workers at one moment, with the engines behind them.
pub(crate) struct Snapshot {
    pub(super) fleet: Fleet,
    /// In the order of the fleet's workers.
    pub(super) seats: Vec<Seat>,
    pub(super) names: Arc<ModelNames>,
    pub(super) listings: Listings,
    /// Whether some engine, which is to say itself what it serves, has not been reached yet, or some source has not said
    /// which workers there are.
    pub(super) has_unknown_models: bool,
    /// Whether one of those sources or engines is on its way: it may be there soon.
    pub(super) awaits_models: bool,
    /// Whether some worker is starting.
    pub(super) has_starting: bool,
    /// Models whose workers may come to hand over to each other in a moment.
    pub(super) coming: HashSet<String>,
    /// Workers that are given a few requests at once only.
    pub(super) trials: Vec<Trial>,
    pub(super) rules: BreakerRules,
    pub(super) clock: Clock,
}

/// A worker that is tried, beside others that are healthy.
pub(super) struct Trial {
    pub(super) worker: WorkerId,
    pub(super) vitals: Arc<Vitals>,
    pub(super) load: Arc<LoadSlot>,
}

/// Where a worker sits: its engine's member, and whether that has several ranks.
#[derive(Clone)]
pub(super) struct Seat {
    pub(super) member: Arc<Member>,
    pub(super) has_ranks: bool,
    pub(super) feed: Arc<KvFeed>,
    pub(super) vitals: Arc<Vitals>,
}

impl Snapshot {
    /// The workers.
    pub(crate) fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    /// The engine behind a worker of this snapshot.
    pub(crate) fn engine(&self, worker: WorkerId) -> &Arc<dyn Engine> {
        &self.seat(worker).member.engine
    }

    /// The rank that a request to a worker of this snapshot must name; `None` where the engine has one only.
    pub(crate) fn rank(&self, worker: &Worker) -> Option<u32> {
        self.seat(worker.id).has_ranks.then_some(worker.spec.rank)
    }

    /// What is seen of a worker of this snapshot from now on.
    pub(crate) fn signs(&self, worker: WorkerId) -> Signs {
        let Seat { member, vitals, .. } = self.seat(worker);
        Signs::new(member.given_up.subscribe(), Arc::clone(vitals))
    }

    /// Whether a worker that may be of another snapshot takes requests.
    pub(crate) fn is_eligible(&self, worker: WorkerId) -> bool {
        let place = self.fleet.workers().binary_search_by_key(&worker, |worker| worker.id);
        place.is_ok_and(|place| self.fleet.workers()[place].state.is_eligible())
    }

    /// Longest context that engines state for what a request asks for: the least of them.
    pub(crate) fn max_model_len(&self, request: &RequestFacts) -> Option<u32> {
        self.listings.max_model_len(request.adapter.as_ref().unwrap_or(&request.model))
    }

    /// Requests that a worker of the fleet, by its place, is to be given at once, if the operator says so.
    pub(crate) fn max_running(&self, place: usize) -> Option<u32> {
        self.seats.get(place)?.member.config.max_running
    }

    /// How the KV of a worker of this snapshot is known.
    pub(crate) fn feed(&self, worker: WorkerId) -> &KvFeed {
        &self.seat(worker).feed
    }

    /// Whether engines that may serve a request tell of their KV: the first few stand for all.
    pub(crate) fn tells_of_kv(&self, request: &RequestFacts) -> bool {
        let eligible = self.eligible(&request.model, request.adapter.as_deref(), Among::Beginning);
        eligible.is_some_and(|eligible| eligible.iter().take(4).any(|worker| self.feed(worker.id).has_events()))
    }

    pub(super) fn seat(&self, worker: WorkerId) -> &Seat {
        self.find(worker).expect("the worker is of this snapshot")
    }

    /// Where a worker sits that may be of another snapshot.
    pub(super) fn find(&self, worker: WorkerId) -> Option<&Seat> {
        let place = self.fleet.workers().binary_search_by_key(&worker, |worker| worker.id).ok()?;
        self.seats.get(place)
    }

    /// All that clients may ask for.
    pub(crate) fn listed_models(&self) -> Vec<ListedModel> {
        models::listed(&self.names, &self.listings)
    }

    /// What a client's name for a model is served as.
    pub(crate) fn resolve(&self, asked: &str) -> Result<Resolved, RequestError> {
        let is_ready = |model: &str, adapter: Option<&str>| self.eligible(model, adapter, Among::Beginning).is_some();
        models::resolve(asked, &self.names, &self.listings, is_ready).ok_or_else(|| {
            let model = asked.to_owned();
            if self.has_unknown_models { RequestError::ModelsUnknown { model } } else { RequestError::ModelNotFound { model } }
        })
    }

    /// The workers that may serve a request. Those that are tried and have enough for now are among them only if there are
    /// no others.
    pub(crate) fn candidates(&self, request: &RequestFacts) -> Result<Arc<Candidates>, RequestError> {
        self.candidates_among(request, Among::Whole)
    }

    /// Those of them that a part of its work is for.
    pub(crate) fn candidates_among(&self, request: &RequestFacts, among: Among) -> Result<Arc<Candidates>, RequestError> {
        let eligible = self.eligible(&request.model, request.adapter.as_deref(), among);
        let eligible = eligible.and_then(|eligible| eligible.without(&request.failed_workers));
        let eligible = eligible.ok_or_else(|| self.no_worker(request))?;
        let busy = self.busy_trials();
        Ok(eligible.without(&busy).unwrap_or(eligible))
    }

    fn busy_trials(&self) -> Vec<WorkerId> {
        let now_ms = if self.trials.is_empty() { 0 } else { self.clock.now_ms() };
        let is_busy = |trial: &&Trial| !trial.vitals.has_room(&self.rules, trial.load.get(Load::ActiveRequests), now_ms);
        self.trials.iter().filter(is_busy).map(|trial| trial.worker).collect()
    }

    /// Whether somebody serves a model of this name.
    pub(crate) fn is_served(&self, asked: &str) -> bool {
        let served = |resolved: Resolved| self.eligible(&resolved.model, resolved.adapter.as_deref(), Among::Beginning);
        self.resolve(asked).ok().and_then(served).is_some()
    }

    /// Whether nobody serves a model of this name, and somebody is starting who may.
    pub(super) fn is_awaited(&self, asked: &str) -> bool {
        if !self.has_starting && !self.awaits_models && self.coming.is_empty() {
            return false;
        }
        match self.resolve(asked) {
            Ok(Resolved { model, adapter, .. }) => {
                let is_starting = |worker: &Worker| worker.state == WorkerState::Starting && worker.spec.model == model;
                self.eligible(&model, adapter.as_deref(), Among::Beginning).is_none()
                    && (self.coming.contains(&model) || self.fleet.workers().iter().any(is_starting))
            }
            Err(RequestError::ModelsUnknown { .. }) => self.awaits_models,
            Err(_) => false,
        }
    }

    pub(super) fn eligible(&self, model: &str, adapter: Option<&str>, among: Among) -> Option<Arc<Candidates>> {
        match adapter {
            Some(adapter) => self.fleet.candidates_with(model, adapter, among),
            None => self.fleet.candidates(model, among),
        }
    }
}
