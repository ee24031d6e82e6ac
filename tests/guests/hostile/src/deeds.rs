//! The misbehaviours themselves.

use std::{hint::black_box, time::Duration};

use dynamo_policy_sdk::{Candidates, Decision, explain, state, telemetry};

use crate::{Hostile, Mode};

/// What one call of [`Mode::Leak`] keeps.
const LEAK_BYTES: usize = 1 << 20;

pub(crate) fn in_configure(mode: Mode) {
    match mode {
        Mode::TrapInConfigure => panic!("configured to panic in configure"),
        Mode::LoopInConfigure => forever(),
        Mode::SlowConfigure => {
            for i in 0..10_000_000u64 {
                black_box(i);
            }
        }
        _ => {}
    }
}

pub(crate) fn in_observe(mode: Mode) {
    match mode {
        Mode::TrapInObserve => panic!("configured to panic in observe"),
        Mode::LoopInObserve => forever(),
        _ => {}
    }
}

pub(crate) fn in_route(hostile: &Hostile, candidates: &Candidates) -> Decision {
    match hostile.settings.mode {
        Mode::Good
        | Mode::Gossip
        | Mode::TrapInConfigure
        | Mode::LoopInConfigure
        | Mode::SlowConfigure
        | Mode::TrapInObserve
        | Mode::LoopInObserve => {}
        Mode::Trap | Mode::TrapAlways => panic!("configured to panic"),
        Mode::Loop => forever(),
        Mode::Memory => {
            let mut hoard = Vec::new();
            loop {
                hoard.push(black_box(Vec::<u8>::with_capacity(1 << 20)));
            }
        }
        Mode::Leak => hostile.hoard.borrow_mut().push(Vec::with_capacity(LEAK_BYTES)),
        Mode::Recursion => drop(black_box(dive(1))),
        Mode::Bulk => {
            let mut block = vec![0u8; 8 << 20];
            for byte in 0.. {
                block.fill(byte);
                black_box(&block);
            }
        }
        Mode::HostCalls => loop {
            black_box(state::get("k"));
        },
        Mode::OutOfRange => return Decision::Place(vec![candidates.count()]),
        Mode::Duplicate => return Decision::Place(vec![0, 0]),
        Mode::Empty => return Decision::Place(Vec::new()),
        Mode::TooMany => return Decision::Place((0..100_000).collect()),
        Mode::HugeAnswer => return Decision::Place((0..300_000).collect()),
        Mode::NoAnswer => return Decision::Abstain,
        Mode::BadStatus => return Decision::Reject { status: 200, retry_after: None, reason: "fine".to_owned() },
        Mode::Reject => {
            let retry_after = Some(Duration::from_millis(1500));
            return Decision::Reject { status: 429, retry_after, reason: "configured to reject".to_owned() };
        }
        Mode::Hold => return Decision::Hold(Duration::from_millis(1)),
        Mode::Flood => {
            for i in 0..100 {
                telemetry::log(telemetry::Level::Info, &"x".repeat(1 << 10));
                telemetry::counter_add(&format!("flood_{i}"), 1);
            }
        }
        Mode::MetricFlood => {
            for i in 0..20 {
                let name = format!("flood_{}_{i}", hostile.calls.get());
                telemetry::counter_add(&name, 1);
                telemetry::gauge_set(&name, 1.0);
            }
        }
        Mode::StateFlood => {
            let value = vec![0; 4096];
            for i in 0..500 {
                let key = format!("flood.{}.{i}", hostile.calls.get());
                // The smallest that there are fill what is left.
                if state::set(&key, &value, Duration::ZERO).is_err() {
                    let _ = state::set(&i.to_string(), &[], Duration::ZERO);
                }
            }
        }
        Mode::NotFinite => not_finite(candidates),
        Mode::Pairs => return hostile.pairs(candidates),
        Mode::Remember => return Decision::Place(vec![hostile.calls.get() % candidates.count()]),
    }
    hostile.good(candidates)
}

fn not_finite(candidates: &Candidates) {
    for (name, value) in [("nan", f64::NAN), ("infinity", f64::INFINITY), ("minus_infinity", f64::NEG_INFINITY)] {
        telemetry::gauge_set(name, value);
        // More than the bucket holds, or no number at all: never, and nothing is kept.
        assert_eq!(state::take(name, value, 1.0, 1.0), Ok(state::Taken::Never));
        assert_eq!(state::take(name, 1.0, value, value), Ok(state::Taken::Never));
    }
    explain("scores", || candidates.rows().map(|row| [f32::NAN, f32::INFINITY][row as usize % 2]).collect());
    explain("too many", || vec![f32::NAN; 100_000]);
}

fn forever() -> ! {
    loop {
        black_box(());
    }
}

#[expect(unconditional_recursion, reason = "that is the misbehaviour")]
fn dive(depth: u64) -> u64 {
    // Small frames: the stack that the host bounds runs out before the guest's own in linear memory.
    black_box(dive(depth + 1)) + depth
}
