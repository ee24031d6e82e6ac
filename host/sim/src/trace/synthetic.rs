//! Synthetic traces: sessions of several turns that begin with prefixes which many share.
//!
//! Sessions begin as a Poisson process. Each has a system prompt, drawn by Zipf's law from a fixed number of them, and
//! some turns, of a geometric distribution. A turn's prompt is the system prompt and all of the session's conversation
//! so far with its new text; the time between turns, the lengths of texts and of outputs are exponentially distributed.

use std::{cmp::Reverse, collections::BinaryHeap, time::Duration};

use super::{Trace, TraceError, TraceRequest};
use crate::{prompt::Segment, samples::Random};

/// What a synthetic trace is like.
#[derive(Clone, Debug, PartialEq)]
pub struct Synthetic {
    /// Requests.
    pub requests: u32,
    /// Requests per second, on average.
    pub rate: f64,
    /// System prompts that exist.
    pub prefixes: u32,
    /// Tokens of each.
    pub prefix_tokens: u32,
    /// Exponent of Zipf's law over them; 0: all alike.
    pub zipf: f64,
    /// Turns of a session, on average.
    pub turns: f64,
    /// Seconds between two turns, on average.
    pub think_s: f64,
    /// New prompt tokens of a turn, on average.
    pub input: f64,
    /// Output tokens of a turn, on average.
    pub output: f64,
    /// Longest prompt: a session ends before it.
    pub max_input: u32,
}

impl Default for Synthetic {
    fn default() -> Self {
        Self {
            requests: 10_000,
            rate: 10.0,
            prefixes: 100,
            prefix_tokens: 1024,
            zipf: 1.0,
            turns: 3.0,
            think_s: 30.0,
            input: 500.0,
            output: 200.0,
            max_input: 32_000,
        }
    }
}

/// A session whose next turn is due.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    at: Duration,
    session: u32,
    prefix: u32,
    /// Tokens of the conversation so far.
    said: u32,
}

impl Synthetic {
    /// Keys of the text form.
    pub const KEYS: &str = "requests, rate, prefixes, prefix_tokens, zipf, turns, think_s, input, output, max_input";

    /// Reads `KEY=VALUE,…`.
    ///
    /// # Errors
    /// Names the key that is not known or the value that is not possible.
    pub fn parse(text: &str) -> Result<Self, TraceError> {
        let mut options = Self::default();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let wrong = |reason: String| TraceError::Synthetic { reason };
            let (key, value) = part.split_once('=').ok_or_else(|| wrong(format!("{part:?} is not KEY=VALUE")))?;
            let number = value.replace('_', "").parse::<f64>().ok().filter(|number| number.is_finite() && *number >= 0.0);
            let number = number.ok_or_else(|| wrong(format!("{key}={value} is not a number of at least 0")))?;
            let whole = || {
                let fits = number.fract() == 0.0 && (1.0..=f64::from(u32::MAX / 2)).contains(&number);
                fits.then_some(number as u32).ok_or_else(|| wrong(format!("{key}={value} is not a whole number of at least 1")))
            };
            let above_0 = || (number > 0.0).then_some(number).ok_or_else(|| wrong(format!("{key}={value} is not above 0")));
            match key {
                "requests" => options.requests = whole()?,
                "rate" => options.rate = above_0()?,
                "prefixes" => options.prefixes = whole()?,
                "prefix_tokens" => options.prefix_tokens = whole()?,
                "zipf" => options.zipf = number,
                "turns" if number < 1.0 => return Err(wrong(format!("turns={value} is below 1"))),
                "turns" => options.turns = number,
                "think_s" => options.think_s = number,
                "input" => options.input = above_0()?,
                "output" => options.output = above_0()?,
                "max_input" => options.max_input = whole()?,
                _ => return Err(wrong(format!("{key:?} is not known"))),
            }
        }
        if options.max_input <= options.prefix_tokens {
            let reason = format!("max_input={} is not above prefix_tokens={}", options.max_input, options.prefix_tokens);
            return Err(TraceError::Synthetic { reason });
        }
        Ok(options)
    }

    /// Makes the trace; the same one for the same seed.
    #[must_use]
    pub fn generate(&self, name: &str, seed: u64) -> Trace {
        let mut random = Random::new(seed);
        let popularity = self.popularity();
        let mut due: BinaryHeap<Reverse<Turn>> = BinaryHeap::new();
        let mut requests = Vec::with_capacity(self.requests as usize);
        let (mut next_session, mut sessions) = (Duration::ZERO, 0);
        while requests.len() < self.requests as usize {
            if due.peek().is_none_or(|Reverse(turn)| turn.at > next_session) {
                let share = random.unit();
                let prefix = popularity.partition_point(|&up_to| up_to < share).min(popularity.len() - 1) as u32;
                due.push(Reverse(Turn { at: next_session, session: sessions, prefix, said: 0 }));
                sessions += 1;
                next_session += Duration::from_secs_f64(random.exponential(self.turns / self.rate));
                continue;
            }
            let Some(Reverse(Turn { at, session, prefix, said })) = due.pop() else { continue };
            let room = self.max_input - self.prefix_tokens;
            let said = said.saturating_add(random.exponential(self.input).ceil().max(1.0) as u32).min(room);
            let output_tokens = random.exponential(self.output).ceil().max(1.0) as u32;
            let of_prefix = Segment { stream: prefix, tokens: self.prefix_tokens };
            let of_session = Segment { stream: self.prefixes.wrapping_add(session), tokens: said };
            requests.push(TraceRequest { at, prompt: [of_prefix, of_session].into(), output_tokens, session: Some(session) });
            let said = said.saturating_add(output_tokens);
            if random.unit() >= 1.0 / self.turns && said < room {
                let at = at + Duration::from_secs_f64(random.exponential(self.think_s));
                due.push(Reverse(Turn { at, session, prefix, said }));
            }
        }
        Trace { name: name.to_owned(), requests }
    }

    /// Cumulated shares of the system prompts.
    fn popularity(&self) -> Vec<f64> {
        let weights = (1..=self.prefixes).map(|rank| f64::from(rank).powf(-self.zipf));
        let total: f64 = weights.clone().sum();
        let cumulated = weights.scan(0.0, |sum, weight| {
            *sum += weight;
            Some(*sum / total)
        });
        cumulated.collect()
    }
}
