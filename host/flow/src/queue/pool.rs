//! One pool's part of the flow: its room, what is in it, and how fast it works.

use super::{shares::NodeId, slots::NONE};

/// What a pool can run at once. `None`: nothing limits it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Workers that accept requests. Without any nothing starts.
    pub workers: u32,
    /// Requests, over all workers.
    pub requests: Option<u32>,
    /// Tokens of prompts that are not computed yet, over all workers. A request that is larger starts when none other is
    /// waiting for its prefill.
    pub tokens: Option<u32>,
}

/// A pool's part of the flow.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PoolLoad {
    /// Requests that run.
    pub running: u32,
    /// Requests that could start at once; `None`: nothing limits them.
    pub free: Option<u32>,
    /// Requests that wait.
    pub queued: u32,
    /// Tokens of their prompts.
    pub queued_tokens: u64,
    /// Age of the oldest in milliseconds; 0 if none waits.
    pub oldest_age_ms: u32,
    /// What a request would wait that comes after all of them, in milliseconds; NaN if that cannot be said yet.
    pub predicted_wait_ms: f32,
}

/// A pool.
#[derive(Debug)]
pub(super) struct Pool {
    pub(super) key: u64,
    pub(super) room: Room,
    /// Its tree of shares.
    pub(super) root: NodeId,
    pub(super) running: u32,
    /// Work of what runs.
    pub(super) running_work: u64,
    /// Tokens of prompts that are being computed.
    pub(super) prefill_tokens: u64,
    pub(super) queued: u32,
    pub(super) queued_tokens: u64,
    pub(super) queued_work: u64,
    /// The waiting request that came first, and the last one; [`NONE`] without any.
    pub(super) oldest: u32,
    pub(super) newest: u32,
    pace: Pace,
}

/// What its latest requests were: decaying sums over them.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    requests: f64,
    work: f64,
    /// Of work times the milliseconds that it ran.
    work_ms: f64,
}

/// Of a request's weight in [`Pace`], what is left at the next one's end.
const KEPT: f64 = 1.0 - 1.0 / 128.0;

impl Pool {
    pub(super) fn new(key: u64, root: NodeId) -> Self {
        Self {
            key,
            room: Room::default(),
            root,
            running: 0,
            running_work: 0,
            prefill_tokens: 0,
            queued: 0,
            queued_tokens: 0,
            queued_work: 0,
            oldest: NONE,
            newest: NONE,
            pace: Pace::default(),
        }
    }

    pub(super) fn has_room(&self, prompt_tokens: u32) -> bool {
        let tokens = self.prefill_tokens + u64::from(prompt_tokens);
        self.room.workers > 0
            && self.room.requests.is_none_or(|max| self.running < max)
            && (self.prefill_tokens == 0 || self.room.tokens.is_none_or(|max| tokens <= u64::from(max)))
    }

    pub(super) fn free(&self) -> Option<u32> {
        if self.room.workers == 0 { Some(0) } else { Some(self.room.requests?.saturating_sub(self.running)) }
    }

    /// Whether it is as if it had never been.
    pub(super) fn is_gone(&self) -> bool {
        self.room.workers == 0 && self.running == 0 && self.queued == 0
    }

    /// A request of this much expected work has ended.
    pub(super) fn ended(&mut self, work: u32, ran_ms: u64) {
        let (work, ran_ms) = (f64::from(work), ran_ms as f64);
        let Pace { requests, work: sum, work_ms } = self.pace;
        self.pace = Pace { requests: requests * KEPT + 1.0, work: sum * KEPT + work, work_ms: work_ms * KEPT + work * ran_ms };
    }

    /// Milliseconds until a request can start that has this much work before it.
    ///
    /// By Little's law, with work for customers: what is in flight is the rate times the time that work spends there. Unlike
    /// a count of ends it needs no time in which the pool was busy, and follows workers that come and go at once.
    pub(super) fn wait_ms(&self, before: f64) -> f32 {
        if self.queued == 0 && self.has_room(0) {
            return 0.0;
        }
        let Pace { requests, work, work_ms } = self.pace;
        // The request waits for a place, too: for one of common size to end.
        let ahead = before + work / requests;
        let wait = ahead / (self.running_work as f64 * work / work_ms);
        if wait.is_finite() { wait as f32 } else { f32::NAN }
    }
}
