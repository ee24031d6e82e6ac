//! Cost: the milliseconds that a request takes on a worker, and takes from others there.
//!
//! | term | what it is |
//! |---|---|
//! | `wait` | until the worker has computed the prompts before this one: their predicted time, less that since its last progress, and never less than a share of it |
//! | `prefill` | to compute what it does not hold of this prompt |
//! | `interference` | by how much that stalls those who run there, up to two passes, times a weight |
//! | `decode` | how much slower this request's tokens come for those who run there, and theirs for this one, times a weight |
//! | `cache` | what is pushed out of the worker's cache, as a share of `prefill` |
//! | `memory` | until enough is freed, where KV memory does not suffice |
//!
//! The total is their sum, times the operator's preference, times the tries that the worker's recent errors make likely. Where
//! prefill and decode can be apart, [`handoff`](crate::handoff) makes costs of both from the same terms.

use dynamo_policy_sdk::{Candidates, Request, UNKNOWN, explain, explain_wanted, role, stage};

use crate::{
    Settings, TierCredit,
    profile::{Profiles, Speed},
};

/// Share of the prefill that waits which is always left, however long the worker has been at it: predictions err, and one that is
/// stuck or slower than its profile is not nearly done.
const LEAST_LEFT: f32 = 0.3;
/// Requests that decode as soon as the prefill under way ends count for interference like so many that run.
const PREFILL_COUNTS: f32 = 2.0;
/// Passes of a prompt that count for interference. A prompt of many would else wait behind all for the sake of a few.
const INTERFERING_PASSES: f32 = 2.0;
/// Share of errors that counts at most: a worker that always fails is still one.
const MOST_ERRORS: f32 = 0.9;
/// Where contexts are to be level: how much less it counts by how much others are slowed down. Where few run with long contexts, a
/// request slows down few; but the longest contexts make the slowest tokens.
const LEVEL: f32 = 0.7;
/// Tokens of a prompt of which nobody knows how long it is.
const PROMPT_TOKENS: f32 = 1000.0;

/// A term, and its name in receipts.
type Named = (&'static str, fn(Terms) -> f32);

/// What the costs are made of: columns as they are, and the request.
pub(crate) struct Costs<'a> {
    settings: &'a Settings,
    prompt: f32,
    output: f32,
    slo_itl_ms: f32,
    /// Tokens of this prompt that a worker does not hold.
    uncached: Vec<f32>,
    /// 1 if it has to compute them; 0 if it fetches what another has prefilled. Numbers, since loops with choices are no SIMD.
    computes: f32,
    /// 1 if workers differ in what they do, else 0.
    apart: f32,
    prefilling: &'a [u32],
    queued: &'a [u32],
    busy_ms: &'a [u32],
    context: &'a [u32],
    requests: &'a [u32],
    free: &'a [u32],
    error_rate: &'a [f32],
    preference: &'a [f32],
}

/// Milliseconds on one worker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Terms {
    pub(crate) wait: f32,
    pub(crate) prefill: f32,
    pub(crate) interference: f32,
    pub(crate) decode: f32,
    pub(crate) cache: f32,
    pub(crate) memory: f32,
    /// By how much the sum is multiplied.
    pub(crate) factor: f32,
    /// Of `prefill`, what counts for those that it stalls.
    pub(crate) stall: f32,
    /// Requests that decode there.
    pub(crate) decoding: f32,
    /// What comes to `decode` where the contexts of workers are to be level.
    pub(crate) level: f32,
    /// Tokens of this prompt that the worker does not hold.
    pub(crate) uncached: f32,
    /// A full pass.
    pub(crate) pass: f32,
}

impl Terms {
    #[inline(always)]
    fn total(self) -> f32 {
        (self.wait + self.prefill + self.interference + self.decode + self.cache + self.memory) * self.factor
    }
}

impl<'a> Costs<'a> {
    pub(crate) fn of(settings: &'a Settings, request: &Request, candidates: &'a Candidates) -> Self {
        let stage = request.stage();
        let prompt = if request.prompt_tokens() == UNKNOWN { PROMPT_TOKENS } else { request.prompt_tokens() as f32 };
        Self {
            settings,
            prompt,
            output: if stage == stage::PREFILL { 0.0 } else { output(settings, request) },
            // None is as good as any.
            slo_itl_ms: Some(request.slo_itl_ms()).filter(|ms| *ms > 0.0).unwrap_or(f32::INFINITY),
            uncached: uncached(settings, prompt, candidates),
            computes: if stage == stage::DECODE { 0.0 } else { 1.0 },
            apart: if is_apart(candidates) { 1.0 } else { 0.0 },
            prefilling: candidates.active_prefill_tokens(),
            queued: candidates.active_uncached_tokens(),
            busy_ms: candidates.prefill_busy_ms(),
            context: candidates.active_decode_tokens(),
            requests: candidates.active_requests(),
            free: candidates.kv_tokens_free(),
            error_rate: candidates.error_rate(),
            preference: candidates.preference(),
        }
    }

    /// Tokens to be computed where most is cached.
    pub(crate) fn fewest_uncached(&self) -> f32 {
        // By their bits, which are ordered as they are above 0, and whose minimum is SIMD.
        self.uncached.iter().map(|tokens| tokens.to_bits()).min().map_or(f32::INFINITY, f32::from_bits)
    }

    /// Tokens that each worker would have to compute, or to fetch.
    pub(crate) fn uncached(&self) -> &[f32] {
        &self.uncached
    }

    /// Whether workers differ in what they do, or may.
    pub(crate) fn is_apart(&self) -> bool {
        self.apart > 0.0
    }

    /// Tokens of the prompt.
    pub(crate) fn prompt(&self) -> f32 {
        self.prompt
    }

    /// Tokens of output that are expected.
    pub(crate) fn output(&self) -> f32 {
        self.output
    }

    /// Of every worker.
    pub(crate) fn total(&self, profiles: &Profiles) -> Vec<f32> {
        self.each(profiles, Terms::total)
    }

    /// Tells the receipt what the costs are made of.
    pub(crate) fn explain(&self, profiles: &Profiles) {
        if !explain_wanted() {
            return;
        }
        let terms: [Named; 7] = [
            ("wait_ms", |terms| terms.wait),
            ("prefill_ms", |terms| terms.prefill),
            ("interference_ms", |terms| terms.interference),
            ("decode_ms", |terms| terms.decode),
            ("cache_ms", |terms| terms.cache),
            ("memory_ms", |terms| terms.memory),
            ("total_ms", Terms::total),
        ];
        for (name, term) in terms {
            explain(name, || self.each(profiles, term));
        }
    }

    /// Two loops, since that over one profile needs no lookup in the middle and becomes SIMD.
    pub(crate) fn each(&self, profiles: &Profiles, value: impl Fn(Terms) -> f32) -> Vec<f32> {
        match profiles {
            Profiles::One(speed) => self.rows().map(|row| value(self.terms(row, speed))).collect(),
            Profiles::Each(columns) => {
                self.rows().zip(columns.rows()).map(|(row, speed)| value(self.terms(row, &speed))).collect()
            }
        }
    }

    /// Three values of each worker in one loop, since the terms are what takes time: by these, its role, and what the third is before. The
    /// first is returned.
    pub(crate) fn fill(
        &self,
        profiles: &Profiles,
        roles: &[u32],
        [b, c]: [&mut [f32]; 2],
        values: impl Fn(Terms, u32, f32) -> [f32; 3],
    ) -> Vec<f32> {
        let rows = self.rows().zip(roles).zip(b.iter_mut().zip(c));
        let write = |terms, role: &u32, (b, c): (&mut f32, &mut f32)| {
            let a;
            [a, *b, *c] = values(terms, *role, *c);
            a
        };
        match profiles {
            Profiles::One(speed) => rows.map(|((row, role), out)| write(self.terms(row, speed), role, out)).collect(),
            Profiles::Each(columns) => {
                rows.zip(columns.rows()).map(|(((row, role), out), speed)| write(self.terms(row, &speed), role, out)).collect()
            }
        }
    }

    fn rows(&self) -> impl Iterator<Item = Row> {
        let queues = self.prefilling.iter().zip(self.queued).zip(self.busy_ms);
        let load = self.context.iter().zip(self.requests).zip(self.free);
        let weights = self.error_rate.iter().zip(self.preference);
        self.uncached.iter().zip(queues).zip(load).zip(weights).map(
            |(((&uncached, ((&prefilling, &queued), &busy_ms)), ((&context, &requests), &free)), (&error_rate, &preference))| {
                Row {
                    uncached,
                    prefilling: prefilling as f32,
                    queued: queued as f32,
                    busy_ms: busy_ms as f32,
                    context: context as f32,
                    requests: requests as f32,
                    free: free as f32,
                    error_rate,
                    preference,
                }
            },
        )
    }

    #[inline(always)]
    fn terms(&self, row: Row, speed: &Speed) -> Terms {
        let Self { settings, prompt, output, slo_itl_ms, computes, apart, .. } = *self;
        let Row { uncached, prefilling, queued, busy_ms, context, requests, free, error_rate, preference } = row;
        let profile = &speed.profile;
        let (is_decoding, is_prefilling) = (context > 0.0, prefilling > 0.0);

        // A pass that computes prompts reads the context of those that decode, too.
        let decode_work = profile.decode_ms_per_sequence * requests + profile.decode_ms_per_context_token * context;
        let step = if is_decoding { profile.decode_ms_base + decode_work } else { 0.0 };
        let passes = speed.full_passes(queued) + 1.0;
        // Whoever comes has to wait for the end of a step, on average half of one.
        let waiting = speed.prefill_ms(queued);
        let left = waiting + passes * decode_work + 0.5 * step - busy_ms;
        let wait = if is_prefilling { most(left, LEAST_LEFT * waiting) } else { 0.5 * step };

        let computed = computes * speed.prefill_ms(uncached);
        let prefill = computed + computes * decode_work;
        let stalled = requests + if is_prefilling { PREFILL_COUNTS } else { 0.0 };
        let stall = least(prefill, INTERFERING_PASSES * speed.full_pass_ms);

        // This request slows each of those that run, and they slow it.
        let slows = profile.decode_ms_per_sequence + profile.decode_ms_per_context_token * prompt;
        // What its tokens take beyond their target counts in full.
        let late = output * most(profile.decode_ms_base + decode_work + slows - slo_itl_ms, 0.0);
        let decode = settings.decode_weight * output * (decode_work + requests * slows) + late;

        // Memory is freed as requests end; all context, in about the time of one.
        // What is fetched from elsewhere waits for it too, and is computed by nobody.
        let waits = queued + apart * (prefilling - queued);
        let missing = most(waits + uncached + output - free, 0.0);
        let memory = missing * output * step / most(context, 1.0);

        // An unknown error rate is none: no comparison with NaN is true.
        let fails = if error_rate > 0.0 { least(error_rate, MOST_ERRORS) } else { 0.0 };
        Terms {
            wait,
            prefill,
            interference: settings.interference * stall * stalled,
            decode,
            cache: settings.cache_price * computed,
            memory,
            factor: preference / (1.0 - fails),
            stall,
            level: settings.decode_weight * output * (decode_work - LEVEL * requests * slows),
            decoding: requests * context / most(context + prefilling, 1.0),
            uncached,
            pass: speed.full_pass_ms,
        }
    }
}

/// What is known of one worker.
#[derive(Clone, Copy)]
struct Row {
    uncached: f32,
    prefilling: f32,
    queued: f32,
    busy_ms: f32,
    context: f32,
    requests: f32,
    free: f32,
    error_rate: f32,
    preference: f32,
}

/// The lesser of two numbers. Unlike `f32::min` it need not care for NaN, and is one instruction.
#[inline(always)]
pub(crate) fn least(a: f32, b: f32) -> f32 {
    if b < a { b } else { a }
}

/// The greater of two numbers.
#[inline(always)]
pub(crate) fn most(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// Tokens that each worker has to compute, what it can load counted by its tier. Of a prompt that is all there, the last
/// token is computed again.
fn uncached(settings: &Settings, prompt: f32, candidates: &Candidates) -> Vec<f32> {
    let known = |tokens: u32| if tokens == UNKNOWN { 0.0 } else { tokens as f32 };
    let TierCredit { host, disk, remote } = settings.tier_credit;
    let near = candidates.cached_device_tokens().iter().zip(candidates.cached_host_tokens());
    let far = candidates.cached_disk_tokens().iter().zip(candidates.cached_remote_tokens());
    near.zip(far)
        .map(|((&on_device, &on_host), (&on_disk, &on_remote))| {
            let tokens = prompt - known(on_device) - host * known(on_host) - disk * known(on_disk) - remote * known(on_remote);
            most(tokens, 1.0)
        })
        .collect()
}

/// Whether workers differ in what they do, or may.
fn is_apart(candidates: &Candidates) -> bool {
    // In one go and in lanes, which is SIMD.
    let (blocks, rest) = candidates.role().as_chunks::<16>();
    let mut any = [role::AGGREGATED; 16];
    for block in blocks {
        for (any, &of) in any.iter_mut().zip(block) {
            *any |= of;
        }
    }
    any.iter().chain(rest).fold(role::AGGREGATED, |all, of| all | of) != role::AGGREGATED
}

/// Output tokens that are still to be expected, over all choices.
fn output(settings: &Settings, request: &Request) -> f32 {
    let expected = match request.expected_output_tokens() {
        UNKNOWN => settings.expected_output_tokens,
        tokens => tokens as f32,
    };
    // An unknown limit is the largest number: none.
    let left = expected.min(request.max_output_tokens() as f32) - request.generated_tokens() as f32;
    left.max(1.0) * request.choices() as f32
}
