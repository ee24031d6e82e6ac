//! Costs of workers, in tokens: cached prefix against load, by Dynamo's rule.

use dynamo_policy_sdk::{Candidates, Request, explain, role};

use crate::{Settings, known};

/// What a request costs on each row.
pub(crate) struct Costs {
    /// Tokens of the prompt that it need not compute, by what each tier is worth.
    pub(crate) cached: Vec<f32>,
    /// Of the prompt: what is to be computed before it, and what is left of it.
    pub(crate) prefill: Vec<f32>,
    /// Of the output: the context that the worker has, and the request's own.
    pub(crate) context: Vec<f32>,
    /// Of all of it.
    pub(crate) whole: Vec<f32>,
}

/// What a token of a tier counts, and the column of tokens that a worker can load from it.
type Tiered = (f32, fn(&Candidates) -> &[u32]);

impl Costs {
    pub(crate) fn of(settings: &Settings, request: &Request, candidates: &Candidates) -> Self {
        let prompt = known(request.prompt_tokens());
        let preference = candidates.preference();
        let cached = cached(settings, candidates, prompt);
        let queued = candidates.active_uncached_tokens();
        let prefill = |((&cached, &queued), &preference): ((&f32, &u32), &f32)| {
            let credit = settings.overlap_score_credit * cached;
            settings.prefill_load_scale * (known(queued) + (prompt - credit).max(0.0)) * preference
        };
        let prefill: Vec<f32> = cached.iter().zip(queued).zip(preference).map(prefill).collect();
        let (decoding, prefilling) = (candidates.active_decode_tokens(), candidates.active_prefill_tokens());
        let context = |((&decoding, &prefilling), &preference): ((&u32, &u32), &f32)| {
            (known(decoding) + known(prefilling) + prompt) * preference
        };
        let mut context: Vec<f32> = decoding.iter().zip(prefilling).zip(preference).map(context).collect();
        if settings.active_request_weight_tokens != 0.0 {
            for ((context, &requests), &preference) in context.iter_mut().zip(candidates.active_requests()).zip(preference) {
                *context += settings.active_request_weight_tokens * known(requests) * preference;
            }
        }
        explain("cached_tokens", || cached.clone());
        explain("prefill_tokens", || prefill.clone());
        let whole = prefill.iter().zip(&context).map(|(prefill, context)| prefill + context).collect();
        Self { cached, prefill, context, whole }
    }

    /// Of who decodes what another has prefilled: load alone, as in Dynamo. Last are those that KV cannot go to.
    pub(crate) fn decode(self, candidates: &Candidates) -> Vec<f32> {
        let reachable = candidates.links().reachable(None);
        let cost = |(cost, reachable): (f32, u32)| if reachable == 1 { cost } else { f32::INFINITY };
        self.context.into_iter().zip(reachable).map(cost).collect()
    }

    /// Of what would come of a request that is placed there.
    pub(crate) fn first(&self, candidates: &Candidates) -> Vec<f32> {
        let cost = |(row, &role): (usize, &u32)| if role == role::PREFILL { self.prefill[row] } else { self.whole[row] };
        candidates.role().iter().enumerate().map(cost).collect()
    }
}

fn cached(settings: &Settings, candidates: &Candidates, prompt: f32) -> Vec<f32> {
    let mut cached: Vec<f32> = candidates.cached_device_tokens().iter().map(|&tokens| known(tokens)).collect();
    let tiers: [Tiered; 3] = [
        (settings.host_cache_hit_weight, Candidates::cached_host_tokens),
        (settings.disk_cache_hit_weight, Candidates::cached_disk_tokens),
        (settings.shared_cache_multiplier, Candidates::cached_remote_tokens),
    ];
    for (weight, column) in tiers.into_iter().filter(|(weight, _)| *weight != 0.0) {
        for (cached, &tokens) in cached.iter_mut().zip(column(candidates)) {
            *cached += weight * known(tokens);
        }
    }
    cached.iter_mut().for_each(|cached| *cached = cached.min(prompt));
    cached
}
