//! Measures a live engine: how long prefill takes by length, a decode step by batch and context, and what it can hold.
//!
//! Contract: it asks for completions like any client, through the engine's adapter, one thing at a time; within a bounded time
//! and with a bounded number of tokens. No two prompts begin alike, so that no prefix cache falsifies anything. Of equal
//! measurements the quickest counts: what disturbs only ever adds.

mod fit;
mod probe;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use dynamo_engine_api::{Engine, RankLoad};
use dynamo_engine_mock::Profile;
use indicatif::{ProgressBar, ProgressStyle};

pub(crate) use self::fit::{Fit, Point};
use self::{
    fit::fit,
    probe::{Prober, Stream},
};

use crate::text::plain;

/// Bounds of a measurement.
pub(crate) struct Bounds {
    pub(crate) time: Duration,
    /// Tokens of prompts and outputs together.
    pub(crate) tokens: u64,
    /// Longest prompt.
    pub(crate) longest: u32,
}

/// What was found.
pub(crate) struct Measured {
    pub(crate) profile: Profile,
    pub(crate) prefill: Fit,
    pub(crate) prefill_points: usize,
    pub(crate) decode: Option<Fit>,
    pub(crate) decode_points: usize,
    /// Of each capacity, how it is known.
    pub(crate) known_by: Vec<(&'static str, u32, &'static str)>,
    pub(crate) warnings: Vec<String>,
}

/// Shortest prompt.
const SHORTEST: u32 = 32;
/// Times that each length is measured.
const REPEATS: usize = 3;
/// Sequences that decode at once.
const BATCHES: [u32; 5] = [1, 2, 4, 8, 16];
/// Steps that a batch decodes.
const STEPS: u32 = 24;
/// Share of the time that prefill may take.
const PREFILL_SHARE: f64 = 0.5;
/// Context of the short and of the long ones among those that decode.
const CONTEXTS: [u32; 2] = [64, 2048];

/// Measures an engine.
///
/// # Errors
/// Why it could not be.
pub(crate) async fn measure(engine: Arc<dyn Engine>, model: Option<&str>, bounds: &Bounds) -> Result<Measured, String> {
    let begun = Instant::now();
    let cards = engine.models().await.map_err(|error| error.to_string())?;
    let card = match model {
        Some(name) => cards.iter().find(|card| card.id == name),
        None => cards.iter().find(|card| card.parent.is_none()),
    };
    let model = match (model, card) {
        (Some(name), _) => name.to_owned(),
        (None, Some(card)) => card.id.clone(),
        (None, None) => return Err("the engine lists no model; name one with --model".to_owned()),
    };
    // Its adapter learns what it is by a probe, and then how to ask for its load.
    engine.probe().await.map_err(|error| error.to_string())?;
    let mut warnings = Vec::new();
    let told = engine.load().await.unwrap_or_else(|error| {
        warnings.push(format!("the engine does not tell its load: {}", plain(&error.to_string())));
        Vec::new()
    });
    let told = told.into_iter().next().unwrap_or_default();
    busy(&told, "before", &mut warnings);

    let bar = bar();
    let most = card.and_then(|card| card.max_model_len).unwrap_or(u32::MAX);
    let most = most.min(told.kv_tokens_total.unwrap_or(u32::MAX));
    let mut prober = Prober::new(Arc::clone(&engine), model, begun + bounds.time, bounds.tokens);
    bar.set_message("warming up");
    prober.settle().await?;
    let longest = bounds.longest.min(most.saturating_sub(STEPS + 8)).min(told.max_batched_tokens.unwrap_or(u32::MAX));
    let (prefill, points) = prefills(&mut prober, longest, begun + bounds.time.mul_f64(PREFILL_SHARE), &bar).await?;
    let fitted = fit(&points).ok_or("no prompt was measured in time; raise --max-seconds or --max-tokens")?;
    let (decode_points, seen) = decodes(&mut prober, &told, most, &bar).await?;
    let decode = fit(&decode_points);
    bar.finish_and_clear();

    if prefill.len() < 3 {
        warnings.push(format!("only {} lengths were measured in time: raise --max-seconds or --max-tokens", prefill.len()));
    }
    if prober.is_cut {
        warnings.push("the bounds were reached before all was measured: raise --max-seconds or --max-tokens".to_owned());
    }
    if let Ok(now) = engine.load().await {
        busy(&now.into_iter().next().unwrap_or_default(), "after", &mut warnings);
    }
    let mut profile = Profile { speedup: 1.0, ..Profile::default() };
    [profile.prefill_ms_base, profile.prefill_ms_per_token, profile.prefill_ms_per_token_squared] = fitted.coefficients;
    match &decode {
        Some(decode) => {
            [profile.decode_ms_base, profile.decode_ms_per_sequence, profile.decode_ms_per_context_token] = decode.coefficients;
        }
        None => warnings.push("no decode step was measured: its times are the default's".to_owned()),
    }
    let known_by = capacities(&mut profile, &told, card.and_then(|card| card.max_model_len), seen);
    profile.validate().map_err(|error| format!("what was measured is no profile: {error}"))?;
    Ok(Measured {
        profile,
        prefill: fitted,
        prefill_points: points.len(),
        decode,
        decode_points: decode_points.len(),
        known_by,
        warnings,
    })
}

fn busy(load: &RankLoad, when: &str, warnings: &mut Vec<String>) {
    let (running, queued) = (load.running.unwrap_or(0), load.queued.unwrap_or(0));
    if running + queued > 0 {
        warnings.push(format!(
            "the engine was busy {when} ({running} running, {queued} waiting): what was measured is too slow; measure an idle one"
        ));
    }
}

/// On the terminal alone.
fn bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{elapsed_precise} [{wide_bar}] {pos}/{len} {msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// Time to the first token by length.
async fn prefills(
    prober: &mut Prober,
    longest: u32,
    until: Instant,
    bar: &ProgressBar,
) -> Result<(Vec<u32>, Vec<Point>), String> {
    let doubled = std::iter::successors(Some(SHORTEST), |length| length.checked_mul(2));
    let lengths: Vec<u32> = doubled.take_while(|length| *length <= longest).collect();
    bar.set_length((lengths.len() * REPEATS + BATCHES.len() * CONTEXTS.len()) as u64);
    let (mut measured, mut points) = (Vec::new(), Vec::new());
    for length in lengths {
        bar.set_message(format!("prefill of {length} tokens"));
        let mut quickest: Option<(f64, u32)> = None;
        for _ in 0..REPEATS {
            bar.inc(1);
            if Instant::now() >= until {
                prober.is_cut = true;
                break;
            }
            let Some(Stream { first, asked, prompt_tokens, cached_tokens, .. }) = prober.ask(length, 1).await? else { break };
            let ms = (first - asked).as_secs_f64() * 1e3;
            let computed = prompt_tokens.saturating_sub(cached_tokens);
            if quickest.is_none_or(|(quickest, _)| ms < quickest) {
                quickest = Some((ms, computed));
            }
        }
        let Some((ms, tokens)) = quickest else { break };
        let n = f64::from(tokens);
        measured.push(length);
        points.push(Point { work: [1.0, n, n * n], ms, name: format!("{tokens} tokens") });
    }
    Ok((measured, points))
}

/// Time of a step by sequences and context; and the most sequences that were seen to run at once, with those that were asked.
async fn decodes(
    prober: &mut Prober,
    told: &RankLoad,
    most: u32,
    bar: &ProgressBar,
) -> Result<(Vec<Point>, Option<(u32, u32)>), String> {
    let mut points = Vec::new();
    let mut seen = None;
    for context in CONTEXTS {
        // Half of what one sequence may have is long enough.
        let context = context.min(most / 2).max(1);
        for batch in BATCHES {
            bar.inc(1);
            let room = told.kv_tokens_total.unwrap_or(u32::MAX);
            if told.max_running.is_some_and(|max| batch > max) || batch.saturating_mul(context + STEPS + 16) > room {
                continue;
            }
            bar.set_message(format!("decode of {batch} sequences of {context} tokens"));
            let Some(streams) = prober.ask_together(batch, context, STEPS).await? else { continue };
            let at_once = probe::overlap(&streams);
            seen = seen.max(Some((at_once, batch)));
            if let (true, Some(ms)) = (at_once == batch, probe::step_ms(&streams)) {
                let read: u64 = streams.iter().map(|stream| u64::from(stream.prompt_tokens + STEPS / 2)).sum();
                let name = format!("{batch} sequences, {read} tokens of context");
                points.push(Point { work: [1.0, f64::from(batch), read as f64], ms, name });
            }
        }
    }
    Ok((points, seen))
}

/// What the engine can hold: as it tells, as it was seen, or as the default is.
fn capacities(
    profile: &mut Profile,
    told: &RankLoad,
    max_model_len: Option<u32>,
    seen: Option<(u32, u32)>,
) -> Vec<(&'static str, u32, &'static str)> {
    const TOLD: &str = "told by the engine";
    const DEFAULT: &str = "not told: the default";
    let mut known_by = Vec::new();
    let mut take = |key, field: &mut u32, value: Option<u32>| {
        *field = value.unwrap_or(*field).max(1);
        known_by.push((key, *field, if value.is_some() { TOLD } else { DEFAULT }));
    };
    take("block_size", &mut profile.block_size, told.block_size);
    take("kv_blocks", &mut profile.kv_blocks, told.kv_tokens_total.map(|tokens| tokens / profile.block_size));
    take("max_model_len", &mut profile.max_model_len, max_model_len);
    take("max_num_seqs", &mut profile.max_num_seqs, told.max_running);
    take("max_num_batched_tokens", &mut profile.max_num_batched_tokens, told.max_batched_tokens);
    if let (None, Some((at_once, batch))) = (told.max_running, seen)
        && at_once < batch
    {
        profile.max_num_seqs = at_once.max(1);
        known_by[3] = ("max_num_seqs", profile.max_num_seqs, "seen: no more ran at once");
    }
    // What is not told must not contradict what is.
    let holds = profile.kv_blocks.saturating_mul(profile.block_size);
    if profile.max_model_len > holds {
        let needed = profile.max_model_len.div_ceil(profile.block_size);
        if told.kv_tokens_total.is_some() {
            profile.max_model_len = holds;
            known_by[2] = ("max_model_len", holds, "what its KV capacity holds");
        } else {
            profile.kv_blocks = needed;
            known_by[1] = ("kv_blocks", needed, "not told: one longest sequence");
        }
    }
    if profile.max_num_batched_tokens < profile.max_num_seqs {
        profile.max_num_batched_tokens = profile.max_num_seqs;
        known_by[4] = ("max_num_batched_tokens", profile.max_num_seqs, "as many as sequences");
    }
    known_by
}
