//! The one thread that writes receipts, and the queue before it.
//!
//! Bounded twice: by entries, and by the values that they hold, since a receipt of ten thousand candidates is as large as
//! a thousand of ten.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
};

use dynamo_host_policy::Reading;
use tokio::sync::oneshot;

use super::{Decided, DecisionLine, Line, OutcomeLine, budget::Budget, log::Log};

/// Entries that wait.
const QUEUE: usize = 8192;
/// Bytes of columns that wait.
const MAX_WAITING: usize = 32 << 20;
/// Bytes that are written at a time.
const BATCH: usize = 1 << 20;

/// What is left for the writer.
pub(super) enum Entry {
    Decision(Box<Decided>),
    Outcome(Box<OutcomeLine>),
    Flush(oneshot::Sender<()>),
}

impl Entry {
    /// Bytes that it keeps in memory, about.
    fn weight(&self) -> usize {
        let Self::Decision(decided) = self else { return 0 };
        let columns = decided.readings.iter().filter(|reading| matches!(reading, Reading::Column(..))).count();
        (columns + decided.explanations.len()) * decided.candidates.count() as usize * 4
    }
}

/// Where entries wait.
pub(super) struct Queue {
    sender: SyncSender<Entry>,
    waiting: Arc<AtomicUsize>,
}

impl Queue {
    /// Starts the writer; `None` if the system has no thread for it.
    pub(super) fn start(log: Log, budget: Arc<Budget>) -> Option<Self> {
        let (sender, receiver) = sync_channel(QUEUE);
        let waiting = Arc::new(AtomicUsize::new(0));
        let taken = Arc::clone(&waiting);
        thread::Builder::new().name("receipts".to_owned()).spawn(move || Writer::new(log, budget).run(&receiver, &taken)).ok()?;
        Some(Self { sender, waiting })
    }

    /// Leaves an entry; what has no room is counted.
    pub(super) fn leave(&self, entry: Entry) {
        let weight = entry.weight();
        if self.waiting.fetch_add(weight, Relaxed) + weight > MAX_WAITING || self.sender.try_send(entry).is_err() {
            self.waiting.fetch_sub(weight, Relaxed);
            dropped("queue", 1);
        }
    }

    /// Waits until all that was left before is written.
    pub(super) async fn flushed(&self) {
        let (done, wait) = oneshot::channel();
        if self.sender.try_send(Entry::Flush(done)).is_ok() {
            // An error: the writer is gone, and has nothing any more.
            let _ = wait.await;
        }
    }
}

fn dropped(cause: &'static str, lines: u64) {
    metrics::counter!("dynamo_host_receipts_dropped_total", "cause" => cause).increment(lines);
}

struct Writer {
    log: Log,
    /// Told what each line takes.
    budget: Arc<Budget>,
    batch: Vec<u8>,
    lines: u64,
    /// It was said that they cannot be written.
    is_failing: bool,
}

impl Writer {
    fn new(log: Log, budget: Arc<Budget>) -> Self {
        Self { log, budget, batch: Vec::new(), lines: 0, is_failing: false }
    }

    /// Writes until nobody can leave anything any more.
    fn run(mut self, receiver: &Receiver<Entry>, waiting: &AtomicUsize) {
        while let Ok(first) = receiver.recv() {
            let mut next = Some(first);
            while let Some(entry) = next {
                let weight = entry.weight();
                self.take(entry);
                waiting.fetch_sub(weight, Relaxed);
                next = if self.batch.len() < BATCH { receiver.try_recv().ok() } else { None };
            }
            self.write();
        }
    }

    fn take(&mut self, entry: Entry) {
        let line = match entry {
            Entry::Decision(decided) => Line::Decision(Box::new(DecisionLine::of(&decided))),
            Entry::Outcome(outcome) => Line::Outcome(outcome),
            Entry::Flush(done) => {
                self.write();
                let _ = done.send(());
                return;
            }
        };
        let begun = self.batch.len();
        if let Err(error) = serde_json::to_writer(&mut self.batch, &line) {
            self.batch.truncate(begun);
            dropped("unwritable", 1);
            tracing::debug!("a receipt cannot be written as JSON: {error}");
            return;
        }
        self.batch.push(b'\n');
        self.budget.spend((self.batch.len() - begun) as u64);
        self.lines += 1;
    }

    fn write(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        match self.log.append(&self.batch) {
            Ok(()) if std::mem::take(&mut self.is_failing) => tracing::info!("receipts are written again"),
            Ok(()) => {}
            Err(error) => {
                dropped("disk", self.lines);
                if !std::mem::replace(&mut self.is_failing, true) {
                    let folder = self.log.folder().display();
                    tracing::warn!(
                        "receipts cannot be written to {folder}: {error}; they are dropped and counted until they can"
                    );
                }
            }
        }
        self.batch.clear();
        self.lines = 0;
    }
}
