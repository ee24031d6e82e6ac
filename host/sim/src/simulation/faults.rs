//! Engines that fail, and requests that move on to others.

use std::time::Duration;

use serde::Serialize;

use super::{End, Run, fleet};
use crate::{
    faults::{Fault, Faults},
    queue::Happening,
    requests::{Before, Fetching, Placed},
};

/// What the host tells a policy of an attempt that failed: `end` in `observe`.
pub(super) const FAILED: u32 = 2;
/// And of one whose client left.
pub(super) const CANCELLED: u32 = 1;

/// What faults came to.
#[derive(Clone, Debug, Default, Serialize)]
pub struct FaultTally {
    /// Engines that died.
    pub died: u64,
    /// Slow spells.
    pub slow: u64,
    /// Hangs.
    pub hung: u64,
    /// Requests that lost their worker, each time.
    pub interrupted: u64,
    /// Those that had output by then, and went on with it.
    pub migrated: u64,
    /// Tokens of output that they had and kept.
    pub tokens_kept: u64,
}

impl Run<'_> {
    fn faults(&self) -> Option<&Faults> {
        self.options.faults.as_ref()
    }

    fn tally_faults(&mut self) -> &mut FaultTally {
        self.tally.faults.get_or_insert_default()
    }

    pub(super) fn begin_faults(&mut self) {
        if self.faults().is_some() {
            self.tally_faults();
            Fault::ALL.into_iter().for_each(|kind| self.schedule(kind));
        }
    }

    fn schedule(&mut self, kind: Fault) {
        if let Some(every) = self.faults().and_then(|faults| faults.every(kind)) {
            let pause = Duration::from_secs_f64(self.chance.exponential(every));
            self.queue.push(self.now + pause, Happening::Fault { kind });
        }
    }

    /// An engine that is well fails, if there is one.
    pub(super) fn fail(&mut self, kind: Fault) {
        self.schedule(kind);
        let Some(faults) = self.faults().cloned() else { return };
        let well: Vec<u32> = (0..).zip(&self.engines).filter(|(_, engine)| engine.fault.is_none()).map(|(at, _)| at).collect();
        let Some(&worker) = well.get((self.chance.unit() * well.len() as f64) as usize) else { return };
        let engine = &mut self.engines[worker as usize];
        engine.fault = Some(kind);
        let lasts = match kind {
            Fault::Die => {
                self.tally_faults().died += 1;
                self.die(worker);
                faults.down_s
            }
            Fault::Slow => {
                engine.slow = faults.slow_factor;
                self.tally_faults().slow += 1;
                faults.slow_s
            }
            Fault::Hang => {
                self.tally_faults().hung += 1;
                self.hang(worker, Duration::from_secs_f64(faults.hang_s));
                if faults.stall_s < faults.hang_s {
                    let found_out = self.now + Duration::from_secs_f64(faults.stall_s);
                    self.queue.push(found_out, Happening::Stalled { worker });
                }
                faults.hang_s
            }
        };
        self.queue.push(self.now + Duration::from_secs_f64(lasts), Happening::Recover { worker });
    }

    fn die(&mut self, worker: u32) {
        let engine = &mut self.engines[worker as usize];
        if engine.is_stepping {
            engine.busy += self.now - engine.step_begun;
        }
        let kept = std::mem::take(&mut engine.kept);
        engine.die();
        engine.is_up = false;
        // What was to be heard of its cache is heard as nothing, each at its time.
        self.kv_events[worker as usize].iter_mut().for_each(Vec::clear);
        self.refresh_fleet();
        self.interrupt(worker, false);
        self.lose_kept(worker, kept);
    }

    fn hang(&mut self, worker: u32, lasts: Duration) {
        let engine = &mut self.engines[worker as usize];
        engine.hung_until = self.now + lasts;
        if engine.is_stepping {
            engine.step_ends += lasts;
            self.queue.push(engine.step_ends, Happening::StepEnd { worker });
        }
    }

    /// The host has waited for long enough: the requests move on, and no others come until it is well.
    pub(super) fn stalled(&mut self, worker: u32) {
        self.engines[worker as usize].is_up = false;
        self.refresh_fleet();
        self.interrupt(worker, true);
    }

    pub(super) fn recover(&mut self, worker: u32) {
        let engine = &mut self.engines[worker as usize];
        (engine.fault, engine.slow) = (None, 1.0);
        if !std::mem::replace(&mut engine.is_up, true) {
            self.refresh_fleet();
            std::mem::take(&mut self.stranded).into_iter().for_each(|number| self.place(number));
        }
    }

    /// Takes over who is a candidate.
    fn refresh_fleet(&mut self) {
        self.fleet = fleet(self.fleet.generation() + 1, &self.engines);
        self.measure_room();
    }

    /// All requests of a worker have to go on elsewhere. `is_there`: the engine still has them.
    fn interrupt(&mut self, worker: u32, is_there: bool) {
        for number in std::mem::take(&mut self.engines[worker as usize].requests) {
            let Some(placed) = self.take_placed(number) else { continue };
            if is_there {
                self.engines[worker as usize].model.cancel(placed.place.sequence);
            }
            self.tell(&placed, f64::NAN, FAILED);
            self.move_on(number, *placed);
        }
    }

    pub(super) fn move_on(&mut self, number: u32, placed: Placed) {
        let output = placed.all_tokens();
        if let Some(tally) = &mut self.tally.faults {
            tally.interrupted += 1;
        }
        // What a prompt that was computed for somebody else came to is no output.
        let Placed { mut before, last_token, place, .. } = placed;
        before.failed.push(place.id);
        let attempts = self.faults().map_or(Faults::default().attempts, |faults| faults.attempts);
        if before.failed.len() >= attempts as usize {
            self.tally.failed += 1;
            return self.gone(number, output, End::Failed);
        }
        if output > 0
            && let Some(tally) = &mut self.tally.faults
        {
            tally.migrated += 1;
            tally.tokens_kept += u64::from(output);
        }
        let before = Before { tokens: output, last_token, ..before };
        let waiting = self.beginning(number, before);
        self.waiting.insert(number, waiting);
        self.place(number);
    }

    /// A client leaves: whatever is still to be done for it is not.
    pub(super) fn leave(&mut self, number: u32) {
        if let Some(placed) = self.take_placed(number) {
            self.engines[placed.place.worker as usize].model.cancel(placed.place.sequence);
            self.tell(&placed, f64::NAN, CANCELLED);
            self.gone(number, placed.all_tokens(), End::Left);
        } else if let Some(waiting) = self.waiting.remove(&number) {
            waiting.kept.iter().for_each(|kept| self.let_go(number, kept, Fetching::Waits));
            self.gone(number, waiting.before.tokens, End::Left);
        }
    }
}
