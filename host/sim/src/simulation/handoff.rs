//! Hand-off: a prompt that one engine has computed goes on at another, when its KV has come over.
//!
//! As the host does it with engines that are asked one after the other (vLLM's NIXL connector). The engine that decodes makes
//! room first; then the KV is fetched through both engines' ports, which transfers share; then the one that has computed it frees
//! it. The first token comes from whoever decodes. KV is lost with its engine, and with whoever was to fetch it: the request is
//! prefilled anew.

use std::time::Duration;

use dynamo_engine_mock::model::{Event, Fetch};
use dynamo_host_core::request::Stage;

use super::{Run, faults::FAILED};
use crate::{
    queue::Happening,
    requests::{Fetching, Kept, Leg, Placed, Waiting, ms},
};

/// How long an engine keeps KV that nobody has begun to fetch, as vLLM does by default.
const LEASE: Duration = Duration::from_secs(30);

impl Run<'_> {
    /// An engine has computed a prompt for somebody else: who goes on is asked now.
    pub(super) fn prefilled(&mut self, number: u32, event: &Event) {
        let Some(mut placed) = self.take_placed(number) else { return };
        self.observe(&placed);
        // Its token is nobody's: the first one comes from whoever decodes.
        placed.tokens = 0;
        self.tell(&placed, placed.ttft_ms(), 0);
        self.tally.handoffs.prefilled.add(ms(self.now - placed.at));
        self.service.iter_mut().for_each(|service| service.prefilled(number));
        let Placed { leg, place, mut before, decision_id, is_observed, in_flight, .. } = *placed;
        let Leg::Prefill { mut facts, prompt, decoder } = leg else { return };
        drop(in_flight);
        let engine = &mut self.engines[place.worker as usize];
        engine.kept.insert(number);
        let kept = Kept { place, life: engine.life, since: self.now };
        self.queue.push(self.now + LEASE, Happening::Lease { request: number });
        before.cached_tokens = Some(event.cached_tokens);
        facts.stage = Stage::Decode;
        facts.prefilled_by = Some(place.id);
        // A pair is one decision; who goes on otherwise is another.
        facts.decision_id = if decoder.is_some() { decision_id } else { before.next_decision(number) };
        self.waiting.insert(number, Waiting { facts: *facts, prompt, holds: 0, before, kept: Some(kept) });
        if let Some(decoder) = decoder {
            if self.give_to(number, decoder, is_observed) {
                return;
            }
            if let Some(waiting) = self.waiting.get_mut(&number) {
                waiting.facts.decision_id = waiting.before.next_decision(number);
            }
        }
        self.place(number);
    }

    /// Whether KV is there still.
    pub(super) fn is_kept(&self, kept: &Kept) -> bool {
        let engine = &self.engines[kept.place.worker as usize];
        engine.life == kept.life && engine.model.held(kept.place.sequence).is_some()
    }

    /// Begins to fetch what an engine has made room for.
    pub(super) fn begin_fetches(&mut self, worker: u32) {
        let mut fetches = std::mem::take(&mut self.fetches);
        self.engines[worker as usize].model.take_fetches(&mut fetches);
        for Fetch { sequence, tokens } in fetches.drain(..) {
            let engine = &self.engines[worker as usize];
            let Some(&number) = engine.remote.get(&sequence) else { continue };
            let Some(Leg::Decode { kept, transfer }) = self.placed[number as usize].as_mut().map(|placed| &mut placed.leg) else {
                continue;
            };
            let bytes = engine.model.profile().kv_bytes(tokens);
            let id = self.wires.begin(self.now, kept.place.worker as usize, worker as usize, bytes);
            *transfer = Fetching::UnderWay(id);
            self.under_way.insert(id, (number, tokens, self.now));
            self.tally.handoffs.fetches += 1;
        }
        self.fetches = fetches;
        self.await_transfers();
    }

    /// Has the next end of a transfer looked at when it comes.
    fn await_transfers(&mut self) {
        if let Some(at) = self.wires.next_end()
            && self.transfers_due.is_none_or(|due| at < due)
        {
            self.transfers_due = Some(at);
            self.queue.push(at, Happening::Transfers);
        }
    }

    /// Transfers may have ended: their engines go on, and those that had the KV have room again.
    pub(super) fn end_transfers(&mut self) {
        if self.transfers_due.is_none_or(|due| due > self.now) {
            return;
        }
        self.transfers_due = None;
        let mut ended = Vec::new();
        self.wires.advance(self.now, &mut ended);
        for end in ended {
            let Some((number, tokens, since)) = self.under_way.remove(&end.transfer) else { continue };
            let Some(placed) = &mut self.placed[number as usize] else { continue };
            let (here, Leg::Decode { kept, transfer }) = (placed.place, &mut placed.leg) else { continue };
            *transfer = Fetching::Done;
            let kept = *kept;
            let engine = &mut self.engines[here.worker as usize];
            engine.remote.remove(&here.sequence);
            engine.model.fetched(here.sequence, self.now);
            self.tally.handoffs.moved(tokens, engine.model.profile().kv_bytes(tokens), ms(self.now - since));
            self.make_ready(here.worker);
            self.free(number, &kept);
        }
        self.await_transfers();
    }

    /// Nobody will fetch it any more.
    pub(super) fn let_go(&mut self, number: u32, kept: &Kept, transfer: Fetching) {
        match transfer {
            Fetching::Done => return,
            Fetching::Waits => {}
            Fetching::UnderWay(id) => {
                self.wires.cancel(self.now, id);
                self.under_way.remove(&id);
                self.tally.handoffs.fetches -= 1;
                self.await_transfers();
            }
        }
        self.free(number, kept);
    }

    /// KV that nobody has begun to fetch by now is given up: who waits for it has failed.
    pub(super) fn end_lease(&mut self, number: u32) {
        let is_over = |kept: &Kept, now| kept.since + LEASE == now;
        if let Some(waiting) = self.waiting.get_mut(&number)
            && let Some(kept) = waiting.kept.filter(|kept| is_over(kept, self.now))
        {
            // It is asked for again as it was, and finds nothing.
            self.free(number, &kept);
            self.tally.handoffs.leases_lost += 1;
        } else if let Some(placed) = &self.placed[number as usize]
            && let Leg::Decode { kept, transfer: Fetching::Waits } = &placed.leg
            && is_over(kept, self.now)
        {
            self.tally.handoffs.leases_lost += 1;
            self.fail_decode(number);
        }
    }

    fn free(&mut self, number: u32, kept: &Kept) {
        if self.is_kept(kept) {
            let engine = &mut self.engines[kept.place.worker as usize];
            engine.kept.remove(&number);
            engine.model.release(kept.place.sequence);
            self.make_ready(kept.place.worker);
        }
    }

    /// The first token came after a hand-off: what the host learns of the way between the two.
    pub(super) fn handed_over(&mut self, number: u32) {
        let Some(placed) = &self.placed[number as usize] else { return };
        let Leg::Decode { kept, .. } = &placed.leg else { return };
        let slot = |worker: u32| self.engines[worker as usize].load.index();
        let tokens = self.trace[number as usize].prompt_tokens();
        let took_ms = ms(self.now - placed.dispatched);
        self.links.arrived(slot(kept.place.worker), slot(placed.place.worker), tokens, took_ms as f32);
        self.tally.handoffs.time.add(ms(self.now - kept.since));
    }

    /// An engine is gone with all that it kept: whoever was to go on from it has failed.
    pub(super) fn lose_kept(&mut self, worker: u32, kept: impl IntoIterator<Item = u32>) {
        for number in kept {
            let Some(placed) = &self.placed[number as usize] else { continue };
            // Who waits for a decision finds out when it is asked for.
            let slot = |worker: u32| self.engines[worker as usize].load.index();
            self.links.failed(slot(worker), slot(placed.place.worker), self.now_ms());
            self.fail_decode(number);
        }
    }

    /// Nothing came to go on from: prefilled anew.
    fn fail_decode(&mut self, number: u32) {
        let Some(placed) = self.take_placed(number) else { return };
        let here = placed.place;
        self.engines[here.worker as usize].model.cancel(here.sequence);
        self.make_ready(here.worker);
        self.tell(&placed, f64::NAN, FAILED);
        self.move_on(number, *placed);
    }
}
