//! Engines' steps, and the tokens that come of them.

use dynamo_engine_mock::model::Event;
use dynamo_host_core::load::Recent;
use dynamo_host_policy::OutcomeRow;

use super::{End, Run};
use crate::{
    queue::Happening,
    requests::{Leg, Placed, ms},
};

impl Run<'_> {
    pub(super) fn make_ready(&mut self, worker: u32) {
        let engine = &mut self.engines[worker as usize];
        if !engine.is_stepping && !engine.is_ready {
            engine.is_ready = true;
            self.ready.push(worker);
        }
    }

    pub(super) fn begin_steps(&mut self) {
        let mut at = 0;
        while let Some(&worker) = self.ready.get(at) {
            at += 1;
            let engine = &mut self.engines[worker as usize];
            engine.is_ready = false;
            if let Some(end) = engine.begin_step(self.now) {
                self.queue.push(end, Happening::StepEnd { worker });
            }
            if !self.engines[worker as usize].remote.is_empty() {
                self.begin_fetches(worker);
            }
        }
        self.ready.clear();
    }

    pub(super) fn end_step(&mut self, worker: u32) {
        let engine = &mut self.engines[worker as usize];
        if !(engine.is_stepping && engine.step_ends == self.now) {
            return;
        }
        engine.is_stepping = false;
        engine.busy += self.now - engine.step_begun;
        engine.model.end_step(&mut self.tokens);
        self.publish(worker);
        let mut tokens = std::mem::take(&mut self.tokens);
        tokens.drain(..).for_each(|event| self.take_token(&event));
        self.tokens = tokens;
        self.make_ready(worker);
    }

    /// What has changed in an engine's cache is on its way to the index.
    pub(super) fn publish(&mut self, worker: u32) {
        let changes = self.engines[worker as usize].take_kv_events();
        if !changes.is_empty() {
            self.kv_events[worker as usize].push_back(changes);
            self.queue.push(self.now + self.options.kv_event_lag, Happening::KvEvents { worker });
        }
    }

    fn take_token(&mut self, event: &Event) {
        let number = event.token.wrapping_sub(event.index);
        let Some(placed) = &mut self.placed[number as usize] else { return };
        let since = placed.token(event, self.now);
        let work = &mut self.engines[placed.place.worker as usize].work;
        work.output_tokens += 1;
        let is_remote = matches!(placed.leg, Leg::Decode { .. });
        if event.index == 0 && !is_remote {
            work.prompt_tokens += u64::from(self.trace[number as usize].prompt_tokens() + placed.before.tokens);
            work.cached_tokens += u64::from(event.cached_tokens);
        }
        // One token and no more was an answer as a whole: there is nothing to go on from.
        let is_all = event.finish.is_none_or(|finish| finish == dynamo_engine_mock::model::FinishReason::Stop);
        if matches!(placed.leg, Leg::Prefill { .. }) && !is_all {
            return self.prefilled(number, event);
        }
        match since {
            Some(since) => self.tally.itl.add(ms(since), 1),
            None => {
                let ttft_ms = ms(self.now - placed.at);
                let cached_tokens = placed.before.cached_tokens.filter(|_| is_remote).unwrap_or(event.cached_tokens);
                let role = self.engines[placed.place.worker as usize].role;
                self.tally.begun(ttft_ms, cached_tokens, (is_remote, role));
                let now_ms = self.now_ms();
                self.service.iter_mut().for_each(|service| service.begun(number, ttft_ms, now_ms));
            }
        }
        if is_remote && event.index == 0 {
            self.handed_over(number);
        }
        if event.finish.is_some()
            && let Some(placed) = self.take_placed(number)
        {
            self.end(&placed);
        }
    }

    /// Takes a request off its engine, which has nothing more to do for it. Whatever it was still to fetch is fetched no more.
    pub(super) fn take_placed(&mut self, number: u32) -> Option<Box<Placed>> {
        let placed = self.placed[number as usize].take()?;
        let engine = &mut self.engines[placed.place.worker as usize];
        engine.requests.remove(&number);
        self.on_engines -= 1;
        if let Leg::Decode { kept, transfer } = &placed.leg {
            engine.remote.remove(&placed.place.sequence);
            self.let_go(number, kept, *transfer);
        }
        Some(placed)
    }

    /// A request has ended: what the host takes down of it, and tells its policy.
    fn end(&mut self, placed: &Placed) {
        self.tally.end(ms(self.now - placed.at), placed.all_tokens(), self.now);
        self.observe(placed);
        self.tell(placed, placed.ttft_ms(), 0);
        self.gone(placed.number, placed.all_tokens(), End::Served);
    }

    /// What is observed of a worker that did what it was to do.
    pub(super) fn observe(&mut self, placed: &Placed) {
        let load = placed.in_flight.slot();
        for (recent, value) in [(Recent::TtftMs, placed.ttft_ms()), (Recent::ItlMs, placed.itl_ms()), (Recent::ErrorRate, 0.0)] {
            if !value.is_nan() {
                load.observe(recent, value as f32);
                load.observed(self.now_ms());
            }
        }
    }

    /// Tells the policy what came of a request on a worker.
    pub(super) fn tell(&mut self, placed: &Placed, ttft_ms: f64, end: u32) {
        let row = OutcomeRow {
            decision_id: placed.decision_id,
            worker_id: placed.place.id.0,
            ttft_ms: ttft_ms as f32,
            itl_ms: placed.itl_ms() as f32,
            queue_ms: f32::NAN,
            output_tokens: placed.tokens,
            end,
        };
        if placed.is_observed
            && let Some(at) = self.outcomes.tell(row, self.now)
        {
            self.queue.push(at, Happening::Observe);
        }
        // That hears of the leg that answers, or was to.
        if placed.tokens > 0 || !matches!(placed.leg, Leg::Prefill { .. }) {
            self.tell_admission(placed.number, row);
        }
    }

    /// A request is no more, however it ended.
    pub(super) fn gone(&mut self, number: u32, output_tokens: u32, end: End) {
        self.open -= 1;
        self.tally.turned_away += u64::from(matches!(end, End::Left | End::Expired | End::Refused | End::Shed));
        self.tell_admission_of_none(number, end);
        let work = self.trace[number as usize].prompt_tokens().saturating_add(output_tokens);
        let now_ms = self.now_ms();
        self.service.iter_mut().for_each(|service| service.gone(number, work, output_tokens, end, now_ms));
    }
}
