//! All workers at one moment, with the engines behind them: what one decision sees.

use std::{collections::HashMap, sync::Arc};

use dynamo_engine_api::Engine;
use dynamo_host_core::{Candidates, Fleet, RequestFacts, Role, WorkerId};

use crate::error::RequestError;

/// All workers at one moment, with the engines behind them.
pub(crate) struct Snapshot {
    pub(super) fleet: Fleet,
    pub(super) engines: HashMap<WorkerId, Arc<dyn Engine>>,
    /// Whether some engine, which is to say itself what it serves, has not been reached yet.
    pub(super) has_unknown_models: bool,
}

impl Snapshot {
    /// The workers.
    pub(crate) fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    /// The engine behind a worker of this snapshot.
    pub(crate) fn engine(&self, worker: WorkerId) -> &Arc<dyn Engine> {
        &self.engines[&worker]
    }

    /// The workers that may serve a request.
    pub(crate) fn candidates(&self, request: &RequestFacts) -> Result<Arc<Candidates>, RequestError> {
        let eligible = self.fleet.candidates(&request.model, Role::Aggregated);
        match eligible.and_then(|eligible| eligible.without(&request.failed_workers)) {
            Some(candidates) => Ok(candidates),
            None if self.fleet.models().contains(&request.model) => Err(RequestError::NoWorker { model: request.model.clone() }),
            None if self.has_unknown_models => Err(RequestError::ModelsUnknown { model: request.model.clone() }),
            None => Err(RequestError::ModelNotFound { model: request.model.clone() }),
        }
    }
}
