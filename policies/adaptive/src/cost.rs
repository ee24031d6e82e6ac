//! Cost: the milliseconds that a request takes on a worker, and takes from others there.
//!
//! | term | what it is |
//! |---|---|
//! | `wait` | until the worker has computed the prompts before this one: their predicted time, less that since its last progress |
//! | `prefill` | to compute what it does not hold of this prompt |
//! | `interference` | by how much that stalls those who run there, up to two passes, times a weight |
//! | `decode` | how much slower this request's tokens come for those who run there, and theirs for this one, times a weight |
//! | `cache` | what is pushed out of the worker's cache, as a share of `prefill` |
//! | `memory` | until enough is freed, where KV memory does not suffice |
//!
//! The total is their sum, times the operator's preference, times the tries that the worker's recent errors make likely.

use dynamo_policy_sdk::{Candidates, Request, UNKNOWN, explain, explain_wanted, stage};

use crate::{Profile, Settings, profile::Profiles};

/// Share of a pass that is always left of a prefill under way, however long it has taken: predictions err.
const LEAST_LEFT: f32 = 0.3;
/// Requests that decode as soon as the prefill under way ends count for interference like so many that run.
const PREFILL_COUNTS: f32 = 2.0;
/// Passes of a prompt that count for interference. A prompt of many would else wait behind all for the sake of a few.
const INTERFERING_PASSES: f32 = 2.0;
/// Tokens of a prompt of which nobody knows how long it is.
const PROMPT_TOKENS: f32 = 1000.0;

/// What the costs are made of: columns as they are, and the request.
pub(crate) struct Costs<'a> {
    settings: &'a Settings,
    prompt: f32,
    output: f32,
    /// Tokens of this prompt that a worker has to compute.
    uncached: Vec<f32>,
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
        let uncached = match stage {
            stage::DECODE => vec![0.0; candidates.count() as usize],
            _ => uncached(settings, prompt, candidates),
        };
        Self {
            settings,
            prompt,
            output: if stage == stage::PREFILL { 0.0 } else { output(settings, request) },
            uncached,
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
        self.uncached.iter().copied().fold(f32::INFINITY, f32::min)
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
        let terms: [(&str, fn(Terms) -> f32); 7] = [
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

    /// Two loops, since that over one profile needs no lookup in the middle.
    fn each(&self, profiles: &Profiles, value: impl Fn(Terms) -> f32) -> Vec<f32> {
        let rows = 0..self.uncached.len();
        match profiles {
            Profiles::One(profile) => rows.map(|row| value(self.terms(row, profile))).collect(),
            Profiles::Each(profiles) => rows.map(|row| value(self.terms(row, &profiles[row]))).collect(),
        }
    }

    #[inline(always)]
    pub(crate) fn terms(&self, row: usize, profile: &Profile) -> Terms {
        let settings = self.settings;
        let uncached = self.uncached[row];
        let [queued, busy_ms, context, requests, free] =
            [self.queued[row], self.busy_ms[row], self.context[row], self.requests[row], self.free[row]]
                .map(|value| value as f32);
        let (is_prefilling, is_decoding) = (self.prefilling[row] > 0, context > 0.0);

        // A pass that computes prompts reads the context of those that decode, too.
        let decode_work = profile.decode_ms_per_sequence * requests + profile.decode_ms_per_context_token * context;
        let step = if is_decoding { profile.decode_ms_base + decode_work } else { 0.0 };
        let passes = (queued / profile.max_batched_tokens).ceil();
        // Whoever comes has to wait for the end of a step, on average half of one.
        let left = profile.prefill_ms(queued) + passes * decode_work + 0.5 * step - busy_ms;
        let least_left = LEAST_LEFT * profile.pass_ms(queued.min(profile.max_batched_tokens));
        let wait = if is_prefilling { left.max(least_left) } else { 0.5 * step };

        let computed = profile.prefill_ms(uncached);
        let prefill = computed + if uncached > 0.0 { decode_work } else { 0.0 };
        let stalled = requests + if is_prefilling { PREFILL_COUNTS } else { 0.0 };
        let stall = prefill.min(INTERFERING_PASSES * profile.pass_ms(profile.max_batched_tokens));

        // This request slows each of those that run, and they slow it.
        let slows = profile.decode_ms_per_sequence + profile.decode_ms_per_context_token * self.prompt;
        let decode = settings.decode_weight * self.output * (decode_work + requests * slows);

        // Memory is freed as requests end; all context, in about the time of one.
        let missing = (queued + uncached + self.output - free).max(0.0);
        let memory = missing * self.output * step / context.max(1.0);

        let factor = self.preference[row] / (1.0 - self.error_rate[row].max(0.0).min(0.9));
        Terms {
            wait,
            prefill,
            interference: settings.interference * stall * stalled,
            decode,
            cache: settings.cache_price * computed,
            memory,
            factor,
        }
    }
}

/// Tokens that each worker has to compute, what it can load counted by its tier. Of a prompt that is all there, the last
/// token is computed again.
fn uncached(settings: &Settings, prompt: f32, candidates: &Candidates) -> Vec<f32> {
    let known = |tokens: u32| if tokens == UNKNOWN { 0.0 } else { tokens as f32 };
    let credit = &settings.tier_credit;
    let mut uncached: Vec<f32> = candidates.cached_device_tokens().iter().map(|&tokens| prompt - known(tokens)).collect();
    let tiers: [(f32, fn(&Candidates) -> &[u32]); 3] = [
        (credit.host, Candidates::cached_host_tokens),
        (credit.disk, Candidates::cached_disk_tokens),
        (credit.remote, Candidates::cached_remote_tokens),
    ];
    for (credit, column) in tiers.into_iter().filter(|(credit, _)| *credit > 0.0) {
        for (uncached, &tokens) in uncached.iter_mut().zip(column(candidates)) {
            *uncached -= credit * known(tokens);
        }
    }
    for uncached in &mut uncached {
        *uncached = uncached.max(1.0);
    }
    uncached
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
