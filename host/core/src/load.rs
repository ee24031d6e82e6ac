//! What the host itself knows of each worker's load: counted at dispatch, freed on every way out.
//!
//! Columns are arrays of atomics indexed by a worker's slot, not fields of a worker: a policy reads a whole
//! column at a time, and at thousands of workers a pointer per value would cost more than the policy does.
//! The board has a fixed number of slots, so membership changes never move a counter that a running request
//! still holds.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
};

use crate::UNKNOWN;

/// The load columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Requests in flight.
    ActiveRequests,
    /// Prompt tokens of requests without a first token.
    ActivePrefillTokens,
    /// Context tokens of requests that decode.
    ActiveDecodeTokens,
}

const COLUMNS: usize = 3;

/// A slot's recent observations: moving averages as `f32` bits, NaN before the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recent {
    /// Time to first token in milliseconds.
    TtftMs,
    /// Time between tokens in milliseconds.
    ItlMs,
    /// Share of requests that failed.
    ErrorRate,
}

const RECENT: usize = 3;

/// Weight of the newest observation in a moving average: about the last ten count.
const ALPHA: f32 = 0.1;

/// All workers' load, column by column.
#[derive(Debug)]
pub struct LoadBoard {
    columns: [Box<[AtomicU32]>; COLUMNS],
    recent: [Box<[AtomicU32]>; RECENT],
    /// When a slot's recent values were last observed, in milliseconds of the host's clock; `u64::MAX`: never.
    observed_ms: Box<[AtomicU64]>,
    free: Mutex<Vec<u32>>,
}

impl LoadBoard {
    /// A board with room for `workers` workers.
    #[must_use]
    pub fn new(workers: u32) -> Arc<Self> {
        let zeros = || (0..workers).map(|_| AtomicU32::new(0)).collect();
        let unknown = || (0..workers).map(|_| AtomicU32::new(f32::NAN.to_bits())).collect();
        Arc::new(Self {
            columns: [zeros(), zeros(), zeros()],
            recent: [unknown(), unknown(), unknown()],
            observed_ms: (0..workers).map(|_| AtomicU64::new(u64::MAX)).collect(),
            free: Mutex::new((0..workers).rev().collect()),
        })
    }

    /// Takes a slot for a worker, or `None` if the board is full. The slot comes back when the last
    /// reference to it is dropped.
    #[must_use]
    pub fn claim(self: &Arc<Self>) -> Option<Arc<LoadSlot>> {
        let index = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
        for column in &self.columns {
            column[index as usize].store(0, Relaxed);
        }
        for column in &self.recent {
            column[index as usize].store(f32::NAN.to_bits(), Relaxed);
        }
        self.observed_ms[index as usize].store(u64::MAX, Relaxed);
        Some(Arc::new(LoadSlot { board: Arc::clone(self), index, served: AtomicU64::new(0) }))
    }

    /// Reads one column at `slots`, in their order.
    #[must_use]
    pub fn gather(&self, load: Load, slots: &[u32]) -> Arc<[u32]> {
        let column = &self.columns[load as usize];
        slots.iter().map(|&slot| column[slot as usize].load(Relaxed)).collect()
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
        let age = |observed_ms| match observed_ms {
            u64::MAX => UNKNOWN,
            at => u32::try_from(now_ms.saturating_sub(at)).unwrap_or(UNKNOWN - 1),
        };
        slots.iter().map(|&slot| age(self.observed_ms[slot as usize].load(Relaxed))).collect()
    }
}

/// One worker's place on the board.
#[derive(Debug)]
pub struct LoadSlot {
    board: Arc<LoadBoard>,
    index: u32,
    served: AtomicU64,
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

    /// Present value of one column.
    #[must_use]
    pub fn get(&self, load: Load) -> u32 {
        self.board.columns[load as usize][self.index as usize].load(Relaxed)
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

    fn add(&self, load: Load, by: u32) {
        // Saturating, and short of the value that means "unknown".
        let _ = self.board.columns[load as usize][self.index as usize]
            .fetch_update(Relaxed, Relaxed, |v| Some(v.saturating_add(by).min(UNKNOWN - 1)));
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
#[derive(Debug)]
pub struct InFlight {
    slot: Arc<LoadSlot>,
    prefill: u32,
    decode: u32,
}

impl InFlight {
    /// Books a request with a prompt of this many tokens.
    #[must_use]
    pub fn dispatch(slot: Arc<LoadSlot>, prompt_tokens: u32) -> Self {
        slot.served.fetch_add(1, Relaxed);
        slot.add(Load::ActiveRequests, 1);
        slot.add(Load::ActivePrefillTokens, prompt_tokens);
        Self { slot, prefill: prompt_tokens, decode: 0 }
    }

    /// Tokens came out: the first ones end the prefill, all of them grow the context.
    pub fn tokens(&mut self, count: u32) {
        let grown = if self.prefill > 0 {
            let prompt = std::mem::take(&mut self.prefill);
            self.slot.sub(Load::ActivePrefillTokens, prompt);
            prompt.saturating_add(count)
        } else {
            count
        };
        self.decode = self.decode.saturating_add(grown);
        self.slot.add(Load::ActiveDecodeTokens, grown);
    }

    /// The slot that this request is booked on.
    #[must_use]
    pub fn slot(&self) -> &Arc<LoadSlot> {
        &self.slot
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.slot.sub(Load::ActivePrefillTokens, self.prefill);
        self.slot.sub(Load::ActiveDecodeTokens, self.decode);
        self.slot.sub(Load::ActiveRequests, 1);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn loads(slot: &LoadSlot) -> [u32; 3] {
        [Load::ActiveRequests, Load::ActivePrefillTokens, Load::ActiveDecodeTokens].map(|load| slot.get(load))
    }

    #[test]
    fn a_request_moves_from_prefill_to_decode_and_leaves_nothing() {
        let slot = LoadBoard::new(1).claim().unwrap();
        let mut request = InFlight::dispatch(Arc::clone(&slot), 100);
        assert_eq!(loads(&slot), [1, 100, 0]);
        request.tokens(1);
        request.tokens(2);
        assert_eq!(loads(&slot), [1, 0, 103]);
        drop(request);
        assert_eq!(loads(&slot), [0, 0, 0]);
    }

    #[test]
    fn a_slot_returns_only_when_its_last_request_has_ended() {
        let board = LoadBoard::new(1);
        let slot = board.claim().unwrap();
        let request = InFlight::dispatch(Arc::clone(&slot), 5);
        drop(slot);
        assert!(board.claim().is_none(), "the slot is still in use");
        drop(request);
        assert!(board.claim().is_some());
    }

    #[test]
    fn the_age_of_observations_is_known_once_there_was_one() {
        let slot = LoadBoard::new(1).claim().unwrap();
        assert_eq!(*slot.board().gather_recent_age_ms(&[0], 50), [UNKNOWN]);
        slot.observed(20);
        assert_eq!(*slot.board().gather_recent_age_ms(&[0], 50), [30]);
    }

    #[test]
    fn a_recent_average_starts_at_the_first_observation() {
        let slot = LoadBoard::new(1).claim().unwrap();
        assert!(slot.board().gather_recent(Recent::TtftMs, &[0])[0].is_nan());
        slot.observe(Recent::TtftMs, 10.0);
        slot.observe(Recent::TtftMs, 20.0);
        assert_eq!(*slot.board().gather_recent(Recent::TtftMs, &[0]), [11.0]);
    }

    proptest! {
        #[test]
        fn any_interleaving_of_requests_drains_to_zero(steps in prop::collection::vec((0u32..2000, 0u32..50, any::<bool>()), 1..200)) {
            let slot = LoadBoard::new(1).claim().unwrap();
            let mut open: Vec<InFlight> = Vec::new();
            for (prompt, tokens, end) in steps {
                open.push(InFlight::dispatch(Arc::clone(&slot), prompt));
                for request in &mut open {
                    request.tokens(tokens);
                }
                if end {
                    open.swap_remove(0);
                }
                prop_assert_eq!(slot.get(Load::ActiveRequests) as usize, open.len());
            }
            open.clear();
            prop_assert_eq!(loads(&slot), [0, 0, 0]);
        }
    }
}
