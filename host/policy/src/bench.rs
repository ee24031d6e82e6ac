//! Measures decisions: what `dynamo-host policy bench` reports.
//!
//! Inside the timing: the columns that the policy asks for built and handed over, its decision, the answer checked.
//! Outside: the fleet and the request, and taking the instance from its pool.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use dynamo_host_core::native;
use serde::Serialize;

use crate::{fault::PolicyFault, synthetic, version::PolicyVersion};

/// Samples per size.
const SAMPLES: usize = 300;
/// Least time that one sample covers, so that the clock's own cost vanishes.
const SAMPLE: Duration = Duration::from_micros(500);

/// Cost of one decision at one size.
#[derive(Clone, Debug, Serialize)]
pub struct Cost {
    /// Candidates.
    pub candidates: u32,
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
pub fn policy(version: &Arc<PolicyVersion>, candidates: u32) -> Result<Cost, PolicyFault> {
    let fleet = synthetic::fleet(candidates);
    let mut call = synthetic::route_call(&fleet, 1);
    let mut trial = version.trial()?;
    let fuel = trial.route(&call)?.fuel;
    let (median_ns, p99_ns) = measure(|seed| {
        call.seed = seed;
        trial.route(&call).map(|routed| drop(std::hint::black_box(routed.verdict)))
    })?;
    Ok(Cost { candidates, median_ns, p99_ns, fuel })
}

/// Measures the native fallback at one size.
#[must_use]
pub fn native_fallback(candidates: u32) -> Cost {
    let fleet = synthetic::fleet(candidates);
    let Ok((median_ns, p99_ns)) = measure::<std::convert::Infallible>(|seed| {
        std::hint::black_box(native::least_loaded(&fleet.candidates, seed));
        Ok(())
    });
    Cost { candidates, median_ns, p99_ns, fuel: 0 }
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
