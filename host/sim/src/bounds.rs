//! Bounds that no policy can beat: what every request would wait if it never queued, and whatever any worker has computed
//! were in its own cache.

use std::{sync::Arc, time::Duration};

use dynamo_engine_mock::{
    Profile,
    model::{EngineModel, FinishReason, Pass, Sequence},
};
use serde::Serialize;

use crate::{
    engine::EngineSpec,
    prompt,
    requests::ms,
    samples::{Quantiles, Samples},
    simulation::SimulationError,
    trace::Trace,
};

/// One bound.
#[derive(Clone, Debug, Serialize)]
pub struct Bound {
    /// Time to first token in milliseconds.
    pub ttft: Quantiles,
    /// Share of the prompt tokens that are cached.
    pub reuse: f64,
}

/// The bounds of a trace on a fleet.
#[derive(Clone, Debug, Serialize)]
pub struct Bounds {
    /// With one cache that forgets nothing.
    pub infinite: Bound,
    /// With one cache of all workers' capacity together, least recently used out first.
    pub pooled: Bound,
}

/// Computes the bounds: requests are computed one after the other, in the order in which they come, each by the whole of
/// an idle engine with the fastest worker's speed.
///
/// # Errors
/// If the engine cannot be.
pub fn bounds(trace: &Trace, workers: &[EngineSpec]) -> Result<Bounds, SimulationError> {
    let workers: Vec<&Profile> = workers.iter().map(|worker| &worker.profile).collect();
    let fastest = workers.iter().copied().min_by(|one, other| full_pass(one).total_cmp(&full_pass(other)));
    let engine = fastest.ok_or(SimulationError::NoWorker)?;
    let pooled = workers.iter().map(|profile| u64::from(profile.kv_blocks) * u64::from(profile.block_size)).sum::<u64>();
    let pooled = u32::try_from(pooled / u64::from(engine.block_size)).unwrap_or(u32::MAX);
    Ok(Bounds { infinite: bound(trace, engine, u32::MAX)?, pooled: bound(trace, engine, pooled)? })
}

/// Seconds of a full pass per token of it: engines may differ in what a pass takes.
fn full_pass(profile: &Profile) -> f64 {
    let prefill_tokens = profile.max_num_batched_tokens;
    let pass = Pass { prefill_tokens, ..Pass::default() };
    profile.step_time(pass).as_secs_f64() / f64::from(prefill_tokens.max(1))
}

fn bound(trace: &Trace, engine: &Profile, kv_blocks: u32) -> Result<Bound, SimulationError> {
    let mut model = EngineModel::new(Profile { kv_blocks, ..engine.clone() })?;
    let (mut ttft, mut cached, mut total) = (Samples::default(), 0u64, 0u64);
    let mut events = Vec::new();
    for request in &trace.requests {
        let prompt: Arc<[u32]> = prompt::tokens(&request.prompt);
        total += prompt.len() as u64;
        let sequence = Sequence {
            prompt,
            first_output_token: 0,
            output_tokens: 1,
            finish: FinishReason::Stop,
            salt: 0,
            hold: false,
            remote: false,
        };
        if model.submit(Duration::ZERO, sequence).is_err() {
            let (tokens, max_model_len, workers) = (trace.longest(), engine.max_model_len, 1);
            return Err(SimulationError::TooLong { tokens, max_model_len, workers });
        }
        let mut now = Duration::ZERO;
        while let Some(end) = model.begin_step(now) {
            now = end;
            model.end_step(&mut events);
        }
        ttft.add(ms(now));
        cached += events.drain(..).map(|event| u64::from(event.cached_tokens)).sum::<u64>();
    }
    Ok(Bound { ttft: ttft.quantiles(), reuse: cached as f64 / total.max(1) as f64 })
}
