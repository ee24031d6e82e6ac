//! KV-aware: cached prefix against load, by Dynamo's cost rule, with its settings under its names and with its defaults.
//!
//! `cost = (prefill_load_scale · (prefill under way + max(0, prompt − credit)) + context under way + this request's +
//! decode_active_request_weight · requests) · preference`, in blocks. `credit` is what the worker holds of the prompt, by
//! tier. The lowest cost is taken, equals at random; with a temperature, any worker, the cheaper the likelier.
//!
//! Where it differs from Dynamo: blocks that several running requests share are counted once for each, since a policy does
//! not see blocks; output counts as context; credit beyond the prompt's own blocks pays for nothing. Of a plain decode stage,
//! load alone decides, as there.

mod overrides;
mod settings;

use dynamo_policy_sdk::{Candidates, Decision, Request, Router, UNKNOWN, entropy, explain, rank, stage};

pub use self::settings::Settings;

/// Tokens of a block where no engine says how many.
const BLOCK_SIZE: f32 = 16.0;

/// The policy.
pub struct KvAware {
    settings: Settings,
}

impl Router for KvAware {
    type Settings = Settings;

    fn new(settings: Settings) -> Result<Self, String> {
        settings.check()?;
        Ok(Self { settings })
    }

    fn route(&self, request: &Request, candidates: &Candidates) -> Decision {
        let overridden = self.settings.overridden(request);
        let settings = overridden.as_ref().unwrap_or(&self.settings);
        let blocks = Blocks::of(request, candidates);
        let costs = costs(settings, request, candidates, &blocks);
        explain("total", || costs.clone());
        let seed = entropy::next();
        let rows = match settings.router_temperature {
            0.0 => rank::lowest_rows(costs, seed),
            temperature => rank::lowest_rows(perturbed(&costs, temperature, seed), seed),
        };
        Decision::Place(rows)
    }
}

/// Of a request, what does not depend on the worker.
struct Blocks {
    /// Blocks per token.
    per_token: f32,
    /// Of the prompt.
    prompt: f32,
}

impl Blocks {
    fn of(request: &Request, candidates: &Candidates) -> Self {
        // Engines of one model may differ in their blocks; costs are compared, so one unit has to do.
        let block_size = candidates.block_size().iter().copied().find(|&size| size != UNKNOWN && size > 0);
        let per_token = 1.0 / block_size.map_or(BLOCK_SIZE, |size| size as f32);
        Self { per_token, prompt: known(request.prompt_tokens()) * per_token }
    }
}

/// 0 for what is unknown: an overlap that nobody knows of is none.
fn known(tokens: u32) -> f32 {
    if tokens == UNKNOWN { 0.0 } else { tokens as f32 }
}

fn costs(settings: &Settings, request: &Request, candidates: &Candidates, blocks: &Blocks) -> Vec<f32> {
    let is_decode = request.stage() == stage::DECODE;
    let tracks_prefill = settings.router_track_prefill_tokens && !is_decode;
    let prefilling = candidates.active_prefill_tokens();
    let mut costs = vec![0.0; prefilling.len()];
    if tracks_prefill {
        let credit = credit(settings, candidates, blocks);
        let queued = candidates.active_uncached_tokens();
        for ((cost, credit), &queued) in costs.iter_mut().zip(&credit).zip(queued) {
            *cost = settings.prefill_load_scale * (queued as f32 * blocks.per_token + blocks.prompt - credit);
        }
        explain("credit_blocks", || credit);
        explain("prefill_blocks", || costs.clone());
    }
    if settings.router_track_active_blocks {
        for ((cost, &decode), &prefilling) in costs.iter_mut().zip(candidates.active_decode_tokens()).zip(prefilling) {
            *cost += (decode as f32 + prefilling as f32) * blocks.per_token + blocks.prompt;
        }
    }
    if settings.decode_active_request_weight != 0.0 {
        for (cost, &requests) in costs.iter_mut().zip(candidates.active_requests()) {
            *cost += settings.decode_active_request_weight * requests as f32;
        }
    }
    for (cost, &preference) in costs.iter_mut().zip(candidates.preference()) {
        *cost *= preference;
    }
    costs
}

/// What a block of a tier counts, and the column of tokens that a worker can load from it.
type Tiered = (f32, fn(&Candidates) -> &[u32]);

/// Blocks of the prompt that a worker need not compute, by what each tier is worth.
fn credit(settings: &Settings, candidates: &Candidates, blocks: &Blocks) -> Vec<f32> {
    let device = candidates.cached_device_tokens();
    let mut credit: Vec<f32> =
        device.iter().map(|&tokens| settings.overlap_score_credit * known(tokens) * blocks.per_token).collect();
    if settings.overlap_score_credit_decay > 0.0 {
        // The more prefill a worker has beyond the least loaded one, the less its overlap counts.
        let queued = candidates.active_uncached_tokens();
        let least = queued.iter().copied().min().unwrap_or(0);
        let request_blocks = blocks.prompt.max(1.0);
        for (credit, &queued) in credit.iter_mut().zip(queued) {
            let excess = (queued - least) as f32 * blocks.per_token;
            *credit /= 1.0 + settings.overlap_score_credit_decay * excess / request_blocks;
        }
    }
    let tiers: [Tiered; 3] = [
        (settings.host_cache_hit_weight, Candidates::cached_host_tokens),
        (settings.disk_cache_hit_weight, Candidates::cached_disk_tokens),
        (settings.shared_cache_multiplier, Candidates::cached_remote_tokens),
    ];
    for (weight, column) in tiers.into_iter().filter(|(weight, _)| *weight != 0.0) {
        for (credit, &tokens) in credit.iter_mut().zip(column(candidates)) {
            *credit += weight * known(tokens) * blocks.per_token;
        }
    }
    // A surplus (weights above 1, an index that is off) must not pay for the worker's queue.
    for credit in &mut credit {
        *credit = credit.min(blocks.prompt);
    }
    credit
}

/// Costs over their range and the temperature, less Gumbel noise: the lowest of these is a draw from the softmax of the
/// former, the next one a draw from the rest, and so on (Kool et al. 2019).
fn perturbed(costs: &[f32], temperature: f32, seed: u64) -> Vec<f32> {
    let known = costs.iter().copied().filter(|cost| cost.is_finite());
    let (least, most) = known.fold((f32::INFINITY, f32::NEG_INFINITY), |(least, most), cost| (least.min(cost), most.max(cost)));
    let scale = if most > least { 1.0 / ((most - least) * temperature) } else { 0.0 };
    let mut random = seed;
    let mut gumbel = move || {
        // SplitMix64 (Steele et al. 2014); 24 bits and a half are within (0, 1) as a float.
        random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (random ^ (random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let uniform = ((mixed >> 41) as f32 + 0.5) / (1u32 << 23) as f32;
        -(-uniform.ln()).ln()
    };
    costs.iter().map(|cost| (cost - least) * scale - gumbel()).collect()
}

dynamo_policy_sdk::register!(KvAware);

#[cfg(test)]
mod tests;
