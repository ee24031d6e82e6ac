//! Pairs of workers, one that prefills and one that decodes: who can hand KV to whom.

use std::sync::Arc;

use dynamo_host_core::{Among, Candidates, Endpoint, LinkBoard, RequestFacts, Role, Worker, WorkerId};

use super::Snapshot;
use crate::error::RequestError;

impl Snapshot {
    /// Whether KV can go from one worker to another: they do it in one way, and the link between them is not avoided. One that
    /// is avoided is better than none, where engines serve no whole requests.
    pub(crate) fn reaches(&self, from: &Worker, to: &Worker, links: &LinkBoard) -> bool {
        let is_avoided = |from: &Worker, to: &Worker| links.is_avoided(from.load.index(), to.load.index(), self.clock.now_ms());
        let has_other = || {
            let same = self.fleet.workers().iter().filter(|worker| worker.handoff.group == from.handoff.group);
            let same: Vec<&Worker> = same.filter(|worker| worker.state.is_eligible()).collect();
            same.iter().any(|from| same.iter().any(|to| from.hands_to(to) && !is_avoided(from, to)))
        };
        from.hands_to(to) && (!is_avoided(from, to) || !from.handoff.serves_whole && !has_other())
    }

    /// Whether somebody who has not failed the request could decode what a worker prefills of it.
    pub(crate) fn reaches_any(&self, request: &RequestFacts, from: &Worker, links: &LinkBoard) -> bool {
        let decoders = self.eligible(&request.model, request.adapter.as_deref(), Among::Decoders);
        decoders.is_some_and(|decoders| {
            decoders.iter().any(|to| !request.failed_workers.contains(&to.id) && self.reaches(from, to, links))
        })
    }

    /// Whether a request's KV may be handed over: where nobody is left who serves it whole, more of them than elsewhere.
    pub(crate) fn may_hand_over(&self, request: &RequestFacts) -> bool {
        request.may_hand_over() || request.has_one_answer() && self.for_whole(request).is_err()
    }

    /// Whether a request that one worker should serve has no way left but over a pair.
    pub(crate) fn is_left_to_pairs(&self, request: &RequestFacts, links: &LinkBoard) -> bool {
        self.for_whole(request).is_err() && self.has_pair(request, links)
    }

    /// Whether a request may begin on one worker and end on another, of those that have not failed it.
    pub(crate) fn has_pair(&self, request: &RequestFacts, links: &LinkBoard) -> bool {
        if !self.may_hand_over(request) {
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

    /// What is missing where a request could be handed over but for it, a pool or the ways between both; `None` where there is
    /// nothing to hand over from or to.
    pub(crate) fn missing_for_pairs(&self, request: &RequestFacts) -> Option<&'static str> {
        if !self.may_hand_over(request) {
            return None;
        }
        let eligible = |among| self.eligible(&request.model, request.adapter.as_deref(), among);
        match eligible(Among::Decoders) {
            Some(_) if eligible(Among::Everyone)?.iter().any(|worker| worker.spec.role == Role::Prefill) => Some("no_link"),
            Some(decoders) => decoders.iter().any(|worker| worker.spec.role == Role::Decode).then_some("no_prefill_pool"),
            None => eligible(Among::Whole)?.iter().all(|worker| worker.spec.role == Role::Prefill).then_some("no_decode_pool"),
        }
    }

    /// Those that serve a request whole. Where all of them have failed it, workers of other pools that do.
    ///
    /// # Errors
    /// If there is nobody.
    pub(crate) fn for_whole(&self, request: &RequestFacts) -> Result<Arc<Candidates>, RequestError> {
        let usual = self.candidates(request);
        if usual.is_ok() || request.failed_workers.is_empty() {
            return usual;
        }
        self.candidates_among(request, Among::AnyWhole).or(usual)
    }

    /// Whether anybody could serve a request, in whatever way.
    pub(crate) fn has_way(&self, request: &RequestFacts, links: &LinkBoard) -> bool {
        self.for_whole(request).is_ok() || self.has_pair(request, links)
    }

    /// Whether a request of several prompts or choices has no way but one for each of them.
    pub(crate) fn has_way_in_parts_only(&self, request: &RequestFacts, links: &LinkBoard) -> bool {
        if request.has_one_answer() || self.has_way(request, links) {
            return false;
        }
        let one = RequestFacts { choices: 1, prompts: 1, ..request.clone() };
        one.has_one_answer() && self.has_pair(&one, links)
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
        let model = request.adapter.as_ref().unwrap_or(&request.model).clone();
        let has = |among| self.eligible(&request.model, request.adapter.as_deref(), among).is_some();
        let has_choices = matches!(request.endpoint, Endpoint::ChatCompletions | Endpoint::Completions);
        if has(Among::Decoders) && !has(Among::Whole) && !has_choices {
            return RequestError::OnlyPairs { model };
        }
        RequestError::NoWorker { model }
    }
}
