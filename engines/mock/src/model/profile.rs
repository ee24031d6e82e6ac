//! Profile: the capacity and the speed of a modelled engine.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What an engine can hold, and how long its steps take.
///
/// One pass of the model over `n` new prompt tokens takes
/// `prefill_ms_per_token_squared·n² + prefill_ms_per_token·n + prefill_ms_base`; one that decodes takes
/// `decode_ms_base`, plus a share per running sequence and per token of context that is read. A step that does
/// both reads the weights once: of the two base times it takes the greater.
///
/// The default times of prefill are those that Dynamo's simulator (`mocker`) uses; those of decode are in
/// the range of an 8-billion-parameter model on one data-centre GPU, and so are its bytes of KV (32 layers, 8 heads of 128, 16 bit).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Profile {
    /// Tokens of a KV block.
    pub block_size: u32,
    /// KV blocks that the engine has.
    pub kv_blocks: u32,
    /// Sequences that run at once.
    pub max_num_seqs: u32,
    /// Tokens that one step computes; longer prompts are computed in chunks.
    pub max_num_batched_tokens: u32,
    /// Longest context, prompt and output together, in tokens.
    pub max_model_len: u32,
    /// Bytes of KV of a token, which a hand-off to another engine moves.
    pub kv_bytes_per_token: u32,
    /// Milliseconds of a prefill per square of new tokens.
    pub prefill_ms_per_token_squared: f64,
    /// Milliseconds of a prefill per new token.
    pub prefill_ms_per_token: f64,
    /// Milliseconds of a prefill, however short.
    pub prefill_ms_base: f64,
    /// Milliseconds of a decode step, however small.
    pub decode_ms_base: f64,
    /// Milliseconds of a decode step per sequence that decodes.
    pub decode_ms_per_sequence: f64,
    /// Milliseconds of a decode step per token of context, over all sequences that decode.
    pub decode_ms_per_context_token: f64,
    /// All times are divided by this.
    pub speedup: f64,
}

impl Default for Profile {
    fn default() -> Self {
        Self {
            block_size: 16,
            kv_blocks: 16_384,
            max_num_seqs: 256,
            max_num_batched_tokens: 8192,
            max_model_len: 32_768,
            kv_bytes_per_token: 131_072,
            prefill_ms_per_token_squared: 4.21e-07,
            prefill_ms_per_token: 0.01518,
            prefill_ms_base: 16.5,
            decode_ms_base: 6.0,
            decode_ms_per_sequence: 0.03,
            decode_ms_per_context_token: 2e-05,
            speedup: 1.0,
        }
    }
}

/// A profile that no engine can have.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ProfileError {
    /// An amount is 0.
    #[error("{key}=0 is not possible; use at least 1")]
    Zero {
        /// Which.
        key: &'static str,
    },
    /// A time is negative or no number.
    #[error("{key}={value} is not a time; use a number of milliseconds of at least 0")]
    Time {
        /// Which.
        key: &'static str,
        /// What it was.
        value: f64,
    },
    /// The speedup cannot divide.
    #[error("speedup={value} is not possible; use a number above 0")]
    Speedup {
        /// What it was.
        value: f64,
    },
    /// The longest sequence does not fit.
    #[error(
        "kv_blocks={kv_blocks} of {block_size} tokens cannot hold max_model_len={max_model_len} tokens; \
         raise kv_blocks or lower max_model_len"
    )]
    KvTooSmall {
        /// Blocks.
        kv_blocks: u32,
        /// Tokens per block.
        block_size: u32,
        /// Longest context.
        max_model_len: u32,
    },
    /// A step could not hold a token of each running sequence.
    #[error(
        "max_num_batched_tokens={max_num_batched_tokens} is below max_num_seqs={max_num_seqs}; \
         a step must hold a token of each running sequence"
    )]
    StepTooSmall {
        /// Tokens per step.
        max_num_batched_tokens: u32,
        /// Sequences.
        max_num_seqs: u32,
    },
}

/// A longer step is a misconfiguration, but no reason for clocks to overflow.
const LONGEST_STEP: Duration = Duration::from_secs(365 * 24 * 3600);

/// What one step computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Prompt tokens, over all sequences.
    pub prefill_tokens: u32,
    /// Sequences that decode one token.
    pub decodes: u32,
    /// Tokens of context that those read.
    pub context_tokens: u64,
}

impl Profile {
    /// Checks that the amounts fit together.
    ///
    /// # Errors
    /// Names the first that doesn't.
    pub fn validate(&self) -> Result<(), ProfileError> {
        for (key, amount) in [
            ("block_size", self.block_size),
            ("kv_blocks", self.kv_blocks),
            ("max_num_seqs", self.max_num_seqs),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
            ("max_model_len", self.max_model_len),
            ("kv_bytes_per_token", self.kv_bytes_per_token),
        ] {
            if amount == 0 {
                return Err(ProfileError::Zero { key });
            }
        }
        for (key, value) in [
            ("prefill_ms_per_token_squared", self.prefill_ms_per_token_squared),
            ("prefill_ms_per_token", self.prefill_ms_per_token),
            ("prefill_ms_base", self.prefill_ms_base),
            ("decode_ms_base", self.decode_ms_base),
            ("decode_ms_per_sequence", self.decode_ms_per_sequence),
            ("decode_ms_per_context_token", self.decode_ms_per_context_token),
        ] {
            if !value.is_finite() || value < 0.0 {
                return Err(ProfileError::Time { key, value });
            }
        }
        if !self.speedup.is_finite() || self.speedup <= 0.0 {
            return Err(ProfileError::Speedup { value: self.speedup });
        }
        let Self { block_size, kv_blocks, max_num_seqs, max_num_batched_tokens, max_model_len, .. } = *self;
        if max_model_len.div_ceil(block_size) > kv_blocks {
            return Err(ProfileError::KvTooSmall { kv_blocks, block_size, max_model_len });
        }
        if max_num_batched_tokens < max_num_seqs {
            return Err(ProfileError::StepTooSmall { max_num_batched_tokens, max_num_seqs });
        }
        Ok(())
    }

    /// Its fields by name, as workers have them for labels (`profile.FIELD`) and policies for signals. Times are those that
    /// the engine takes: the speedup has been taken out of them.
    #[must_use]
    pub fn labels(&self) -> BTreeMap<String, String> {
        let mut profile = self.clone();
        let speedup = std::mem::replace(&mut profile.speedup, 1.0);
        for time in [
            &mut profile.prefill_ms_per_token_squared,
            &mut profile.prefill_ms_per_token,
            &mut profile.prefill_ms_base,
            &mut profile.decode_ms_base,
            &mut profile.decode_ms_per_sequence,
            &mut profile.decode_ms_per_context_token,
        ] {
            *time /= speedup;
        }
        let Ok(Value::Object(fields)) = serde_json::to_value(&profile) else { return BTreeMap::new() };
        let numbers = fields.into_iter().filter(|(field, value)| value.is_number() && field != "speedup");
        numbers.map(|(field, value)| (format!("profile.{field}"), value.to_string())).collect()
    }

    /// How long a step takes that computes `pass`.
    #[must_use]
    pub fn step_time(&self, pass: Pass) -> Duration {
        let mut base_ms: f64 = 0.0;
        let mut work_ms = 0.0;
        if pass.prefill_tokens > 0 {
            let tokens = f64::from(pass.prefill_tokens);
            base_ms = self.prefill_ms_base;
            work_ms += self.prefill_ms_per_token_squared * tokens * tokens + self.prefill_ms_per_token * tokens;
        }
        if pass.decodes > 0 {
            base_ms = base_ms.max(self.decode_ms_base);
            work_ms += self.decode_ms_per_sequence * f64::from(pass.decodes);
            work_ms += self.decode_ms_per_context_token * pass.context_tokens as f64;
        }
        Duration::try_from_secs_f64((base_ms + work_ms) / 1000.0 / self.speedup).unwrap_or(LONGEST_STEP).min(LONGEST_STEP)
    }

    /// Bytes of KV that `tokens` tokens are, in whole blocks: those are what engines move.
    #[must_use]
    pub fn kv_bytes(&self, tokens: u32) -> u64 {
        let tokens = self.blocks_for(tokens) as u64 * u64::from(self.block_size);
        tokens * u64::from(self.kv_bytes_per_token)
    }

    /// Blocks that `tokens` tokens take.
    pub(super) fn blocks_for(&self, tokens: u32) -> usize {
        tokens.div_ceil(self.block_size) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_takes_the_stated_time() {
        let profile = Profile { speedup: 2.0, ..Profile::default() };
        let prefill = profile.step_time(Pass { prefill_tokens: 1000, ..Pass::default() });
        assert_eq!(prefill.as_micros(), ((0.421 + 15.18 + 16.5) * 500.0) as u128);
        let decode = profile.step_time(Pass { decodes: 10, context_tokens: 10_000, ..Pass::default() });
        assert_eq!(decode.as_micros(), ((6.0 + 0.3 + 0.2) * 500.0) as u128);
        let both = profile.step_time(Pass { prefill_tokens: 1000, decodes: 10, context_tokens: 10_000 });
        assert_eq!(both.as_micros(), ((0.421 + 15.18 + 16.5 + 0.3 + 0.2) * 500.0) as u128);
    }

    #[test]
    fn a_step_is_bounded_whatever_the_profile() {
        let profile = Profile { decode_ms_base: f64::MAX, speedup: f64::MIN_POSITIVE, ..Profile::default() };
        assert_eq!(profile.step_time(Pass { decodes: 1, ..Pass::default() }), LONGEST_STEP);
    }

    #[test]
    fn a_profile_that_cannot_work_says_what_to_change() {
        let base = Profile::default();
        assert_eq!(base.validate(), Ok(()));
        for (profile, expected) in [
            (Profile { block_size: 0, ..base.clone() }, "block_size=0 is not possible"),
            (Profile { speedup: f64::NAN, ..base.clone() }, "use a number above 0"),
            (Profile { decode_ms_base: -1.0, ..base.clone() }, "decode_ms_base=-1"),
            (Profile { kv_blocks: 10, ..base.clone() }, "raise kv_blocks or lower max_model_len"),
            (Profile { max_num_batched_tokens: 8, ..base.clone() }, "a token of each running sequence"),
        ] {
            let error = profile.validate().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
