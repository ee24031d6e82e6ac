//! What is known of each worker's load: what the host counts itself, at dispatch and on every way out, and what the
//! engine reports, with the age of its report.
//!
//! Columns are arrays of atomics indexed by a worker's slot, not fields of a worker: a policy reads a whole
//! column at a time, and at thousands of workers a pointer per value would cost more than the policy does.
//! The board has a fixed number of slots, so membership changes never move a counter that a running request
//! still holds.

mod throughput;

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
};

pub use self::throughput::Throughput;
use crate::UNKNOWN;

/// The load columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Requests in flight.
    ActiveRequests,
    /// Prompt tokens of requests without a first token.
    ActivePrefillTokens,
    /// Of those, what the worker did not hold when it was given them: what it has to compute.
    ActiveUncachedTokens,
    /// Context tokens of requests that decode.
    ActiveDecodeTokens,
}

const COLUMNS: usize = 4;

/// Columns of what engines report, [`UNKNOWN`] where one does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reported {
    /// Requests that wait inside the engine.
    QueuedRequests,
    /// Requests that the engine runs at once at most.
    MaxRunningRequests,
    /// Tokens that the engine computes in one step at most.
    MaxBatchedTokens,
    /// KV capacity in tokens.
    KvTokensTotal,
    /// KV capacity in tokens that is free or holds only reusable cache.
    KvTokensFree,
    /// Tokens per KV block.
    BlockSize,
    /// Requests that the engine works on, of whomever.
    RunningRequests,
}

const REPORTED: usize = 7;

/// How many engines a host asks for their load in a second: with more engines each is read less often, and its age says so.
pub const READINGS_PER_SECOND: f64 = 2000.0;

/// What an engine says of one worker's load at one moment. What it does not say is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Requests that the engine works on, of whomever.
    pub running_requests: Option<u32>,
    /// Requests that wait inside the engine.
    pub queued_requests: Option<u32>,
    /// Requests that the engine runs at once at most.
    pub max_running_requests: Option<u32>,
    /// Tokens that the engine computes in one step at most.
    pub max_batched_tokens: Option<u32>,
    /// KV capacity in tokens.
    pub kv_tokens_total: Option<u32>,
    /// KV capacity in tokens that is free or holds only reusable cache.
    pub kv_tokens_free: Option<u32>,
    /// Tokens per KV block.
    pub block_size: Option<u32>,
}

/// A slot's recent observations: moving averages as `f32` bits, NaN before the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recent {
    /// Time to first token in milliseconds.
    TtftMs,
    /// Time between tokens in milliseconds.
    ItlMs,
    /// Share of requests that failed.
    ErrorRate,
    /// Output tokens per second.
    TokensPerSecond,
}

const RECENT: usize = 4;

/// Weight of the newest observation in a moving average: about the last ten count.
const ALPHA: f32 = 0.1;

/// All workers' load, column by column.
#[derive(Debug)]
pub struct LoadBoard {
    columns: [Box<[AtomicU32]>; COLUMNS],
    reported: [Box<[AtomicU32]>; REPORTED],
    /// When a slot's engine last reported, in milliseconds of the host's clock; `u64::MAX`: never.
    reported_ms: Box<[AtomicU64]>,
    /// When a slot last made progress in prefill: a prompt was done, or the first came; in milliseconds of the host's clock.
    prefill_ms: Box<[AtomicU64]>,
    recent: [Box<[AtomicU32]>; RECENT],
    /// When a slot's recent values were last observed, in milliseconds of the host's clock; `u64::MAX`: never.
    observed_ms: Box<[AtomicU64]>,
    free: Mutex<Vec<u32>>,
}

impl LoadBoard {
    /// A board with room for `workers` workers.
    #[must_use]
    pub fn new(workers: u32) -> Arc<Self> {
        let all = |value: u32| (0..workers).map(|_| AtomicU32::new(value)).collect();
        let never = || (0..workers).map(|_| AtomicU64::new(u64::MAX)).collect();
        Arc::new(Self {
            columns: std::array::from_fn(|_| all(0)),
            reported: std::array::from_fn(|_| all(UNKNOWN)),
            reported_ms: never(),
            prefill_ms: never(),
            recent: std::array::from_fn(|_| all(f32::NAN.to_bits())),
            observed_ms: never(),
            free: Mutex::new((0..workers).rev().collect()),
        })
    }

    /// Takes a slot for a worker, or `None` if the board is full. The slot comes back when the last
    /// reference to it is dropped.
    #[must_use]
    pub fn claim(self: &Arc<Self>) -> Option<Arc<LoadSlot>> {
        let index = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
        for (columns, blank) in [(&self.columns[..], 0), (&self.reported[..], UNKNOWN), (&self.recent[..], f32::NAN.to_bits())] {
            columns.iter().for_each(|column| column[index as usize].store(blank, Relaxed));
        }
        for times in [&self.reported_ms, &self.prefill_ms, &self.observed_ms] {
            times[index as usize].store(u64::MAX, Relaxed);
        }
        Some(Arc::new(LoadSlot { board: Arc::clone(self), index, served: AtomicU64::new(0), output_tokens: AtomicU64::new(0) }))
    }

    /// Reads one column at `slots`, in their order.
    #[must_use]
    pub fn gather(&self, load: Load, slots: &[u32]) -> Arc<[u32]> {
        let column = &self.columns[load as usize];
        slots.iter().map(|&slot| column[slot as usize].load(Relaxed)).collect()
    }

    /// Reads for how long `slots` have had prompts in prefill without progress, in their order; 0 for those without any.
    #[must_use]
    pub fn gather_prefill_busy_ms(&self, slots: &[u32], now_ms: u64) -> Arc<[u32]> {
        let waiting = &self.columns[Load::ActivePrefillTokens as usize];
        let busy = |&slot: &u32| match waiting[slot as usize].load(Relaxed) {
            0 => 0,
            _ => age_ms(&self.prefill_ms[slot as usize], now_ms),
        };
        slots.iter().map(busy).collect()
    }

    /// Reads one column of what engines report at `slots`, in their order.
    #[must_use]
    pub fn gather_reported(&self, reported: Reported, slots: &[u32]) -> Arc<[u32]> {
        let column = &self.reported[reported as usize];
        slots.iter().map(|&slot| column[slot as usize].load(Relaxed)).collect()
    }

    /// Reads how long ago the engines of `slots` last reported, in their order.
    #[must_use]
    pub fn gather_load_age_ms(&self, slots: &[u32], now_ms: u64) -> Arc<[u32]> {
        slots.iter().map(|&slot| age_ms(&self.reported_ms[slot as usize], now_ms)).collect()
    }

    /// Reads one column of recent observations at `slots`, in their order.
    #[must_use]
    pub fn gather_recent(&self, recent: Recent, slots: &[u32]) -> Arc<[f32]> {
        let column = &self.recent[recent as usize];
        slots.iter().map(|&slot| f32::from_bits(column[slot as usize].load(Relaxed))).collect()
    }

    /// Reads how long ago `slots` were last observed, in their order.
    #[must_use]
    pub fn gather_recent_age_ms(&self, slots: &[u32], now_ms: u64) -> Arc<[u32]> {
        slots.iter().map(|&slot| age_ms(&self.observed_ms[slot as usize], now_ms)).collect()
    }
}

/// Time since a moment; [`UNKNOWN`] if it never was.
fn age_ms(at_ms: &AtomicU64, now_ms: u64) -> u32 {
    match at_ms.load(Relaxed) {
        u64::MAX => UNKNOWN,
        at => u32::try_from(now_ms.saturating_sub(at)).unwrap_or(UNKNOWN - 1),
    }
}

/// One worker's place on the board.
#[derive(Debug)]
pub struct LoadSlot {
    board: Arc<LoadBoard>,
    index: u32,
    served: AtomicU64,
    output_tokens: AtomicU64,
}

impl LoadSlot {
    /// Index on the board.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The board.
    #[must_use]
    pub fn board(&self) -> &Arc<LoadBoard> {
        &self.board
    }

    /// Requests that this worker was ever given.
    #[must_use]
    pub fn served(&self) -> u64 {
        self.served.load(Relaxed)
    }

    /// Output tokens that this worker ever made for this host.
    #[must_use]
    pub fn output_tokens(&self) -> u64 {
        self.output_tokens.load(Relaxed)
    }

    /// Present value of one column.
    #[must_use]
    pub fn get(&self, load: Load) -> u32 {
        self.board.columns[load as usize][self.index as usize].load(Relaxed)
    }

    /// What the engine last reported, if it did.
    #[must_use]
    pub fn get_reported(&self, reported: Reported) -> Option<u32> {
        Some(self.board.reported[reported as usize][self.index as usize].load(Relaxed)).filter(|&value| value != UNKNOWN)
    }

    /// How long ago the engine last reported, in milliseconds, if it ever did.
    #[must_use]
    pub fn load_age_ms(&self, now_ms: u64) -> Option<u32> {
        Some(age_ms(&self.board.reported_ms[self.index as usize], now_ms)).filter(|&age| age != UNKNOWN)
    }

    /// Takes down what the engine reports now, by the host's clock.
    pub fn report(&self, report: &LoadReport, now_ms: u64) {
        let &LoadReport {
            running_requests,
            queued_requests,
            max_running_requests,
            max_batched_tokens,
            kv_tokens_total,
            kv_tokens_free,
            block_size,
        } = report;
        for (reported, value) in [
            (Reported::RunningRequests, running_requests),
            (Reported::QueuedRequests, queued_requests),
            (Reported::MaxRunningRequests, max_running_requests),
            (Reported::MaxBatchedTokens, max_batched_tokens),
            (Reported::KvTokensTotal, kv_tokens_total),
            (Reported::KvTokensFree, kv_tokens_free),
            (Reported::BlockSize, block_size),
        ] {
            // A value that cannot be told from "unknown" is the next lower one.
            let value = value.map_or(UNKNOWN, |value| value.min(UNKNOWN - 1));
            self.board.reported[reported as usize][self.index as usize].store(value, Relaxed);
        }
        self.board.reported_ms[self.index as usize].store(now_ms, Relaxed);
    }

    /// Notes that the recent values were observed now, by the host's clock.
    pub fn observed(&self, now_ms: u64) {
        self.board.observed_ms[self.index as usize].store(now_ms, Relaxed);
    }

    /// Folds an observation into a moving average.
    pub fn observe(&self, recent: Recent, value: f32) {
        let cell = &self.board.recent[recent as usize][self.index as usize];
        // A lost race loses one observation of an average: not worth a loop.
        let old = f32::from_bits(cell.load(Relaxed));
        let new = if old.is_nan() { value } else { old + ALPHA * (value - old) };
        cell.store(new.to_bits(), Relaxed);
    }

    /// Takes down what is an average already.
    pub fn set_recent(&self, recent: Recent, value: f32) {
        self.board.recent[recent as usize][self.index as usize].store(value.to_bits(), Relaxed);
    }

    /// Adds to a column as much as it can hold, and says what was there and how much was added: who gives back more than
    /// that would take of others'.
    fn add(&self, load: Load, by: u32) -> (u32, u32) {
        // Short of the value that means "unknown".
        let sum = |before: u32| before.saturating_add(by).min(UNKNOWN - 1);
        let cell = &self.board.columns[load as usize][self.index as usize];
        let before = cell.fetch_update(Relaxed, Relaxed, |before| Some(sum(before))).unwrap_or_default();
        (before, sum(before) - before)
    }

    fn prefill_progress(&self, now_ms: u64) {
        self.board.prefill_ms[self.index as usize].store(now_ms, Relaxed);
    }

    fn sub(&self, load: Load, by: u32) {
        let _ =
            self.board.columns[load as usize][self.index as usize].fetch_update(Relaxed, Relaxed, |v| Some(v.saturating_sub(by)));
    }
}

impl Drop for LoadSlot {
    fn drop(&mut self) {
        self.board.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.index);
    }
}

/// One request on one worker's account, from dispatch until dropped: a request that leaves by any way
/// leaves no trace.
///
/// Invariant: what it holds of a column is what it added to it, so that nothing drifts, however long and at whatever load.
#[derive(Debug)]
pub struct InFlight {
    slot: Arc<LoadSlot>,
    /// Tokens of its prompt, as far as is known by now.
    prompt: u32,
    in_prefill: bool,
    prefill: u32,
    uncached: u32,
    decode: u32,
}

impl InFlight {
    /// Books a request with a prompt of this many tokens, of which so many are to be computed. `now_ms` is the host's
    /// clock.
    #[must_use]
    pub fn dispatch(slot: Arc<LoadSlot>, prompt_tokens: u32, uncached_tokens: u32, now_ms: u64) -> Self {
        slot.served.fetch_add(1, Relaxed);
        slot.add(Load::ActiveRequests, 1);
        let (before, prefill) = slot.add(Load::ActivePrefillTokens, prompt_tokens);
        if before == 0 {
            slot.prefill_progress(now_ms);
        }
        let (_, uncached) = slot.add(Load::ActiveUncachedTokens, uncached_tokens);
        Self { slot, prompt: prompt_tokens, in_prefill: true, prefill, uncached, decode: 0 }
    }

    /// Tokens came out: the first ones end the prefill, all of them grow the context.
    pub fn tokens(&mut self, count: u32, now_ms: u64) {
        let grown = if std::mem::take(&mut self.in_prefill) {
            self.slot.sub(Load::ActivePrefillTokens, std::mem::take(&mut self.prefill));
            self.slot.sub(Load::ActiveUncachedTokens, std::mem::take(&mut self.uncached));
            self.slot.prefill_progress(now_ms);
            self.prompt.saturating_add(count)
        } else {
            count
        };
        self.slot.output_tokens.fetch_add(u64::from(count), Relaxed);
        let (_, grown) = self.slot.add(Load::ActiveDecodeTokens, grown);
        self.decode = self.decode.saturating_add(grown);
    }

    /// The engine says how long the prompt is, and how much of it was cached if it tells: what was booked by an estimate is
    /// put right.
    pub fn correct(&mut self, prompt_tokens: u32, cached_tokens: Option<u32>) {
        let estimate = std::mem::replace(&mut self.prompt, prompt_tokens);
        if self.in_prefill {
            rebook(&self.slot, Load::ActivePrefillTokens, &mut self.prefill, prompt_tokens);
            let uncached = prompt_tokens.saturating_sub(cached_tokens.unwrap_or(estimate.saturating_sub(self.uncached)));
            rebook(&self.slot, Load::ActiveUncachedTokens, &mut self.uncached, uncached);
        } else {
            let context = self.decode.saturating_sub(estimate).saturating_add(prompt_tokens);
            rebook(&self.slot, Load::ActiveDecodeTokens, &mut self.decode, context);
        }
    }

    /// The slot that this request is booked on.
    #[must_use]
    pub fn slot(&self) -> &Arc<LoadSlot> {
        &self.slot
    }
}

/// Changes what is booked of a column.
fn rebook(slot: &LoadSlot, load: Load, booked: &mut u32, to: u32) {
    if to < *booked {
        slot.sub(load, *booked - to);
        *booked = to;
    } else {
        *booked += slot.add(load, to - *booked).1;
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.slot.sub(Load::ActivePrefillTokens, self.prefill);
        self.slot.sub(Load::ActiveUncachedTokens, self.uncached);
        self.slot.sub(Load::ActiveDecodeTokens, self.decode);
        self.slot.sub(Load::ActiveRequests, 1);
    }
}

#[cfg(test)]
mod tests;
