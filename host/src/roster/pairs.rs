//! Pairs of workers, one that prefills and one that decodes: who can hand KV to whom.

use std::sync::Arc;

use dynamo_host_core::{Among, Candidates, LinkBoard, RequestFacts, Worker, WorkerId};

use super::Snapshot;
use crate::error::RequestError;

impl Snapshot {
    /// Whether KV can go from one worker to another: they do it in one way, and the link between them is not avoided.
    pub(crate) fn reaches(&self, from: &Worker, to: &Worker, links: &LinkBoard) -> bool {
        from.hands_to(to) && !links.is_avoided(from.load.index(), to.load.index(), self.clock.now_ms())
    }

    /// Whether somebody who has not failed the request could decode what a worker prefills of it.
    pub(crate) fn reaches_any(&self, request: &RequestFacts, from: &Worker, links: &LinkBoard) -> bool {
        let decoders = self.eligible(&request.model, request.adapter.as_deref(), Among::Decoders);
        decoders.is_some_and(|decoders| {
            decoders.iter().any(|to| !request.failed_workers.contains(&to.id) && self.reaches(from, to, links))
        })
    }

    /// Whether a request may begin on one worker and end on another, of those that have not failed it.
    pub(crate) fn has_pair(&self, request: &RequestFacts, links: &LinkBoard) -> bool {
        if !request.may_hand_over() {
            return false;
        }
        // Without decoders there is nothing to look at, and most fleets have none.
        let adapter = request.adapter.as_deref();
        if self.eligible(&request.model, adapter, Among::Decoders).is_none() {
            return false;
        }
        let everyone = self.eligible(&request.model, adapter, Among::Everyone);
        everyone.is_some_and(|everyone| {
            let begins = |from: &Worker| !request.failed_workers.contains(&from.id) && from.spec.role.prefills();
            everyone.iter().any(|from| begins(from) && self.reaches_any(request, from, links))
        })
    }

    /// Whether anybody could serve a request, in whatever way.
    pub(crate) fn has_way(&self, request: &RequestFacts, links: &LinkBoard) -> bool {
        self.candidates(request).is_ok() || self.has_pair(request, links)
    }

    /// Those that can go on from what a worker prefills or has prefilled.
    ///
    /// # Errors
    /// If there is nobody.
    pub(crate) fn decoders(
        &self,
        request: &RequestFacts,
        from: WorkerId,
        links: &LinkBoard,
    ) -> Result<Arc<Candidates>, RequestError> {
        let decoders = self.candidates_among(request, Among::Decoders)?;
        // One that is gone has left its KV to nobody.
        let from = decoders.find(from).ok_or_else(|| self.no_worker(request))?;
        decoders.of(|to| self.reaches(from, to, links)).ok_or_else(|| self.no_worker(request))
    }

    /// That there is nobody for a request.
    pub(crate) fn no_worker(&self, request: &RequestFacts) -> RequestError {
        RequestError::NoWorker { model: request.adapter.as_ref().unwrap_or(&request.model).clone() }
    }
}
