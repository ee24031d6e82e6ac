//! Driver: runs an [`EngineModel`] in real time, in one task that owns it.
//!
//! Contract: whoever submits gets [`Outputs`]; dropping them cancels the sequences at once, also in the middle of a
//! step. The task ends when the driver is dropped; outputs then end without a finish reason.
//!
//! A request that is to hold its KV has one sequence, and is known by its ticket until it is [released](Courier::release); one whose
//! KV comes from elsewhere has one sequence, and its [`Outputs`] say when to fetch it.
//!
//! Bounds: submissions wait for room in a queue of [`COMMANDS`]. A request's outputs have room for all tokens that it can
//! ever get, so a slow reader holds up nobody, and holds no more than its own answer.
//!
//! Time: steps end at exact model times, and the task sleeps until those. A timer that fires late delays what it
//! announces, not the steps after it; only a lag of more than [`MAX_LAG`] is given up.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::JoinSet,
    time::{Instant, sleep_until},
};

use crate::{
    faults::Pace,
    model::{EngineModel, Event, Fetch, FinishReason, Sequence, SequenceId, Snapshot},
    tape::{Batch, Tape},
};

/// Commands that may wait for the task.
const COMMANDS: usize = 256;

/// How far steps may fall behind the clock before the time is given up as lost.
const MAX_LAG: Duration = Duration::from_millis(50);

/// The task that drives a model is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the mock engine was stopped")]
pub struct Stopped;

/// One token of one of a request's sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Output {
    /// Which of the submitted sequences.
    pub(crate) sequence: u32,
    /// Its place in the output, from 0.
    pub(crate) index: u32,
    /// Its id.
    pub(crate) token: u32,
    /// Prompt tokens that were cached.
    pub(crate) cached_tokens: u32,
    /// On the last: why it ended.
    pub(crate) finish: Option<FinishReason>,
}

/// A handle to the task; dropping it ends the task.
#[derive(Debug)]
pub(crate) struct Driver {
    commands: mpsc::Sender<Command>,
    cancellations: Arc<Cancellations>,
    next_ticket: std::sync::atomic::AtomicU64,
    _task: JoinSet<()>,
}

/// Names a request between driver and task.
pub(crate) type Ticket = u64;

pub(crate) enum Command {
    Submit { ticket: Ticket, sequences: Vec<Sequence>, outputs: mpsc::Sender<Output>, fetch: oneshot::Sender<Fetch> },
    Fetched { ticket: Ticket, arrived: bool },
    Held { ticket: Ticket, answer: oneshot::Sender<Option<Vec<u32>>> },
    Snapshot(oneshot::Sender<Snapshot>),
    ResetPrefixCache(oneshot::Sender<bool>),
    Tape(oneshot::Sender<mpsc::Receiver<Batch>>),
}

impl Driver {
    /// Starts the task.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub(crate) fn start(model: EngineModel, pace: watch::Receiver<Pace>) -> Self {
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let cancellations = Arc::new(Cancellations::default());
        let mut task = JoinSet::new();
        task.spawn(Loop::new(model, inbox, Arc::clone(&cancellations), pace).run());
        Self { commands, cancellations, next_ticket: 0.into(), _task: task }
    }

    /// Submits a request's sequences, which the profile must allow.
    ///
    /// # Cancel safety
    /// Dropping the future submits nothing; dropping the outputs cancels.
    pub(crate) async fn submit(&self, sequences: Vec<Sequence>) -> Result<Outputs, Stopped> {
        let ticket = self.next_ticket.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let room = sequences.iter().map(|sequence| sequence.output_tokens as usize).sum::<usize>().max(1);
        let (outputs, reader) = mpsc::channel(room);
        let open = sequences.len();
        let (fetch, fetches) = oneshot::channel();
        self.commands.send(Command::Submit { ticket, sequences, outputs, fetch }).await.map_err(|_| Stopped)?;
        let guard = CancelOnDrop { ticket, cancellations: Arc::clone(&self.cancellations) };
        Ok(Outputs { reader, open, fetch: Some(fetches), guard })
    }

    /// A way to tell of requests that does not hold the driver.
    pub(crate) fn courier(&self) -> Courier {
        Courier { commands: self.commands.clone(), cancellations: Arc::clone(&self.cancellations) }
    }

    pub(crate) async fn snapshot(&self) -> Result<Snapshot, Stopped> {
        self.ask(Command::Snapshot).await
    }

    pub(crate) async fn reset_prefix_cache(&self) -> Result<bool, Stopped> {
        self.ask(Command::ResetPrefixCache).await
    }

    /// Changes of the prefix cache: those that are kept, then those that come.
    pub(crate) async fn tape(&self) -> Result<mpsc::Receiver<Batch>, Stopped> {
        self.tapes().next().await
    }

    /// A way to read them again and again that does not hold the driver.
    pub(crate) fn tapes(&self) -> Tapes {
        Tapes(self.commands.clone())
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Stopped> {
        ask(&self.commands, command).await
    }
}

/// Tells of KV that comes from elsewhere, or goes there.
#[derive(Clone, Debug)]
pub(crate) struct Courier {
    commands: mpsc::Sender<Command>,
    cancellations: Arc<Cancellations>,
}

impl Courier {
    /// The KV that a request waits for is there; or it does not come, and is computed.
    pub(crate) async fn fetched(&self, ticket: Ticket, arrived: bool) {
        // Were the task gone, the request would hear of it.
        let _ = self.commands.send(Command::Fetched { ticket, arrived }).await;
    }

    /// The blocks that a request holds since it finished.
    pub(crate) async fn held(&self, ticket: Ticket) -> Result<Option<Vec<u32>>, Stopped> {
        ask(&self.commands, |answer| Command::Held { ticket, answer }).await
    }

    /// What a request holds is not needed any more. Waits for nothing.
    pub(crate) fn release(&self, ticket: Ticket) {
        self.cancellations.lock().released.push(ticket);
        self.cancellations.wake.notify_one();
    }
}

/// Begins to read changes of the prefix cache.
pub(crate) struct Tapes(mpsc::Sender<Command>);

impl Tapes {
    pub(crate) async fn next(&self) -> Result<mpsc::Receiver<Batch>, Stopped> {
        ask(&self.0, Command::Tape).await
    }
}

async fn ask<T>(commands: &mpsc::Sender<Command>, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Stopped> {
    let (answer, answered) = oneshot::channel();
    commands.send(command(answer)).await.map_err(|_| Stopped)?;
    answered.await.map_err(|_| Stopped)
}

/// The tokens of a request as they come. Dropping it cancels what is not finished.
#[derive(Debug)]
pub(crate) struct Outputs {
    // Closed before the guard tells of it: a request that the task has not taken yet is refused then.
    reader: mpsc::Receiver<Output>,
    /// Sequences that have not finished.
    open: usize,
    fetch: Option<oneshot::Receiver<Fetch>>,
    guard: CancelOnDrop,
}

impl Outputs {
    /// Its name.
    pub(crate) fn ticket(&self) -> Ticket {
        self.guard.ticket
    }

    /// Says when to fetch its KV, and how much of it. Once, and of nothing if its KV is computed here.
    pub(crate) fn take_fetch(&mut self) -> Option<oneshot::Receiver<Fetch>> {
        self.fetch.take()
    }

    /// The next token of any of the sequences; `Ok(None)` after the last one of all.
    ///
    /// # Errors
    /// If the task ended before them.
    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Output>, Stopped>> {
        if self.open == 0 {
            return Poll::Ready(Ok(None));
        }
        self.reader.poll_recv(cx).map(|output| {
            let output = output.ok_or(Stopped)?;
            self.open -= usize::from(output.finish.is_some());
            Ok(Some(output))
        })
    }
}

/// Requests whose readers left, and those whose KV is not needed. Lists and not channels, since dropping cannot wait for room; each
/// request is in each of them once at most.
#[derive(Debug, Default)]
struct Cancellations {
    gone: Mutex<Gone>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct Gone {
    left: Vec<Ticket>,
    released: Vec<Ticket>,
}

impl Cancellations {
    fn lock(&self) -> MutexGuard<'_, Gone> {
        self.gone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Gone {
        std::mem::take(&mut self.lock())
    }
}

#[derive(Debug)]
struct CancelOnDrop {
    ticket: Ticket,
    cancellations: Arc<Cancellations>,
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.cancellations.lock().left.push(self.ticket);
        self.cancellations.wake.notify_one();
    }
}

/// What the task owns.
struct Loop {
    model: EngineModel,
    inbox: mpsc::Receiver<Command>,
    cancellations: Arc<Cancellations>,
    pace: watch::Receiver<Pace>,
    start: Instant,
    /// Which of which request's sequences it is.
    places: HashMap<SequenceId, (Ticket, u32)>,
    requests: HashMap<Ticket, Request>,
    /// Requests that have finished and hold their KV.
    held: HashMap<Ticket, SequenceId>,
    fetches: Vec<Fetch>,
    events: Vec<Event>,
    /// Made for its first reader.
    tape: Option<Tape>,
}

struct Request {
    outputs: mpsc::Sender<Output>,
    sequences: Vec<SequenceId>,
    open: usize,
    /// Until it was told to fetch.
    fetch: Option<oneshot::Sender<Fetch>>,
}

impl Loop {
    fn new(
        model: EngineModel,
        inbox: mpsc::Receiver<Command>,
        cancellations: Arc<Cancellations>,
        pace: watch::Receiver<Pace>,
    ) -> Self {
        let (start, tape) = (Instant::now(), None);
        let (places, requests, held) = (HashMap::new(), HashMap::new(), HashMap::new());
        let (fetches, events) = (Vec::new(), Vec::new());
        Self { model, inbox, cancellations, pace, start, places, requests, held, fetches, events, tape }
    }

    /// Runs until the driver is gone, or the engine dies.
    async fn run(mut self) {
        let mut last_end = Duration::ZERO;
        loop {
            while let Ok(command) = self.inbox.try_recv() {
                self.carry_out(command);
            }
            self.apply_cancellations();
            let pace = *self.pace.borrow_and_update();
            if pace.is_dead {
                return;
            }
            self.model.slow_down(pace.slow);
            if pace.is_paused {
                if !self.listen().await {
                    return;
                }
                continue;
            }
            let now = self.start.elapsed();
            let begin = if self.model.is_idle() || now.saturating_sub(last_end) > MAX_LAG { now } else { last_end };
            let end = self.model.begin_step(begin);
            self.tell_fetches();
            match end {
                Some(end) => {
                    self.listen_until(self.start + end).await;
                    if !self.resumed().await {
                        return;
                    }
                    self.model.end_step(&mut self.events);
                    self.record();
                    self.deliver();
                    last_end = end;
                }
                None if !self.listen().await => return,
                None => last_end = self.start.elapsed(),
            }
        }
    }

    /// Takes commands and cancellations while a step runs.
    async fn listen_until(&mut self, step_end: Instant) {
        let sleep = sleep_until(step_end);
        tokio::pin!(sleep);
        if step_end <= Instant::now() {
            // Catching up: the readers must get their turn all the same.
            tokio::task::yield_now().await;
        }
        loop {
            tokio::select! {
                biased;
                () = &mut sleep => return,
                Ok(()) = self.pace.changed() => if self.pace.borrow().is_dead { return },
                () = self.cancellations.wake.notified() => self.apply_cancellations(),
                Some(command) = self.inbox.recv() => self.carry_out(command),
            }
        }
    }

    /// Waits while the engine is paused in the middle of a step. `false` if the driver is gone, or the engine dies.
    async fn resumed(&mut self) -> bool {
        loop {
            let pace = *self.pace.borrow_and_update();
            if pace.is_dead {
                return false;
            }
            if !pace.is_paused {
                return true;
            }
            if !self.listen().await {
                return false;
            }
        }
    }

    /// Waits, with nothing to do, for a command, a cancellation or another pace. `false` if the driver is gone.
    async fn listen(&mut self) -> bool {
        tokio::select! {
            changed = self.pace.changed() => return changed.is_ok(),
            () = self.cancellations.wake.notified() => {}
            command = self.inbox.recv() => match command {
                Some(command) => self.carry_out(command),
                None => return false,
            },
        }
        true
    }

    fn carry_out(&mut self, command: Command) {
        // Whoever asked and left does not need the answer.
        match command {
            Command::Submit { ticket, sequences, outputs, fetch } => self.submit(ticket, sequences, outputs, fetch),
            Command::Fetched { ticket, arrived } => self.fetched(ticket, arrived),
            Command::Held { ticket, answer } => {
                let held = self.held.get(&ticket).and_then(|&id| self.model.held(id));
                let _ = answer.send(held.map(<[u32]>::to_vec));
            }
            Command::Snapshot(answer) => drop(answer.send(self.model.snapshot())),
            Command::ResetPrefixCache(answer) => {
                let _ = answer.send(self.model.reset_prefix_cache());
                self.record();
            }
            Command::Tape(answer) => {
                self.model.record_cache_events();
                let block_size = self.model.profile().block_size;
                drop(answer.send(self.tape.get_or_insert_with(|| Tape::new(block_size)).read()));
            }
        }
    }

    /// Whoever waits for KV is told to fetch it.
    fn tell_fetches(&mut self) {
        self.model.take_fetches(&mut self.fetches);
        for fetch in self.fetches.drain(..) {
            let request = self.places.get(&fetch.sequence).and_then(|(ticket, _)| self.requests.get_mut(ticket));
            // If nobody waits for it, its cancellation is on the way.
            let _ = request.and_then(|request| request.fetch.take()).map(|told| told.send(fetch));
        }
    }

    fn fetched(&mut self, ticket: Ticket, arrived: bool) {
        for &id in self.requests.get(&ticket).iter().flat_map(|request| &request.sequences) {
            if arrived {
                self.model.fetched(id, self.start.elapsed());
            } else {
                self.model.fetch_failed(id);
            }
        }
    }

    fn submit(&mut self, ticket: Ticket, sequences: Vec<Sequence>, outputs: mpsc::Sender<Output>, fetch: oneshot::Sender<Fetch>) {
        if outputs.is_closed() {
            return;
        }
        let now = self.start.elapsed();
        let mut ids = Vec::with_capacity(sequences.len());
        for sequence in sequences {
            match self.model.submit(now, sequence) {
                Ok(id) => ids.push(id),
                // The service has checked the sequences; were it wrong, the reader sees an end without a finish.
                Err(_) => {
                    ids.into_iter().for_each(|id| _ = self.model.cancel(id));
                    return;
                }
            }
        }
        self.places.extend((0..).zip(&ids).map(|(place, &id)| (id, (ticket, place))));
        self.requests.insert(ticket, Request { outputs, open: ids.len(), sequences: ids, fetch: Some(fetch) });
    }

    fn apply_cancellations(&mut self) {
        let Gone { left, released } = self.cancellations.take();
        for ticket in released {
            match self.held.remove(&ticket) {
                Some(id) => _ = self.model.release(id),
                // It would hold it when it ends.
                None => self.cancel(ticket),
            }
        }
        left.into_iter().for_each(|ticket| self.cancel(ticket));
    }

    fn cancel(&mut self, ticket: Ticket) {
        let Some(request) = self.requests.remove(&ticket) else { return };
        for id in request.sequences {
            self.places.remove(&id);
            self.model.cancel(id);
        }
    }

    /// Takes down what became of the prefix cache.
    fn record(&mut self) {
        if let Some(tape) = &mut self.tape {
            tape.record(self.model.take_cache_events());
        }
    }

    fn deliver(&mut self) {
        for event in self.events.drain(..) {
            let Some(&(ticket, sequence)) = self.places.get(&event.sequence) else { continue };
            let Some(request) = self.requests.get_mut(&ticket) else { continue };
            let Event { index, token, cached_tokens, finish, .. } = event;
            // It has room for all its tokens; if the reader left, its cancellation is on the way.
            let _ = request.outputs.try_send(Output { sequence, index, token, cached_tokens, finish });
            if finish.is_some() {
                if self.model.held(event.sequence).is_some() {
                    self.held.insert(ticket, event.sequence);
                }
                self.places.remove(&event.sequence);
                request.open -= 1;
                if request.open == 0 {
                    self.requests.remove(&ticket);
                }
            }
        }
    }
}
