//! Profile: how long a worker takes for what.
//!
//! As engines are measured by `dynamo-host profile` and modelled by the simulator: a pass over `n` new tokens of prompt takes
//! `prefill_ms_per_token_squared·n² + prefill_ms_per_token·n + prefill_ms_base`, at most `max_num_batched_tokens` at a time;
//! a decode step takes a base time, and more per sequence and token of context.

use dynamo_policy_sdk::{
    Candidates,
    schemars::{self, JsonSchema},
    serde::{self, Deserialize},
};

use crate::cost::most;

/// The speed of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(crate = "serde", default, deny_unknown_fields)]
#[schemars(crate = "schemars")]
pub struct Profile {
    /// Milliseconds of a prefill pass per square of new tokens.
    pub prefill_ms_per_token_squared: f32,
    /// Milliseconds of a prefill pass per new token.
    pub prefill_ms_per_token: f32,
    /// Milliseconds of a prefill pass, however short.
    pub prefill_ms_base: f32,
    /// Milliseconds of a decode step, however small.
    pub decode_ms_base: f32,
    /// Milliseconds of a decode step per sequence.
    pub decode_ms_per_sequence: f32,
    /// Milliseconds of a decode step per token of context.
    pub decode_ms_per_context_token: f32,
    /// Tokens that a pass computes at most.
    pub max_batched_tokens: f32,
}

impl Default for Profile {
    /// An 8-billion-parameter model on one data-centre GPU, about.
    fn default() -> Self {
        Self {
            prefill_ms_per_token_squared: 4.21e-7,
            prefill_ms_per_token: 0.01518,
            prefill_ms_base: 16.5,
            decode_ms_base: 6.0,
            decode_ms_per_sequence: 0.0,
            decode_ms_per_context_token: 4.5e-5,
            max_batched_tokens: 8192.0,
        }
    }
}

impl Profile {
    /// Its times, by the names that they have in settings.
    pub(crate) fn times(&self) -> [(&'static str, f32); 6] {
        [
            ("profile.prefill_ms_per_token_squared", self.prefill_ms_per_token_squared),
            ("profile.prefill_ms_per_token", self.prefill_ms_per_token),
            ("profile.prefill_ms_base", self.prefill_ms_base),
            ("profile.decode_ms_base", self.decode_ms_base),
            ("profile.decode_ms_per_sequence", self.decode_ms_per_sequence),
            ("profile.decode_ms_per_context_token", self.decode_ms_per_context_token),
        ]
    }

    /// Milliseconds of one pass.
    #[inline(always)]
    pub(crate) fn pass_ms(&self, tokens: f32) -> f32 {
        (self.prefill_ms_per_token_squared * tokens + self.prefill_ms_per_token) * tokens + self.prefill_ms_base
    }
}

/// What of a profile each row asks for, worked out once.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Speed {
    pub(crate) profile: Profile,
    /// Milliseconds of a full pass.
    pub(crate) full_pass_ms: f32,
    passes_per_token: f32,
}

impl Speed {
    pub(crate) fn of(profile: Profile) -> Self {
        let tokens = profile.max_batched_tokens;
        Self { profile, full_pass_ms: profile.pass_ms(tokens), passes_per_token: 1.0 / tokens }
    }

    /// Full passes within so many tokens.
    #[inline(always)]
    pub(crate) fn full_passes(&self, tokens: f32) -> f32 {
        (tokens * self.passes_per_token).floor()
    }

    /// Milliseconds to compute so many new tokens, in as many passes as that takes; 0 for none.
    #[inline(always)]
    pub(crate) fn prefill_ms(&self, tokens: f32) -> f32 {
        let full = self.full_passes(tokens);
        let rest = tokens - full * self.profile.max_batched_tokens;
        // The reciprocal may err by a pass at its edge: then the rest is a whole pass, or a hair below none.
        let last = if rest > 0.5 { self.profile.pass_ms(rest) } else { 0.0 };
        full * self.full_pass_ms + last
    }
}

/// The profiles of all candidates. One for all is the usual case, and the quick one.
pub(crate) enum Profiles {
    One(Speed),
    Each(Columns),
}

/// Profiles that differ, a column for each of the [`FIELDS`]: loops over them become SIMD.
pub(crate) struct Columns([Vec<f32>; FIELDS.len()]);

impl Columns {
    /// One after the other, in row order.
    #[inline(always)]
    pub(crate) fn rows(&self) -> impl Iterator<Item = Speed> {
        let [squared, per_token, base, decode, per_sequence, per_context, batched] = &self.0;
        let prefill = squared.iter().zip(per_token).zip(base);
        let decode = decode.iter().zip(per_sequence).zip(per_context);
        prefill.zip(decode).zip(batched).map(
            |((((&squared, &per_token), &base), ((&decode, &per_sequence), &per_context)), &max_batched_tokens)| {
                Speed::of(Profile {
                    prefill_ms_per_token_squared: squared,
                    prefill_ms_per_token: per_token,
                    prefill_ms_base: base,
                    decode_ms_base: decode,
                    decode_ms_per_sequence: per_sequence,
                    decode_ms_per_context_token: per_context,
                    max_batched_tokens,
                })
            },
        )
    }

    fn first(&self) -> Speed {
        self.rows().next().expect("there is at least one candidate")
    }
}

/// A field of a profile, and the signal that it comes from.
type Field = (&'static str, fn(&mut Profile) -> &mut f32);

const FIELDS: [Field; 7] = [
    ("profile.prefill_ms_per_token_squared", |profile| &mut profile.prefill_ms_per_token_squared),
    ("profile.prefill_ms_per_token", |profile| &mut profile.prefill_ms_per_token),
    ("profile.prefill_ms_base", |profile| &mut profile.prefill_ms_base),
    ("profile.decode_ms_base", |profile| &mut profile.decode_ms_base),
    ("profile.decode_ms_per_sequence", |profile| &mut profile.decode_ms_per_sequence),
    ("profile.decode_ms_per_context_token", |profile| &mut profile.decode_ms_per_context_token),
    ("profile.max_num_batched_tokens", |profile| &mut profile.max_batched_tokens),
];

/// Before the signals' names in [`FIELDS`]: by how much an engine is faster than its profile says.
const SPEEDUP: &str = "profile.speedup";

/// Of these, how many are times, and so shorter by [`SPEEDUP`]: all but the last.
const TIMES: usize = FIELDS.len() - 1;

impl Profiles {
    /// From the candidates' signals, and `default` where a worker has none.
    pub(crate) fn read(candidates: &Candidates, default: &Profile) -> Self {
        let signals = FIELDS.map(|(signal, _)| candidates.signal(signal));
        let speedup = candidates.signal(SPEEDUP);
        let mut default = *default;
        let is_one = signals.iter().flatten().chain(&speedup).all(|column| is_one_value(column));
        let count = if is_one { 1 } else { candidates.count() as usize };
        let mut nth = 0;
        let columns = signals.map(|column| {
            let (field, is_time) = (*(FIELDS[nth].1)(&mut default), nth < TIMES);
            nth += 1;
            let mut values = match column {
                // What cannot be (and so NaN, for unknown) leaves the default. Of infinities, costs would be no numbers.
                Some(column) => column[..count]
                    .iter()
                    .map(|&value| if (0.0..f32::INFINITY).contains(&value) { value } else { field })
                    .collect(),
                None => vec![field; count],
            };
            if !is_time {
                values.iter_mut().for_each(|tokens| *tokens = most(*tokens, 1.0));
            } else if let Some(speedup) = &speedup {
                for (value, &speedup) in values.iter_mut().zip(speedup) {
                    let is_known = speedup > 0.0 && speedup < f32::INFINITY;
                    *value /= if is_known { speedup } else { 1.0 };
                }
            }
            values
        });
        let columns = Columns(columns);
        if is_one { Self::One(columns.first()) } else { Self::Each(columns) }
    }

    /// The first one's: what is decided before there is a worker goes by that.
    pub(crate) fn first(&self) -> Speed {
        match self {
            Self::One(speed) => *speed,
            Self::Each(columns) => columns.first(),
        }
    }
}

fn is_one_value(column: &[f32]) -> bool {
    // By bits, since NaN is a value here.
    column.iter().fold(true, |same, value| same & (value.to_bits() == column[0].to_bits()))
}
