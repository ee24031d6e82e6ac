//! What a contender must do.

use crate::stream::Event as StreamEvent;

pub(crate) trait Contender {
    /// What a lookup is asked with: a prompt's blocks, hashed as far as the contender's callers do.
    type Key;
    type Event;

    fn new(workers: usize, threads: usize, block_size: u32) -> Self;
    fn key(blocks: &[u64], block_size: u32) -> Self::Key;
    fn event(worker: usize, event: &StreamEvent, block_size: u32) -> Self::Event;
    /// Blocks that all workers hold of the prompt, summed.
    fn lookup(&self, key: &Self::Key) -> u64;
    /// Hands an event on to the thread that applies its worker's.
    fn send(&self, worker: usize, event: Self::Event);
    /// Waits until all that was sent is applied.
    fn drain(&mut self);
    /// All workers go, and come back empty.
    fn remove_workers(&mut self);
}
