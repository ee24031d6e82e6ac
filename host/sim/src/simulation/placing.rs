//! Asks the policy where requests go, and gives them to engines: what the host's request path does.
//!
//! Who tells roles apart is asked among workers of all roles; who does not, where the request shall begin, and then who goes on.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use dynamo_engine_mock::model::{FinishReason, Sequence};
use dynamo_host_core::{
    Among, Candidates, Held, Role, Worker, WorkerId,
    answer::{MAX_HOLD, Verdict},
    load::InFlight,
    request::Stage,
};
use dynamo_host_index::{Prompt, Salt};
use dynamo_host_policy::{Decision, RouteCall};

use super::{End, Run, UNIX_START_MS};
use crate::{
    engine::MODEL,
    queue::Happening,
    requests::{Before, Fetching, Leg, Place, Placed, Waiting, facts, shared_tokens},
};

/// What comes of a decision for one of the candidates.
struct Choice<'a> {
    worker: &'a Worker,
    /// Who is to go on from what it computes, if that was said at once.
    decoder: Option<WorkerId>,
    /// Tokens of the prompt that it is believed to hold.
    cached_tokens: u32,
    is_observed: bool,
}

impl Run<'_> {
    /// A request as it is when it is placed from the start: with what was generated as a part of its prompt.
    pub(super) fn beginning(&self, number: u32, mut before: Before) -> Waiting {
        let request = &self.trace[number as usize];
        let mut facts = facts(number, request, self.arrival(number as usize).as_millis() as u64);
        let generated = (0..before.tokens).map(|index| number.wrapping_add(index));
        let tokens = shared_tokens(request);
        let tokens = if before.tokens == 0 { tokens } else { tokens.iter().copied().chain(generated).collect() };
        facts.decision_id = before.next_decision(number);
        facts.prompt.tokens += before.tokens;
        facts.generated_tokens = before.tokens;
        facts.attempt = before.failed.len() as u32;
        facts.failed_workers.clone_from(&before.failed);
        self.service.iter().for_each(|service| service.mark(number, &mut facts));
        let prompt = Prompt::new(Salt::new(MODEL, None, None), tokens, true);
        Waiting { facts, prompt, holds: 0, before, kept: None }
    }

    /// Asks the policy where a request shall go.
    pub(super) fn place(&mut self, number: u32) {
        let Some(mut waiting) = self.waiting.remove(&number) else { return };
        if waiting.kept.is_some_and(|kept| !self.is_kept(&kept)) {
            waiting = self.beginning(number, waiting.before);
        }
        let Some(candidates) = self.candidates(number, &mut waiting) else {
            self.waiting.insert(number, waiting);
            return self.stranded.push(number);
        };
        waiting.facts.holds = waiting.holds;
        let begun = Instant::now();
        let overlap = Arc::new(self.indexes.overlap(MODEL, &waiting.prompt));
        let now_ms = self.now_ms();
        let call = RouteCall {
            request: Arc::new(waiting.facts.clone()),
            candidates: Arc::clone(&candidates),
            overlap: Some(Arc::clone(&overlap)),
            links: self.options.has_roles().then(|| Arc::clone(&self.links)),
            now_ms,
            unix_ms: UNIX_START_MS + now_ms,
            seed: self.options.seed.wrapping_add(waiting.facts.decision_id) ^ u64::from(waiting.holds) << 60,
            explain: false,
        };
        let decision = self.slot.decide(&self.pinned, call);
        self.tally.decided(&decision, begun.elapsed());
        let Decision { verdict, by, .. } = decision;
        let is_observed = by.version().is_some_and(|version| version.observes());
        let choice = |row: u32, decoder: Option<u32>| {
            let worker = candidates.worker(row);
            let cached_tokens = overlap.of(worker.load.index()).map_or(0, Held::total);
            Choice { worker, decoder: decoder.map(|row| candidates.worker(row).id), cached_tokens, is_observed }
        };
        match verdict {
            Verdict::Place(ranking) => self.give(number, waiting, &choice(ranking.rows()[0], None)),
            Verdict::PlacePairs(pairs) => self.give(number, waiting, &choice(pairs[0].0, Some(pairs[0].1))),
            Verdict::Hold { at_most_ms } => {
                waiting.holds += 1;
                let pause = Duration::from_millis(u64::from(at_most_ms.max(1))).min(MAX_HOLD);
                self.waiting.insert(number, waiting);
                self.queue.push(self.now + pause, Happening::AskAgain { request: number });
            }
            Verdict::Reject(_) => {
                self.tally.rejected += 1;
                waiting.kept.iter().for_each(|kept| self.let_go(number, kept, Fetching::Waits));
                self.gone(number, waiting.before.tokens, End::Rejected);
            }
        }
    }

    /// Who may be given the request, or what is left of it; `None` if there is nobody. Says in its facts which part of it that is.
    fn candidates(&mut self, number: u32, waiting: &mut Waiting) -> Option<Arc<Candidates>> {
        if let Some(kept) = waiting.kept {
            let from = self.fleet_worker(kept.place.id);
            if let Some(decoders) = from.and_then(|from| self.decoders(from)) {
                return Some(decoders);
            }
            // Nobody is left who could go on: from the start, where its engine has the prompt in its cache.
            self.let_go(number, &kept, Fetching::Waits);
            *waiting = self.beginning(number, std::mem::take(&mut waiting.before));
        }
        let may_divide = self.options.has_roles() && waiting.facts.may_hand_over() && self.has_pair();
        let among = match (may_divide, self.pinned.tells_roles_apart()) {
            (false, _) => Among::Whole,
            (true, false) => Among::Beginning,
            (true, true) => Among::Everyone,
        };
        let candidates = self.fleet.candidates(MODEL, among)?;
        waiting.facts.stage = if among == Among::Beginning { candidates.beginning_stage() } else { Stage::Whole };
        Some(candidates)
    }

    /// Whether anybody's KV can go anywhere.
    fn has_pair(&self) -> bool {
        let prefills = |worker: &&Worker| worker.state.is_eligible() && worker.spec.role.prefills();
        self.fleet.workers().iter().filter(prefills).any(|worker| self.decoders(worker).is_some())
    }

    /// Who can go on from what a worker computes.
    pub(super) fn decoders(&self, from: &Worker) -> Option<Arc<Candidates>> {
        let (now_ms, slot) = (self.now_ms(), from.load.index());
        let decoders = self.fleet.candidates(MODEL, Among::Decoders)?;
        decoders.of(|to| from.hands_to(to) && !self.links.is_avoided(slot, to.load.index(), now_ms))
    }

    /// Gives a request, or the part of it that is due, to a worker.
    fn give(&mut self, number: u32, waiting: Waiting, choice: &Choice<'_>) {
        let Waiting { facts, prompt, before, kept, .. } = waiting;
        let (decision_id, tokens, is_observed) = (facts.decision_id, facts.prompt.tokens, choice.is_observed);
        let all = self.trace[number as usize].output_tokens - before.tokens;
        let prompt_tokens = Arc::clone(prompt.tokens());
        let (decoder, role) = (choice.decoder, choice.worker.spec.role);
        let divides = || facts.may_hand_over() && self.decoders(choice.worker).is_some();
        let (output_tokens, leg) = match kept {
            Some(kept) => (all, Leg::Decode { kept, transfer: Fetching::Waits }),
            None if (role == Role::Prefill || decoder.is_some()) && divides() => {
                (1, Leg::Prefill { facts: Box::new(facts), prompt, decoder })
            }
            None => (all, Leg::Whole),
        };
        let is_remote = kept.is_some();
        let uncached = if is_remote { 0 } else { tokens.saturating_sub(choice.cached_tokens) };
        let sequence = Sequence {
            prompt: prompt_tokens,
            // Its tokens then tell whose they are, and no two requests' are alike at any place.
            first_output_token: number,
            output_tokens,
            finish: if output_tokens == all { FinishReason::Stop } else { FinishReason::Length },
            salt: 0,
            // An answer of one token is final: there is nothing to go on from.
            hold: output_tokens < all,
            remote: is_remote,
        };
        let now_ms = self.now_ms();
        let worker = self.by_slot[choice.worker.load.index() as usize];
        let engine = &mut self.engines[worker as usize];
        let in_flight = InFlight::dispatch(Arc::clone(&engine.load), tokens, uncached, now_ms);
        let sequence = engine.model.submit(self.now, sequence).expect("the longest request was checked against the profile");
        if is_remote {
            engine.remote.insert(sequence, number);
        }
        engine.requests.insert(number);
        engine.work.legs += 1;
        let last_token = if before.tokens > 0 { before.last_token } else { self.now };
        self.placed[number as usize] = Some(Box::new(Placed {
            in_flight,
            number,
            decision_id,
            leg,
            place: Place { id: choice.worker.id, worker, sequence },
            before,
            at: self.arrival(number as usize),
            dispatched: self.now,
            first_token: self.now,
            last_token,
            tokens: 0,
            is_observed,
        }));
        self.on_engines += 1;
        self.make_ready(worker);
    }

    /// Gives what was prefilled to whoever was named for it beforehand, if that is still possible. Returns whether it was.
    pub(super) fn give_to(&mut self, number: u32, decoder: WorkerId, is_observed: bool) -> bool {
        let Some(waiting) = self.waiting.remove(&number) else { return false };
        let decoders = waiting.kept.and_then(|kept| self.decoders(self.fleet_worker(kept.place.id)?));
        match decoders.as_ref().and_then(|decoders| decoders.iter().find(|worker| worker.id == decoder)) {
            Some(worker) => {
                self.give(number, waiting, &Choice { worker, decoder: None, cached_tokens: 0, is_observed });
                true
            }
            None => {
                self.waiting.insert(number, waiting);
                false
            }
        }
    }

    fn fleet_worker(&self, id: WorkerId) -> Option<&Worker> {
        self.fleet.workers().iter().find(|worker| worker.id == id)
    }
}
