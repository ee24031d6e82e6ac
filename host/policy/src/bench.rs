//! Measures decisions: what `dynamo-host policy bench` reports.
//!
//! Inside the timing: the columns that the policy asks for built and handed over, its decision, the answer checked.
//! Outside: the fleet and the request, and taking the instance from its pool.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde::Serialize;

use crate::{fault::PolicyFault, question::Question, version::PolicyVersion, world::World};

/// Samples per size.
const SAMPLES: usize = 300;
/// Least time that one sample covers, so that the clock's own cost vanishes.
const SAMPLE: Duration = Duration::from_micros(500);

/// Cost of one decision at one size.
#[derive(Clone, Debug, Serialize)]
pub struct Cost {
    /// Rows of its columns: candidates, or pools.
    pub rows: u32,
    /// Median over samples, in nanoseconds per decision.
    pub median_ns: f64,
    /// 99th percentile over samples, in nanoseconds per decision.
    pub p99_ns: f64,
    /// Fuel of one decision; 0 for native code.
    pub fuel: u64,
}

/// Measures a policy at one size.
///
/// # Errors
/// If it fails to decide.
pub fn policy(version: &Arc<PolicyVersion>, rows: u32) -> Result<Cost, PolicyFault> {
    (version.world().tried.bench)(version, rows)
}

/// Measures what decides in a world without a policy, at one size.
#[must_use]
pub fn native_fallback(world: &World, rows: u32) -> Cost {
    (world.tried.bench_native)(rows)
}

pub(crate) fn of_policy<Q: Question>(version: &Arc<PolicyVersion>, rows: u32) -> Result<Cost, PolicyFault> {
    let scene = Q::measured(version, rows);
    let mut trial = version.trial()?;
    let mut call = Q::plain(&scene, 1, false);
    let fuel = trial.decide(&call)?.fuel;
    let (median_ns, p99_ns) = measure(|seed| {
        call.set_seed(seed);
        trial.decide(&call).map(|decided| drop(std::hint::black_box(decided.verdict)))
    })?;
    Ok(Cost { rows, median_ns, p99_ns, fuel })
}

pub(crate) fn of_native<Q: Question>(rows: u32) -> Cost {
    let scene = Q::scene(rows);
    let mut call = Q::plain(&scene, 1, false);
    let Ok((median_ns, p99_ns)) = measure::<std::convert::Infallible>(|seed| {
        call.set_seed(seed);
        std::hint::black_box(call.native());
        Ok(())
    });
    Cost { rows, median_ns, p99_ns, fuel: 0 }
}

/// Median and 99th percentile of samples, in nanoseconds per call.
///
/// # Errors
/// The first error of a call.
pub fn measure<E>(mut decide: impl FnMut(u64) -> Result<(), E>) -> Result<(f64, f64), E> {
    let mut seed = 0;
    let mut sample = |calls: u32| {
        let start = Instant::now();
        for _ in 0..calls {
            seed += 1;
            decide(seed)?;
        }
        Ok(start.elapsed())
    };
    // Warm up, and find how many calls fill a sample.
    let mut calls = 1;
    while sample(calls)? < SAMPLE {
        calls *= 2;
    }
    let mut samples = Vec::with_capacity(SAMPLES);
    for _ in 0..SAMPLES {
        samples.push(sample(calls)?.as_nanos() as f64 / f64::from(calls));
    }
    samples.sort_unstable_by(f64::total_cmp);
    Ok((samples[SAMPLES / 2], samples[SAMPLES * 99 / 100]))
}
