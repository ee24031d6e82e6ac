//! Cores: one single-threaded runtime each. A connection lives on one of them, with its request, its engine's answer and
//! all their timers.
//!
//! Why not one runtime that steals work: a token then wakes another thread as often as not, and that costs more than all
//! that is done for it (measured, see docs/benchmarks.md). The price: a connection stays where it is, however busy its
//! neighbours are; a new one goes where there are fewest. Nothing here may block: a policy's call is bounded by its fuel.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
};

use tokio::{
    runtime::{Builder, Handle},
    sync::oneshot,
};

/// Runtimes to serve connections on. They end, with what runs on them, when this is dropped.
pub(crate) struct Cores {
    cores: Vec<Arc<Runtime>>,
}

struct Runtime {
    handle: Handle,
    connections: AtomicUsize,
    /// Dropped, it ends the runtime.
    _alive: Option<oneshot::Sender<()>>,
}

/// The core that a connection lives on.
pub(crate) struct Core(Arc<Runtime>);

impl Cores {
    /// As many as the machine has.
    ///
    /// # Errors
    /// If the system gives no thread, or no way to wait for events.
    pub(crate) fn start() -> io::Result<Self> {
        let count = thread::available_parallelism().map_or(1, usize::from);
        Ok(Self { cores: (0..count).map(|number| Runtime::start(number).map(Arc::new)).collect::<io::Result<_>>()? })
    }

    /// The runtime that asks for it, and no thread of its own.
    pub(crate) fn here() -> Self {
        let core = Runtime { handle: Handle::current(), connections: AtomicUsize::new(0), _alive: None };
        Self { cores: vec![Arc::new(core)] }
    }

    /// The one with the fewest connections.
    pub(crate) fn next(&self) -> Core {
        let core = self.cores.iter().min_by_key(|core| core.connections.load(Relaxed)).expect("there is at least one core");
        core.connections.fetch_add(1, Relaxed);
        Core(Arc::clone(core))
    }
}

impl Runtime {
    fn start(number: usize) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (alive, dropped) = oneshot::channel::<()>();
        let run = move || drop(runtime.block_on(dropped));
        thread::Builder::new().name(format!("core-{number}")).spawn(run)?;
        Ok(Self { handle, connections: AtomicUsize::new(0), _alive: Some(alive) })
    }
}

impl Core {
    /// Where to run what the connection needs.
    pub(crate) fn runtime(&self) -> &Handle {
        &self.0.handle
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Relaxed);
    }
}
