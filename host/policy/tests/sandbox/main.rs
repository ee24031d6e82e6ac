//! Real components in the real sandbox: good policies decide, bad ones are refused or bounded under their own name.
//!
//! The components are what `cargo xtask policies` builds.

mod admission;
mod admission_policies;
mod decisions;
mod hostile;
mod loading;
mod memory;
mod on_error;
mod quarantine;
mod raw;
mod roles;
mod slots;
mod witness;

use std::{
    cell::RefCell,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use dynamo_host_core::{SlotName, answer::Verdict};
use dynamo_host_policy::{
    Decided, FaultCause, Limits, LoadError, Now, PolicyFault, PolicyRuntime, PolicyVersion, RouteCall, RoutingSlot, SlotState,
    synthetic::{self, SyntheticFleet},
};

static RUNTIME: LazyLock<PolicyRuntime> = LazyLock::new(|| runtime(Limits::default()));

/// What was compiled once is compiled for all tests, and for the next run.
fn cache() -> &'static Path {
    Path::new(concat!(env!("CARGO_TARGET_TMPDIR"), "/sandbox"))
}

fn runtime(limits: Limits) -> PolicyRuntime {
    let start = Instant::now();
    let clock = move || Now { monotonic_ms: start.elapsed().as_millis() as u64, unix_ms: 1 };
    PolicyRuntime::new(limits, Arc::new(clock), Some(cache())).unwrap()
}

/// A runtime whose time is what a test says.
fn timed_runtime() -> (PolicyRuntime, Arc<AtomicU64>) {
    let now_ms = Arc::new(AtomicU64::new(0));
    let clock = Arc::clone(&now_ms);
    let tell = move || Now { monotonic_ms: clock.load(Relaxed), unix_ms: 1_000_000 + clock.load(Relaxed) };
    (PolicyRuntime::new(Limits::default(), Arc::new(tell), Some(cache())).unwrap(), now_ms)
}

/// Waits until something holds that other threads bring about.
#[track_caller]
fn eventually(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 60 s: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn component(kind: &str, name: &str) -> Vec<u8> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let path: PathBuf = [target, Path::new(kind), Path::new(&format!("{name}.wasm"))].iter().collect();
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}; run: cargo xtask policies", path.display()))
}

fn load(bytes: &[u8], settings: &str) -> Result<Arc<PolicyVersion>, LoadError> {
    RUNTIME.load(bytes, settings, Arc::new(SlotState::default()))
}

#[track_caller]
fn policy(name: &str, settings: &str) -> Arc<PolicyVersion> {
    load(&component("policies", name), settings).unwrap()
}

#[track_caller]
fn hostile(mode: &str) -> Arc<PolicyVersion> {
    hostile_with(&format!(r#"{{"mode":"{mode}"}}"#))
}

#[track_caller]
fn hostile_with(settings: &str) -> Arc<PolicyVersion> {
    load(&component("guests", "hostile"), settings).unwrap()
}

/// A routing slot that holds these, the last one active.
fn slot_of(versions: impl IntoIterator<Item = Arc<PolicyVersion>>) -> RoutingSlot {
    let slot = RoutingSlot::new(SlotName::ROUTING);
    versions.into_iter().for_each(|version| slot.activate(Some(version)));
    slot
}

/// Who decides, as the header says it.
fn decided_by(slot: &RoutingSlot, call: RouteCall) -> String {
    slot.decide(&slot.pin(), call).by.to_string()
}

/// A request that hostile guests misbehave at.
fn provoking(fleet: &SyntheticFleet) -> RouteCall {
    let mut call = synthetic::route_call(fleet, 1);
    Arc::make_mut(&mut call.request).max_output_tokens = Some(13);
    call
}

/// The same call at another time.
fn at(call: RouteCall, now_ms: u64) -> RouteCall {
    RouteCall { now_ms, ..call }
}

/// Asks it until it answers or fails: on a busy machine failed instances are replaced slowly, and calls may be pre-empted.
fn ask(version: &PolicyVersion, call: &RouteCall) -> Result<Decided, PolicyFault> {
    let answer = RefCell::new(None);
    eventually("it is neither busy nor pre-empted", || {
        let asked = version.decide(call.clone());
        let is_over = !matches!(&asked, Err(fault) if matches!(fault.cause, FaultCause::Busy | FaultCause::HostStall));
        *answer.borrow_mut() = Some(asked);
        is_over
    });
    answer.into_inner().expect("it was asked")
}

fn placed(version: &PolicyVersion, call: RouteCall) -> Vec<u32> {
    match ask(version, &call).unwrap().verdict {
        Verdict::Place(ranking) => ranking.rows().to_vec(),
        other => panic!("not placed: {other:?}"),
    }
}

fn cores() -> u32 {
    std::thread::available_parallelism().unwrap().get() as u32
}
