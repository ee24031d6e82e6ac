//! Doubles of engines in split pools, as strict as the real ones where a hand-off could go wrong.
//!
//! SGLang, TensorRT-LLM and vLLM with Mooncake are written after their sources, since no such pair runs here; vLLM with NIXL after
//! a real one. Each double refuses what the real one would, and what the real one would die of, hang on or silently garble
//! is kept as a *fault* besides, for a test to look at. What a double says follows from its prompt's tokens alone, so that
//! an answer is the same however it was made. They need little: the adapter's own tests use them, too.

mod context;
mod rooms;
mod server;
mod speech;
mod vllm;

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

pub(crate) use self::{
    context::{AT_ONCE, Trtllm},
    rooms::{Fault, REFUSED_SEED, Rooms, Sglang},
    server::Cut,
    speech::{ENDLESS_TOKENS, text_by, text_of},
    vllm::Vllm,
};

/// The model that all of them serve.
pub(crate) const MODEL: &str = "m";

/// What an engine of a pair does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Prefill,
    Decode,
    /// Neither, whatever the host was told: it was started to serve whole requests.
    Whole,
}

/// What is known of hand-offs among engines that can reach each other.
#[derive(Default)]
pub(crate) struct Network<Here> {
    pub(crate) here: Mutex<Here>,
    faults: Mutex<Vec<String>>,
    handed_over: AtomicUsize,
    at_work: AtomicUsize,
    abandoned: AtomicUsize,
}

impl<Here: Default> Network<Here> {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Something that a real engine would have suffered from.
    fn fault(&self, what: impl Into<String>) {
        self.faults.lock().unwrap().push(what.into());
    }

    /// All of it.
    pub(crate) fn faults(&self) -> Vec<String> {
        self.faults.lock().unwrap().clone()
    }

    fn handed(&self) {
        self.handed_over.fetch_add(1, Ordering::SeqCst);
    }

    /// Prompts whose KV went from one engine to another.
    pub(crate) fn handed_over(&self) -> usize {
        self.handed_over.load(Ordering::SeqCst)
    }

    /// Requests that have come and have not ended.
    pub(crate) fn at_work(&self) -> usize {
        self.at_work.load(Ordering::SeqCst)
    }

    /// Requests whose client left before their end.
    pub(crate) fn abandoned(&self) -> usize {
        self.abandoned.load(Ordering::SeqCst)
    }
}

/// Counts a request as abandoned unless it comes to its end.
struct UntilTheEnd<Here> {
    network: Arc<Network<Here>>,
    came: bool,
}

impl<Here> UntilTheEnd<Here> {
    fn of(network: &Arc<Network<Here>>) -> Self {
        network.at_work.fetch_add(1, Ordering::SeqCst);
        Self { network: Arc::clone(network), came: false }
    }

    fn came(mut self) {
        self.came = true;
    }
}

impl<Here> Drop for UntilTheEnd<Here> {
    fn drop(&mut self) {
        if !self.came {
            self.network.abandoned.fetch_add(1, Ordering::SeqCst);
        }
        self.network.at_work.fetch_sub(1, Ordering::SeqCst);
    }
}
